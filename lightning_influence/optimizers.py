"""An optimizer's step as one pure elementwise function; its Jacobian, adjoint and finite response.

Each update rule is written once (method.md section 2). Everything else follows from that function,
by differentiating it or by calling it on changed inputs. Because the maps are elementwise, their
Jacobians are a handful of diagonals, shared by all queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.errors import UnsupportedOptimizer
from lightning_influence.trajectory import Hyper

Moments: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Update:
    """An elementwise update rule.

    Attributes:
        moments: names of the moments in ``torch.optim.Optimizer.state``, in order.
        apply: ``(moments, gradient, hyper) -> (change of the parameter, new moments)``. The gradient
            is the effective one (`effective_gradient`); decoupled weight decay is not part of it.
    """

    moments: tuple[str, ...]
    apply: Callable[[Moments, Tensor, Hyper], tuple[Tensor, Moments]]


def _safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0: where ``v = 0`` also ``m = 0``, and nothing moves."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def _adam_moments(moments: Moments, gradient: Tensor, hyper: Hyper) -> Moments:
    m, v = moments
    return torch.lerp(m, gradient, 1 - hyper["beta1"]), torch.lerp(v, gradient**2, 1 - hyper["beta2"])


def _adam_change(m: Tensor, v: Tensor, hyper: Hyper) -> Tensor:
    # the bias corrections are gathered into two numbers, and the division fused with what scales it: this is the
    # innermost loop of the finite response
    correction1 = 1 - hyper["beta1"] ** hyper["step"]
    correction2 = math.sqrt(1 - hyper["beta2"] ** hyper["step"])
    scale = -hyper["lr"] * correction2 / correction1
    return torch.addcdiv(m.new_zeros(()), m, _safe_sqrt(v) + correction2 * hyper["eps"], value=scale)


def _adam(moments: Moments, gradient: Tensor, hyper: Hyper) -> tuple[Tensor, Moments]:
    m, v = _adam_moments(moments, gradient, hyper)
    return _adam_change(m, v, hyper), (m, v)


def _amsgrad(moments: Moments, gradient: Tensor, hyper: Hyper) -> tuple[Tensor, Moments]:
    m, v = _adam_moments(moments[:2], gradient, hyper)
    largest = torch.maximum(moments[2], v)
    return _adam_change(m, largest, hyper), (m, v, largest)


def _sgd(moments: Moments, gradient: Tensor, hyper: Hyper) -> tuple[Tensor, Moments]:
    return -hyper["lr"] * gradient, ()


def _momentum_sgd(moments: Moments, gradient: Tensor, hyper: Hyper) -> tuple[Tensor, Moments]:
    (buffer,) = moments
    dampening = hyper["dampening"] if hyper["step"] > 1 else 0.0  # torch starts the buffer at the gradient
    buffer = hyper["momentum"] * buffer + (1 - dampening) * gradient
    direction = gradient + hyper["momentum"] * buffer if hyper["nesterov"] else buffer
    return -hyper["lr"] * direction, (buffer,)


UPDATES: dict[str, Update] = {
    "adam": Update(("exp_avg", "exp_avg_sq"), _adam),
    "amsgrad": Update(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _amsgrad),
    "sgd": Update((), _sgd),
    "momentum_sgd": Update(("momentum_buffer",), _momentum_sgd),
}
"""The known update rules. AdamW is ``adam`` with ``decoupled`` weight decay."""


def decay(hyper: Hyper) -> float:
    """Factor that decoupled weight decay applies to the parameter itself."""
    return 1 - hyper["lr"] * hyper["weight_decay"] if hyper["decoupled"] else 1.0


def coupling(hyper: Hyper) -> float:
    """Coefficient of the parameter in the effective gradient: coupled weight decay (L2)."""
    return 0.0 if hyper["decoupled"] else hyper["weight_decay"]


def effective_gradient(gradient: Tensor, parameter: Tensor | None, hyper: Hyper) -> Tensor:
    """The gradient that enters the moments: sign of ``maximize``, coupled weight decay added."""
    signed = -gradient if hyper["maximize"] else gradient
    if coupling(hyper) == 0.0:
        return signed
    if parameter is None:
        raise ValueError("coupled weight decay needs the parameter; the step record holds none")
    return signed + coupling(hyper) * parameter


def step(update: Update, parameter: Tensor, moments: Moments, gradient: Tensor, hyper: Hyper) -> tuple[Tensor, Moments]:
    """One optimizer step (method.md section 2): new parameter and moments, shapes as given.

    Args:
        gradient: the gradient that the optimizer consumes, after clipping.
    """
    change, moments = update.apply(moments, effective_gradient(gradient, parameter, hyper), hyper)
    return decay(hyper) * parameter + change, moments


@dataclass(frozen=True)
class RecordedStep:
    """A recorded step of one parameter, or of several joined, where `adjoint` and `finite_response` start from.

    Attributes:
        gradient: ``(d,)`` the effective gradient (`effective_gradient`).
        moments: ``(d,)`` each, before the step.
    """

    update: Update
    moments: Moments
    gradient: Tensor
    hyper: Hyper

    def to(self, dtype: torch.dtype) -> RecordedStep:
        """The same in another precision."""
        if self.gradient.dtype == dtype:
            return self
        moments = tuple(m.to(dtype) for m in self.moments)
        return RecordedStep(self.update, moments, self.gradient.to(dtype), self.hyper)

    def at(self, coordinates: slice) -> RecordedStep:
        """Some of the coordinates."""
        moments = tuple(m[coordinates] for m in self.moments)
        return RecordedStep(self.update, moments, self.gradient[coordinates], self.hyper)

    @cached_property
    def taken(self) -> tuple[Tensor, Moments]:
        """Change of the parameter and moments after the step, as recorded."""
        return self.update.apply(self.moments, self.gradient, self.hyper)


def join(steps: Sequence[RecordedStep]) -> RecordedStep:
    """The same step of several parameters that share their hyperparameters, end to end."""
    if len(steps) == 1:
        return steps[0]
    moments = tuple(torch.cat(parts) for parts in zip(*(s.moments for s in steps), strict=True))
    return replace(steps[0], moments=moments, gradient=torch.cat([s.gradient for s in steps]))


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
difference of nearly equal numbers (method.md section 2), which at the third cost one digit at most."""

