"""The evaluation of a step spread over processes: each runs its part of the batch, and what it finds is put together.

A part is some of the step's micro-batches; where there are fewer of them than processes, it is some samples of a micro-batch, if the
loss has been seen to be a mean or a sum of what its samples say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.core.shares import Form, Layout, pack, unpack
from lightning_influence.core.trajectory import Vectors
from lightning_influence.replay.plan import PlannedMicroBatch, PlannedStep
from lightning_influence.run.batches import without
from lightning_influence.run.ranks import ALONE, Ranks


@dataclass
class Spread:
    """How the steps of a run are spread over processes.

    Attributes:
        ranks: the processes.
        divides: whether a micro-batch may be divided by its samples; None where that is not known yet.
        whole: whether every process has to evaluate every step as a whole, since micro-batches depend on one another.
    """

    ranks: Ranks = ALONE
    divides: bool | None = None
    whole: bool = False

    def part(self, planned: PlannedStep, *, divided: bool | None = None) -> PlannedStep:
        """What this process evaluates of a step; nothing where there is not enough for all.

        Args:
            divided: whether micro-batches are divided by their samples, by default where they may be and have to.
        """
        numbers = torch.arange(len(planned.micro_batches))
        if divided is None:
            divided = bool(self.divides) and self.is_short(planned)
        if divided:
            rows = torch.arange(len(planned.sample_ids)).tensor_split(self.ranks.size)[self.ranks.rank]
        else:
            own = numbers.tensor_split(self.ranks.size)[self.ranks.rank]
            rows = torch.isin(planned.micro_batch_numbers, own).nonzero()[:, 0]
        return _of_rows(planned, rows)

    def is_short(self, planned: PlannedStep) -> bool:
        """Whether a step has fewer micro-batches than there are processes."""
        return len(planned.micro_batches) < self.ranks.size

    def sum(self, vectors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Vectors:
        """Sums over the processes, by name; a process may lack some.

        Args:
            like: tensors of the same shapes, with all names that there may be.
        """
        held = {name for names in self.ranks.gather(list(vectors)) for name in names}
        return {k: self.ranks.sum(vectors[k] if k in vectors else torch.zeros_like(like[k])) for k in like if k in held}

    def gathered(self, shares: Sequence[Mapping[str, Form]]) -> list[dict[str, Form]]:
        """The shares of all processes, micro-batch by micro-batch."""
        tensors: dict[str, Tensor] = {}
        layouts = []
        for number, forms in enumerate(shares):
            packed = {k: pack(form) for k, form in forms.items()}
            tensors |= {f"{number}/{k}/{key}": t for k, (parts, _) in packed.items() for key, t in parts.items()}
            layouts.append({k: layout for k, (_, layout) in packed.items()})
        of_all: list[dict[str, Form]] = []
        for held, of_rank in zip(self.ranks.gather_tensors(tensors), self.ranks.gather(layouts), strict=True):
            for number, by_name in enumerate(of_rank):
                of_all.append({k: _unpacked(layout, held, f"{number}/{k}/") for k, layout in by_name.items()})
        return of_all


def _unpacked(layout: Layout, tensors: Mapping[str, Tensor], prefix: str) -> Form:
    return unpack(layout, lambda key: tensors[prefix + key])


def _of_rows(planned: PlannedStep, rows: Tensor) -> PlannedStep:
    """Some samples of a step, by position, as a step of its own whose loss is their part of the whole step's."""
    micro_batches = list[PlannedMicroBatch]()
    for number, micro_batch in enumerate(planned.micro_batches):
        positions = (planned.micro_batch_numbers == number).nonzero()[:, 0]
        kept = torch.isin(positions, rows)
        if bool(kept.all()):
            micro_batches.append(micro_batch)
        elif bool(kept.any()):
            weights = planned.loss_weights[positions]
            factor = float(weights[kept].sum() / weights.sum()) if planned.averaged else 1.0
            micro_batches.append(
                replace(
                    micro_batch,
                    batch=without(micro_batch.batch, (~kept).nonzero()[:, 0], micro_batch.n_samples),
                    factor=factor * micro_batch.factor,
                    n_samples=int(kept.sum()),
                )
            )
    return replace(
        planned,
        micro_batches=micro_batches,
        sample_ids=planned.sample_ids[rows],
        loss_weights=planned.loss_weights[rows],
        micro_batch_numbers=planned.micro_batch_numbers[rows],
    )
