"""Linear layers: the weight's share is a sum of outer products, lossless in its factors."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_influence.capture.rules import rule, tokens
from lightning_influence.core.shares import Dense, Form, Outer


@rule(nn.Linear)
def linear(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """``y = W x + b``: ``dW = sum_t delta_t x_t^T``, ``db = sum_t delta_t``."""
    delta = tokens(output_gradient)
    return {"weight": Outer(delta, tokens(inputs)), "bias": Dense(delta.sum(1))}


@rule("Conv1D")
def transposed_linear(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """The ``Conv1D`` of `transformers`, a linear layer whose weight is stored as ``(in, out)``."""
    delta = tokens(output_gradient)
    return {"weight": Outer(tokens(inputs), delta), "bias": Dense(delta.sum(1))}
