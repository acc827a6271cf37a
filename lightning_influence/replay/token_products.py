"""A batch's gradient taken apart by the labels whose losses it is the sum of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.core.curvature import Loss, differentiable_attention
from lightning_influence.core.trajectory import Vectors
from lightning_influence.errors import ConfigurationError
from lightning_influence.run.token_losses import TokenLosses

_REST = 1e-2  # of the sum of sizes: what may be left of the gradient besides the labels' losses


@dataclass(frozen=True)
class TokenProducts:
    """Of one micro-batch.

    Attributes:
        targets: ``(labels,)`` int64, the labels themselves.
        weights: ``(labels,)``, in the denominator of a mean.
        products: ``(q, labels)``, of the vectors and each label's part of the gradient.
        whole: ``(q,)``, of the vectors and the gradient.
    """

    targets: Tensor
    weights: Tensor
    products: Tensor
    whole: Tensor


def token_products(loss: Loss, parameters: dict[str, Tensor], vectors: Vectors) -> TokenProducts:
    """Products ``<v, s_t>`` of vectors with the part of every label ``t`` in the gradient of a loss.

    One gradient that can be differentiated again, and for each vector one derivative of its product by the labels' weights.

    Args:
        vectors: ``(q, d)`` each.

    Raises:
        ConfigurationError: no single loss over classes, or one that is only a part of the training loss.
    """
    leaves = {k: p.detach().requires_grad_() for k, p in parameters.items()}
    with differentiable_attention():
        with TokenLosses() as tokens:
            value = loss(leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=True, materialize_grads=True)
        of_tokens = []
        for i in range(len(next(iter(vectors.values())))):
            pairs = zip(leaves, gradients, strict=True)
            whole = torch.stack([(vectors[k][i].to(g) * g.flatten()).sum() for k, g in pairs]).sum()
            (each,) = torch.autograd.grad(whole, tokens.dials, retain_graph=True, materialize_grads=True)
            of_tokens.append((each.detach(), whole.detach()))
    products, total = (torch.stack(part) for part in zip(*of_tokens, strict=True))
    rest = (total - products.sum(1)).abs()
    if bool((rest > _REST * products.abs().sum(1) + 1e-30).any()):
        raise ConfigurationError(
            "the training loss is more than the sum of its labels' losses (a penalty, an auxiliary loss), so tokens cannot "
            "account for the samples' scores; score whole samples with attribute(...)."
        )
    return TokenProducts(tokens.targets.cpu(), tokens.weights.cpu(), products, total)