_BLOCK = 2**17
"""Coordinates that a processor differentiates at a time: its cache then holds what is computed on the way."""


def adjoint(recorded: RecordedStep, after: Adjoint) -> tuple[Adjoint, Tensor]:
    """Pull the adjoint back through one step (method.md section 3).

    Returns:
        The adjoint before the step, with the loss gradient held fixed, and that of the gradient (`gradient_adjoint`).
    """
    hyper = recorded.hyper
    *d_moments, d_gradient = _pulled(recorded, after, moments=True)
    before = Adjoint(decay(hyper) * after.parameter + coupling(hyper) * d_gradient, tuple(d_moments))
    return before, -d_gradient if hyper["maximize"] else d_gradient


def gradient_adjoint(recorded: RecordedStep, after: Adjoint) -> Tensor:
    """``A`` ``(q, d)``, the derivative of the queries with respect to the gradient that the step consumed."""
    (d_gradient,) = _pulled(recorded, after, moments=False)
    return -d_gradient if recorded.hyper["maximize"] else d_gradient


def _pulled(recorded: RecordedStep, after: Adjoint, *, moments: bool) -> list[Tensor]:
    """Derivatives ``(q, d)`` of the queries in each moment, where asked for, and in the effective gradient."""
    total = len(recorded.gradient)
    size = _BLOCK if recorded.gradient.device.type == "cpu" else total
    if total <= size:
        return _pulled_block(recorded, after, moments=moments)
    blocks = [slice(start, start + size) for start in range(0, total, size)]
    parts = [_pulled_block(recorded.at(block), after.at(block), moments=moments) for block in blocks]
    return [torch.cat(part, 1) for part in zip(*parts, strict=True)]


def _pulled_block(recorded: RecordedStep, after: Adjoint, *, moments: bool) -> list[Tensor]:
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


