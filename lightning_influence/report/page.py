"""The report as one page that a person reads; it needs no network and no other file."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from lightning_influence.errors import ConfigurationError
from lightning_influence.report.rendering import (
    Render,
    as_html,
    default_render,
    indexed,
    label_of,
    labels_of,
    training_samples,
)

if TYPE_CHECKING:
    from lightning_influence.report import InfluenceReport

_BINS = 41  # of the histogram; odd, so that one is around zero
_TIMES = 80  # bars over training
_SHOWN_QUERIES = 24
_SHOWN_ROWS = 1000
_SHOWN_GROUPS = 100

_CURVATURE = {
    "hessian": ("solid", "Exact: the run was replayed with its true second derivatives."),
    "gauss_newton": ("approximate", "The run was replayed with the Gauss-Newton matrix."),
    "fisher": (
        "approximate",
        "Estimated from the logged gradients; a run recorded for replay is scored more faithfully.",
    ),
    "none": ("caution", "Ignored: what a removal changes in later gradients is not followed."),
}


@dataclass(frozen=True)
class _Card:
    """A sample among the most helpful or harmful ones.

    Attributes:
        share: of the largest score beside it.
        note: a word on the score.
    """

    sample_id: int
    score: float
    share: float
    content: Markup
    label: str
    note: str = ""


@dataclass(frozen=True)
class _Trust:
    """A reason to trust the scores more or less; `level` is solid, approximate, caution or unknown."""

    name: str
    value: str
    level: str
    meaning: str


class _Samples:
    """What is shown of the samples of a dataset, each of which is read once."""

    def __init__(self, data: Any, render: Render, classes: Sequence[str] | None) -> None:
        self._data, self._render, self._classes = data, render, classes
        known = None if data is None else labels_of(data)
        self.labels = None if known is None else [self.named(label) for label in known]
        self._read = lru_cache(maxsize=None)(self._shown)

    def content(self, sample_id: int) -> Markup:
        return Markup() if self._data is None else self._read(sample_id)[0]

    def label(self, sample_id: int) -> str:
        if self.labels is not None:
            return self.labels[sample_id]
        return "" if self._data is None else self._read(sample_id)[1]

    def named(self, label: str) -> str:
        if self._classes is None or not label.isdigit():
            return label
        if int(label) >= len(self._classes):
            raise ConfigurationError(f"classes has {len(self._classes)} names, but there is a label {label}.")
        return str(self._classes[int(label)])

    def _shown(self, sample_id: int) -> tuple[Markup, str]:
        sample = self._data[sample_id]
        return Markup(as_html(self._render(sample))), self.named(label_of(sample))


def page(
    report: InfluenceReport,
    *,
    data: Any = None,
    show: Render | None = None,
    tokenizer: Any = None,
    queries: Any = None,
    groups: Sequence[Any] | Mapping[int, Any] | Tensor | None = None,
    classes: Sequence[str] | None = None,
    k: int = 8,
    title: str = "Influence report",
) -> str:
    """The whole page as HTML; arguments as of `InfluenceReport.to_html`."""
    render = show or default_render(tokenizer)
    samples = _Samples(training_samples(data, report.sample_ids), render, classes)
    examples, n_examples = indexed(queries)
    asked = None if examples is None else _Samples(examples, render, classes)
    several = len(report.query_ids) > 1
    if several and n_examples not in (None, len(report.query_ids)):
        raise ConfigurationError(f"{n_examples} queries to show for {len(report.query_ids)} columns of scores.")
    shown = report.query_ids[:_SHOWN_QUERIES] if several else []
    mean, metadata = report.mean, report.metadata
    views = [_view(report, samples, k, None), *(_view(report, samples, k, q, i, asked) for i, q in enumerate(shown))]
    suspects = _suspects(report, samples, k) if several else []
    cards = [card for view in views for card in (*view["helpful"], *view["harmful"])] + suspects
    return _template("page.html").render(
        title=title,
        report=report,
        several=several,
        helping=int((mean > 0).sum()),
        harming=int((mean < 0).sum()),
        views=views,
        left_out=len(report.query_ids) - len(shown) if several else 0,
        suspects=suspects,
        histogram=_histogram(mean),
        over_time=_over_time(report),
        rows=list(_rows(report, samples, {card.sample_id for card in cards})),
        groups=_groups(report, samples.labels if groups is None else groups, given=groups is not None),
        trust=_trust(report),
        coverage={"parameters": {}, "excluded": [], **part_of(metadata, "coverage")},
        facts=_facts(metadata),
        versions=part_of(metadata, "versions"),
    )


def cell(report: InfluenceReport) -> str:
    """The report in the output of a notebook's cell."""
    return _template("cell.html").render(
        report=report,
        lists=[("Most helpful", "help", report.top(5)), ("Most harmful", "harm", report.bottom(5))],
        histogram=_histogram(report.mean),
        trust=_trust(report),
    )


