"""What stands for the Hessian of a batch loss in the sweep (method.md section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.trajectory import Shares, StepRecord, Vectors

CURVATURES = ("none", "fisher", "gauss_newton", "hessian")


def fisher_product(record: StepRecord, shares: Mapping[str, Shares], products: Tensor) -> Vectors:
    """Empirical Fisher of the batch times vectors, from the products ``(q, n)`` of vectors and shares.

    With ``s_z = kappa_z grad l_z`` the Fisher of the batch loss is ``sum_z s_z s_z^T / kappa_z``, which
    for a mean over ``n`` is method.md's ``n C S``.
    """
    kappa = record.loss_weights.to(products)
    weights = torch.where(kappa > 0, products / torch.where(kappa > 0, kappa, 1.0), 0.0)
    return {name: share.combine(weights) for name, share in shares.items()}
