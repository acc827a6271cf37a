"""The optimizer step that is about to be taken, with some of its samples taken out of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_influence.capture.step import CollectedStep
from lightning_influence.core.pieces import Part
from lightning_influence.core.shares import Form, Stack
from lightning_influence.core.trajectory import Shares, StepRecord, Vectors
from lightning_influence.errors import CurvatureUnavailable
from lightning_influence.run.ranks import Ranks

_LARGE = 2**14  # coordinates of a parameter that is looked at in part


@dataclass
class LiveStep:
    """The optimizer step that is about to be taken: a trajectory of one step.

    Attributes:
        shapes: of each parameter that is trained.
        full: with every sample in it.
        forms: shares of the samples.
        weights: ``(n,)``, what is left of each of this process's samples.
        ranks: the processes whose gradients are averaged.
        whole: nothing was taken away, on any of them.
    """

    optimizer: str
    sizes: dict[str, tuple[int, int]]
    shapes: dict[str, torch.Size]
    full: StepRecord
    forms: Mapping[str, Form]
    weights: Tensor
    ranks: Ranks
    whole: bool = True
    starts: Sequence[int] = (0,)

    @classmethod
    def of(cls, step: CollectedStep, module: nn.Module, optimizer: str, ranks: Ranks) -> LiveStep:
        """With nothing taken out yet."""
        record = replace(step.record, index=0)
        sizes = {k: (len(g), len(g)) for k, g in record.gradients.items()}
        shapes = {k: p.shape for k, p in module.named_parameters() if p.requires_grad}
        weights = torch.ones(len(record.sample_ids), dtype=torch.float64)
        shares = {k: step.shares[k] for k in record.gradients}
        return cls(optimizer, sizes, shapes, record, shares, weights, ranks)

    def weighted(self, weights: Tensor) -> LiveStep:
        """With each sample weighted; what is averaged together is averaged over the weights."""
        weights = self.weights * weights
        reweighted = self.ranks.sum((weights != 1).sum())
        return replace(self, weights=weights, whole=not bool(reweighted))

    def part(self, fraction: float, number: int) -> Part:
        """The step on some of the rows of every large parameter, others for each ``number``."""
        parts = max(1, round(1 / fraction))
        ranges = {}
        for name, shape in self.shapes.items():
            rows, columns = shape[0] if shape else 1, shape[1:].numel()
            if rows * columns >= _LARGE and rows >= parts:
                i = number % parts
                ranges[name] = slice(rows * i // parts * columns, rows * (i + 1) // parts * columns)
        return Part(self, ranges)

    def write(self, module: nn.Module) -> None:
        """Give the module the gradient that is left."""
        if self.whole:
            return
        gradients = self.record(0).gradients
        for name, p in module.named_parameters():
            if name in gradients and p.grad is not None:
                p.grad.copy_(gradients[name].view_as(p))

    def __len__(self) -> int:
        return 1

    def record(self, index: int) -> StepRecord:
        return self.full if self.whole else self._left_record

    @cached_property
    def _left_record(self) -> StepRecord:
        factors, whole = self._factors, self.full.gradients
        gradients = {k: self._left(form, whole[k], factors) for k, form in self.forms.items()}
        clip = self.full.clip
        if clip.rule == "norm":
            change = sum(float(g.square().sum() - whole[k].square().sum()) for k, g in gradients.items())
            clip = replace(clip, raw_norm=max(clip.raw_norm**2 + change, 0.0) ** 0.5)
        return replace(self.full, gradients=gradients, loss_weights=self.full.loss_weights * factors, clip=clip)

    def _left(self, form: Form, whole: Tensor, factors: Tensor) -> Tensor:
        """The gradient ``(d,)`` that is left of one parameter's whole one."""
        if self.ranks.size > 1 or isinstance(form, Stack):
            return self.ranks.sum(form.combine(factors[None].to(whole))[0])
        # all samples share a factor, and few are taken away
        factor = float(factors.sum() / self.weights.sum())
        removed = form.combine((factor * (self.weights - 1))[None].to(whole))[0]
        return removed.add_(whole, alpha=factor)

    def sample_ids(self, index: int) -> Tensor:
        return self.full.sample_ids

    def shares(self, index: int) -> Mapping[str, Shares]:
        if bool((self._factors == 1).all()):
            return self.forms
        return {k: form.weighted(self._factors) for k, form in self.forms.items()}

    @cached_property
    def _factors(self) -> Tensor:
        """Of each share ``(n,)``: its weight and, under a mean, one over what is left of its micro-batch's weight."""
        if not self.full.averaged:
            return self.weights
        losses, numbers = self.full.loss_weights, self.full.micro_batch_numbers
        n = int(numbers.max()) + 1
        whole = torch.zeros(n, dtype=losses.dtype).index_add_(0, numbers, losses)
        left = torch.zeros(n, dtype=losses.dtype).index_add_(0, numbers, losses * self.weights)
        nothing = left <= 1e-12 * whole  # what is kept weighs nothing in the loss
        return self.weights * torch.where(nothing, 1.0, whole / torch.where(nothing, 1.0, left))[numbers]

    def select(self, name: str, values: Tensor) -> Tensor:
        return values.flatten(values.dim() - len(self.shapes[name]))

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        raise CurvatureUnavailable("a step that is about to be taken has no replay; use curvature='none'.")
