"""The report as one page that a person reads; it needs no network and no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader
from torch import Tensor

from lightning_influence.errors import ConfigurationError
from lightning_influence.render import Render, as_html, default_render, label_of

if TYPE_CHECKING:
    from lightning_influence.report import InfluenceReport

_BINS = 41
_SHOWN_QUERIES = 24
_SHOWN_ROWS = 1000


@dataclass(frozen=True)
class _Card:
    """A sample in a list of the most helpful or harmful ones."""

    sample_id: int
    score: float
    share: float  # of the largest score beside it
    content: str
    label: str


def page(
    report: InfluenceReport,
    *,
    data: Any = None,
    show: Render | None = None,
    tokenizer: Any = None,
    queries: Any = None,
    groups: Sequence[Any] | Tensor | None = None,
    k: int = 8,
    title: str = "Influence report",
) -> str:
    """The whole page as HTML; arguments as of `InfluenceReport.to_html`."""
    render = show or default_render(tokenizer)
    metadata = report.metadata
    views = [_view(report, None, data, render, k, "")]
    for number, query in enumerate(report.query_ids[:_SHOWN_QUERIES] if len(report.query_ids) > 1 else []):
        asked = "" if queries is None else as_html(render(queries[number]))
        views.append(_view(report, query, data, render, k, asked))
    environment = Environment(loader=PackageLoader("lightning_influence", "."), autoescape=True, trim_blocks=True)
    mean = report.scores.double().mean(1)
    order = mean.abs().argsort(descending=True)[:_SHOWN_ROWS].tolist()
    return environment.get_template("report_page.html").render(
        title=title,
        n_samples=len(report.sample_ids),
        against=_against(report),
        helping=int((mean > 0).sum()),
        harming=int((mean < 0).sum()),
        views=views,
        left_out=max(0, len(report.query_ids) - _SHOWN_QUERIES) if len(report.query_ids) > 1 else 0,
        histogram=_histogram(mean),
        over_time=_over_time(report),
        rows=[(int(report.sample_ids[i]), float(mean[i]), _label(data, int(report.sample_ids[i]))) for i in order],
        hidden=len(mean) - len(order),
        groups=_groups(report, groups),
        trust=_trust(report),
        coverage=metadata.get("coverage", {}).get("parameters", {}),
        recorded={key: value for key, value in metadata.items() if isinstance(value, (str, int, float))},
        versions=metadata.get("versions", {}),
    )


def _against(report: InfluenceReport) -> str:
    if len(report.query_ids) > 1:
        return f"{len(report.query_ids)} queries"
    return "the mean loss of the queries" if report.query_ids == ["mean"] else f"query {report.query_ids[0]}"


def _view(
    report: InfluenceReport, query: int | str | None, data: Any, render: Render, k: int, asked: str
) -> dict[str, Any]:
    top, bottom = report.top(k, query), report.bottom(k, query)
    largest = max(float(top.score.abs().max()), float(bottom.score.abs().max()), 1e-300)

    def cards(table: Any, sign: int) -> list[_Card]:
        rows = [(int(r.sample_id), float(r.score)) for r in table.itertuples() if sign * r.score > 0]
        return [
            _Card(z, score, abs(score) / largest, "" if data is None else as_html(render(data[z])), _label(data, z))
            for z, score in rows
        ]

    name = "the whole target" if query is None else f"query {query}"
    return {"name": name, "asked": asked, "helpful": cards(top, 1), "harmful": cards(bottom, -1)}


def _label(data: Any, sample_id: int) -> str:
    return "" if data is None else label_of(data[sample_id])


def _histogram(scores: Tensor) -> dict[str, Any]:
    """Bars of the scores, on a scale that shows both many small and few large ones."""
    scale = float(scores.abs().quantile(0.5)) or 1.0
    squeezed = torch.asinh(scores / scale)
    bound = max(float(squeezed.abs().max()), 1e-9)
    counts = torch.histc(squeezed, _BINS, -bound, bound)
    heights = (counts / counts.max().clamp(min=1)).sqrt()
    edges = [scale * math.sinh(bound * (2 * i / _BINS - 1)) for i in range(_BINS + 1)]
    bars = [
        {"height": float(h), "count": int(c), "low": edges[i], "high": edges[i + 1]}
        for i, (h, c) in enumerate(zip(heights, counts, strict=True))
    ]
    return {"bars": bars, "low": edges[0], "high": edges[-1]}


def _over_time(report: InfluenceReport) -> dict[str, Any]:
    """Summed positive and negative influence of the samples of each step."""
    steps, values = report.rows.steps, report.rows.scores.double().mean(1)
    n = int(steps.max()) + 1
    helped = torch.zeros(n, dtype=torch.float64).index_add_(0, steps, values.clamp(min=0))
    harmed = torch.zeros(n, dtype=torch.float64).index_add_(0, steps, -values.clamp(max=0))
    bins = min(n, 120)
    where = torch.arange(n) * bins // n
    size = torch.bincount(where, minlength=bins)
    sums = [torch.zeros(bins, dtype=torch.float64).index_add_(0, where, v) / size for v in (helped, harmed)]
    largest = max(float(max(s.max() for s in sums)), 1e-300)
    return {
        "helped": (sums[0] / largest).tolist(),
        "harmed": (sums[1] / largest).tolist(),
        "steps": n,
        "largest": largest,
    }


def _groups(report: InfluenceReport, groups: Sequence[Any] | Tensor | None) -> list[dict[str, Any]]:
    if groups is None:
        return []
    if len(groups) <= int(report.sample_ids.max()):
        raise ConfigurationError(
            f"groups names {len(groups)} samples, but sample {int(report.sample_ids.max())} is in the report; give one "
            "group per sample of the training dataset."
        )
    values = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    of = [values[z] for z in report.sample_ids.tolist()]
    mean = report.scores.double().mean(1)
    found = []
    for group in sorted(set(of), key=str):
        here = mean[[i for i, g in enumerate(of) if g == group]]
        found.append({"name": group, "n": len(here), "total": float(here.sum()), "mean": float(here.mean())})
    return found


def _trust(report: InfluenceReport) -> list[tuple[str, str, str]]:
    """Name, value, and what it means."""
    metadata: Mapping[str, Any] = report.metadata
    told = []
    coverage = metadata.get("coverage", {})
    if "fraction" in coverage:
        told.append(
            (
                "Coverage",
                f"{coverage['fraction']:.1%}",
                "of the trained coordinates entered the scores; the rest was left out.",
            )
        )
    meaning = {
        "hessian": "exact: the run was replayed with its true second derivatives.",
        "gauss_newton": "replayed with the Gauss-Newton matrix.",
        "fisher": "approximated from the logged gradients; replay (record='replay') is more faithful.",
        "none": "ignored: what a removal changes in later gradients is not followed.",
    }
    if metadata.get("curvature") in meaning:
        told.append(("Curvature", str(metadata["curvature"]), meaning[str(metadata["curvature"])]))
    if metadata.get("optimizer_assumption") == "sgd":
        told.append(("Optimizer", "SGD assumed", "although the run used another: these scores are a baseline only."))
    size = float(report.scores.norm())
    if size and metadata.get("response") == "finite":
        share = float(report.nonlinearity.norm()) / size
        told.append(
            (
                "Algorithm error",
                f"{share:.1%}",
                "of the scores is what a first-order score misses of the optimizer's answer.",
            )
        )
    drift = metadata.get("replay_drift")
    if drift:
        told.append(
            (
                "System error",
                f"{max(drift.values()):.1e}",
                "is how far the replay ends from the recorded run, relative to its way.",
            )
        )
    if "ceiling" in metadata:
        told.append(
            ("Ceiling", str(metadata["ceiling"]), "is how well retraining agrees with itself; no estimator exceeds it.")
        )
    else:
        told.append(
            ("Ceiling", "not measured", "check_faithfulness(...) retrains and measures how far to trust these scores.")
        )
    return told


def write_page(report: InfluenceReport, path: str | Path, **options: Any) -> Path:
    """Write `page` to a file; the file's path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(report, **options), encoding="utf-8")
    return path
