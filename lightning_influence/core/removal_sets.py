"""What is removed: samples, each alone, and groups of samples, each as a whole.

A set of samples is known by one number: a sample alone by its id, group ``g`` by ``-1 - g``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.core.scores import RowScores


@dataclass(frozen=True)
class Leaving:
    """The sets of which a step holds a sample, and their rows among those of the step.

    Attributes:
        sets: ``(u,)`` int64, by number, each once: samples in the order of the step, then groups.
        owner: ``(e,)`` int64, ascending: position in ``sets``, for every row of every set.
        row: ``(e,)`` int64, position in the step.
    """

    sets: Tensor
    owner: Tensor
    row: Tensor


@dataclass(frozen=True)
class RemovalSets:
    """The sets whose removal is asked for.

    Attributes:
        samples: those that are removed alone; None for all.
        groups: sample ids of each group; they may overlap.
    """

    samples: Collection[int] | None = None
    groups: Sequence[Collection[int]] = ()

    def members(self, number: int) -> frozenset[int]:
        """The samples of a set."""
        return frozenset(self.groups[-1 - number]) if number < 0 else frozenset([number])

    def within(self, sample_ids: Tensor) -> Leaving:
        """The sets of which samples ``(n,)`` of a step are.

        Example:
            >>> sets = RemovalSets(samples=[8], groups=[[3, 8], [5]])
            >>> sets.within(torch.tensor([8, 3, 8]))
            Leaving(sets=tensor([ 8, -1]), owner=tensor([0, 0, 1, 1, 1]), row=tensor([0, 2, 0, 1, 2]))
        """
        sample_ids = sample_ids.cpu()
        singles, groups = self._alone(sample_ids), self._grouped(sample_ids)
        if not self.groups:
            return singles
        return Leaving(
            torch.cat([singles.sets, groups.sets]),
            torch.cat([singles.owner, groups.owner + len(singles.sets)]),
            torch.cat([singles.row, groups.row]),
        )

    def measured(self, numbers: Tensor) -> Leaving:
        """The same where the rows ``(n,)`` of a step are sets by number, each whatever it changes as a whole."""
        numbers = numbers.cpu()
        samples = (
            torch.ones_like(numbers, dtype=torch.bool) if self._asked is None else torch.isin(numbers, self._asked)
        )
        rows = torch.where(numbers >= 0, samples, bool(self.groups)).nonzero()[:, 0]
        sets, owner = _in_order(numbers[rows])
        order = owner.argsort(stable=True)
        return Leaving(sets, owner[order], rows[order])

    @property
    def alone(self) -> RemovalSets:
        """Without the groups."""
        return RemovalSets(self.samples)

    @property
    def together(self) -> RemovalSets:
        """The groups alone."""
        return RemovalSets((), self.groups)

    def split(self, rows: RowScores) -> tuple[RowScores, RowScores]:
        """Rows of samples, and those of groups, whose ids are then the numbers of the groups."""
        alone = rows.sample_ids >= 0
        groups = rows.where(~alone)
        return rows.where(alone), replace(groups, sample_ids=-1 - groups.sample_ids)

    def _alone(self, sample_ids: Tensor) -> Leaving:
        rows = torch.arange(len(sample_ids))
        if self._asked is not None:
            rows = rows[torch.isin(sample_ids, self._asked)]
        ids, owner = _in_order(sample_ids[rows])
        order = owner.argsort(stable=True)
        return Leaving(ids, owner[order], rows[order])

    def _grouped(self, sample_ids: Tensor) -> Leaving:
        member, group = self._pairs
        first, last = (torch.searchsorted(member, sample_ids, right=right) for right in (False, True))
        counts = last - first
        row = torch.arange(len(sample_ids)).repeat_interleave(counts)
        offset = torch.arange(len(row)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        numbers, owner = torch.unique(group[first.repeat_interleave(counts) + offset], return_inverse=True)
        order = owner.argsort(stable=True)
        return Leaving(-1 - numbers, owner[order], row[order])

    @cached_property
    def _asked(self) -> Tensor | None:
        return None if self.samples is None else torch.tensor(list(self.samples), dtype=torch.int64)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """A sample and a group that holds it, ``(p,)`` each, by sample."""
        groups = [torch.tensor(sorted(set(members)), dtype=torch.int64) for members in self.groups]
        if not groups:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        member = torch.cat(groups)
        order = member.argsort(stable=True)
        sizes = torch.tensor([len(members) for members in groups])
        return member[order], torch.arange(len(groups)).repeat_interleave(sizes)[order]


EVERY_SAMPLE = RemovalSets()
"""Each sample alone, and no groups."""


def _in_order(sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample once, in the order of first appearance, and the position of every row's sample among them."""
    _, owner, counts = torch.unique(sample_ids, return_inverse=True, return_counts=True)
    if len(counts) == len(sample_ids):
        return sample_ids, torch.arange(len(sample_ids))
    first = torch.full((len(counts),), len(sample_ids))
    first = first.scatter_reduce(0, owner, torch.arange(len(sample_ids)), "amin")
    order = first.argsort()
    return sample_ids[first[order]], order.argsort()[owner]
