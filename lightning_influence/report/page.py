"""The report as one page that a person reads; it needs no network and no other file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from lightning_influence.errors import ConfigurationError
from lightning_influence.report.arrays import PageDynamics, arrays, in_doubt
from lightning_influence.report.membership import GroupsOf
from lightning_influence.report.numbers import short, signed
from lightning_influence.report.page_groups import (
    filters_of,
    joint,
    members_by_label,
    members_of,
    members_removed,
    totals,
)
from lightning_influence.report.rendering import (
    CARD,
    FULL,
    Render,
    as_html,
    default_render,
    label_of,
    labels_of,
    like_token_ids,
    query_examples,
    training_samples,
)
from lightning_influence.report.scores import Scores
from lightning_influence.report.tokens import TokenScores
from lightning_influence.report.trust import trust

if TYPE_CHECKING:
    import pandas as pd

_BINS = 41  # of the histogram; odd, so that one is around zero
_FINEST = 1e-12  # of the largest score: what the histogram tells from zero
_TIMES = 80  # bars over training
_SHOWN_QUERIES = 24
_SHOWN_ROWS = 1000
_IN_FULL = 200  # samples that are shown in full besides those with a card
_IN_TABLE = replace(CARD, side=68)
_CHARACTERS = 4_000_000  # of the samples' contents; the last quarter goes to small ones


@dataclass(frozen=True)
class _Card:
    """A sample among the most helpful or harmful ones.

    Attributes:
        share: of the largest score beside it.
        note: a word on the score.
        words: the score in words, where it is none.
    """

    sample_id: int
    score: float
    share: float
    content: Markup
    label: str
    note: str = ""
    words: str = ""


class _Samples:
    """What is shown of the samples of a dataset, each of which is read once.

    Args:
        doubts: of `arrays.in_doubt`, whose labels stand for those of the dataset where it would have to be read for them.
    """

    def __init__(
        self, data: Any, render: Render, classes: Sequence[str] | None, doubts: pd.DataFrame | None = None
    ) -> None:
        self._data, self._render, self._classes, self._doubts = data, render, classes, doubts
        own = None if data is None else labels_of(data)
        trained_on = {} if doubts is None else {z: str(int(y)) for z, y in doubts.label.items() if y >= 0}
        known = trained_on if own is None else dict(enumerate(own))
        self.labels = {z: self.named(label) for z, label in known.items()}
        self._read = lru_cache(maxsize=None)(self._shown)
        self.token_ids = False  # whether numbers were shown that a tokenizer would make a text of

    def content(self, sample_id: int) -> Markup:
        return Markup() if self._data is None else self._read(sample_id)[0]

    def contents(self, sample_ids: Sequence[int], opened: int) -> Iterator[tuple[int, Markup]]:
        """Samples as they are opened, the first ``opened``; the others no larger than in the table, as far as there is room."""
        left = _CHARACTERS
        for place, sample_id in enumerate([] if self._data is None else sample_ids):
            if place >= opened and left <= 0:
                return
            size = _IN_TABLE if place >= opened else FULL if left > _CHARACTERS / 4 else CARD
            content = as_html(self._render(self._data[sample_id]), size)
            left -= len(content)
            yield sample_id, Markup(content)

    def label(self, sample_id: int) -> str:
        if sample_id in self.labels:
            return self.labels[sample_id]
        return "" if self._data is None else self._read(sample_id)[1]

    def doubt(self, sample_id: int) -> dict[str, Any]:
        """How suspicious the label is, the label that the network found more likely, if it did, and the mean loss; None where
        the run did not visit the sample.
        """
        if self._doubts is None or math.isnan(self._doubts.suspicion[sample_id]):
            return {"suspicion": None, "suggested": "", "loss": None}
        doubt = self._doubts.loc[sample_id]
        preferred = doubt.suspicion > 0 and doubt.suggested >= 0
        suggested = self.named(str(int(doubt.suggested))) if preferred else ""
        return {"suspicion": float(doubt.suspicion), "suggested": suggested, "loss": float(doubt.loss)}

    def named(self, label: str) -> str:
        if self._classes is None or not label.isdigit():
            return label
        if int(label) >= len(self._classes):
            raise ConfigurationError(f"classes has {len(self._classes)} names, but there is a label {label}.")
        return str(self._classes[int(label)])

    def _shown(self, sample_id: int) -> tuple[Markup, str]:
        sample = self._data[sample_id]
        self.token_ids = self.token_ids or like_token_ids(sample)
        return Markup(as_html(self._render(sample))), self.named(label_of(sample))


def page(
    report: Scores,
    *,
    data: Any = None,
    show: Render | None = None,
    tokenizer: Any = None,
    queries: Any = None,
    groups: GroupsOf | Mapping[int, Any] | None = None,
    classes: Sequence[str] | None = None,
    dynamics: PageDynamics | None = None,
    tokens: TokenScores | None = None,
    k: int = 8,
    title: str = "Influence report",
) -> str:
    """The whole page as HTML; arguments as of `InfluenceReport.to_html`."""
    render = show or default_render(tokenizer)
    doubts = None if dynamics is None else in_doubt(dynamics, report.sample_ids)
    samples = _Samples(training_samples(data, report.sample_ids), render, classes, doubts)
    examples, n_examples = query_examples(queries, len(report.query_ids))
    asked = None if examples is None else _Samples(examples, render, classes)
    several = len(report.query_ids) > 1
    if several and n_examples not in (None, len(report.query_ids)):
        raise ConfigurationError(f"{n_examples} queries to show for {len(report.query_ids)} columns of scores.")
    shown = report.query_ids[:_SHOWN_QUERIES] if several else []
    mean, made = report.mean, report.provenance
    only = asked if made.target is None and n_examples == 1 and not several else None
    views = [
        _view(report, samples, k, None, asked=only),
        *(_view(report, samples, k, q, i, asked) for i, q in enumerate(shown)),
    ]
    suspects = _suspects(report, samples, k) if several else []
    mislabelled = [] if doubts is None else _mislabelled(doubts, samples, k)
    cards = [card for view in views for card in (*view["helpful"], *view["harmful"])] + suspects + mislabelled
    carded = {card.sample_id for card in cards}
    order = _order(report, carded)
    rows = _rows(report, samples, order, len(carded))
    contents = list(samples.contents([row["id"] for row in rows], len(carded) + _IN_FULL))
    members = (
        members_by_label(report.sample_ids, samples.labels) if groups is None else members_of(report.sample_ids, groups)
    )
    filters = filters_of(members, members_removed(report.sample_ids, report.groups), given=groups is not None)
    labels = {z: samples.labels[z] for z in report.sample_ids.tolist() if z in samples.labels}
    labels |= {row["id"]: row["label"] for row in rows if row["label"]}
    rows.sort(key=lambda row: -abs(row["score"]))
    return _template("page.html").render(
        title=title,
        report=report,
        several=several,
        helping=int((mean > 0).sum()),
        harming=int((mean < 0).sum()),
        views=views,
        left_out=len(report.query_ids) - len(shown) if several else 0,
        suspects=suspects,
        mislabelled=mislabelled,
        texts=[] if tokens is None else _texts(report, tokens, tokenizer),
        histogram=_histogram(mean),
        over_time=_over_time(report),
        rows=rows,
        groups=totals(mean, members),
        joint=joint(report.groups),
        filters=[(title, list(members)) for title, members in filters],
        contents=contents,
        doubted=None if doubts is None else int((doubts.suspicion > 0).sum()),
        target=made.target,
        data=arrays(
            report,
            order,
            labels=labels,
            groups=[part for _, members in filters for part in members.items()],
            dynamics=dynamics,
        )
        | {"classes": classes},
        token_ids=(samples.token_ids or tokens is not None) and show is None and tokenizer is None,
        trust=trust(report),
        coverage=made.coverage,
        facts=_facts(report.metadata),
        versions=made.versions,
    )


def cell(report: Scores) -> str:
    """The report in the output of a notebook's cell."""
    return _template("cell.html").render(
        report=report,
        lists=[("Most helpful", "help", report.top(5)), ("Most harmful", "harm", report.bottom(5))],
        histogram=_histogram(report.mean),
        trust=trust(report),
    )


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
    report: Scores,
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
        scored = ((int(r.sample_id), float(r.score)) for r in table.itertuples() if sign * r.score > 0)
        return [_Card(z, s, abs(s) / largest, samples.content(z), samples.label(z)) for z, s in scored]

    label = "" if asked is None else asked.label(number)
    name = f"query {query}" if query is not None else "all queries" if asked is None else "the query"
    return {
        "name": name + (f" ({label})" if label else ""),
        "asked": Markup() if asked is None else asked.content(number),
        "helpful": cards(top, 1),
        "harmful": cards(bottom, -1),
    }


