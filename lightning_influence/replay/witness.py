"""Whether per-sample gradients give what a removal does to a training step: asked before the run begins to rely on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning import LightningModule
from torch import Tensor

from lightning_influence.core.trajectory import Clip
from lightning_influence.replay.plan import ReplayMicroBatch, ReplayStep, State
from lightning_influence.replay.removals import Removals
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.run.tap import untap


class _OneStep:
    """A micro-batch at the module's present parameters, as a `plan.Plan`."""

    optimizer = "sgd"
    snapshots = (0,)

    def __init__(self, step: ReplayStep, state: State) -> None:
        self._step, self._state = step, state

    def __len__(self) -> int:
        return 1

    def sample_ids(self, index: int) -> Tensor:
        return self._step.sample_ids

    def step(self, index: int) -> ReplayStep:
        return self._step

    def snapshot(self, index: int) -> State:
        return self._state


def witness(
    module: LightningModule,
    micro_batch: ReplayMicroBatch,
    sample_ids: Tensor,
    loss_weights: Tensor,
    *,
    trained: Sequence[str],
    averaged: bool,
    exclude: Sequence[str] = (),
    frozen_batch_norm: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Removals:
    """Hold the removals that shares give at a micro-batch against evaluations without the sample (method.md section 11).

    Works on a copy of the module that shares its parameters, so that metrics, counters and buffers stay as they are.
    """
    parameters = {k: p.detach() for k, p in module.named_parameters() if k in trained}
    trainer = module._trainer
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    if trainer is not None:
        memo[id(trainer)] = trainer
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:  # whatever a module holds that cannot be copied
        return Removals(
            unverifiable=f"the module cannot be copied to try a step on it ({type(error).__name__}: {error})"
        )
    untap(twin)
    buffers: Mapping[str, Tensor] = {k: b.detach().clone() for k, b in twin.named_buffers()}
    step = ReplayStep(
        [micro_batch],
        sample_ids,
        loss_weights,
        sample_ids.new_zeros(len(sample_ids)),
        {},
        Clip(),
        averaged,
    )
    plan = _OneStep(step, State(parameters, dict.fromkeys(parameters, ()), dict(buffers)))
    with ReplayTrajectory(
        twin,
        plan,
        exclude=exclude,
        frozen_batch_norm=frozen_batch_norm,
        autocast=autocast,
        exact=False,
        progress=False,
    ) as run:
        try:
            return run.witness()
        except (
            RuntimeError
        ) as error:  # checkpointing that allows no second look, say; a true fault shows in training itself
            return Removals(unverifiable=f"a step cannot be evaluated apart from the run ({error})")
