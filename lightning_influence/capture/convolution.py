"""Convolutions: linear layers over patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.capture.rules import rule
from lightning_influence.core.shares import Dense, Form, Outer


def _patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Windows of a padded input ``(n, c, *space)``: ``(n, positions..., c, *kernel)``."""
    n_space = len(kernel)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, (k - 1) * d + 1, s)[..., ::d]
    order = [0, *range(2, 2 + n_space), 1, *range(2 + n_space, 2 + 2 * n_space)]
    return x.permute(order)


def _grouped(left: Tensor, right: Tensor, groups: int) -> Form:
    """``sum_t left_t right_t^T`` for ``(n, t, r)`` and ``(n, t, g, c)``; rows of one group meet only its columns."""
    if groups == 1:
        return Outer(left, right.flatten(2))
    rows = left.unflatten(2, (groups, -1))
    return Dense(torch.einsum("ntgr,ntgc->ngrc", rows, right).flatten(1))


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """``y_p = W patch_p(x) + b``: as a linear layer, positions for tokens."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    patches = _patches(_padded(layer, inputs), layer.kernel_size, layer.stride, layer.dilation)
    n_space = len(layer.kernel_size)
    right = patches.flatten(1, n_space).unflatten(2, (layer.groups, -1)).flatten(3)
    delta = output_gradient.flatten(2).mT
    return {"weight": _grouped(delta, right, layer.groups), "bias": Dense(delta.sum(1))}


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """The adjoint of a convolution: patches of the output gradient meet the input's positions."""
    assert isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    padding = [size for size in reversed(cast("tuple[int, ...]", layer.padding)) for _ in range(2)]
    patches = _patches(F.pad(output_gradient, padding), layer.kernel_size, layer.stride, layer.dilation)
    for axis, size in enumerate(inputs.shape[2:]):  # output padding adds positions that no input reaches
        patches = patches.narrow(1 + axis, 0, size)
    n_space = len(layer.kernel_size)
    right = patches.flatten(1, n_space).unflatten(2, (layer.groups, -1)).flatten(3)
    bias = output_gradient.flatten(2).sum(2)
    return {"weight": _grouped(inputs.flatten(2).mT, right, layer.groups), "bias": Dense(bias)}
