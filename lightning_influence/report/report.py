"""The answer as an object: scores per sample and per (sample, step), tables, files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.report.page import cell, page, part_of
from lightning_influence.report.plots import Plots
from lightning_influence.report.rendering import Render

_FORMAT = "lightning-influence-report/1"
_TENSORS = ("sample_ids", "steps", "scores", "tangent")
_INTERACTION = "interaction"
_MAX_STEPS = 2**40  # more than any run has, and few enough to reckon with


def mean_score(scores: Tensor) -> Tensor:
    """``(n, n_queries)``, averaged over the queries; 0 where there are none."""
    return scores.double().mean(1).nan_to_num()


@dataclass(frozen=True)
class Rows:
    """Scores of every (sample, step), in order of step.

    Attributes:
        sample_ids, steps: ``(n_rows,)`` int64.
        scores: ``(n_rows, n_queries)``.
        tangent: ``(n_rows, n_queries)``, the score to first order in the change of the gradient.
        interaction: ``(n_rows, n_queries)``, what removing the sample from its later steps, too, adds to the row; None for
            nothing.
    """

    sample_ids: Tensor
    steps: Tensor
    scores: Tensor
    tangent: Tensor
    interaction: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def n_steps(self) -> int:
        """Steps up to the last one with a sample."""
        return int(self.steps.max()) + 1 if len(self) else 0

    def per_sample(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending sample ids and the sums ``(n_samples, n_queries)`` of a row quantity over their steps."""
        ids, where = torch.unique(self.sample_ids, return_inverse=True)
        total = torch.zeros(len(ids), values.shape[1], dtype=torch.float64)
        return ids, total.index_add_(0, where, values.double()).to(values.dtype)

    def over_time(self, bins: int) -> tuple[Tensor, Tensor, Tensor]:
        """How much the samples of each step helped and harmed, on average over the queries.

        Args:
            bins: at most this many; a bin is the mean of neighbouring steps where there are more.

        Returns:
            ``(n_bins,)`` each: the first step of a bin, what helped (positive) and what harmed (negative), per step.

        Raises:
            ConfigurationError: fewer than one bin.
        """
        if bins < 1:
            raise ConfigurationError(f"bins={bins}; give 1 or more.")
        n = self.n_steps
        bins = min(n, bins)
        first = -(-torch.arange(bins + 1) * n // max(bins, 1))  # rounded up
        where, means = self.steps.long() * bins // max(n, 1), mean_score(self.scores)
        helped, harmed = (
            torch.zeros(bins, dtype=torch.float64).index_add_(0, where, part) / first.diff()
            for part in (means.clamp(min=0), means.clamp(max=0))
        )
        return first[:-1], helped, harmed


class InfluenceReport:
    """Which training samples helped or hurt each query.

    Args:
        rows: scores of every (sample, step).
        query_ids: one label per query; their numbers by default.
        metadata: how the scores were made: coverage, curvature, response, counterfactual, optimizer.

    Attributes:
        scores: ``(n_samples, n_queries)``, the predicted query loss without the sample minus with it:
            positive where the sample helps, negative where it harms.
        sample_ids: ``(n_samples,)`` int64, indices into the training dataset, ascending.
    """

    def __init__(
        self, rows: Rows, *, query_ids: Sequence[int | str] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        _validate(rows)
        n_queries = rows.scores.shape[1]
        self.rows = rows
        whole = rows.scores if rows.interaction is None else rows.scores + rows.interaction
        self.sample_ids, self.scores = rows.per_sample(whole)
        self.query_ids: list[int | str] = list(range(n_queries)) if query_ids is None else list(query_ids)
        if len(self.query_ids) != n_queries:
            raise ConfigurationError(
                f"{len(self.query_ids)} query ids for {n_queries} columns of scores; give one each."
            )
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
    ) -> InfluenceReport:
        """A report from the rows of a sweep; see `Rows` for the shapes."""
        rows = Rows(sample_ids, steps, scores, scores if tangent is None else tangent, interaction)
        return cls(rows, query_ids=query_ids, metadata=metadata)

    @property
    def mean(self) -> Tensor:
        """Each sample's score, averaged over the queries: ``(n_samples,)``."""
        return mean_score(self.scores)

    @property
    def nonlinearity(self) -> Tensor:
        """Finite minus tangent score, ``(n_samples, n_queries)``: how nonlinearly the optimizer answers the
        removal of each sample (method.md section 9).
        """
        return self.scores - self.rows.per_sample(self.rows.tangent)[1]

    def to_pandas(self) -> pd.DataFrame:
        """One row per sample: ``sample_id``, one score column per query (``score`` where there is one), and the sample's
        `nonlinearity`, averaged over the queries.
        """
        names = ["score"] if len(self.query_ids) == 1 else [str(q) for q in self.query_ids]
        table = pd.DataFrame(self.scores.numpy(), columns=names)
        table.insert(0, "sample_id", self.sample_ids.numpy())
        table["nonlinearity"] = self.nonlinearity.mean(1).numpy()
        return table

    def to_csv(self, path: str | Path) -> None:
        """Write `to_pandas` as CSV."""
        self.to_pandas().to_csv(_made(path), index=False)

    def to_parquet(self, path: str | Path) -> None:
        """Write `to_pandas` as Parquet."""
        self.to_pandas().to_parquet(_made(path), index=False)

    def top(self, k: int = 10, query: int | str | None = None) -> pd.DataFrame:
        """The ``k`` most helpful samples for a query, or for all of them on average."""
        return self._ranked(query).head(k).reset_index(drop=True)

    def bottom(self, k: int = 10, query: int | str | None = None) -> pd.DataFrame:
        """The ``k`` most harmful samples, the most harmful first."""
        return self._ranked(query).iloc[::-1].head(k).reset_index(drop=True)

    def _ranked(self, query: int | str | None) -> pd.DataFrame:
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

    @property
    def plot(self) -> Plots:
        """Figures: ``report.plot.histogram()``, ``.over_time()``, ``.samples(dataset)``, ``.proxy_against_truth(...)``."""
        return Plots(self)

    def to_html(
        self,
        path: str | Path,
        *,
        data: Any = None,
        show: Render | None = None,
        tokenizer: Any = None,
        queries: Any = None,
        groups: Sequence[Any] | Mapping[int, Any] | Tensor | None = None,
        classes: Sequence[str] | None = None,
        k: int = 8,
        title: str = "Influence report",
    ) -> Path:
        """Write one self-contained page that a person reads.

        Args:
            data: the training dataset, so that samples can be shown, or the loader or datamodule that holds it.
            show: ``show(sample) -> text | PIL image | image tensor | mapping``, a mapping being shown as a small table;
                see `render.default_render` for the default.
            tokenizer: decodes token ids for the default.
            queries: the query examples, indexed like the columns of the scores.
            groups: a group (class, source) per sample of the training dataset or by sample id, for totals; by default the
                labels, where the dataset gives them without being read (`render.labels_of`).
            classes: names of the labels, which are then indices into it.
            k: samples in each list.

        What `metadata` holds under ``errors`` (sizes by name), ``ceiling`` and ``conclusion`` is shown beside what the
        report knows of its own trustworthiness; put there what `check_faithfulness` measured.

        Returns:
            The path.

        Raises:
            ConfigurationError: data, groups, classes or queries that do not fit the report.
        """
        options: dict[str, Any] = {"data": data, "show": show, "tokenizer": tokenizer, "queries": queries}
        path = _made(path)
        text = page(self, **options, groups=groups, classes=classes, k=k, title=title)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a text cut inside a character
        return path

    def _repr_html_(self) -> str:
        return cell(self)

    def save(self, path: str | Path) -> None:
        """Write the report to one safetensors file, which `load` reads.

        Raises:
            ConfigurationError: `metadata` or `query_ids` hold what JSON cannot.
        """
        held = {name: getattr(self.rows, name) for name in (*_TENSORS, _INTERACTION)}
        tensors = {k: t.clone(memory_format=torch.contiguous_format) for k, t in held.items() if t is not None}
        try:
            body = json.dumps({"metadata": self.metadata, "query_ids": self.query_ids})
        except TypeError as error:
            raise ConfigurationError(
                f"metadata or query_ids cannot be written: {error}. Let them hold numbers, texts, lists and mappings."
            ) from error
        save_file(tensors, _made(path), {"format": _FORMAT, "report": body})

    @classmethod
    def load(cls, path: str | Path) -> InfluenceReport:
        """Read a report that `save` wrote.

        Raises:
            InfluenceError: no such file, or not a report.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise InfluenceError(f"{path} is not a report of this version ({metadata.get('format')}).")
                body = json.loads(metadata["report"])
                present = [*_TENSORS, *({_INTERACTION} & set(file.keys()))]
                rows = Rows(**{name: file.get_tensor(name) for name in present})
            return cls(rows, query_ids=body["query_ids"], metadata=body["metadata"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError, ConfigurationError) as error:
            raise InfluenceError(
                f"{path} cannot be read as a report: {error!r}. Give a file that report.save wrote."
            ) from error

    def __repr__(self) -> str:
        coverage = part_of(self.metadata, "coverage").get("fraction")
        seen = "" if coverage is None else f", {coverage:.1%} of the trained coordinates"
        how = ", ".join(str(self.metadata[k]) for k in ("response", "curvature") if k in self.metadata)
        return (
            f"InfluenceReport({len(self.sample_ids)} samples x {len(self.query_ids)} queries, "
            f"{len(self.rows)} rows{seen}; {how or 'no metadata'})"
        )


def _made(path: str | Path) -> Path:
    """The path, in a directory that is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _validate(rows: Rows) -> None:
    n = len(rows.sample_ids)
    shapes = {name: tuple(getattr(rows, name).shape) for name in _TENSORS}
    if (
        rows.scores.dim() != 2
        or shapes["sample_ids"] != (n,)
        or shapes["steps"] != (n,)
        or shapes["scores"][0] != n
        or shapes["tangent"] != shapes["scores"]
        or (rows.interaction is not None and rows.interaction.shape != rows.scores.shape)
    ):
        raise ConfigurationError(f"rows of shapes {shapes}; expected (n,), (n,), (n, q) and (n, q).")
    kinds = [getattr(rows, name).is_floating_point() for name in _TENSORS]
    if kinds != [False, False, True, True]:
        types = {name: getattr(rows, name).dtype for name in _TENSORS}
        raise ConfigurationError(
            f"rows of {types}; expected integers for ids and steps, and floating point for the rest."
        )
    if n and not 0 <= int(rows.steps.min()) <= int(rows.steps.max()) < _MAX_STEPS:
        raise ConfigurationError(
            f"steps from {int(rows.steps.min())} to {int(rows.steps.max())}; a run counts its steps from 0, and has fewer "
            f"than {_MAX_STEPS}."
        )
    if not torch.isfinite(rows.scores).all():
        row = int((~torch.isfinite(rows.scores)).any(1).nonzero()[0])
        raise InfluenceError(
            f"the score of sample {int(rows.sample_ids[row])} at step {int(rows.steps[row])} is not finite; the query "
            "loss or the model's parameters are not finite, or they overflowed on the way."
        )
