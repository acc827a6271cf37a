"""The optimizer's exact response to a finite change of one step's gradient (docs/method.md, "The finite response")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_influence.core.fused import fused_response
from lightning_influence.core.optimizers import Moments, ParameterStep


def finite_response(
    window: Sequence[ParameterStep],
    after: Sequence[Tensor],
    closing: Moments,
    change: Tensor,
    later: Sequence[Tensor | None] | None = None,
    fuse: int | None = None,
) -> Tensor:
    """Exact response of the queries to a finite change of one step's gradient (docs/method.md, "The finite response").

    The elementwise step runs forward through the window on the changed and on the recorded moments,
    with the recorded gradients; the difference of the parameter updates is contracted with the
    adjoint, and what is left in the moments at the end of the window with theirs.

    Args:
        window: the recorded step and the up to ``memory_window`` steps that follow.
        after: ``(q, d)``, the adjoint of the parameter after each step of the window.
        closing: ``(q, d)`` each, the adjoint of the moments after the last step of the window; empty for zero.
        change: ``(n, d)``, change of the gradient consumed in the first step, one row a sample.
        later: changes ``(n, d)`` of the gradients of the window's steps that are made in any case, None for none; the
            first is not looked at. The response is then that of a run which makes them, to ``change`` besides.
        fuse: the steps of a whole window, where its kernels are to be compiled into one (`fused`), which ``later`` keeps
            separate.

    Returns:
        ``(q, n)``, the predicted changes of the queries, in the precision of ``change``.

    Example:
        Adam's first step depends on the sign of the gradient alone: where a change turns it, the parameter moves by twice
        the learning rate; where it does not, by nothing.

        >>> from lightning_influence.core.optimizers import UPDATES
        >>> hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 0.0, "step": 1, "maximize": False}
        >>> zero = torch.zeros(1)
        >>> first = ParameterStep(UPDATES["adam"], (zero, zero), torch.tensor([1.0]), hyper)
        >>> response = finite_response([first], [torch.ones(1, 1)], (), torch.tensor([[-3.0], [2.0]]))
        >>> response.round(decimals=4).abs()
        tensor([[0.2000, 0.0000]])
    """
    if fuse is not None and later is None:
        compiled = fused_response(window, after, closing, change, fuse)
        if compiled is not None:
            return compiled
    sign = -1.0 if window[0].hyper["maximize"] else 1.0
    changes = [sign * change, *(None if c is None else sign * c for c in (later or [None] * len(window))[1:])]
    response = torch.zeros(after[0].shape[0], change.shape[0], dtype=change.dtype, device=change.device)
    changed = base = window[0].to(change.dtype).moments
    recorded_so_far = True  # whether the base is the recorded run itself
    for position, (step, weight, further) in enumerate(zip(window, after, changes, strict=True)):
        recorded = step.to(change.dtype)
        gradient = recorded.gradient if further is None else recorded.gradient + further
        delta, changed = recorded.update.apply(changed, gradient, recorded.hyper)
        recorded_so_far &= position == 0 or further is None
        if recorded_so_far:
            base_delta, base = recorded.taken
        else:
            base_delta, base = recorded.update.apply(base, gradient, recorded.hyper)
        response += weight.to(change) @ (delta - base_delta).T
    for weight, new, old in zip(closing, changed, base, strict=bool(closing)):
        response += weight.to(change) @ (new - old).T
    return response
