"""An optimizer's step as one pure elementwise function; its Jacobian, adjoint and finite response.

Each update rule is written once (docs/method.md, "One optimizer step"). Everything else follows from that function,
by differentiating it or by calling it on changed inputs. Because the maps are elementwise, their
Jacobians are a handful of diagonals, shared by all queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.trajectory import Hyper

Moments: TypeAlias = tuple[Tensor, ...]
Numbers: TypeAlias = tuple[float, ...]


@dataclass(frozen=True)
class Inverse:
    """How an update is undone: its change of the parameter depends on the moments after it alone.

    Attributes:
        change: ``(moments after, hyper) -> change of the parameter``.
        moments: ``(moments after, gradient, hyper) -> moments before``; the gradient is the effective one.
    """

    change: Callable[[Moments, Hyper], Tensor]
    moments: Callable[[Moments, Tensor, Hyper], Moments]


@dataclass(frozen=True)
class Update:
    """An elementwise update rule.

    Attributes:
        moments: names of the moments in ``torch.optim.Optimizer.state``, in order.
        numbers: what a step's hyperparameters come to: the constants of its formula, always as many.
        formula: ``(moments, gradient, numbers) -> (change of the parameter, new moments)``. The gradient
            is the effective one (`effective_gradient`); decoupled weight decay is not part of it.
        inverse: None where a step cannot be undone.
    """

    moments: tuple[str, ...]
    numbers: Callable[[Hyper], Numbers]
    formula: Callable[[Moments, Tensor, Numbers], tuple[Tensor, Moments]]
    inverse: Inverse | None = None

    def apply(self, moments: Moments, gradient: Tensor, hyper: Hyper) -> tuple[Tensor, Moments]:
        """``(change of the parameter, new moments)`` of one step."""
        return self.formula(moments, gradient, self.numbers(hyper))


def _safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0: where ``v = 0`` also ``m = 0``, and nothing moves."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def _adam_numbers(hyper: Hyper) -> Numbers:
    # the bias corrections are gathered into two numbers: the formula is the innermost loop of the finite response
    correction1 = 1 - hyper["beta1"] ** hyper["step"]
    correction2 = math.sqrt(1 - hyper["beta2"] ** hyper["step"])
    scale = -hyper["lr"] * correction2 / correction1
    return 1 - hyper["beta1"], 1 - hyper["beta2"], scale, correction2 * hyper["eps"]


def _adam_moments(moments: Moments, gradient: Tensor, numbers: Numbers) -> Moments:
    m, v = moments
    new1, new2, *_ = numbers
    return torch.lerp(m, gradient, new1), torch.lerp(v, gradient**2, new2)


def _adam_change(m: Tensor, v: Tensor, numbers: Numbers) -> Tensor:
    *_, scale, eps = numbers
    return torch.addcdiv(m.new_zeros(()), m, _safe_sqrt(v) + eps, value=scale)  # fused with what scales it


def _adam(moments: Moments, gradient: Tensor, numbers: Numbers) -> tuple[Tensor, Moments]:
    m, v = _adam_moments(moments, gradient, numbers)
    return _adam_change(m, v, numbers), (m, v)


def _adam_moments_before(moments: Moments, gradient: Tensor, hyper: Hyper) -> Moments:
    m, v = moments
    m = (m - (1 - hyper["beta1"]) * gradient) / hyper["beta1"]
    v = (v - (1 - hyper["beta2"]) * gradient**2) / hyper["beta2"]
    return m, v.clamp(min=0.0)  # rounding may leave less than nothing of what began at zero


_ADAM_INVERSE = Inverse(
    lambda moments, hyper: _adam_change(moments[0], moments[1], _adam_numbers(hyper)), _adam_moments_before
)


def _amsgrad(moments: Moments, gradient: Tensor, numbers: Numbers) -> tuple[Tensor, Moments]:
    m, v = _adam_moments(moments[:2], gradient, numbers)
    largest = torch.maximum(moments[2], v)
    return _adam_change(m, largest, numbers), (m, v, largest)


def _sgd_numbers(hyper: Hyper) -> Numbers:
    return (-hyper["lr"],)


def _sgd(moments: Moments, gradient: Tensor, numbers: Numbers) -> tuple[Tensor, Moments]:
    return numbers[0] * gradient, ()


def _momentum_sgd_numbers(hyper: Hyper) -> Numbers:
    """Momentum, what of the gradient enters the buffer, and what of buffer and gradient the parameter moves by."""
    new = 1 - hyper["dampening"] if hyper["step"] > 1 else 1.0  # torch starts the buffer at the gradient
    if hyper["nesterov"]:
        return hyper["momentum"], new, -hyper["lr"] * hyper["momentum"], -hyper["lr"]
    return hyper["momentum"], new, -hyper["lr"], 0.0


def _momentum_sgd(moments: Moments, gradient: Tensor, numbers: Numbers) -> tuple[Tensor, Moments]:
    (buffer,) = moments
    momentum, new, of_buffer, of_gradient = numbers
    buffer = momentum * buffer + new * gradient
    return of_buffer * buffer + of_gradient * gradient, (buffer,)


UPDATES: dict[str, Update] = {
    "adam": Update(("exp_avg", "exp_avg_sq"), _adam_numbers, _adam, _ADAM_INVERSE),
    "amsgrad": Update(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _adam_numbers, _amsgrad),
    "sgd": Update((), _sgd_numbers, _sgd),
    "momentum_sgd": Update(("momentum_buffer",), _momentum_sgd_numbers, _momentum_sgd),
}
"""The known update rules. AdamW is ``adam`` with ``decoupled`` weight decay."""


def decay(hyper: Hyper) -> float:
    """Factor that decoupled weight decay applies to the parameter itself.

    Example:
        >>> decay({"lr": 0.1, "weight_decay": 0.5, "decoupled": True})
        0.95
        >>> decay({"lr": 0.1, "weight_decay": 0.5, "decoupled": False})
        1.0
    """
    return 1 - hyper["lr"] * hyper["weight_decay"] if hyper["decoupled"] else 1.0


def coupling(hyper: Hyper) -> float:
    """Coefficient of the parameter in the effective gradient: coupled weight decay (L2).

    Example:
        >>> coupling({"weight_decay": 0.5, "decoupled": False})
        0.5
        >>> coupling({"weight_decay": 0.5, "decoupled": True})
        0.0
    """
    return 0.0 if hyper["decoupled"] else hyper["weight_decay"]


def effective_gradient(gradient: Tensor, parameter: Tensor | None, hyper: Hyper) -> Tensor:
    """The gradient that enters the moments: sign of ``maximize``, coupled weight decay added.

    Example:
        >>> hyper = {"maximize": False, "decoupled": False, "weight_decay": 0.5}
        >>> effective_gradient(torch.tensor([1.0]), torch.tensor([4.0]), hyper)
        tensor([3.])

    Raises:
        ValueError: coupled weight decay, and no parameter.
    """
    signed = -gradient if hyper["maximize"] else gradient
    if coupling(hyper) == 0.0:
        return signed
    if parameter is None:
        raise ValueError("coupled weight decay needs the parameter; the step record holds none")
    return signed + coupling(hyper) * parameter


def step(update: Update, parameter: Tensor, moments: Moments, gradient: Tensor, hyper: Hyper) -> tuple[Tensor, Moments]:
    """One optimizer step (docs/method.md, "One optimizer step"): new parameter and moments, shapes as given.

    Args:
        gradient: the gradient that the optimizer consumes, after clipping.

    Example:
        The first step of AdamW is as long as the learning rate, however large the gradient:

        >>> hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 1}
        >>> hyper |= {"weight_decay": 0.0, "decoupled": True, "maximize": False}
        >>> zero = torch.zeros(2)
        >>> parameter, (m, v) = step(UPDATES["adam"], zero, (zero, zero), torch.tensor([0.5, -20.0]), hyper)
        >>> parameter
        tensor([-0.1000,  0.1000])
        >>> m
        tensor([ 0.0500, -2.0000])
    """
    change, moments = update.apply(moments, effective_gradient(gradient, parameter, hyper), hyper)
    return decay(hyper) * parameter + change, moments


def parameter_before(inverse: Inverse, parameter: Tensor, moments: Moments, hyper: Hyper) -> Tensor:
    """The parameter before a step, from what it and its moments are after the step."""
    return (parameter - inverse.change(moments, hyper)) / decay(hyper)


@dataclass(frozen=True)
class ParameterStep:
    """A recorded step of one parameter, or of several joined, where `adjoint` and `finite_response` start from.

    Attributes:
        gradient: ``(d,)`` the effective gradient (`effective_gradient`).
        moments: ``(d,)`` each, before the step.
    """

    update: Update
    moments: Moments
    gradient: Tensor
    hyper: Hyper

    def to(self, dtype: torch.dtype) -> ParameterStep:
        """The same in another precision."""
        if self.gradient.dtype == dtype:
            return self
        moments = tuple(m.to(dtype) for m in self.moments)
        return ParameterStep(self.update, moments, self.gradient.to(dtype), self.hyper)

    def at(self, coordinates: slice) -> ParameterStep:
        """Some of the coordinates."""
        moments = tuple(m[coordinates] for m in self.moments)
        return ParameterStep(self.update, moments, self.gradient[coordinates], self.hyper)

    @cached_property
    def taken(self) -> tuple[Tensor, Moments]:
        """Change of the parameter and moments after the step, as recorded."""
        return self.update.apply(self.moments, self.gradient, self.hyper)


def join(steps: Sequence[ParameterStep]) -> ParameterStep:
    """The same step of several parameters that share their hyperparameters, end to end.

    Example:
        >>> first, second = (ParameterStep(UPDATES["sgd"], (), torch.ones(d), {"lr": 0.5}) for d in (2, 1))
        >>> change, _ = join([first, second]).taken
        >>> change
        tensor([-0.5000, -0.5000, -0.5000])
    """
    if len(steps) == 1:
        return steps[0]
    moments = tuple(torch.cat(parts) for parts in zip(*(s.moments for s in steps), strict=True))
    return replace(steps[0], moments=moments, gradient=torch.cat([s.gradient for s in steps]))
