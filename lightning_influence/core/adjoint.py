"""The adjoint of an optimizer's step: derivatives of the queries pulled back through it (docs/method.md, "The sweep").

The maps are elementwise, so their Jacobians are a handful of diagonals, shared by all queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.core.optimizers import Moments, ParameterStep, coupling, decay


@dataclass(frozen=True)
class Adjoint:
    """Derivative of the queries with respect to one parameter's optimizer state: ``(q, d)`` each.

    Attributes:
        moments: empty where the queries do not depend on them: after the last step.
    """

    parameter: Tensor
    moments: Moments = ()

    def at(self, coordinates: slice) -> Adjoint:
        """Some of the coordinates."""
        return Adjoint(self.parameter[:, coordinates], tuple(m[:, coordinates] for m in self.moments))


def join_adjoints(adjoints: Sequence[Adjoint]) -> Adjoint:
    """Adjoints of several parameters end to end."""
    if len(adjoints) == 1:
        return adjoints[0]
    count = max(len(a.moments) for a in adjoints)
    filled = [a.moments or (torch.zeros_like(a.parameter),) * count for a in adjoints]
    moments = tuple(torch.cat(parts, 1) for parts in zip(*filled, strict=True))
    return Adjoint(torch.cat([a.parameter for a in adjoints], 1), moments)


_SETTLED = 3
"""The step from which an update is differentiated in the run's own precision: at the first, the derivative of Adam's is a
difference of nearly equal numbers (docs/method.md, "One optimizer step"), which at the third cost one digit at most."""

_BLOCK = 2**17
"""Coordinates that a processor differentiates at a time: its cache then holds what is computed on the way."""


def adjoint(recorded: ParameterStep, after: Adjoint) -> tuple[Adjoint, Tensor]:
    """Pull the adjoint back through one step (docs/method.md, "The sweep").

    Returns:
        The adjoint before the step, with the loss gradient held fixed, and that of the gradient (`gradient_adjoint`).

    Example:
        Plain SGD with weight decay 0.5, coupled, at a learning rate of 0.1: ``theta' = theta - 0.1 (g + 0.5 theta)``.

        >>> from lightning_influence.core.optimizers import UPDATES
        >>> hyper = {"lr": 0.1, "weight_decay": 0.5, "decoupled": False, "maximize": False, "step": 5}
        >>> before, gradient = adjoint(ParameterStep(UPDATES["sgd"], (), torch.ones(2), hyper), Adjoint(torch.ones(1, 2)))
        >>> before.parameter
        tensor([[0.9500, 0.9500]])
        >>> gradient
        tensor([[-0.1000, -0.1000]])
    """
    hyper = recorded.hyper
    *d_moments, d_gradient = _pulled(recorded, after, moments=True)
    before = Adjoint(decay(hyper) * after.parameter + coupling(hyper) * d_gradient, tuple(d_moments))
    return before, -d_gradient if hyper["maximize"] else d_gradient


def gradient_adjoint(recorded: ParameterStep, after: Adjoint) -> Tensor:
    """``A`` ``(q, d)``, the derivative of the queries with respect to the gradient that the step consumed."""
    (d_gradient,) = _pulled(recorded, after, moments=False)
    return -d_gradient if recorded.hyper["maximize"] else d_gradient


def _pulled(recorded: ParameterStep, after: Adjoint, *, moments: bool) -> list[Tensor]:
    """Derivatives ``(q, d)`` of the queries in each moment, where asked for, and in the effective gradient."""
    total = len(recorded.gradient)
    size = _BLOCK if recorded.gradient.device.type == "cpu" else total
    if total <= size:
        return _pulled_block(recorded, after, moments=moments)
    blocks = [slice(start, start + size) for start in range(0, total, size)]
    parts = [_pulled_block(recorded.at(block), after.at(block), moments=moments) for block in blocks]
    return [torch.cat(part, 1) for part in zip(*parts, strict=True)]


def _pulled_block(recorded: ParameterStep, after: Adjoint, *, moments: bool) -> list[Tensor]:
    if recorded.hyper["step"] < _SETTLED:
        recorded = recorded.to(torch.float64)
    gradient = recorded.gradient.detach().requires_grad_()
    before = [m.detach().requires_grad_(moments) for m in recorded.moments]
    with torch.enable_grad():
        change, new = recorded.update.apply(tuple(before), gradient, recorded.hyper)
    inputs = [*before, gradient] if moments else [gradient]
    cotangents = (after.parameter, *after.moments)
    outputs = (change, *new)[: len(cotangents)]
    if len(after.parameter) > 1:
        return _by_diagonals(outputs, inputs, cotangents)
    pulled = torch.autograd.grad(outputs, inputs, [c[0].to(change) for c in cotangents], materialize_grads=True)
    return [d[None].to(after.parameter) for d in pulled]


def _by_diagonals(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Pull many cotangents ``(q, d)`` back through the Jacobian's diagonals, which are the same for all."""
    pulled: list[Tensor] = []
    for output, cotangent in zip(outputs, cotangents, strict=True):
        ones = torch.ones_like(output)
        diagonals = torch.autograd.grad(output, inputs, ones, retain_graph=True, materialize_grads=True)
        parts = [cotangent * diagonal.to(cotangent) for diagonal in diagonals]
        pulled = [a + b for a, b in zip(pulled, parts, strict=True)] if pulled else parts
    return pulled
