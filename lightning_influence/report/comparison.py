"""Two reports side by side: of two runs, two queries or two ways of scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_influence.core.scores import mean_score
from lightning_influence.errors import ConfigurationError
from lightning_influence.report.scores import Scores

if TYPE_CHECKING:
    import pandas as pd


def compare(first: Scores, second: Scores) -> pd.DataFrame:
    """The scores of the samples that two reports have in common, those that changed most first.

    Returns:
        ``sample_id``, ``first`` and ``second`` (score, averaged over the queries) and ``change``.

    Raises:
        ConfigurationError: the reports have no sample in common.

    Example:
        >>> ids, steps = torch.arange(3), torch.zeros(3, dtype=torch.int64)
        >>> before = Scores.from_rows(ids, steps, torch.tensor([[1.0], [2.0], [3.0]]))
        >>> after = Scores.from_rows(ids[1:], steps[1:], torch.tensor([[2.5], [1.0]]))
        >>> compare(before, after)
           sample_id  first  second  change
        0          2    3.0     1.0    -2.0
        1          1    2.0     2.5     0.5
    """
    import pandas as pd

    common = first.sample_ids[torch.isin(first.sample_ids, second.sample_ids)]
    if not len(common):
        raise ConfigurationError("the two reports have no sample in common; give reports of the same training data.")
    a, b = (mean_score(r.scores[torch.searchsorted(r.sample_ids, common)]) for r in (first, second))
    table = pd.DataFrame(
        {"sample_id": common.numpy(), "first": a.numpy(), "second": b.numpy(), "change": (b - a).numpy()}
    )
    order = table.change.abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)
