"""What the page's script reads: compact arrays of the scores of all samples, and more of those that come first."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_influence.core.scores import mean_score
from lightning_influence.report.scores import Scores

if TYPE_CHECKING:
    import pandas as pd

_NUMBERS = 500_000  # beyond one score a sample
_TYPES = {torch.int32: "i4", torch.float32: "f4", torch.float64: "f8"}


class _Losses(Protocol):
    @property
    def losses(self) -> Tensor: ...


class PageDynamics(Protocol):
    """Training dynamics as the page reads them (`trust.dynamics.TrainingDynamics`)."""

    @property
    def sample_ids(self) -> Tensor: ...
    @property
    def owner(self) -> Tensor: ...
    @property
    def visits(self) -> _Losses: ...
    def suspects(self, k: int | None = None) -> pd.DataFrame: ...


def arrays(
    report: Scores,
    order: Tensor,
    *,
    labels: Mapping[int, str],
    groups: Sequence[tuple[str, Tensor]] = (),
    dynamics: PageDynamics | None = None,
) -> dict[str, Any]:
    """What JSON holds of a report for the page.

    Every sample has its score, label and groups, and what its label is suspected of. Scores by query and by step, and losses at
    the visits, are those of the first ``m`` samples of ``order``, as many as stay within half a million numbers.

    Args:
        order: ``(n,)`` positions in ``report.sample_ids``.
        labels: by sample id; missing where they are not known.
        groups: names, and positions in ``report.sample_ids`` of the samples of each; a sample may be in several or in none.
    """
    ids, n, several = report.sample_ids, len(order), len(report.query_ids) > 1
    rows = torch.searchsorted(ids, report.rows.sample_ids.contiguous())
    visits = (
        torch.zeros(0, dtype=torch.int64) if dynamics is None else _positions(ids, dynamics.sample_ids)[dynamics.owner]
    )
    size = 2 * rows.bincount(minlength=n) + visits[visits >= 0].bincount(minlength=n)
    size += len(report.query_ids) if several else 0
    first = order[: int((size[order].cumsum(0) <= _NUMBERS).sum())]
    starts, (steps, scores) = _listed(rows, first, n, report.rows.steps, mean_score(report.rows.scores))
    names = sorted(set(labels.values()))
    number = {name: i for i, name in enumerate(names)}
    codes = torch.tensor([number.get(labels.get(z, ""), -1) for z in ids[order].tolist()], dtype=torch.int32)
    tensors = {
        "queries": [str(q) for q in report.query_ids],
        "m": len(first),
        "ids": packed(ids[order]),
        "score": packed(report.mean[order].float()),
        "harmed": packed((report.scores < 0).float().mean(1)[order]) if several else None,
        "labels": {"names": names, "codes": packed(codes)},
        "groups": _memberships(groups, order) if groups else None,
        "scores": packed(report.scores[first].float().flatten()) if several else None,
        "rows": {"starts": packed(starts), "steps": packed(steps), "scores": packed(scores.float())},
        "dynamics": None if dynamics is None else _dynamics(dynamics, visits, ids[order], first),
    }
    return tensors


def _memberships(groups: Sequence[tuple[str, Tensor]], order: Tensor) -> dict[str, Any]:
    """Names of groups, and the numbers of those that each sample is in, one sample after the other."""
    numbers = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(at) for _, at in groups]))
    starts, (codes,) = _listed(torch.cat([at for _, at in groups]), order, len(order), numbers)
    return {"names": [name for name, _ in groups], "starts": packed(starts), "codes": packed(codes)}


def _dynamics(dynamics: PageDynamics, visits: Tensor, ordered: Tensor, first: Tensor) -> dict[str, Any]:
    """What the labels of samples are suspected of, in the order of their ids, and the losses at the visits of the first ones."""
    starts, (losses,) = _listed(visits, first, len(ordered), dynamics.visits.losses)
    table = in_doubt(dynamics, ordered)
    columns = {
        name: packed(torch.from_numpy(table[name].to_numpy("float32"))) for name in ("suspicion", "share", "loss")
    }
    suggested = torch.from_numpy(table.suggested.fillna(-1).to_numpy("int32"))
    return {"starts": packed(starts), "losses": packed(losses.float()), **columns, "suggested": packed(suggested)}


def in_doubt(dynamics: PageDynamics, sample_ids: Tensor) -> pd.DataFrame:
    """`PageDynamics.suspects` of some samples by their id, in their order; NaN for those that the run did not visit."""
    return dynamics.suspects(len(dynamics.sample_ids)).set_index("sample_id").reindex(sample_ids.numpy())


def packed(values: Tensor) -> dict[str, str]:
    """A vector as text: its type, and its bytes in base64, the least significant first."""
    if not values.is_floating_point():
        values = values.int() if not len(values) or int(values.max()) < 2**31 else values.double()
    data = values.numpy().astype(f"<{_TYPES[values.dtype]}").tobytes()
    return {"type": _TYPES[values.dtype], "data": base64.b64encode(data).decode()}


def _positions(ids: Tensor, wanted: Tensor) -> Tensor:
    """Positions of samples in ascending ids; -1 for those that are not there."""
    if not len(ids):
        return torch.full_like(wanted, -1)
    at = torch.searchsorted(ids, wanted).clamp(max=len(ids) - 1)
    return torch.where(ids[at] == wanted, at, -1)


def _listed(owner: Tensor, first: Tensor, n: int, *columns: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The entries of some of ``n`` samples, one sample after the other, and where each begins."""
    place = torch.full((n + 1,), -1)  # the last is that of entries of no sample
    place[first] = torch.arange(len(first))
    where = place[owner]
    chosen = (where >= 0).nonzero()[:, 0]
    chosen = chosen[where[chosen].argsort(stable=True)]
    starts = torch.nn.functional.pad(where[chosen].bincount(minlength=len(first)).cumsum(0), (1, 0))
    return starts, [column[chosen] for column in columns]
