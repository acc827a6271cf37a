"""Groups on the page: who is in which, what the scores of its samples add up to, and what removing it as a whole does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.scores import mean_score
from lightning_influence.errors import ConfigurationError
from lightning_influence.report.groups import Groups
from lightning_influence.report.membership import GroupsOf, named_groups

_MOST_LABELS = 100  # that are taken for groups without being given as such


def members_of(sample_ids: Tensor, groups: GroupsOf | Mapping[int, Any]) -> dict[str, Tensor]:
    """Positions in a report's ``sample_ids``, which ascend, of the samples of each group; groups in the order of their names.

    Args:
        groups: as of `named_groups`, or the label of every sample of the report by its id.

    Raises:
        ConfigurationError: as of `named_groups`; labels that leave out a sample of the report, or ids of which none is in it.
    """
    if not len(sample_ids):
        return {}
    if isinstance(groups, Mapping) and not _labels_by_id(groups):
        return _in_order(_named(sample_ids, named_groups(groups)))
    return _in_order(_labelled(_labels(sample_ids.tolist(), groups)))


def members_by_label(sample_ids: Tensor, labels: Mapping[int, str]) -> dict[str, Tensor]:
    """The same of the samples' labels by id, where these are few enough to be groups; otherwise nothing."""
    own = [labels.get(z) for z in sample_ids.tolist()]
    return _in_order(_labelled(own)) if 1 < len({*own} - {None}) <= _MOST_LABELS else {}


def members_removed(sample_ids: Tensor, groups: Groups | None) -> dict[str, Tensor]:
    """The same of the groups that were removed as wholes; nothing where it is not known who was in them."""
    if groups is None or groups.members is None:
        return {}
    return {name: _positions(sample_ids, ids) for name, ids in zip(groups.names, groups.members, strict=True)}


def filters_of(
    members: Mapping[str, Tensor], removed: Mapping[str, Tensor], *, given: bool
) -> list[tuple[str, Mapping[str, Tensor]]]:
    """What samples can be filtered by, under a heading each: groups that were removed as wholes, then those that the page was
    given or the labels, unless they are the same.
    """
    same = members.keys() == removed.keys() and all(torch.equal(at, removed[name]) for name, at in members.items())
    both = [("removed as a whole", removed), ("groups" if given else "labels", {} if same else members)]
    return [(heading, groups) for heading, groups in both if groups]


def totals(mean: Tensor, members: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Sums of single scores ``(n,)`` by group."""
    sums = [
        (name, len(at), float(mean[at].clamp(min=0).sum()), float(mean[at].clamp(max=0).sum()))
        for name, at in members.items()
    ]
    return _compared(
        [{"name": name, "n": n, "helped": up, "harmed": down, "total": up + down} for name, n, up, down in sums]
    )


def joint(groups: Groups | None) -> list[dict[str, Any]]:
    """What removing each group as a whole does, on average over the queries; nothing where a report has no groups."""
    if groups is None:
        return []
    columns = zip(groups.names, groups.sizes, mean_score(groups.scores).tolist(), groups.readings, strict=True)
    return _compared(
        [{"name": name, "n": n, "total": effect, "reading": reading} for name, n, effect, reading in columns]
    )


def _compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the share that each total has of the largest."""
    largest = max((abs(row["total"]) for row in rows), default=0.0) or 1.0
    return [{**row, "share": row["total"] / largest} for row in rows]


def _labels_by_id(groups: Mapping[Any, Any]) -> bool:
    """Whether a mapping goes from sample ids to labels, rather than from names to sample ids."""
    several = any(isinstance(value, Iterable) and not isinstance(value, str) for value in groups.values())
    return len(groups) > 0 and not several and all(isinstance(key, Integral) for key in groups)


def _positions(sample_ids: Tensor, members: Sequence[int]) -> Tensor:
    return torch.isin(sample_ids, torch.tensor(members, dtype=torch.int64)).nonzero()[:, 0]


def _named(sample_ids: Tensor, groups: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    members = {name: _positions(sample_ids, ids) for name, ids in groups.items()}
    if not any(map(len, members.values())):
        first = next(iter(groups.values()))
        raise ConfigurationError(
            f"groups names samples of which none is in the report ({first[:4]}...); ids are indices into the training dataset."
        )
    return members


def _labels(sample_ids: Sequence[int], groups: Any) -> list[Any]:
    """The label of every sample of the report."""
    values = groups.tolist() if isinstance(groups, Tensor) else groups
    labels = values if isinstance(values, Mapping) else dict(enumerate(values))
    missing = [z for z in sample_ids if z not in labels]
    if missing:
        raise ConfigurationError(
            f"groups names {len(labels)} samples, but sample {missing[-1]} is in the report; give one group per sample of "
            "the training dataset, None for those of no group, or sample ids by the name of their group."
        )
    return [labels[z] for z in sample_ids]


def _labelled(labels: Sequence[Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(at) for name, at in named_groups(labels).items()}


def _in_order(members: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name: numbers by their value, before other names."""
    return {name: members[name] for name in sorted(members, key=_place)}


def _place(name: str) -> tuple[float, str]:
    return (len(name), name) if name.isdigit() else (math.inf, name)
