"""The finite response with its elementwise chain compiled into one kernel.

Separate kernels write what each of them computes to memory and read it again. `torch.compile` makes one loop of the whole
window, for which it needs a compiler (a C++ one on a processor) and some seconds; the scores are the same either way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.optimizers import Moments, Numbers, ParameterStep

_log = logging.getLogger(__name__)

_PAYS = 4 * 10**9
"""Evaluations of an optimizer's step by one coordinate of one sample from which compiling is the faster way: at 2 to 4
nanoseconds by separate kernels and about half a nanosecond compiled, they save more seconds than compiling takes."""

_COORDINATES = 4097  # fewer would be compiled once more

_Formula = Callable[[Moments, Tensor, Numbers], tuple[Tensor, Moments]]


class _Compiler:
    """Whether compiling has failed in this process."""

    failed = False


def pays(evaluations: int) -> bool:
    """Whether a run is long enough for its response to be compiled.

    Args:
        evaluations: of the optimizer's step, over all samples, coordinates and steps of all windows.

    Example:
        >>> pays(10**6)
        False
    """
    return evaluations >= _PAYS and not _Compiler.failed


def fused_response(
    window: Sequence[ParameterStep], after: Sequence[Tensor], closing: Moments, change: Tensor, length: int
) -> Tensor | None:
    """`response.finite_response`, compiled; None where it is to be evaluated by separate kernels.

    Args:
        window, after, closing, change: as of `response.finite_response`.
        length: steps of a whole window. A shorter one, at the end of a run, is filled up with steps that weigh nothing,
            so that one kernel serves the run.
    """
    missing = length - len(window)
    short = missing and bool(closing)  # a parameter that rested for a while
    if _Compiler.failed or short or change.shape[1] < _COORDINATES:
        return None
    steps = [step.to(change.dtype) for step in window]
    update, numbers = steps[0].update, [s.update.numbers(s.hyper) for s in steps]
    # what fills up weighs nothing; it lies in memory of its own, since a kernel is compiled anew for inputs that share theirs
    gradients = _filled([s.gradient for s in steps], length)
    bases = [*_filled([s.taken[0] for s in steps], length), *steps[-1].taken[1]]
    weights = _filled([*_filled([w.to(change) for w in after], length), *(w.to(change) for w in closing)], len(bases))
    sign = -1.0 if steps[0].hyper["maximize"] else 1.0
    moments = tuple(map(_on_its_own, steps[0].moments))
    arguments = (update.formula, moments, gradients, numbers + numbers[-1:] * missing, bases, sign * change)
    try:
        with torch.no_grad():
            if len(weights[0]) == 1:
                response: Tensor = _compiled(_contracted)([_on_its_own(w[0]) for w in weights], *arguments)[None]
            else:
                moves = _compiled(_moves)(*arguments)
                response = torch.stack([w @ m.T for w, m in zip(weights, moves, strict=True)]).sum(0)
    except Exception as error:
        _Compiler.failed = True
        _log.warning("finite responses are evaluated by separate kernels, since compiling them failed: %.300r", error)
        return None
    return response


def _filled(tensors: list[Tensor], count: int) -> list[Tensor]:
    return [*map(_on_its_own, tensors), *(torch.zeros_like(tensors[0]) for _ in range(count - len(tensors)))]


def _on_its_own(tensor: Tensor) -> Tensor:
    """The same values, not known as a part of a larger tensor, for whose every shape a kernel would be compiled anew."""
    return tensor.data


def _moves(
    formula: _Formula,
    moments: Moments,
    gradients: Sequence[Tensor],
    numbers: Sequence[Numbers],
    bases: Sequence[Tensor],
    change: Tensor,
) -> list[Tensor]:
    """What a change ``(n, d)`` of the first gradient adds to every step, and to the moments after the last."""
    deltas = []
    gradient = gradients[0] + change
    for following, constants in zip([*gradients[1:], None], numbers, strict=True):
        delta, moments = formula(moments, gradient, constants)
        deltas.append(delta)
        gradient = gradient if following is None else following
    return [new - old for new, old in zip([*deltas, *moments], bases, strict=True)]


def _contracted(weights: Sequence[Tensor], *of_moves: Any) -> Tensor:
    """`_moves` of its arguments times one adjoint, ``(n,)``; none of them is written to memory."""
    moves = _moves(*of_moves)
    total = moves[0] * weights[0]
    for move, weight in zip(moves[1:], weights[1:], strict=True):
        total = total + move * weight
    return total.sum(1)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)
