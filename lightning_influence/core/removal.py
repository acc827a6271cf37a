"""What a batch gradient becomes when a sample, or a group of samples, is removed (docs/method.md, "What a removal changes").

A removal is linear in the shares before clipping: ``e_z = sum_b shared_zb G_b + sum_i own_i s_i``, with ``s_i`` the shares
of what is removed and ``G_b`` the gradient of each micro-batch ``b``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.core.clipping import apply_clip, norm_coefficient
from lightning_influence.core.removal_sets import EVERY_SAMPLE, RemovalSets
from lightning_influence.core.trajectory import Clip, Shares, StepRecord, Vectors
from lightning_influence.errors import check_choice

COUNTERFACTUALS = ("drop", "zero")


@dataclass(frozen=True)
class GradientChange:
    """The change ``e_z`` of the batch gradient before clipping, for every set ``z`` of samples that may leave a step.

    A set leaves as a whole: a sample that a step holds several times, or a group, with all its rows together.

    Attributes:
        sample_ids: ``(u,)``, the sets by number, as of `RemovalSets`: a sample alone by its id.
        shared: ``(u, n_micro_batches)``, coefficients of the micro-batch gradients.
        own: ``(e,)``, coefficient of a share in the change that it takes part in.
        owner: ``(e,)`` int64, ascending: position in ``sample_ids`` of the set that the share leaves with.
        row: ``(e,)`` int64, position of the share in the step.
        members: ``(n, n_micro_batches)``, one-hot.
    """

    sample_ids: Tensor
    shared: Tensor
    own: Tensor
    owner: Tensor
    row: Tensor
    members: Tensor

    def __len__(self) -> int:
        return len(self.sample_ids)

    def inner(self, products: Tensor) -> Tensor:
        """``<A, e_z>`` ``(q, u)`` from ``<A, s>`` ``(q, n)`` of every share."""
        members, shared, own = (x.to(products) for x in (self.members, self.shared, self.own))
        changes = products @ members @ shared.T
        owner, row = self.owner.to(products.device), self.row.to(products.device)
        return changes.index_add_(1, owner, own * products[:, row])

    def totals(self, shares: Shares, like: Tensor) -> Tensor:
        """Sums of the shares of each micro-batch, ``(n_micro_batches, d)``."""
        return shares.combine(self.members.T.to(like)).to(like)

    def change(self, shares: Shares, sets: slice | Tensor, totals: Tensor) -> Tensor:
        """``e_z`` of some sets, by position, ``(u', d)``, in the dtype and on the device of ``totals``."""
        shared = self.shared[sets].to(totals)
        chosen = torch.arange(len(self))[sets]
        own, row, of = self._entries(chosen)
        if len(of) == len(chosen) and len(row) and bool((row.diff() == 1).all()):  # one share each, side by side
            rows = slice(int(row[0]), int(row[-1]) + 1)
            return torch.addmm(own[:, None].to(totals) * shares.dense(rows).to(totals), shared, totals)
        weights = torch.zeros(len(chosen), len(self.members), dtype=own.dtype)
        weights[of, row] = own
        return torch.addmm(shares.combine(weights.to(totals)).to(totals), shared, totals)

    def _entries(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``own`` and ``row`` of the entries of some sets, and the position in ``chosen`` of the set of each."""
        counts = self.owner.bincount(minlength=len(self))
        starts, counts = (counts.cumsum(0) - counts)[chosen], counts[chosen]
        of = torch.arange(len(chosen)).repeat_interleave(counts)
        entry = torch.arange(len(of)) + (starts - counts.cumsum(0) + counts).repeat_interleave(counts)
        return self.own[entry], self.row[entry], of


def gradient_change(
    record: StepRecord, counterfactual: Literal["drop", "zero"], sets: RemovalSets = EVERY_SAMPLE
) -> GradientChange:
    """The change by the removal of each sample of a step, or of other sets of samples.

    For a mean with weights ``w`` (total ``W``, gradient ``G``), ``drop`` gives ``(w_z G - W s_z) / (W - w_z)`` in every
    micro-batch that holds the sample, and ``zero`` keeps the denominator: ``-s_z``. Under a sum the two are the same. Of a
    set, ``w_z`` and ``s_z`` are the sums. Where nothing is left of a micro-batch, both counterfactuals remove its whole loss.
    Where the changes were measured, the shares are the changes themselves, one row a set.

    Raises:
        ConfigurationError: unknown counterfactual.

    Example:
        A mean over samples with the gradients 1, 2 and 6 has the gradient 3, and 4, 3.5 and 1.5 without one of them:

        >>> from lightning_influence.core.shares import Dense
        >>> ids, mean, one_batch = torch.tensor([7, 8, 9]), torch.full((3,), 1 / 3), torch.zeros(3, dtype=torch.int64)
        >>> gradients = {"weight": torch.tensor([3.0])}
        >>> record = StepRecord(0, ids, mean, one_batch, gradients, moments={}, hyper={})
        >>> shares = Dense(torch.tensor([[1.0], [2.0], [6.0]]) / 3)
        >>> removed = gradient_change(record, "drop")
        >>> removed.change(shares, slice(None), removed.totals(shares, like=gradients["weight"]))
        tensor([[ 1.0000],
                [ 0.5000],
                [-1.5000]])
        >>> gradient_change(record, "zero").inner(shares.inner(torch.ones(1, 1)))
        tensor([[-0.3333, -0.6667, -2.0000]])
    """
    check_choice("counterfactual", counterfactual, COUNTERFACTUALS)
    weights = record.loss_weights.double().cpu()
    known, numbers = torch.unique(record.micro_batch_numbers.cpu(), return_inverse=True)
    members = torch.nn.functional.one_hot(numbers, max(len(known), 1)).double()
    leaving = (sets.measured if record.measured else sets.within)(record.sample_ids)
    ids, owner, row = leaving.sets, leaving.owner, leaving.row
    nothing, ones = weights.new_zeros(len(ids), members.shape[1]), torch.ones_like(weights[row])
    if record.measured:
        return GradientChange(ids, nothing, ones, owner, row, members)
    if counterfactual == "zero" or not record.averaged:
        return GradientChange(ids, nothing, -ones, owner, row, members)
    # by set and micro-batch: the weight that leaves, and what is left
    leaves = nothing.index_add(0, owner, (weights[:, None] * members)[row])
    total = weights @ members
    rest = total - leaves
    rows = nothing.index_add(0, owner, members[row])
    alone = (rows == members.sum(0)) | (rest <= 1e-12 * total)
    rest = torch.where(alone, 1.0, rest)
    shared = torch.where(alone, 0.0, leaves / rest)
    own = torch.where(alone, -1.0, -total / rest)[owner, numbers[row]]
    return GradientChange(ids, shared, own, owner, row, members)


@dataclass(frozen=True)
class ConsumedChange:
    """The change of the gradient that the optimizer consumes, clipping included.

    Attributes:
        before_clipping: the same before clipping.
        clip: of the step.
        coefficients: ``(u,)``, factor of norm clipping without each set.
    """

    before_clipping: GradientChange
    clip: Clip
    coefficients: Tensor

    def change(self, gradient: Tensor, shares: Shares, samples: slice | Tensor, totals: Tensor) -> Tensor:
        """Rows ``(n', d)`` for one parameter; ``gradient`` ``(d,)`` before clipping."""
        raw = self.before_clipping.change(shares, samples, totals)
        if self.clip.rule == "none":
            return raw
        before = apply_clip(self.clip, gradient, norm_coefficient(self.clip, self.clip.raw_norm))
        after = apply_clip(self.clip, gradient + raw, self.coefficients[samples, None])
        return after - before


def consumed_change(
    removed: GradientChange,
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
    squared = torch.full((len(removed),), clip.raw_norm**2, dtype=torch.float64)
    if clip.rule == "norm":
        for name, share in shares.items():
            gradient = record.gradients[name].double()
            totals = removed.totals(share, gradient)
            for samples in chunks[name]:
                e = removed.change(share, samples, totals)
                squared[samples] += (scales[name] * (2 * e @ gradient + e.square().sum(1))).cpu()
    return ConsumedChange(removed, clip, norm_coefficient(clip, squared.clamp(min=0).sqrt()))


def consumed_gradients(record: StepRecord) -> Vectors:
    """The gradients ``(d,)`` that the optimizer consumed in a step.

    Example:
        >>> one = torch.ones(1, dtype=torch.int64)
        >>> clip = Clip("norm", bound=1.0, raw_norm=5.0)
        >>> record = StepRecord(0, one, one.double(), one, {"weight": torch.tensor([3.0, 4.0])}, {}, {}, clip=clip)
        >>> consumed_gradients(record)
        {'weight': tensor([0.6000, 0.8000])}
    """
    if record.clip.rule == "none":
        return dict(record.gradients)
    coefficient = norm_coefficient(record.clip, record.clip.raw_norm)
    return {k: apply_clip(record.clip, g, coefficient) for k, g in record.gradients.items()}
