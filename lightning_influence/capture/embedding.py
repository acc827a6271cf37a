"""Embeddings: the output gradient lands on the rows that were looked up, and is kept sparse."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_influence.capture.rules import rule, tokens
from lightning_influence.core.shares import Form, SparseRows
from lightning_influence.errors import ConfigurationError


@rule(nn.Embedding)
def embedding(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> dict[str, Form]:
    """``y_t = W[i_t]``: ``delta_t`` is added at row ``i_t``; the padding row has no gradient.

    Raises:
        ConfigurationError: gradients scaled by the frequency in the batch, which couples the samples.
    """
    assert isinstance(layer, nn.Embedding)
    if layer.scale_grad_by_freq:
        raise ConfigurationError(
            "an Embedding has scale_grad_by_freq=True, which makes every sample's gradient depend on the others; set it "
            "to False or freeze the embedding."
        )
    rows, delta = inputs.reshape(len(inputs), -1), tokens(output_gradient)
    if layer.padding_idx is not None:
        delta = delta * (rows != layer.padding_idx)[..., None]
    return {"weight": SparseRows(rows, delta, layer.num_embeddings)}
