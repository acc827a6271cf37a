"""Selection inside the step: samples leave the gradient that the backward pass has already produced.

Immediate scores (horizon 0) need no roll-out. The shares of the step's gradient come from the training backward,
and the whole target is read only every so often (`live_target`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from lightning_influence.capture import GradientCapture
from lightning_influence.core.optimizers import UPDATES, coupling
from lightning_influence.core.optimizers import step as take_step
from lightning_influence.core.removal import consumed_gradients
from lightning_influence.core.shares import Form, Stack
from lightning_influence.core.sweep import sweep
from lightning_influence.core.trajectory import Shares, StepRecord, Vectors
from lightning_influence.errors import CurvatureUnavailable
from lightning_influence.run.optimizer import read_hyper, read_moments, update_name
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.sample_ids import SampleIds
from lightning_influence.run.sample_weights import sample_weights
from lightning_influence.run.trainer import clip_of, loss_scaler, only_optimizer
from lightning_influence.run.training_step import parameters_at

if TYPE_CHECKING:
    from lightning_influence.lightning.datamodule import SelectionDataModule


@dataclass(frozen=True)
class _MicroBatch:
    sample_ids: Tensor
    loss_weights: Tensor
    shares: Mapping[str, Form]


class StepSelection(L.Callback):
    """Takes samples out of a run's gradients; `SelectionDataModule` adds it to the trainer."""

    def __init__(self, data: SelectionDataModule) -> None:
        self.data, self.sample_ids = data, SampleIds()
        self._capture: GradientCapture | None = None
        self._started: tuple[Tensor, Tensor] | None = None
        self._micro_batches: list[_MicroBatch] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.sample_ids.listen_to(trainer.strategy)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ranks = Ranks.of(trainer)
        self._capture = GradientCapture(pl_module)
        self._capture.attach()
        self.sample_ids.start(trainer.train_dataloader)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.sample_ids.start(trainer.train_dataloader)  # it may have been reloaded

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._capture is not None
        ids = self.sample_ids.next(batch)
        weights = sample_weights(batch, len(ids))
        self._started = ids, weights / weights.sum() / (trainer.accumulate_grad_batches * self._ranks.size)
        self._capture.begin(len(ids))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._capture is not None and self._started is not None
        scaler = loss_scaler(trainer)
        shares = self._capture.take(1.0 / (self._ranks.size * (1.0 if scaler is None else scaler.get_scale())))
        self._micro_batches.append(_MicroBatch(*self._started, shares))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        micro_batches, self._micro_batches = self._micro_batches, []
        step = LiveStep.read(trainer, micro_batches, self._ranks)
        scores = torch.zeros(len(step.weights))
        for policy in self.data.portions:
            left = step.weights > 0
            target = self._target_after(trainer, step)
            rows = sweep(step, target, self.data.method, progress=False)
            scores[left] = rows.of(step.full.sample_ids[left])[:, 0].to(scores)
            step = step.weighted(self.data.decide(policy, scores, step.full.sample_ids, step.full.micro_batches, left))
        step.write(pl_module)
        self.data.note(trainer, step.full.sample_ids, scores, step.weights)

    def _target_after(self, trainer: L.Trainer, step: LiveStep) -> Vectors:
        """The target gradient where the step leads: that is where the removal of a sample is felt."""
        module, record, update = trainer.lightning_module, step.record(0), UPDATES[step.optimizer]
        parameters = {k: p.detach() for k, p in module.named_parameters() if k in record.gradients}
        moved = {
            k: take_step(update, parameters[k].flatten(), record.moments[k], gradient, record.hyper[k])[0]
            for k, gradient in consumed_gradients(record).items()
        }
        with parameters_at(module, moved):
            return self.data.live_target.gradient(module, self.data.target_batches(), step.select, trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._capture is not None:
            self._capture.detach()
        trainer.strategy.__dict__.pop("process_dataloader", None)
        self.sample_ids.stop()


@dataclass
class LiveStep:
    """The optimizer step that is about to be taken: a trajectory of one step.

    Attributes:
        full: with every sample in it.
        dims: number of dimensions of each parameter that is trained.
        forms: shares of the samples.
        weights: ``(n,)``, what is left of each of this process's samples.
        ranks: the processes whose gradients are averaged.
        whole: nothing was taken away, on any of them.
    """

    optimizer: str
    sizes: dict[str, tuple[int, int]]
    dims: dict[str, int]
    full: StepRecord
    forms: Mapping[str, Form]
    weights: Tensor
    ranks: Ranks
    whole: bool = True

    @classmethod
    def read(cls, trainer: L.Trainer, micro_batches: list[_MicroBatch], ranks: Ranks) -> LiveStep:
        """From the trainer's optimizer and the micro-batches whose backward has run."""
        optimizer, module = only_optimizer(trainer), trainer.lightning_module
        update = update_name(optimizer)
        forms: dict[str, Form] = {
            k: form if len(micro_batches) == 1 else Stack([m.shares[k] for m in micro_batches])
            for k, form in micro_batches[0].shares.items()
        }
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        own = {k: p for k, p in module.named_parameters() if k in forms and p.grad is not None}
        hyper = {k: read_hyper(groups[p], optimizer.state.get(p, {}), type(optimizer)) for k, p in own.items()}
        clip = clip_of(trainer)
        if clip.rule == "norm":
            norms = torch.stack([p.grad.norm() for p in groups if p.grad is not None])
            clip = replace(clip, raw_norm=float(torch.linalg.vector_norm(norms)))
        record = StepRecord(
            index=0,
            sample_ids=torch.cat([m.sample_ids for m in micro_batches]),
            loss_weights=torch.cat([m.loss_weights for m in micro_batches]),
            micro_batches=torch.cat([torch.full_like(m.sample_ids, i) for i, m in enumerate(micro_batches)]),
            gradients={k: p.grad.detach().flatten() for k, p in own.items() if p.grad is not None},
            moments={
                k: tuple(m.flatten() for m in read_moments(optimizer.state.get(p, {}), UPDATES[update], p))
                for k, p in own.items()
            },
            hyper=hyper,
            clip=clip,
            parameters={k: p.detach().flatten() for k, p in own.items() if coupling(hyper[k])},
        )
        sizes = {k: (p.numel(), p.numel()) for k, p in own.items()}
        dims = {k: p.dim() for k, p in module.named_parameters() if p.requires_grad}
        weights = torch.ones(len(record.sample_ids), dtype=torch.float64)
        return cls(update, sizes, dims, record, {k: forms[k] for k in own}, weights, ranks)

    def weighted(self, weights: Tensor) -> LiveStep:
        """With each sample weighted; what is averaged together is averaged over the weights."""
        weights = self.weights * weights
        taken = self.ranks.sum((weights != 1).sum())
        return replace(self, weights=weights, whole=not bool(taken))

    def write(self, module: L.LightningModule) -> None:
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
        # all samples are averaged together, and few are taken away
        factor = float(factors.sum() / self.weights.sum())
        taken = form.combine((factor * (self.weights - 1))[None].to(whole))[0]
        return taken.add_(whole, alpha=factor)

    def sample_ids(self, index: int) -> Tensor:
        return self.full.sample_ids

    def shares(self, index: int) -> Mapping[str, Shares]:
        factors = self._factors
        return {k: _Weighted(form, factors) for k, form in self.forms.items()}

    @cached_property
    def _factors(self) -> Tensor:
        """Of each share ``(n,)``: its weight, over the mean weight of its micro-batch."""
        losses, numbers = self.full.loss_weights, self.full.micro_batches
        n = int(numbers.max()) + 1
        whole = torch.zeros(n, dtype=losses.dtype).index_add_(0, numbers, losses)
        left = torch.zeros(n, dtype=losses.dtype).index_add_(0, numbers, losses * self.weights)
        return self.weights * (whole / left.clamp(min=1e-30))[numbers]

    def select(self, name: str, values: Tensor) -> Tensor:
        return values.flatten(values.dim() - self.dims[name])

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        raise CurvatureUnavailable("a step that is about to be taken has no replay; use curvature='none'.")


@dataclass(frozen=True)
class _Weighted:
    """Shares times a factor of each sample."""

    shares: Form
    factors: Tensor

    @property
    def n_samples(self) -> int:
        return self.shares.n_samples

    @property
    def n_coordinates(self) -> int:
        return self.shares.n_coordinates

    def inner(self, vectors: Tensor) -> Tensor:
        return self.shares.inner(vectors) * self.factors.to(vectors)

    def combine(self, weights: Tensor) -> Tensor:
        return self.shares.combine(weights * self.factors.to(weights))

    def dense(self, samples: slice = slice(None)) -> Tensor:
        rows = self.shares.dense(samples)
        return rows * self.factors[samples, None].to(rows)
