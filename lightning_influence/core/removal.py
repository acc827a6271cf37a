"""What a batch gradient becomes when one of its samples is removed (method.md section 6).

Removal is linear in the shares before clipping: ``e_z = shared_z * G + own_z * s_z``, with ``s_z`` the
sample's share and ``G`` the sum of the shares that were averaged with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.core.clipping import apply_clip, norm_coefficient
from lightning_influence.core.trajectory import Clip, Shares, StepRecord, Vectors
from lightning_influence.errors import ConfigurationError

COUNTERFACTUALS = ("drop", "zero")


@dataclass(frozen=True)
class Removal:
    """The change ``e_z`` of the batch gradient before clipping, for every sample of a step.

    Attributes:
        shared: ``(n,)``, coefficient of the micro-batch gradient.
        own: ``(n,)``, coefficient of the sample's own share.
        members: ``(n, n_micro_batches)``, one-hot.
    """

    shared: Tensor
    own: Tensor
    members: Tensor

    def inner(self, products: Tensor) -> Tensor:
        """``<A, e_z>`` ``(q, n)`` from ``<A, s_z>`` ``(q, n)``."""
        members, shared, own = (x.to(products) for x in (self.members, self.shared, self.own))
        return shared * (products @ members @ members.T) + own * products

    def totals(self, shares: Shares, like: Tensor) -> Tensor:
        """Sums of the shares of each micro-batch, ``(n_micro_batches, d)``."""
        return shares.combine(self.members.T.to(like)).to(like)

    def change(self, shares: Shares, samples: slice, totals: Tensor) -> Tensor:
        """``e_z`` of some samples, ``(n', d)``, in the dtype and on the device of ``totals``."""
        rows = shares.dense(samples).to(totals)
        shared = (self.shared[:, None] * self.members)[samples].to(totals)
        return torch.addmm(self.own[samples, None].to(totals) * rows, shared, totals)


def removal(record: StepRecord, counterfactual: Literal["drop", "zero"]) -> Removal:
    """Removal of each sample of a step.

    ``drop`` leaves the mean over one sample fewer; ``zero`` keeps the denominator. Under a sum the
    two are the same. A sample that was alone in its micro-batch takes that loss with it in both.

    Raises:
        ConfigurationError: unknown counterfactual.
    """
    if counterfactual not in COUNTERFACTUALS:
        raise ConfigurationError(f"counterfactual={counterfactual!r}; choose one of {', '.join(COUNTERFACTUALS)}")
    weights = record.loss_weights.double()
    _, numbers = torch.unique(record.micro_batches, return_inverse=True)
    members = torch.nn.functional.one_hot(numbers).double()
    total = (weights @ members) @ members.T
    rest = total - weights
    alone = members.sum(0) @ members.T == 1
    if counterfactual == "zero" or not record.averaged:
        return Removal(torch.zeros_like(weights), -torch.ones_like(weights), members)
    rest = torch.where(alone, 1.0, rest)
    shared = torch.where(alone, 0.0, weights / rest)
    own = torch.where(alone, -1.0, -total / rest)
    return Removal(shared, own, members)


@dataclass(frozen=True)
class ConsumedChange:
    """The change of the gradient that the optimizer consumes, clipping included.

    Attributes:
        coefficients: ``(n,)``, factor of norm clipping without each sample.
    """

    removal: Removal
    clip: Clip
    coefficients: Tensor

    def change(self, gradient: Tensor, shares: Shares, samples: slice, totals: Tensor) -> Tensor:
        """Rows ``(n', d)`` for one parameter; ``gradient`` ``(d,)`` before clipping."""
        raw = self.removal.change(shares, samples, totals)
        if self.clip.rule == "none":
            return raw
        before = apply_clip(self.clip, gradient, norm_coefficient(self.clip, self.clip.raw_norm))
        after = apply_clip(self.clip, gradient + raw, self.coefficients[samples, None])
        return after - before


def consumed_change(
    removed: Removal,
    record: StepRecord,
    shares: Mapping[str, Shares],
    scales: Mapping[str, float],
    chunks: Mapping[str, list[slice]],
) -> ConsumedChange:
    """How each sample's removal changes the consumed gradient.

    Norm clipping needs the norm of the whole gradient without the sample, one pass over all
    parameters; ``scales`` extrapolates masked ones, ``chunks`` bounds the memory.
    """
    clip = record.clip
    n = len(record.sample_ids)
    squared = torch.full((n,), clip.raw_norm**2, dtype=torch.float64)
    if clip.rule == "norm":
        for name, share in shares.items():
            gradient = record.gradients[name].double()
            totals = removed.totals(share, gradient)
            for samples in chunks[name]:
                e = removed.change(share, samples, totals)
                squared[samples] += (scales[name] * (2 * e @ gradient + e.square().sum(1))).cpu()
    return ConsumedChange(removed, clip, norm_coefficient(clip, squared.clamp(min=0).sqrt()))


def consumed_gradients(record: StepRecord) -> Vectors:
    """The gradients ``(d,)`` that the optimizer consumed in a step."""
    if record.clip.rule == "none":
        return dict(record.gradients)
    coefficient = norm_coefficient(record.clip, record.clip.raw_norm)
    return {k: apply_clip(record.clip, g, coefficient) for k, g in record.gradients.items()}
