"""What each of several processes does of an attribution: some queries, and of the replay that it shares with others some removals.

Queries are spread as far as they go. Where there are more processes than queries, several share a replay: they evaluate
parts of each step (`replay.spread`), and each scores the removal of some samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_influence.core.removal_sets import RemovalSets
from lightning_influence.core.scores import RowScores
from lightning_influence.run.ranks import ALONE, Ranks
from lightning_influence.scoring.memory import Holding


class Fabric(Protocol):
    """The processes of a launched `lightning.Fabric`, as far as they are asked."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    @property
    def global_rank(self) -> int:
        """The number of this one."""

    @property
    def device(self) -> torch.device:
        """Where this one computes."""


class ConsumedSamples(Protocol):
    """A run as far as which samples its steps consumed."""

    def __len__(self) -> int: ...

    def sample_ids(self, index: int) -> Tensor:
        """Samples ``(n,)`` that a step consumed."""


@dataclass(frozen=True)
class Deal:
    """The part of one process.

    Attributes:
        queries: that go through the run in this process and those that share its replay.
        sets: whose removal this process scores.
        everyone: all processes.
        replay: those that share its replay.
    """

    queries: range
    sets: RemovalSets
    everyone: Ranks = ALONE
    replay: Ranks = ALONE

    @classmethod
    def of(cls, fabric: Fabric | None, n_queries: int, sets: RemovalSets, run: ConsumedSamples) -> Deal:
        """The part of the process that asks; all of them have to ask."""
        if fabric is None or fabric.world_size == 1:
            return cls(range(n_queries), sets)
        everyone = Ranks(fabric.global_rank, fabric.world_size, fabric.device)
        together = sharing(fabric.world_size, n_queries)
        group, rank = divmod(fabric.global_rank, together)
        own = torch.arange(n_queries).tensor_split(fabric.world_size // together)[group]
        queries = range(int(own[0]), int(own[-1]) + 1) if len(own) else range(0)
        if together == 1:
            return cls(queries, sets, everyone)
        of_torch = dist.new_subgroups(together)[0] if together < fabric.world_size else None
        replay = Ranks(rank, together, fabric.device, of_torch)
        return cls(queries, _dealt(sets, run, replay), everyone, replay)

    def holding(self, own: Callable[[], Holding]) -> Holding:
        """What all processes that share a replay can hold.

        Args:
            own: says what this one can.
        """
        every = self.replay.gather(self.replay.agreed(own))
        names = ("memory_window", "queries", "replay", "pairs")
        return Holding(**{k: min(getattr(h, k) for h in every) for k in names}, in_files=any(h.in_files for h in every))

    def gathered(self, rows: RowScores, run: ConsumedSamples, groups: int) -> RowScores:
        """The rows of all processes, each with the columns of all queries, in the order of one process.

        Args:
            groups: of which the removal was asked for.
        """
        if self.everyone.size == 1:
            return rows
        if self.replay.size > 1:
            of_ranks = enumerate(_of_all(rows, self.replay))
            numbered = [_renumbered(own, rank, self.replay.size, groups) for rank, own in of_ranks]
            rows = _in_order(RowScores.joined(numbered, rows.n_queries), run)
        return RowScores.beside(_of_all(rows, self.everyone)[:: self.replay.size])


def sharing(processes: int, n_queries: int) -> int:
    """How many processes share a replay: as few as divide them so that none is without a query.

    Example:
        >>> [sharing(8, n) for n in (1, 2, 3, 5, 8, 100)]
        [8, 4, 4, 2, 1, 1]
    """
    return next(n for n in range(1, processes + 1) if processes % n == 0 and processes // n <= max(n_queries, 1))


def _dealt(sets: RemovalSets, run: ConsumedSamples, ranks: Ranks) -> RemovalSets:
    """The sets that one process scores: of the samples in the order in which the run meets them every so-manieth, since the
    processes go through the steps together, and so of the groups.
    """
    met = dict.fromkeys(z for t in range(len(run)) for z in run.sample_ids(t).tolist())
    asked: Collection[int] = met if sets.samples is None else set(sets.samples)
    samples = [z for z in met if z in asked][ranks.rank :: ranks.size]
    groups: Sequence[Collection[int]] = list(sets.groups)[ranks.rank :: ranks.size]
    return RemovalSets(samples, groups or ([()] if sets.groups else ()))  # groups are walked through by all or by none


def _of_all(rows: RowScores, ranks: Ranks) -> list[RowScores]:
    """The rows of each process."""
    own = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return [RowScores(**columns) for columns in ranks.gather_tensors(own)]


def _renumbered(rows: RowScores, rank: int, size: int, groups: int) -> RowScores:
    """The rows of a process with groups numbered as they were asked for."""
    numbers = torch.where(rows.sample_ids < 0, -1 - (rank + size * (-1 - rows.sample_ids)), rows.sample_ids)
    return replace(rows, sample_ids=numbers).where(numbers >= -groups)


def _in_order(rows: RowScores, run: ConsumedSamples) -> RowScores:
    """By step, samples as the step holds them; then groups."""
    place: dict[tuple[int, int], int] = {}
    for t in range(len(run)):
        for i, z in enumerate(run.sample_ids(t).tolist()):
            place.setdefault((t, z), i)
    pairs = list(zip(rows.steps.tolist(), rows.sample_ids.tolist(), strict=True))
    keys = [(z < 0, t, place[t, z] if z >= 0 else -z) for t, z in pairs]
    return rows.where(torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64))