def part_of(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of the metadata that maps names; nothing where it is left out or holds something else."""
    part = metadata.get(name)
    return part if isinstance(part, Mapping) else {}


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, in print rather than in code: ``−1.2×10⁻⁵``."""
    mantissa, _, exponent = f"{value:+#.{digits}g}".replace("-", "−").partition("e")
    mantissa = mantissa.removesuffix(".")
    if not exponent:
        return mantissa
    power = str(int(exponent.replace("−", "-"))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×10{power}"


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("lightning_influence", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = signed
    return environment.get_template(name)


# -- samples --------------------------------------------------------------------------------------------------


def _view(
    report: InfluenceReport,
    samples: _Samples,
    k: int,
    query: int | str | None,
    number: int = 0,
    asked: _Samples | None = None,
) -> dict[str, Any]:
    """The extremes of one query, or of their mean, and the query itself where it can be shown."""
    top, bottom = report.top(k, query), report.bottom(k, query)
    largest = max(float(top.score.abs().max()), float(bottom.score.abs().max())) or 1.0

    def cards(table: Any, sign: int) -> list[_Card]:
        found = ((int(r.sample_id), float(r.score)) for r in table.itertuples() if sign * r.score > 0)
        return [_Card(z, s, abs(s) / largest, samples.content(z), samples.label(z)) for z, s in found]

    label = "" if asked is None or query is None else asked.label(number)
    return {
        "name": "all queries" if query is None else f"query {query}" + (f" ({label})" if label else ""),
        "asked": Markup() if asked is None or query is None else asked.content(number),
        "helpful": cards(top, 1),
        "harmful": cards(bottom, -1),
    }


def _suspects(report: InfluenceReport, samples: _Samples, k: int) -> list[_Card]:
    found = report.suspects()
    largest = float(found.suspicion.max()) if len(found) else 1.0
    return [
        _Card(
            z := int(row.sample_id),
            -row.suspicion,
            row.suspicion / largest,
            samples.content(z),
            samples.label(z),
            f"harms {row.harmed:.0%} of the queries",
        )
        for row in found.head(k).itertuples()
    ]


def _rows(report: InfluenceReport, samples: _Samples, carded: Collection[int]) -> Iterator[dict[str, Any]]:
    """The samples of the largest scores and those with a card, for the table."""
    mean, harmed = report.mean, (report.scores < 0).double().mean(1).nan_to_num()
    for rank, i in enumerate(mean.abs().argsort(descending=True, stable=True).tolist()):
        sample_id = int(report.sample_ids[i])
        if rank >= _SHOWN_ROWS and sample_id not in carded:
            continue
        yield {"id": sample_id, "score": float(mean[i]), "harmed": float(harmed[i]), "label": samples.label(sample_id)}


def _groups(
    report: InfluenceReport, groups: Sequence[Any] | Mapping[int, Any] | Tensor | None, *, given: bool
) -> list[dict[str, Any]]:
    """Totals by group; labels that were not given as groups count only where they are few."""
    if groups is None:
        return []
    names = _group_names(report.sample_ids.tolist(), groups)
    distinct = sorted(set(names), key=lambda name: (len(name), name) if name.isdigit() else (math.inf, name))
    if not distinct or (not given and not 1 < len(distinct) <= _SHOWN_GROUPS):
        return []
    where = torch.tensor([distinct.index(name) for name in names])
    mean = report.mean
    helped, harmed = (
        torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, where, part)
        for part in (mean.clamp(min=0), mean.clamp(max=0))
    )
    sizes = torch.bincount(where, minlength=len(distinct))
    largest = float((helped + harmed).abs().max()) or 1.0
    columns = zip(distinct, sizes.tolist(), helped.tolist(), harmed.tolist(), strict=True)
    return [
        {"name": name, "n": n, "helped": up, "harmed": down, "total": up + down, "share": (up + down) / largest}
        for name, n, up, down in columns
    ]


def _group_names(sample_ids: list[int], groups: Sequence[Any] | Mapping[int, Any] | Tensor) -> list[str]:
    """The group of every sample of the report."""
    known = groups if isinstance(groups, Mapping) else range(len(groups))
    missing = [z for z in sample_ids if z not in known]
    if missing:
        raise ConfigurationError(
            f"groups names {len(groups)} samples, but sample {missing[-1]} is in the report; give one group per sample of "
            "the training dataset."
        )
    values = groups if isinstance(groups, Mapping) else groups.tolist() if isinstance(groups, Tensor) else list(groups)
    return [str(values[z]) for z in sample_ids]


# -- figures --------------------------------------------------------------------------------------------------


def _histogram(scores: Tensor) -> dict[str, Any]:
    """Bars over a scale that is linear for small and logarithmic for large scores (the inverse hyperbolic sine)."""
    if not len(scores):
        return {"bars": [], "ticks": [(0.5, 0.0)], "largest": 0}
    scale = float(scores.abs().median()) or float(scores.abs().max()) or 1.0
    bound = float(torch.asinh(scores.abs() / scale).max()) or 1.0
    counts = torch.histc(torch.asinh(scores / scale), _BINS, -bound, bound)
    edges = [scale * math.sinh(bound * (2 * i / _BINS - 1)) for i in range(_BINS + 1)]
    bars = [
        {"height": count / max(counts.max().item(), 1), "count": int(count), "low": edges[i], "high": edges[i + 1]}
        for i, count in enumerate(counts.tolist())
    ]
    marks = [-scale * math.sinh(bound), -scale * math.sinh(bound / 2), 0.0]
    ticks = [(0.25 * i, value) for i, value in enumerate(marks + [-v for v in marks[1::-1]])]
    return {"bars": bars, "ticks": ticks, "largest": int(counts.max())}


def _over_time(report: InfluenceReport) -> dict[str, Any]:
    first, helped, harmed = report.rows.over_time(_TIMES)
    n = report.rows.n_steps
    largest = max([*helped.tolist(), *(-harmed).tolist()], default=0.0) or 1.0
    last = [following - 1 for following in [*first.tolist(), n][1:]]
    bars = [
        {"first": a, "last": b, "helped": up, "harmed": down, "up": up / largest, "down": -down / largest}
        for a, b, up, down in zip(first.tolist(), last, helped.tolist(), harmed.tolist(), strict=True)
    ]
    return {"bars": bars, "steps": n, "largest": largest}


# -- trust and origin -----------------------------------------------------------------------------------------


def _trust(report: InfluenceReport) -> list[_Trust]:
    """Everything known about how far these scores can be believed."""
    metadata = report.metadata
    measured = {k: v for k, v in part_of(metadata, "errors").items() if isinstance(v, (int, float))}
    errors = _own_errors(report) | measured
    told = [*_approximations(metadata)]
    for name, size in errors.items():
        corrected = name == "config" and not metadata.get("optimizer_assumption")
        level = "solid" if corrected or size < 0.1 else "approximate" if size < 0.5 else "caution"
        told.append(_Trust(f"{name} error".capitalize(), _percent(size), level, _ERRORS.get(name, "Of the scores.")))
    if "ceiling" in metadata:
        told.append(_Trust("Ceiling", _short(metadata["ceiling"]), "solid", "Agreement of retraining with itself."))
    else:
        told.append(
            _Trust("Ceiling", "not measured", "unknown", "check_faithfulness retrains, and says what scores can reach.")
        )
    if "conclusion" in metadata:
        told.append(_Trust("Measured", "against retraining", "solid", str(metadata["conclusion"])))
    return told


_ERRORS = {
    "config": "What the scores would be off by, had the run been taken for one of plain SGD.",
    "algorithm": "How far the optimizer's answer to a removal is from a straight line. These scores follow the answer "
    "within each parameter; what it sets off beyond grows with this number.",
    "system": "How far the run, trained again from its record, ends from where it ended.",
}


def _own_errors(report: InfluenceReport) -> dict[str, float]:
    """Levels of error that follow from the report itself."""
    found, size = {}, float(report.scores.norm())
    if size and report.metadata.get("response") == "finite":
        found["algorithm"] = float(report.nonlinearity.norm()) / size
    if drift := part_of(report.metadata, "replay_drift"):
        found["system"] = max(drift.values())
    return found


def _approximations(metadata: Mapping[str, Any]) -> Iterator[_Trust]:
    coverage = part_of(metadata, "coverage").get("fraction")
    if coverage is not None:
        level = "solid" if coverage > 0.99 else "approximate" if coverage > 0.1 else "caution"
        yield _Trust("Coverage", _percent(coverage), level, "Share of the trained coordinates that the scores rest on.")
    curvature = str(metadata.get("curvature"))
    if curvature in _CURVATURE:
        yield _Trust(
            "Curvature", curvature.replace("_", "-").replace("gauss-newton", "Gauss-Newton"), *_CURVATURE[curvature]
        )
    if metadata.get("optimizer_assumption"):
        assumed = str(metadata["optimizer_assumption"]).upper()
        yield _Trust("Optimizer", f"{assumed} assumed", "caution", "The run used another: these scores are a baseline.")


def _facts(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What else is known about how the run was recorded and scored."""
    shown = {
        k: v for k, v in metadata.items() if isinstance(v, (str, int, float)) and k not in ("ceiling", "conclusion")
    }
    return [(k.replace("_", " "), _short(v)) for k, v in shown.items()]


def _percent(fraction: float) -> str:
    if 0 < abs(fraction) < 0.0005:
        return signed(fraction, 2)[1:]
    return f"{100 * fraction:.3g} %"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
