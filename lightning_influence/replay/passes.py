"""Forward and backward passes of the micro-batches of a step, at chosen parameters and buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.capture import GradientCapture
from lightning_influence.core.shares import Form
from lightning_influence.core.torch_function import keywords_of
from lightning_influence.core.trajectory import Vectors
from lightning_influence.replay.plan import PlannedMicroBatch, PlannedStep, State
from lightning_influence.replay.stopped_paths import NotedPaths, OpenPaths, StopWatch
from lightning_influence.run.kept_random import NotedRandom
from lightning_influence.run.moment import set_modes
from lightning_influence.run.parameters import placed
from lightning_influence.run.random_state import read_random_state, write_random_state
from lightning_influence.run.task import Task


@dataclass(frozen=True)
class Pass:
    """What a forward and backward pass gave.

    Attributes:
        gradients: of the parameters that have one; the optimizer skips the others.
        shares: None where they were not captured.
        buffers: after the pass.
        drew: whether the training step drew random numbers, of the micro-batch's own random state.
    """

    gradients: dict[str, Tensor]
    shares: dict[str, Form] | None
    buffers: dict[str, Tensor]
    drew: bool = False


class Passes:
    """Runs a task's loss on micro-batches, in the modes and at the moment of the run.

    Args:
        task: what is trained.
        autocast: makes the context of the run's mixed precision.

    Attributes:
        half: whether a pass so far ran in half precision.
    """

    def __init__(self, task: Task, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.task, self.module, self._autocast = task, task.module, autocast
        self.half = False
        self._looked = False  # whether the first pass has told

    def loss(self, micro_batch: PlannedMicroBatch) -> Tensor:
        """A micro-batch's part in the loss of its step, at what the module now holds."""
        set_modes(self.module, micro_batch.moment.in_eval)
        if micro_batch.random is not None:
            write_random_state(micro_batch.random)
        watch = _AutocastWatch(self.task.device.type)
        with self._autocast(), nullcontext() if self._looked else watch:
            loss = self.task.loss(micro_batch.batch, micro_batch.moment)
        self.half, self._looked = self.half or watch.seen, True
        return loss * micro_batch.factor

    def loss_at(self, micro_batch: PlannedMicroBatch, state: State) -> Callable[[dict[str, Tensor]], Tensor]:
        """`loss` as a function of parameters, the others as in a state."""

        def loss(values: dict[str, Tensor]) -> Tensor:
            with placed(self.module, state.parameters | values | copies(state.buffers)):
                return self.loss(micro_batch)

        return loss

    def run(
        self,
        leaves: dict[str, Tensor],
        buffers: Mapping[str, Tensor],
        micro_batch: PlannedMicroBatch,
        *,
        exact: bool = False,
        capture: GradientCapture | None = None,
        stopped: dict[str, Tensor] | None = None,
        drawing: AbstractContextManager[Any] | None = None,
    ) -> Pass:
        """One forward and backward pass.

        Args:
            exact: whether the gradients will be differentiated again.
            capture: hooks for the shares.
            stopped: leaves for the paths that the loss stops (`stopped_paths`), to be followed.
            drawing: a context for the pass, which gives it random numbers.
        """
        if stopped and capture is not None:  # whose own hooks detach what they keep
            captured = self.run(leaves, buffers, micro_batch, capture=capture)
            return replace(self.run(leaves, buffers, micro_batch, exact=exact, stopped=stopped), shares=captured.shares)
        noted = OpenPaths()
        if stopped:
            with placed(self.module, stopped | copies(buffers)), noted:
                self.loss(micro_batch)
        shares: dict[str, Form] | None = None
        with placed(self.module, leaves | copies(buffers)) as inside, drawing or nullcontext():
            if capture is not None:
                capture.attach()
                capture.begin(micro_batch.n_samples)
            try:
                with NotedPaths(noted) if stopped else nullcontext():
                    loss = self.loss(micro_batch)
                if capture is not None:
                    capture.end_forward()
                drew = _drew(micro_batch)
                gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=exact, allow_unused=True)
                shares = None if capture is None else capture.take()
            finally:
                if capture is not None:
                    capture.detach()
        present = {k: g for k, g in zip(leaves, gradients, strict=True) if g is not None}
        return Pass(present, shares, {k: inside[k].detach() for k in buffers}, drew)

    def noted_random(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], micro_batch: PlannedMicroBatch
    ) -> NotedRandom:
        """The random numbers that a micro-batch's training step draws."""
        noted = NotedRandom()
        with torch.no_grad(), placed(self.module, {**parameters, **copies(buffers)}), noted:
            self.loss(micro_batch)
        return noted

    def whole(self, planned: PlannedStep, state: State) -> Pass:
        """The gradient of a whole step, by parameter and in its shape, and the buffers after it, without shares."""
        total: dict[str, Tensor] = {}
        leaves, buffers, drew = leaves_of(state.parameters), state.buffers, False
        for micro_batch in planned.micro_batches:
            one = self.run(leaves, buffers, micro_batch)
            buffers, drew = one.buffers, drew or one.drew
            total |= {k: total[k] + g if k in total else g for k, g in one.gradients.items()}
        return Pass(total, None, dict(buffers), drew)

    def slope(self, planned: PlannedStep, state: State, direction: Vectors) -> Vectors:
        """Central difference of a step's gradient along a direction of the parameters, by name and in their shapes."""
        length = math.sqrt(sum(float(d.double().square().sum()) for d in direction.values()))
        own = math.sqrt(sum(float(p.double().square().sum()) for p in state.parameters.values()))
        double = next(iter(state.parameters.values())).dtype == torch.float64
        size = (1e-5 if double else 1e-3) * own / max(length, 1e-30)
        sides: list[dict[str, Tensor]] = []
        for sign in (size, -size):
            moved = {k: p + sign * direction[k] if k in direction else p for k, p in state.parameters.items()}
            sides.append(self.whole(planned, replace(state, parameters=moved)).gradients)
        return {k: (sides[0][k] - sides[1][k]) / (2 * size) for k in sides[0]}

    def stop_paths(
        self, planned: PlannedStep, leaves: dict[str, Tensor], buffers: Sequence[Mapping[str, Tensor]]
    ) -> bool:
        """Whether the training step stops a path from a parameter, by ``detach`` or ``no_grad``."""
        watch = StopWatch()
        for micro_batch, before in zip(planned.micro_batches, buffers, strict=False):
            with placed(self.module, leaves | copies(before)), watch:
                self.loss(micro_batch)
        return watch.seen


def _drew(micro_batch: PlannedMicroBatch) -> bool:
    """Whether random numbers were drawn since a micro-batch's random state was put in force."""
    if micro_batch.random is None:
        return False
    start, state = micro_batch.random, read_random_state()
    return any(not torch.equal(start[k], state[k]) for k in start if k in state)


class _AutocastWatch(TorchFunctionMode):
    """Notes whether functions run under autocast, which a loss may enter by itself.

    Attributes:
        seen: whether one did.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type, self.seen = device_type, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch.is_autocast_enabled(self._device_type)
        return func(*args, **keywords_of(func, kwargs))


def leaves_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, to be differentiated by."""
    return {k: p.detach().requires_grad_() for k, p in parameters.items()}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of their own, since a training step may write to its buffers."""
    return {k: t.clone() for k, t in tensors.items()}
