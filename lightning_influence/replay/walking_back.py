"""A run walked backwards: each step of an optimizer is undone, so that one state is held instead of one for each step.

The parameters before a step follow from what it left; the gradient there, which is evaluated for the Hessian product anyway, then
gives the moments before it. Rounding grows by about a tenth a step, and where the second moments are still young it is
as large as they are, so a walk begins at a state that is known, after the first steps of a run, and is short.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.core.optimizers import Update, effective_gradient, parameter_before
from lightning_influence.core.removal import consumed_gradients
from lightning_influence.core.trajectory import Hyper, StepRecord
from lightning_influence.errors import ReplayDrift
from lightning_influence.replay.plan import State

WALK = 16
"""The most steps from a state that is known: the gradients are then off by about a millionth."""

_SETTLED = 10  # steps, after which the second moments are no longer young


def can_be_undone(update: Update, hypers: Mapping[str, Hyper]) -> bool:
    """Whether a step can be undone.

    Args:
        hypers: of the parameters that it moved.
    """
    if update.inverse is None:
        return False
    return all(h["step"] > _SETTLED and h["beta1"] > 0 and h["beta2"] > 0 for h in hypers.values())


class WalkBack:
    """A state that is moved back, one step at a time: `parameters`, then the step is evaluated there, then `arrive`.

    Args:
        index: of the step before which the run had the state.

    Attributes:
        index: of the step before which the run had `state`.
    """

    def __init__(self, update: Update, index: int, state: State) -> None:
        assert update.inverse is not None
        self._update, self._inverse, self.index, self.state = update, update.inverse, index, state

    def parameters(self, hypers: Mapping[str, Hyper]) -> State:
        """The state before the last step, but for its moments, which are still those after the step."""
        parameters = dict(self.state.parameters)
        for k, hyper in hypers.items():
            if k in parameters:
                parameters[k] = parameter_before(self._inverse, parameters[k], self.state.moments[k], hyper)
        self.state = State(parameters, self.state.moments, self.state.buffers)
        return self.state

    def arrive(self, record: StepRecord, buffers: Mapping[str, Tensor]) -> None:
        """The step has been evaluated.

        Args:
            record: without moments.
            buffers: after the step.

        Raises:
            ReplayDrift: the step cannot be undone.
        """
        before = self.state.buffers
        if record.hyper.keys() - record.gradients.keys() or not all(
            torch.equal(b, before[k]) for k, b in buffers.items()
        ):
            raise ReplayDrift(
                f"step {record.index} cannot be undone: it left buffers or parameters that it did not move."
            )
        moments = dict(self.state.moments)
        for k, gradient in consumed_gradients(record).items():
            parameter = self.state.parameters[k]
            effective = effective_gradient(gradient.view(parameter.shape), parameter, record.hyper[k])
            moments[k] = self._inverse.moments(moments[k], effective, record.hyper[k])
        self.index, self.state = record.index, State(self.state.parameters, moments, before)
