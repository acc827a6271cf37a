"""What a training step does with a batch that only trying it tells: whether it remembers samples, and whether it minds padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.replay.passes import Passes, copies
from lightning_influence.replay.plan import PlannedMicroBatch
from lightning_influence.run.batches import without
from lightning_influence.run.parameters import placed
from lightning_influence.run.random_state import random_state
from lightning_influence.run.task import Task

_SAME = 1e-6  # relative


class Tries:
    """Runs a micro-batch forward on a copy of a module, at chosen buffers.

    Args:
        twin: on the copy, which shares the module's parameters.
        autocast: makes the context of the run's mixed precision.
    """

    def __init__(self, twin: Task, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self._twin, self._passes = twin, Passes(twin, autocast)

    def remembered(self, micro_batch: PlannedMicroBatch, buffers: Mapping[str, Tensor]) -> str | None:
        """The name of a buffer in which the step leaves something of its samples, and which its loss reads."""
        first = torch.zeros(1, dtype=torch.int64)
        less = replace(
            micro_batch,
            batch=without(micro_batch.batch, first, micro_batch.n_samples),
            n_samples=micro_batch.n_samples - 1,
        )
        if less.n_samples == 0 or micro_batch.less is not None:
            return None
        whole, rest = self._after(micro_batch, buffers)[1], self._after(less, buffers)[1]
        for name in whole:
            if whole[name].shape == rest[name].shape and _same(whole[name], rest[name]):
                continue
            one, other = (self._after(micro_batch, {**buffers, name: b[name]})[0] for b in (whole, rest))
            if not _same(one, other):
                return name
        return None

    def same_loss(self, micro_batch: PlannedMicroBatch, one: Any, other: Any, buffers: Mapping[str, Tensor]) -> bool:
        """Whether two batches of a sample fewer have the same loss; they have not, where the step takes only the first."""
        n = micro_batch.n_samples - 1
        losses = list[Tensor]()
        for batch in (one, other):
            try:
                losses.append(self._after(replace(micro_batch, batch=batch, n_samples=n), buffers)[0])
            except Exception:  # of the step, which takes no such batch
                losses.append(torch.tensor(torch.nan))
        return _same(*losses) or bool(losses[0].isnan())

    def _after(self, micro_batch: PlannedMicroBatch, buffers: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the buffers that the step leaves."""
        with (
            torch.no_grad(),
            random_state(None),
            self._twin.quiet(),
            placed(self._twin.module, copies(buffers)) as inside,
        ):
            loss = self._passes.loss(micro_batch).detach().clone()
        return loss, {k: inside[k].detach() for k in buffers}


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    return bool(torch.equal(a, b) or (a - b).norm() <= _SAME * b.norm())