def _in_doubt(suspects: Any, by: str, samples: _Samples, said: Callable[[Any], Sequence[str]]) -> list[_Card]:
    """The samples of a table of suspects.

    Args:
        by: the column that they are ranked by.
        said: note and words of a row.
    """
    largest = float(suspects[by].max()) if len(suspects) else 1.0
    return [
        _Card(
            z := int(row.sample_id),
            -getattr(row, by),
            getattr(row, by) / largest,
            samples.content(z),
            samples.label(z),
            *said(row),
        )
        for row in suspects.itertuples()
    ]


def _suspects(report: Scores, samples: _Samples, k: int) -> list[_Card]:
    def said(row: Any) -> list[str]:
        return [", ".join([f"harms {row.harmed:.0%} of the queries", *_loss_and_label(row, samples)])]

    return _in_doubt(report.suspects().head(k), "relative_harm", samples, said)


def _mislabelled(doubts: pd.DataFrame, samples: _Samples, k: int) -> list[_Card]:
    """Samples of the report for which the network found another label the more likely one."""
    suspects = doubts[doubts.suspicion > 0].sort_values("suspicion", ascending=False, kind="stable").reset_index()
    return _in_doubt(
        suspects.head(k), "suspicion", samples, lambda row: [*_loss_and_label(row, samples), "doubtful"][:2]
    )


