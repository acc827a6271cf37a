"""Gradient clipping as a function of the batch gradient: applied, and pulled back.

`torch.nn.utils.clip_grad_norm_` scales by ``bound / (norm + 1e-6)`` where that is below 1;
`clip_grad_value_` clamps every coordinate (docs/method.md, "What a removal changes").
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.core.trajectory import Clip, Vectors

_NORM_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


def norm_coefficient(clip: Clip, norm: Tensor | float) -> Tensor:
    """Factor that scales a gradient of the given norm, elementwise in ``norm``; 1 unless the
    rule is ``"norm"``.

    Example:
        >>> norm_coefficient(Clip("norm", bound=1.0), torch.tensor([0.5, 4.0]))
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    norm = torch.as_tensor(norm, dtype=torch.float64)
    if clip.rule != "norm":
        return torch.ones_like(norm)
    return torch.clamp(clip.bound / (norm + _NORM_EPS), max=1.0)


def apply_clip(clip: Clip, gradient: Tensor, coefficient: Tensor) -> Tensor:
    """The consumed gradient of one parameter; ``coefficient`` from `norm_coefficient` broadcasts.

    Example:
        >>> gradient = torch.tensor([3.0, -4.0])
        >>> clip = Clip("norm", bound=1.0, raw_norm=5.0)
        >>> apply_clip(clip, gradient, norm_coefficient(clip, clip.raw_norm))
        tensor([ 0.6000, -0.8000])
        >>> clip = Clip("value", bound=1.0)
        >>> apply_clip(clip, gradient, norm_coefficient(clip, clip.raw_norm))
        tensor([ 1., -1.])
    """
    if clip.rule == "value":
        return gradient.clamp(-clip.bound, clip.bound)
    return gradient * coefficient.to(gradient)


def clip_adjoint(clip: Clip, gradients: Vectors, adjoints: Vectors, scales: Mapping[str, float]) -> Vectors:
    """Derivative of the queries with respect to the gradient before clipping.

    Args:
        gradients: ``(d,)`` each, before clipping.
        adjoints: ``(q, d)`` each, the derivative with respect to the clipped gradient.
        scales: all coordinates over kept ones, the factor that extrapolates an inner product over a mask.

    Example:
        A clamped coordinate passes nothing on; a gradient that is scaled to a norm passes nothing on along itself:

        >>> gradients, adjoints = {"weight": torch.tensor([3.0, 0.5])}, {"weight": torch.ones(1, 2)}
        >>> clip_adjoint(Clip("value", bound=1.0), gradients, adjoints, {"weight": 1.0})["weight"]
        tensor([[0., 1.]])
        >>> gradients, along = {"weight": torch.tensor([3.0, 4.0])}, {"weight": torch.tensor([[3.0, 4.0]])}
        >>> pulled = clip_adjoint(Clip("norm", bound=1.0, raw_norm=5.0), gradients, along, {"weight": 1.0})
        >>> bool(pulled["weight"].norm() < 1e-5)
        True
    """
    if clip.rule == "value":
        return {k: a * (gradients[k].abs() <= clip.bound) for k, a in adjoints.items()}
    coefficient = float(norm_coefficient(clip, clip.raw_norm))
    if coefficient == 1.0:
        return adjoints
    along = sum(scales[k] * (a @ gradients[k].to(a.dtype)) for k, a in adjoints.items())
    slope = coefficient / (clip.raw_norm * (clip.raw_norm + _NORM_EPS))
    return {
        k: coefficient * a - slope * torch.outer(torch.as_tensor(along), gradients[k].to(a.dtype))
        for k, a in adjoints.items()
    }
