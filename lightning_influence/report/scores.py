"""The answer as numbers: scores per sample and per (sample, step), tables, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_influence.core.scores import RowScores, mean_score
from lightning_influence.errors import ConfigurationError, InfluenceError, check_choice
from lightning_influence.report.files import Saved, read, write
from lightning_influence.report.groups import Groups
from lightning_influence.report.numbers import percent
from lightning_influence.report.provenance import Provenance
from lightning_influence.report.tables import made, score_table, write_csv

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float64, torch.float32, torch.float16)
_MAX_STEPS = 2**40  # more than any run has, and few enough to reckon with
_MAX_EMPTY_COLUMNS = 2**20  # which cost no bytes in a file
_MAX_SCORE = 1e30  # more than any loss changes by, and small enough to sum in single precision


class Scores:
    """Scores of training samples for queries, and how they were made.

    Args:
        rows: scores of every (sample, step).
        query_ids: one label per query; their numbers by default.
        metadata: how the scores were made (`provenance.Provenance`), what was measured of them
            (`provenance.Measured`), and whatever else JSON can hold.
        groups: scores of groups, each removed as a whole; None where none were asked for.

    Attributes:
        scores: ``(n_samples, n_queries)``, the predicted query loss without the sample minus with it:
            positive where the sample helps, negative where it harms.
        sample_ids: ``(n_samples,)`` int64, indices into the training dataset, ascending.
        groups: scores of groups of samples, each removed as a whole; None where `attribute` was given none.

    Raises:
        ConfigurationError: shapes or types that do not fit together.
        InfluenceError: scores that are not finite.
    """

    def __init__(
        self,
        rows: RowScores,
        *,
        query_ids: Sequence[int | str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        groups: Groups | None = None,
    ) -> None:
        _validate(rows)
        if groups is not None:
            _validate(groups.rows)
        self.rows, self.groups = rows, groups
        self.query_ids = _query_ids(query_ids, rows.n_queries)
        self.sample_ids, self.scores = rows.per_sample(rows.scores + rows.interaction)
        self.metadata = dict(metadata or {})

    @classmethod
    def from_rows(
        cls,
        sample_ids: Tensor,
        steps: Tensor,
        scores: Tensor,
        *,
        tangent: Tensor | None = None,
        interaction: Tensor | None = None,
        query_ids: Sequence[int | str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """From the rows of a sweep; see `RowScores` for the shapes."""
        rows = RowScores(sample_ids, steps, scores, scores if tangent is None else tangent, interaction)  # type: ignore[arg-type]
        return cls(rows, query_ids=query_ids, metadata=metadata)

    @property
    def provenance(self) -> Provenance:
        """How the scores were made, from `metadata`."""
        return Provenance.from_json(self.metadata)

    @property
    def mean(self) -> Tensor:
        """Each sample's score, averaged over the queries: ``(n_samples,)``."""
        return mean_score(self.scores)

    @property
    def nonlinearity(self) -> Tensor:
        """Finite minus tangent score, ``(n_samples, n_queries)``: how nonlinearly the optimizer answers the
        removal of each sample (docs/method.md, "How far to trust a score").
        """
        return self.scores - self.rows.per_sample(self.rows.tangent)[1]

    def to_pandas(self) -> pd.DataFrame:
        """One row per sample: ``sample_id``, one score column per query (``score`` where there is one), and the sample's
        `nonlinearity`, averaged over the queries.
        """
        return score_table(
            self.scores,
            self.query_ids,
            before={"sample_id": self.sample_ids.numpy()},
            after={"nonlinearity": self.nonlinearity.mean(1).numpy()},
        )

    def to_csv(self, path: str | Path) -> None:
        """Write `to_pandas` as CSV; names of queries that a spreadsheet would run as a formula are quoted."""
        write_csv(self.to_pandas(), path)

    def to_parquet(self, path: str | Path) -> None:
        """Write `to_pandas` as Parquet."""
        self.to_pandas().to_parquet(made(path), index=False)

    def top(self, k: int = 10, query: int | str | None = None) -> pd.DataFrame:
        """The ``k`` most helpful samples for a query, or for all of them on average."""
        return self._ranked(query).head(k).reset_index(drop=True)

    def bottom(self, k: int = 10, query: int | str | None = None) -> pd.DataFrame:
        """The ``k`` most harmful samples, the most harmful first."""
        return self._ranked(query).iloc[::-1].head(k).reset_index(drop=True)

    def _ranked(self, query: int | str | None) -> pd.DataFrame:
        import pandas as pd

        if query is None:
            scores = self.mean
        elif query in self.query_ids:
            scores = self.scores[:, self.query_ids.index(query)]
        else:
            shown = ", ".join(map(repr, self.query_ids[:10]))
            raise ConfigurationError(f"query={query!r} is not in this report; its queries are {shown}.")
        table = pd.DataFrame({"sample_id": self.sample_ids.numpy(), "score": scores.numpy()})
        return table.sort_values("score", ascending=False, kind="stable")

    def suspects(self, k: int | None = None) -> pd.DataFrame:
        """Samples that are likely mislabelled or otherwise harmful, the most suspicious first.

        A wrong label harms the queries that resemble its sample and helps others, and the mean of the two may be nothing.
        So what counts is the harm alone, and every query counts alike, however large its scores are: a report with one
        column per query finds more than one with a mean target.

        Args:
            k: how many; None for all that harm any query.

        Returns:
            ``sample_id``, ``score`` (mean over the queries), ``suspicion`` (the mean harm to a query, in units of the
            root mean square of the query's scores) and ``harmed`` (the share of queries that the sample harms).
        """
        import pandas as pd

        typical = self.scores.double().square().mean(0).sqrt()
        relative = self.scores / typical.clamp(min=torch.finfo(self.scores.dtype).tiny)
        table = pd.DataFrame(
            {
                "sample_id": self.sample_ids.numpy(),
                "score": self.scores.mean(1).numpy(),
                "suspicion": -relative.clamp(max=0).mean(1).numpy(),
                "harmed": (self.scores < 0).float().mean(1).numpy(),
            }
        ).sort_values("suspicion", ascending=False, kind="stable")
        table = table[table.suspicion > 0] if k is None else table.head(k)
        return table.reset_index(drop=True)

    def select(self, k: int | None = None, *, by: Literal["harm", "suspicion"] = "harm") -> list[int]:
        """Ids of the samples that might be left out, the worst first.

        Args:
            k: how many; None for all that harm.
            by: ``"harm"`` to the queries on average, or ``"suspicion"`` as of `suspects`.

        Raises:
            ConfigurationError: another criterion.
        """
        check_choice("by", by, ("harm", "suspicion"))
        if by == "suspicion":
            return self.suspects(k).sample_id.tolist()  # type: ignore[no-any-return]
        ranked = self._ranked(None).iloc[::-1]
        return (ranked[ranked.score < 0] if k is None else ranked.head(k)).sample_id.tolist()  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> None:
        """Write the report to one safetensors file, which `load` reads.

        Raises:
            ConfigurationError: `metadata` or `query_ids` hold what JSON cannot.
        """
        write(Saved(self.rows, self.query_ids, self.metadata, self.groups), path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report that `save` wrote.

        Raises:
            InfluenceError: no such file, not a report, or other bytes than were written.
        """
        saved = read(path)
        try:
            return cls(saved.rows, query_ids=saved.query_ids, metadata=saved.metadata, groups=saved.groups)
        except ConfigurationError as error:
            raise InfluenceError(
                f"{path} cannot be read as a report: {error} Give a file that report.save wrote."
            ) from error

    def __repr__(self) -> str:
        made_by = self.provenance
        coverage = made_by.coverage.fraction
        covered = "" if coverage is None else f", {percent(coverage)} of the trained coordinates"
        parts = (made_by.response, made_by.curvature, made_by.removals, made_by.queried)
        how = [str(part) for part in parts if part is not None]
        return (
            f"{type(self).__name__}({len(self.sample_ids)} samples x {len(self.query_ids)} queries, "
            f"{len(self.rows)} rows{covered}; {', '.join(how) or 'no metadata'})"
        )


def _query_ids(query_ids: Sequence[int | str] | None, n_queries: int) -> list[int | str]:
    if query_ids is None:
        return list(range(n_queries))
    labels = list(query_ids)
    if not all(isinstance(label, (int, str)) for label in labels):
        raise ConfigurationError("query_ids holds something else than numbers and texts; give one label per column.")
    if len(labels) != n_queries:
        raise ConfigurationError(f"{len(labels)} query ids for {n_queries} columns of scores; give one each.")
    return labels


def _validate(rows: RowScores) -> None:
    n = len(rows.sample_ids) if rows.sample_ids.dim() else -1
    shapes = {name: tuple(tensor.shape) for name, tensor in vars(rows).items()}
    if (
        rows.scores.dim() != 2
        or shapes["sample_ids"] != (n,)
        or shapes["steps"] != (n,)
        or shapes["scores"][0] != n
        or shapes["tangent"] != shapes["scores"]
        or shapes["interaction"] != shapes["scores"]
        or (n == 0 and rows.n_queries > _MAX_EMPTY_COLUMNS)
    ):
        raise ConfigurationError(f"rows of shapes {shapes}; expected (n,), (n,), (n, q) and (n, q).")
    types = {name: tensor.dtype for name, tensor in vars(rows).items()}
    known = {"sample_ids": _INTEGERS, "steps": _INTEGERS, "scores": _FLOATS, "tangent": _FLOATS, "interaction": _FLOATS}
    if any(types[name] not in allowed for name, allowed in known.items()):
        raise ConfigurationError(
            f"rows of {types}; expected integers for ids and steps, and floating point for the rest."
        )
    if n and not 0 <= int(rows.steps.min()) <= int(rows.steps.max()) < _MAX_STEPS:
        raise ConfigurationError(
            f"steps from {int(rows.steps.min())} to {int(rows.steps.max())}; a run counts its steps from 0, and has fewer "
            f"than {_MAX_STEPS}."
        )
    if n and int(rows.sample_ids.min()) < 0:
        raise ConfigurationError(f"sample ids from {int(rows.sample_ids.min())}; they are indices into a dataset.")
    wrong = ~(rows.scores.abs() <= _MAX_SCORE)  # as NaN is
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0])
        score = rows.scores[row][wrong[row]][0]
        why = f"is {float(score):.3g}" if score.isfinite() else "is not finite"
        raise InfluenceError(
            f"the score of sample {int(rows.sample_ids[row])} at step {int(rows.steps[row])} {why}; the query "
            "loss or the model's parameters are not finite, or they overflowed on the way."
        )