def _loss_and_label(row: Any, samples: _Samples) -> list[str]:
    """Of a sample that the run visited, its loss, and the label that the network found more likely."""
    doubt = samples.doubt(int(row.sample_id))
    loss = [] if doubt["loss"] is None else [f"loss {doubt['loss']:.3g}"]
    return loss + ([f"rather {doubt['suggested']}"] if doubt["suggested"] else [])


def _texts(report: Scores, tokens: TokenScores, tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens of samples with their scores, and these relative to the largest of the text."""
    missing = tokens.sample_ids[~torch.isin(tokens.sample_ids, report.sample_ids)].tolist()
    if missing:
        raise ConfigurationError(f"tokens has scores of sample {missing[0]}, which is not in the report.")
    texts = []
    for sample_id in tokens.sample_ids.tolist():
        table = tokens.of(sample_id)
        largest = float(table.score.abs().max()) or 1.0
        spelt = [f"{z} " if tokenizer is None else str(tokenizer.decode([z])) for z in table.token.tolist()]
        cells = [
            {"text": text, "score": score, "share": abs(score) / largest}
            for text, score in zip(spelt, table.score.tolist(), strict=True)
        ]
        texts.append({"sample_id": sample_id, "score": float(table.score.sum()), "tokens": cells})
    return texts


def _order(report: Scores, carded: Iterable[int]) -> Tensor:
    """Positions of the samples: those with a card, then the others, the largest scores first."""
    order = report.mean.abs().argsort(descending=True, stable=True)
    first = torch.isin(report.sample_ids[order], torch.tensor(sorted(carded), dtype=torch.int64))
    return torch.cat([order[first], order[~first]])


def _rows(report: Scores, samples: _Samples, order: Tensor, carded: int) -> list[dict[str, Any]]:
    """The first samples for the table: those with a card, and those of the largest scores."""
    mean, harmed = report.mean, (report.scores < 0).double().mean(1).nan_to_num()
    largest = set(mean.abs().argsort(descending=True, stable=True)[:_SHOWN_ROWS].tolist())
    return [
        {
            "id": (z := int(report.sample_ids[i])),
            "score": float(mean[i]),
            "harmed": float(harmed[i]),
            "label": samples.label(z),
            **samples.doubt(z),
        }
        for rank, i in enumerate(order.tolist())
        if rank < carded or i in largest
    ]


# -- figures --------------------------------------------------------------------------------------------------


def _histogram(scores: Tensor) -> dict[str, Any]:
    """Bars over a scale that is linear for small and logarithmic for large scores (the inverse hyperbolic sine)."""
    if not len(scores):
        return {"bars": [], "ticks": [(0.5, 0.0)], "largest": 0}
    scale = max(float(scores.abs().median()), _FINEST * float(scores.abs().max())) or 1.0
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


def _over_time(report: Scores) -> dict[str, Any]:
    first, helped, harmed = report.rows.over_time(_TIMES)
    n = report.rows.n_steps
    largest = max([*helped.tolist(), *(-harmed).tolist()], default=0.0) or 1.0
    last = [following - 1 for following in [*first.tolist(), n][1:]]
    bars = [
        {"first": a, "last": b, "helped": up, "harmed": down, "up": up / largest, "down": -down / largest}
        for a, b, up, down in zip(first.tolist(), last, helped.tolist(), harmed.tolist(), strict=True)
    ]
    return {"bars": bars, "steps": n, "largest": largest}


# -- origin ---------------------------------------------------------------------------------------------------


def _facts(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What else is known about how the run was recorded and scored."""
    shown = {
        k: v for k, v in metadata.items() if isinstance(v, (str, int, float)) and k not in ("ceiling", "conclusion")
    }
    return [(k.replace("_", " "), short(v)) for k, v in shown.items()]