def finite_response(
    window: Sequence[RecordedStep],
    after: Sequence[Tensor],
    closing: Moments,
    change: Tensor,
) -> Tensor:
    """Exact response of the queries to a finite change of one step's gradient (method.md section 5).

    The elementwise step runs forward through the window on the changed and on the recorded moments,
    with the recorded gradients; the difference of the parameter updates is contracted with the
    adjoint, and what is left in the moments at the end of the window with theirs.

    Args:
        window: the recorded step and the up to ``memory_window`` steps that follow.
        after: ``(q, d)``, the adjoint of the parameter after each step of the window.
        closing: ``(q, d)`` each, the adjoint of the moments after the last step of the window; empty for zero.
        change: ``(n, d)``, change of the gradient consumed in the first step, one row a sample.

    Returns:
        ``(q, n)``, the predicted changes of the queries, in the precision of ``change``.
    """
    first = window[0].to(change.dtype)
    if first.hyper["maximize"]:
        change = -change
    response = torch.zeros(after[0].shape[0], change.shape[0], dtype=change.dtype, device=change.device)
    changed = first.moments
    for position, (step, weight) in enumerate(zip(window, after, strict=True)):
        recorded = step.to(change.dtype)
        gradient = recorded.gradient + change if position == 0 else recorded.gradient
        delta, changed = recorded.update.apply(changed, gradient, recorded.hyper)
        base_delta, base = recorded.taken
        response += weight.to(change) @ (delta - base_delta).T
    for weight, new, old in zip(closing, changed, base, strict=bool(closing)):
        response += weight.to(change) @ (new - old).T
    return response


def update_name(optimizer: torch.optim.Optimizer) -> str:
    """Key of `UPDATES` for a torch optimizer.

    Raises:
        UnsupportedOptimizer: the optimizer's step is not one of the known elementwise functions.
    """
    groups = optimizer.param_groups
    kind = type(optimizer)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return _one_rule(kind, {"amsgrad" if g["amsgrad"] else "adam" for g in groups})
    if kind is torch.optim.SGD:
        return _one_rule(kind, {"momentum_sgd" if g["momentum"] else "sgd" for g in groups})
    raise UnsupportedOptimizer(
        f"the optimizer is {kind.__module__}.{kind.__qualname__}, whose step is not a known elementwise "
        "function; influence is defined for torch.optim.AdamW, Adam (also amsgrad) and SGD "
        "(also momentum, nesterov). Use one of these, not a subclass or a wrapper."
    )


def _one_rule(kind: type, names: set[str]) -> str:
    if len(names) > 1:
        raise UnsupportedOptimizer(
            f"the parameter groups of {kind.__name__} use different update rules ({', '.join(sorted(names))}); "
            "give all groups the same amsgrad (Adam) or all or none of them momentum (SGD)."
        )
    return names.pop()


def read_hyper(group: dict[str, Any], state: dict[str, Any], kind: type) -> dict[str, float]:
    """Hyperparameters of one parameter for its next step.

    Args:
        group: its entry of ``optimizer.param_groups``.
        state: its entry of ``optimizer.state``; empty before its first step.
        kind: class of the optimizer.
    """
    hyper: dict[str, float] = {
        "lr": float(group["lr"]),
        "weight_decay": float(group["weight_decay"]),
        "maximize": float(group["maximize"]),
    }
    if kind is torch.optim.SGD:
        started = state.get("momentum_buffer") is not None
        hyper |= {key: float(group[key]) for key in ("momentum", "dampening", "nesterov")}
        # SGD keeps no step count, and only its first step differs from the others.
        return hyper | {"decoupled": 0.0, "step": 2.0 if started else 1.0}
    beta1, beta2 = group["betas"]
    decoupled = kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))
    return hyper | {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "decoupled": float(decoupled),
        "step": float(state.get("step", 0)) + 1,
    }


def read_moments(state: dict[str, Any], update: Update, like: Tensor) -> Moments:
    """Moments of one parameter before its next step, shaped like it; zeros before the first. They are the optimizer's
    own tensors, which its step changes in place.
    """
    values = (state.get(key) for key in update.moments)
    return tuple(torch.zeros_like(like) if v is None else v.detach() for v in values)
