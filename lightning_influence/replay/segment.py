"""Some consecutive steps run forward from a state: their gradients, from which every state between can be made again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.core.optimizers import Update, step
from lightning_influence.core.removal import consumed_gradients
from lightning_influence.core.trajectory import StepRecord
from lightning_influence.errors import ReplayDrift
from lightning_influence.replay.evaluation import Evaluation
from lightning_influence.replay.plan import State


def state_after(update: Update, record: StepRecord, state: State, buffers: Mapping[str, Tensor]) -> State:
    """The state after a step, by the pure update in the run's own precision.

    Args:
        record: of the step; its gradients are read, its moments are not.
        buffers: after the step.

    Raises:
        ReplayDrift: a gradient that is finite makes a parameter that is not.
    """
    parameters, moments = dict(state.parameters), dict(state.moments)
    for k, gradient in consumed_gradients(record).items():
        shape = parameters[k].shape
        parameters[k], moments[k] = step(update, parameters[k], moments[k], gradient.view(shape), record.hyper[k])
    if math.isfinite(record.clip.raw_norm):  # a look-ahead may meet one that is not, in a run that is still to come
        _refuse_not_finite(record, parameters)
    return State(parameters, moments, dict(buffers))


def _refuse_not_finite(record: StepRecord, parameters: Mapping[str, Tensor]) -> None:
    sums = torch.stack([parameters[k].sum(dtype=torch.float64) for k in record.gradients] or [torch.zeros(())])
    if not bool(sums.isfinite().all()):
        wrong = next(k for k, total in zip(record.gradients, sums, strict=True) if not total.isfinite())
        raise ReplayDrift(
            f"step {record.index}: the optimizer's step, replayed with {record.hyper[wrong]}, makes {wrong} not finite."
        )


class Segment:
    """Steps from ``start`` to ``stop``, which grows.

    Args:
        start, state: where it begins.
        every: of every so many steps the state is held; those between are made again from the gradients.

    Attributes:
        evaluations: of steps, those that are kept.
    """

    def __init__(self, update: Update, start: int, state: State, every: int = 1) -> None:
        self.start, self._update, self._every = start, update, every
        self.evaluations: dict[int, Evaluation] = {}
        self._records: list[StepRecord] = []
        self._buffers: list[Mapping[str, Tensor]] = []  # after each step
        self._held = {start: state}
        self._last = start, state  # asked for

    @property
    def stop(self) -> int:
        """The step after the last."""
        return self.start + len(self._records)

    def append(self, record: StepRecord, buffers: Mapping[str, Tensor]) -> None:
        """The next step.

        Args:
            record: without moments.
            buffers: after the step.
        """
        self._records.append(record)
        self._buffers.append(buffers)

    def record(self, index: int) -> StepRecord:
        """A step's record, without moments."""
        return self._records[index - self.start]

    def state(self, index: int) -> State:
        """The state before a step, or after the last."""
        if index != self._last[0]:
            nearest, state = max((i, s) for i, s in [*self._held.items(), self._last] if i <= index)
            self._last = nearest, state
            for i in range(nearest, index):
                offset = i - self.start
                self._last = (
                    i + 1,
                    state_after(self._update, self._records[offset], self._last[1], self._buffers[offset]),
                )
                if (i + 1 - self.start) % self._every == 0:
                    self._held[i + 1] = self._last[1]
        return self._last[1]
