"""Normalisation layers: an elementwise scale and shift of the normalised input."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.capture.rules import rule, tokens
from lightning_influence.core.shares import Dense, Form


def _over_tokens(normalised: Tensor, output_gradient: Tensor, shape: tuple[int, ...]) -> dict[str, Form]:
    """Features in the last dimensions: everything before them is summed."""
    delta = tokens(output_gradient, len(shape)).flatten(2)
    return {
        "weight": Dense((delta * tokens(normalised, len(shape)).flatten(2)).sum(1)),
        "bias": Dense(delta.sum(1)),
    }


def _over_channels(normalised: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """Channels in dimension 1: everything after them is summed."""
    products, delta = normalised * output_gradient, output_gradient
    return {
        "weight": Dense(products.reshape(*products.shape[:2], -1).sum(2)),
        "bias": Dense(delta.reshape(*delta.shape[:2], -1).sum(2)),
    }


@rule(nn.LayerNorm)
def layer_norm(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """``y = w x_hat + b`` with ``x_hat`` normalised over the last dimensions."""
    assert isinstance(layer, nn.LayerNorm)
    shape = tuple(layer.normalized_shape)
    return _over_tokens(F.layer_norm(inputs, list(shape), eps=layer.eps), output_gradient, shape)


@rule(nn.RMSNorm)
def rms_norm(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """``y = w x / rms(x)``."""
    assert isinstance(layer, nn.RMSNorm)
    shape = tuple(layer.normalized_shape)
    shares = _over_tokens(F.rms_norm(inputs, list(shape), eps=layer.eps), output_gradient, shape)
    return {"weight": shares["weight"]}


@rule("RMSNorm")
def transformers_rms_norm(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """The RMS norms of `transformers` (Llama, Mistral, Qwen, Gemma, ...), each a class of its own."""
    eps = cast(float, layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps)
    normalised = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + eps)
    return {"weight": _over_tokens(normalised, output_gradient, (inputs.shape[-1],))["weight"]}


@rule(nn.GroupNorm)
def group_norm(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """``y = w_c x_hat + b_c``, normalised over groups of channels."""
    assert isinstance(layer, nn.GroupNorm)
    return _over_channels(F.group_norm(inputs, layer.num_groups, eps=layer.eps), output_gradient)


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """``y = w_c x_hat + b_c``, normalised over the positions of each channel."""
    assert isinstance(layer, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
    own = layer.training or not layer.track_running_stats
    mean, variance = (None, None) if own else (layer.running_mean, layer.running_var)
    normalised = F.instance_norm(inputs, mean, variance, use_input_stats=own, eps=layer.eps)
    return _over_channels(normalised, output_gradient)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def frozen_batch_norm(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """``y = w_c x_hat + b_c`` with the running statistics; with the batch's own, samples would be coupled."""
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    normalised = F.batch_norm(inputs, layer.running_mean, layer.running_var, training=False, eps=layer.eps)
    return _over_channels(normalised, output_gradient)
