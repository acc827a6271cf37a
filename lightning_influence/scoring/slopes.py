"""Whether the gradient that autograd gives of a loss is how the loss changes, by its values on either side of a place.

Gradient reversal, straight-through estimators and other functions with a backward of their own have a gradient that serves training
and is not the derivative of the loss. Their part of a gradient is told apart by letting nothing through them, and the loss is looked
at along it: along the whole gradient a wrong part is hard to see beside a large right one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from lightning_influence.core.trajectory import Vectors
from lightning_influence.run.parameters import parameters_at

_TOLERATED = 0.1  # relative error of what is looked at
_NOISE = 30  # rounding errors of the loss, or of 1 where it is smaller, that its change has to exceed
_MATTERS = 1e-3  # relative size of a part of the gradient
_COMPILED = "CompiledFunction"  # of torch.compile, whose backward is right


@dataclass(frozen=True)
class Slope:
    """Values of a loss a step before a place, at it, and a step after it.

    Attributes:
        step: in multiples of the direction.
        eps: rounding error of 1 in the precision of the parameters.
    """

    before: float
    at: float
    after: float
    step: float
    eps: float

    @property
    def central(self) -> float:
        """Change of the loss along the direction."""
        return (self.after - self.before) / (2 * self.step)

    def misses(self, expected: float, size: float) -> bool:
        """Whether the change is not the ``expected`` one, by more of ``size`` than bends, kinks and rounding explain.

        A kink and a bend lie between the changes to either side.
        """
        sides = (self.at - self.before) / self.step, (self.after - self.at) / self.step
        noise = _NOISE * self.eps * max(1.0, abs(self.at)) / self.step
        return max(min(sides) - expected, expected - max(sides)) > max(_TOLERATED * size, noise)


@dataclass(frozen=True)
class Gradient:
    """The gradient of a loss, and what of it comes through functions with a backward of their own.

    Attributes:
        at: the loss.
        whole: its gradient by autograd.
        part: what comes through those functions; all of it where there are none.
        functions: their names.
    """

    at: float
    whole: Vectors
    part: Vectors
    functions: str

    @classmethod
    def of(cls, loss: Tensor, parameters: Mapping[str, Tensor]) -> Gradient:
        """Of a loss with its graph, which is used up."""
        at, own = float(loss.detach()), _own_backwards(loss)
        if own:
            names = ", ".join(sorted({_name(node) for node in own}))
            with suppress(RuntimeError):  # a graph that cannot be used twice, such as one with compiled parts
                whole = _gradient(loss, parameters, keep_graph=True)
                return cls(at, whole, _part_through(own, loss, parameters, whole), names)
        whole = _gradient(loss, parameters)
        return cls(at, whole, whole, "")

    def differs_from(self, other: Gradient, tolerance: float) -> bool:
        """Whether another one is not the same, by more than a tolerance relative to the other."""
        apart = sum(_norm(g - other.whole[k]) for k, g in self.whole.items())
        return apart > tolerance * sum(map(_norm, other.whole.values()))

    def slope(
        self, loss: Callable[[], float], module: nn.Module, parameters: Mapping[str, Tensor], along: Vectors
    ) -> Slope:
        """How the loss, which ``loss`` gives at the parameters that the module then has, changes along a direction."""
        dtype = next(iter(parameters.values())).dtype
        size = sum(map(_norm, parameters.values())) / max(sum(map(_norm, along.values())), 1e-30)
        step = size * (1e-6 if dtype == torch.float64 else 2e-4)
        values = []
        for sign in (-step, step):
            with parameters_at(module, {k: p.detach() + sign * along[k] for k, p in parameters.items()}):
                values.append(loss())
        return Slope(values[0], self.at, values[1], step, torch.finfo(dtype).eps)

    def is_of(
        self, loss: Callable[[], float], module: nn.Module, parameters: Mapping[str, Tensor], tolerance: float
    ) -> bool:
        """Whether the loss changes along the gradient as it says, within a relative tolerance."""
        expected = dot(self.whole, self.whole)
        change = self.slope(loss, module, parameters, self.whole).central
        return abs(change - expected) <= tolerance * expected

    def error(self, loss: Callable[[], float], module: nn.Module, parameters: Mapping[str, Tensor]) -> str | None:
        """What is wrong with it, in words; None where nothing is, or where it cannot be told."""
        size = dot(self.part, self.part)
        if size <= _MATTERS**2 * dot(self.whole, self.whole):
            return None
        try:
            slope = self.slope(loss, module, parameters, self.part)
        except Exception:  # whatever a module raises at parameters that it never had
            return None
        expected = dot(self.part, self.whole)
        if not slope.misses(expected, size):
            return None
        where = f"along what comes through {self.functions}" if self.functions else "along it"
        return (
            f"the gradient of the query loss is not how the loss changes: {where}, the loss of the first query changes by "
            f"{slope.central / size**0.5:.3g} instead of {expected / size**0.5:.3g} a unit, because of a custom backward such as "
            "gradient reversal or a straight-through estimator in the loss"
        )


def dot(a: Vectors, b: Vectors) -> float:
    """Of two gradients, in double precision."""
    return sum(float((_real(a[k]) * _real(b[k])).sum()) for k in a)


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _own_backwards(loss: Tensor) -> list[Node]:
    """The functions in the graph of a loss whose backward somebody wrote in Python."""
    waiting, seen = [loss.grad_fn], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return [node for node in seen if isinstance(node, BackwardCFunction) and _name(node) != _COMPILED]


def _name(node: Node) -> str:
    return type(node).__name__.removesuffix("Backward")


def _part_through(own: list[Node], loss: Tensor, parameters: Mapping[str, Tensor], gradient: Vectors) -> Vectors:
    """What of a gradient comes through some functions: what is missing where they are given nothing."""
    hooks = [node.register_prehook(lambda given: tuple(None if g is None else g * 0 for g in given)) for node in own]
    try:
        rest = _gradient(loss, parameters)
    finally:
        for hook in hooks:
            hook.remove()
    return {k: g - rest[k] for k, g in gradient.items()}


def _gradient(loss: Tensor, parameters: Mapping[str, Tensor], *, keep_graph: bool = False) -> Vectors:
    if not loss.requires_grad:
        return {k: torch.zeros_like(p) for k, p in parameters.items()}
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=keep_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, gradients, strict=True))


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().norm())
