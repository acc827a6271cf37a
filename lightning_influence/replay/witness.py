"""Whether per-sample gradients give what a removal does to a training step, and whether the step can be run again: asked before a
run begins to rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.trajectory import Clip, Vectors
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.replay.plan import PlannedMicroBatch, PlannedStep, State
from lightning_influence.replay.removals import RemovalCheck
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.run.moment import eval_modes, set_modes
from lightning_influence.run.random_state import random_state
from lightning_influence.run.task import Task

_TOLERANCE = 1e-3  # relative, of gradients
_TOLERANCE_HALF = 5e-2  # in half precision


class _OneStep:
    """A micro-batch at the module's present parameters, as a `plan.Plan`."""

    optimizer = "sgd"
    snapshots = (0,)

    def __init__(self, step: PlannedStep, state: State) -> None:
        self._step, self._state = step, state

    def __len__(self) -> int:
        return 1

    def sample_ids(self, index: int) -> Tensor:
        return self._step.sample_ids

    def step(self, index: int) -> PlannedStep:
        return self._step

    def snapshot(self, index: int) -> State:
        return self._state

    def parameters(self, index: int) -> dict[str, Tensor]:
        return self._state.parameters


@dataclass(frozen=True)
class Trial:
    """A micro-batch as a run is about to see it.

    Attributes:
        buffers: of the module, before.
    """

    micro_batch: PlannedMicroBatch
    sample_ids: Tensor
    buffers: Mapping[str, Tensor]

    def plan(self, twin: Task, trained: Collection[str], loss_weights: Tensor, averaged: bool) -> _OneStep:
        """As a plan, at the present parameters."""
        ids = self.sample_ids
        step = PlannedStep([self.micro_batch], ids, loss_weights, torch.zeros_like(ids), {}, Clip(), averaged)
        parameters = {k: p.detach() for k, p in twin.module.named_parameters() if k in trained}
        return _OneStep(step, State(parameters, dict.fromkeys(parameters, ()), dict(self.buffers)))


@dataclass(frozen=True)
class Rerun:
    """The gradient of a micro-batch that was run again.

    Attributes:
        gradients: by parameter.
        half: whether it was run in half precision.
    """

    gradients: Vectors
    half: bool


def witness(
    twin: Task,
    trial: Trial,
    loss_weights: Tensor,
    *,
    trained: Collection[str],
    averaged: bool,
    removals: RemovalCheck,
    exclude: Sequence[str] = (),
    frozen_batch_norm: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Rerun | None:
    """Compare the removals that shares give at a micro-batch with evaluations without the sample (docs/method.md, "Removals in
    any module").

    Args:
        removals: what was verified of the run so far; added to.

    Returns:
        The micro-batch as a whole, which had to be run for that; None where that failed.
    """
    with ReplayTrajectory(
        twin,
        trial.plan(twin, trained, loss_weights, averaged),
        exclude=exclude,
        frozen_batch_norm=frozen_batch_norm,
        autocast=autocast,
        exact=False,
        progress=False,
        removals=removals,
    ) as run:
        try:
            return Rerun(run.witness(), run.half)
        except InfluenceError:
            raise
        except Exception as error:  # a step that does not take fewer samples; a true fault shows in training itself
            removals.unverifiable = f"a step cannot be evaluated apart from the run ({error})"
    return None


def evaluated(twin: Task, trial: Trial) -> Tensor:
    """The loss of a micro-batch in eval mode."""
    modes = eval_modes(twin.module)
    twin.module.eval()
    try:
        with twin.quiet(), random_state(None):
            return twin.loss(trial.micro_batch.batch, trial.micro_batch.moment)
    finally:
        set_modes(twin.module, modes)


def rehearse(
    twin: Task,
    trial: Trial,
    expected: Vectors,
    rerun: Rerun | None = None,
    *,
    frozen_batch_norm: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run a micro-batch again, as a replay will.

    Args:
        expected: gradients of its loss that the run found.
        rerun: the micro-batch, where it has been run again already.

    Raises:
        ConfigurationError: it cannot be run again, or gives other gradients.
    """
    if rerun is None or not expected.keys() <= rerun.gradients.keys():
        rerun = _run_again(twin, trial, expected.keys(), frozen_batch_norm=frozen_batch_norm, autocast=autocast)
    replayed = rerun.gradients
    missed = {
        k: float((replayed[k] - g).double().norm()) if k in replayed else float(g.norm()) for k, g in expected.items()
    }
    size = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
    narrow = any(g.dtype in (torch.float16, torch.bfloat16) for g in expected.values())
    distance = sum(m**2 for m in missed.values()) ** 0.5
    if distance > (_TOLERANCE_HALF if rerun.half or narrow else _TOLERANCE) * size:
        raise ConfigurationError(
            f"the training step, run again, gives another gradient than in the run, by {distance / max(size, 1e-30):.2g} of its size "
            f"(most at {max(missed, key=missed.__getitem__)}), so a replay would not follow the run. Either something changes "
            "gradients on their way (a hook on a parameter), or the step reads what is neither in its batch nor a parameter, a "
            "buffer or a plain number of the module: keep such state in a buffer (register_buffer), or use record='gradients'."
        )


def _run_again(twin: Task, trial: Trial, trained: Collection[str], **options: Any) -> Rerun:
    plan = trial.plan(twin, trained, torch.ones(len(trial.sample_ids)), averaged=True)
    try:
        with ReplayTrajectory(twin, plan, exact=False, progress=False, **options) as run:
            return Rerun(run.gradient(0), run.half)
    except InfluenceError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the training step cannot be run again, as a replay would ({type(error).__name__}: {error}). Record with "
            "record='gradients', or make the step depend on its batch and the module alone."
        ) from error
