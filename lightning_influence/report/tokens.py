"""Scores of single tokens, as an object that people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_influence.core.scores import mean_score
from lightning_influence.errors import ConfigurationError
from lightning_influence.report.tables import in_notebook

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class TokenScores:
    """What the loss of every token of some samples did to the queries, to first order.

    The token is the one that is predicted, the label of its position. The scores of a sample's tokens add up to the sample's
    tangent score.

    Attributes:
        sample_ids: ``(n,)`` int64, ascending.
        tokens: for each sample its labels ``(t,)`` int64, without those that are ignored.
        positions: for each sample their places ``(t,)`` int64 among all of its labels.
        scores: for each sample ``(t, n_queries)``.

    Example:
        >>> ids, tokens, positions = torch.tensor([5]), [torch.tensor([101, 7592])], [torch.tensor([0, 1])]
        >>> tokens = TokenScores(ids, tokens, positions, scores=[torch.tensor([[0.5], [-0.25]])])
        >>> tokens.of(5)
           position  token  score
        0         0    101   0.50
        1         1   7592  -0.25
        >>> tokens.per_sample
        tensor([[0.2500]])
    """

    sample_ids: Tensor
    tokens: Sequence[Tensor]
    positions: Sequence[Tensor]
    scores: Sequence[Tensor]

    def of(self, sample_id: int) -> pd.DataFrame:
        """The tokens of a sample in their order.

        Returns:
            ``position``, ``token`` and ``score``, averaged over the queries.

        Raises:
            ConfigurationError: a sample that was not asked for.
        """
        import pandas as pd

        positions = (self.sample_ids == sample_id).nonzero()[:, 0].tolist()
        if not positions:
            shown = ", ".join(map(str, self.sample_ids[:10].tolist()))
            raise ConfigurationError(f"sample_id={sample_id!r} has no token scores here; these samples have: {shown}.")
        i = positions[0]
        columns = {"position": self.positions[i], "token": self.tokens[i], "score": mean_score(self.scores[i])}
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})

    @property
    def per_sample(self) -> Tensor:
        """The samples' tangent scores ``(n, n_queries)``, the sums over their tokens."""
        return torch.stack([scores.sum(0) for scores in self.scores])

    def to_pandas(self) -> pd.DataFrame:
        """The tokens of all samples: ``sample_id`` and the columns of `of`."""
        import pandas as pd

        tables = [self.of(z).assign(sample_id=z) for z in self.sample_ids.tolist()]
        return pd.concat(tables, ignore_index=True)[["sample_id", "position", "token", "score"]]

    def __repr__(self) -> str:
        n_tokens = sum(map(len, self.tokens))
        return f"TokenScores({len(self.sample_ids)} samples, {n_tokens} tokens x {self.scores[0].shape[1]} queries)"

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.to_pandas())
