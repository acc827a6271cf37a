"""How much each sample of a batch weighs in the batch's mean loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.errors import ConfigurationError

WeightSource: TypeAlias = "Callable[[Any], Tensor] | None"

IGNORED_LABEL = -100
"""The label that `torch.nn.functional.cross_entropy` and `transformers` leave out of a mean."""


def sample_weights(batch: Any, n_samples: int, source: WeightSource = None) -> Tensor:
    """Relative weights ``(n,)`` of the samples of a batch, float64.

    By default all samples weigh the same, except where the batch is a mapping whose integer ``labels``
    ``(n, tokens)`` leave tokens out by the label -100: the loss is then taken to be the mean over the
    remaining next-token targets ``labels[:, 1:]``, as in the causal models of `transformers`.

    Args:
        source: function of the batch that gives the weights instead.

    Raises:
        ConfigurationError: weights of another shape, negative, not finite or all zero.
    """
    weights = source(batch) if source is not None else _default(batch)
    if weights is None:
        return torch.ones(n_samples, dtype=torch.float64)
    weights = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    valid = weights.shape == (n_samples,) and bool((weights >= 0).all() and torch.isfinite(weights).all())
    if not valid or not weights.sum() > 0:
        raise ConfigurationError(
            f"sample_weights gave a tensor of shape {tuple(weights.shape)} with values {weights.flatten()[:5].tolist()}; "
            f"it has to give {n_samples} finite weights >= 0, one per sample and not all zero."
        )
    return weights


def _default(batch: Any) -> Tensor | None:
    """None where all samples weigh the same."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        counted = labels != IGNORED_LABEL
        if not counted.all():
            return counted[:, 1:].sum(1)
    return None
