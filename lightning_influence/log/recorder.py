"""From the moments of a training loop to the steps of a log: what one optimizer step leaves behind.

The order of calls within one optimizer step is ``begin`` and ``after_backward`` once per micro-batch,
``before_step`` once, then the optimizer's own step, whose post hook writes the record: a step is in the
log if and only if the optimizer took it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.capture import GradientCapture
from lightning_influence.core.clipping import norm_coefficient
from lightning_influence.core.coordinates import Keep, plan
from lightning_influence.core.optimizers import UPDATES, coupling
from lightning_influence.core.shares import Form, Stack
from lightning_influence.core.trajectory import Clip, StepRecord
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.snapshots import (
    SNAPSHOT,
    Packed,
    ReplaySettings,
    numbered,
    pack_micro_batch,
    pack_snapshot,
    snapshot_name,
)
from lightning_influence.log.steps import FINAL, LAYOUT, MOMENTS_EVERY, checksum, pack_dynamics, pack_layout, pack_step
from lightning_influence.log.writer import StoreWriter
from lightning_influence.run.between_steps import BetweenSteps
from lightning_influence.run.losses import Dynamics, joined
from lightning_influence.run.optimizer import read_hyper, read_moments, update_name
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.refusals import refuse_unowned

CompressionName = Literal["auto", "full", "factored", "mask"]

_SUM_TOLERANCE = 0.02  # relative; half-precision backward passes round at 2^-8
_CLIP_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Compression:
    """What is kept of the per-sample gradients (`compression.plan`)."""

    kind: CompressionName = "auto"
    mask_size: int = 8192
    seed: int = 0


@dataclass(frozen=True)
class _MicroBatch:
    sample_ids: Tensor
    loss_weights: Tensor
    replay: Packed | None
    shares: Mapping[str, Form]
    dynamics: Dynamics | None


@dataclass(frozen=True)
class _Started:
    """A micro-batch that is being run; ``weights`` are relative."""

    sample_ids: Tensor
    weights: Tensor
    accumulated: int
    replay: Packed | None
    dynamics: Dynamics | None = None


class Recorder:
    """Writes every optimizer step of a training loop to a log.

    Args:
        module: whose parameters train.
        capture: attached to the module; None where per-sample gradients are not recorded.
        replay: what is written so that the run can be replayed; None for nothing.
        averaged: whether the training loss is a mean over its samples.
        ranks: the processes whose gradients are averaged; the first writes what they share.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        writer: StoreWriter,
        *,
        capture: GradientCapture | None,
        compression: Compression,
        replay: ReplaySettings | None,
        averaged: bool = True,
        ranks: Ranks,
    ) -> None:
        self.module, self.optimizer, self.writer = module, optimizer, writer
        self.capture, self.replay, self.compression = capture, replay, compression
        self.averaged, self.ranks = averaged, ranks
        self.update_name = update_name(optimizer)
        self.keeps: dict[str, Keep] | None = None
        self._with_moments = _with_moments(writer)  # parameters whose moments the present block of steps holds
        self._micro_batches: list[_MicroBatch] = []
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._between = BetweenSteps(module)
        self._buffers: dict[str, Tensor] = {}  # before the first micro-batch of a step whose state is due
        self._in_snapshots = _in_snapshots(writer)  # parameters
        self._started: _Started | None = None
        self._norm: Tensor | None = None  # of the gradient after the last backward pass
        self._pending: tuple[StepRecord, dict[str, Form], list[_MicroBatch]] | None = None
        self._left_by_steps: Tensor | None = None
        self._post_hook = optimizer.register_step_post_hook(lambda *_: self._stepped())

    def begin(
        self,
        sample_ids: Tensor,
        weights: Tensor,
        accumulated: int,
        *,
        batch: Any = None,
        moment: Mapping[str, Any] | None = None,
        fetched: Mapping[str, Tensor] | None = None,
        less: Mapping[int, Any] | None = None,
    ) -> None:
        """A micro-batch is about to be run.

        Args:
            sample_ids: ``(n,)`` int64.
            weights: ``(n,)``, relative weights of the samples in the loss (tokens, say).
            accumulated: micro-batches by whose number its loss is divided.
            batch: as the training step gets it.
            moment: as of `snapshots.pack_micro_batch`.
            fetched, less: as of `snapshots.pack_micro_batch`.
        """
        packed = None
        self._between.check()
        if self._snapshot_due() and not self._micro_batches:
            self._buffers = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        if self.replay is not None:
            packed = pack_micro_batch(batch, moment or {}, fetched, self.replay, less)
        self._started = _Started(sample_ids, weights, accumulated, packed)
        if self.capture is not None:
            self.capture.begin(len(sample_ids))

    def weigh(self, weights: Tensor) -> None:
        """The weights of the micro-batch's samples as its loss turned out to have them."""
        if self._started is not None:
            self._started = replace(self._started, weights=weights)

    def observe(self, dynamics: Dynamics | None) -> None:
        """The training step has run; what the micro-batch's loss said of its samples."""
        self._between.note_training_step()
        if self._started is not None:
            self._started = replace(self._started, dynamics=dynamics)

    def before_zero_grad(self) -> None:
        """Gradients are about to be cleared, and with them those of micro-batches that no step has consumed."""
        self._micro_batches.clear()

    def before_backward(self) -> None:
        """Gradients have been cleared, if this is a step's first micro-batch.

        Raises:
            ConfigurationError: they were not.
        """
        if self._micro_batches:
            return
        left = _total_norm(p.grad for p in self._parameters())
        if float(left) > 0:
            raise ConfigurationError(
                f"step {len(self.writer)}: a gradient of norm {float(left):.6g} is left of the last step, to which the backward pass "
                "adds: optimizer_zero_grad is overridden and does not clear it. Influence follows steps whose gradients are "
                "those of their own batches; clear them, and keep a running mean in the optimizer (momentum)."
            )

    def after_backward(self, loss_scale: float = 1.0, *, watch: bool = False) -> Tensor | None:
        """Collect the micro-batch's shares.

        Args:
            loss_scale: what the loss was multiplied with.
            watch: remember the gradient's norm, since something may change gradients before the step.

        Returns:
            Coefficients ``(n,)`` of the samples' losses in the step; None where no micro-batch was begun.
        """
        if self._started is None:
            return None
        self._norm = _total_norm(p.grad for p in self._parameters()) / loss_scale if watch else None
        shares: dict[str, Form] = {}
        if self.capture is not None:
            shares = self.capture.take(1.0 / (loss_scale * self.ranks.size))
        if self.keeps is not None:
            shares = {name: self.keeps[name].compress(share) for name, share in shares.items()}
        started, self._started = self._started, None
        weights = started.weights.detach().to("cpu", torch.float64)
        if self.averaged:
            weights = weights / weights.sum()
        weights = weights / (started.accumulated * self.ranks.size)
        self._micro_batches.append(_MicroBatch(started.sample_ids, weights, started.replay, shares, started.dynamics))
        return weights

    @property
    def first_of_step(self) -> bool:
        """Whether the last micro-batch is the first of its step."""
        return len(self._micro_batches) == 1

    def before_step(self, clip: Clip, *, may_skip: bool = False) -> None:
        """All gradients are there, not yet clipped.

        Args:
            clip: rule and bound; the norm is measured here.
            may_skip: the optimizer may skip the step where the gradient is not finite (loss scaling).

        Raises:
            InfluenceError: a gradient that is not finite.
            ConfigurationError: shares that do not sum to the gradient, or a gradient nobody recorded.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if not micro_batches:  # every batch was skipped: training_step returned None
            return
        norm = _total_norm(p.grad for p in self._parameters())
        if not torch.isfinite(norm):
            if may_skip:
                return
            raise InfluenceError(
                f"step {len(self.writer)}: the gradient's norm is {float(norm)}, so its influence is undefined. The log "
                "keeps the steps before it. Lower the learning rate, clip the gradient, or look for the loss that "
                "is not finite with Trainer(detect_anomaly=True)."
            )
        if self._norm is not None and float((norm - self._norm).abs()) > _CLIP_TOLERANCE * float(norm):
            raise ConfigurationError(
                f"step {len(self.writer)}: the backward pass left a gradient of norm {float(self._norm):.6g}, and the optimizer "
                f"is about to consume one of norm {float(norm):.6g}: on_after_backward, of the module or of a callback, changes "
                "gradients, which influence does not follow. Clip through Trainer(gradient_clip_val=...) instead."
            )
        self._refuse_unrecorded()
        shares: dict[str, Form] = {
            name: Stack([m.shares[name] for m in micro_batches]) if len(micro_batches) > 1 else share
            for name, share in micro_batches[0].shares.items()
        }
        if self.keeps is None and self.capture is not None:
            shares = self._plan(shares, self.capture)
        index = len(self.writer)
        if self._snapshot_due():
            self._snapshot(index, self._buffers)
        record = self._record(micro_batches, Clip(clip.rule, clip.bound, float(norm)))
        self._pending = record, {name: shares[name] for name in record.gradients}, micro_batches

    def close(self, *, finished: bool) -> None:
        """Write what is pending and let go of optimizer and module.

        Args:
            finished: the run ended as intended; the log then notes by which parameters.
        """
        self._post_hook.remove()
        if self.capture is not None:
            self.capture.detach()
        try:
            if finished and len(self.writer):
                self._finish()
        finally:
            self.writer.close()

    def _finish(self) -> None:
        """Note by which parameters the run ended, unless they are no longer those of its last step."""
        self.writer.flush()
        self.ranks.wait()  # the note also says that the log is whole, so every process has written its steps before it
        if self.ranks.rank > 0:
            return
        if self._left_by_steps is not None and not torch.equal(self._sums(), self._left_by_steps):
            self.writer.save(FINAL, {}, {"moved": True})
            return
        if self.replay is not None:
            self._snapshot(len(self.writer), dict(self.module.named_buffers()))
        trained = ((self._names.get(id(p)), p) for p in self._parameters() if p.requires_grad)
        checksums = {name: checksum(p) for name, p in trained if name is not None}
        self.writer.save(FINAL, {}, {"checksums": checksums})

    def end_epoch(self) -> None:
        """An epoch's last step was taken; what changes the parameters after this is not the run's doing."""
        self._left_by_steps = self._sums()

    def _sums(self) -> Tensor:
        """A number for each parameter that tells whether it was changed."""
        return torch.stack([p.detach().double().sum() for p in self._parameters()])

    def _snapshot_due(self) -> bool:
        """Whether the state before this step is written: every few steps, and where a parameter begins to train."""
        if self.replay is None or self.ranks.rank > 0:
            return False
        return len(self.writer) % self.replay.snapshot_every == 0 or not self._training() <= self._in_snapshots

    def _training(self) -> set[str]:
        """Names of the parameters that the optimizer is to move."""
        return {self._names[id(p)] for p in self._parameters() if p.requires_grad and id(p) in self._names}

    def _snapshot(self, index: int, buffers: Mapping[str, Tensor]) -> None:
        self._in_snapshots |= self._training()
        packed = pack_snapshot(self.module, self.optimizer, self.update_name, self._in_snapshots, buffers)
        self.writer.save(snapshot_name(index), *packed)

    def _parameters(self) -> Iterable[torch.nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _refuse_unrecorded(self) -> None:
        if self.capture is None:
            return
        known = {id(p) for p in self.capture.parameters.values()} | self.capture.excluded_ids
        unknown = [p for p in self._parameters() if p.grad is not None and id(p) not in known]
        if unknown:
            raise ConfigurationError(
                f"step {len(self.writer)}: {len(unknown)} parameters (the first of shape {tuple(unknown[0].shape)}) began "
                "to train after fit had started. Unfreeze them before fit, or name them in exclude=."
            )

    def _plan(self, shares: Mapping[str, Form], capture: GradientCapture) -> dict[str, Form]:
        """Decide at the first step what is kept, and check that the shares are the gradient's."""
        parameters = capture.parameters
        for name, share in shares.items():
            gradient = parameters[name].grad
            total = share.combine(torch.ones(1, share.n_samples, device=None if gradient is None else gradient.device))
            _check_sum(name, self.ranks.sum(total), gradient)
        keeps = plan(
            shares,
            {name: tuple(parameters[name].shape) for name in shares},
            compression=self.compression.kind,
            mask_size=self.compression.mask_size,
            seed=self.compression.seed,
        )
        self.keeps = self.ranks.first(keeps)  # the sizes of the first batch may differ between the processes
        if self.ranks.rank == 0:
            self.writer.save(LAYOUT, *pack_layout(self.keeps, self.update_name))
        return {name: self.keeps[name].compress(share) for name, share in shares.items()}

    def _record(self, micro_batches: list[_MicroBatch], clip: Clip) -> StepRecord:
        refuse_unowned(self.module, self.optimizer)
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        trained = {self._names[id(p)]: p for p in self._parameters() if p.grad is not None}
        kind, update = type(self.optimizer), UPDATES[self.update_name]
        state = {name: self.optimizer.state.get(p, {}) for name, p in trained.items()}
        hyper = {name: read_hyper(groups[id(p)], state[name], kind) for name, p in trained.items()}
        captured = {name: p for name, p in trained.items() if self.keeps is not None and name in self.keeps}
        index = len(self.writer)
        if index % MOMENTS_EVERY == 0:
            self._with_moments = set()
        record = StepRecord(
            index=index,
            sample_ids=torch.cat([m.sample_ids for m in micro_batches]),
            loss_weights=torch.cat([m.loss_weights for m in micro_batches]),
            micro_batches=torch.cat([torch.full_like(m.sample_ids, i) for i, m in enumerate(micro_batches)]),
            gradients={name: self._kept(name, p.grad) for name, p in captured.items() if p.grad is not None},
            moments={
                name: tuple(self._kept(name, m) for m in read_moments(state[name], update, p))
                for name, p in captured.items()
                if name not in self._with_moments
            },
            hyper=hyper,
            averaged=self.averaged,
            clip=clip,
            parameters={name: self._kept(name, p) for name, p in captured.items() if coupling(hyper[name])},
        )
        self._with_moments |= record.moments.keys()
        return record

    def _kept(self, name: str, values: Tensor) -> Tensor:
        assert self.keeps is not None
        return self.keeps[name].select(values.detach()).to("cpu", copy=True)

    def _stepped(self) -> None:
        """The optimizer took the step: its gradients are now the clipped ones."""
        if self._pending is None:
            return
        (record, shares, micro_batches), self._pending = self._pending, None
        self._between.note_step()
        self._check_clip(record.clip, record.index)
        tensors, meta = pack_step(record, shares, state=self.ranks.rank == 0)
        tensors |= pack_dynamics(joined([m.dynamics for m in micro_batches]))
        replays = [m.replay for m in micro_batches if m.replay is not None]
        for number, replay in enumerate(replays):
            tensors |= numbered(replay, number)
        self.writer.append(record.index, tensors, meta | {"micro_batches": [told for _, told in replays]})

    def _check_clip(self, clip: Clip, index: int) -> None:
        consumed = float(_total_norm(p.grad for p in self._parameters()))
        if clip.rule == "value":
            expected = consumed  # a clamp cannot be told from its norm; every coordinate is within the bound
            largest = max(float(p.grad.abs().max()) for p in self._parameters() if p.grad is not None and p.numel())
            agrees = largest <= clip.bound * (1 + _CLIP_TOLERANCE)
        else:
            expected = clip.raw_norm * float(norm_coefficient(clip, clip.raw_norm))
            agrees = abs(consumed - expected) <= _CLIP_TOLERANCE * max(expected, 1e-30)
        if not agrees:
            raise ConfigurationError(
                f"step {index}: the optimizer consumed a gradient of norm {consumed:.6g}, but {expected:.6g} was expected "
                f"from the trainer's clipping ({clip.rule}, bound {clip.bound:g}). Something changes gradients between "
                "on_before_optimizer_step and the step: an overridden configure_gradient_clipping, or another callback. "
                "Use Trainer(gradient_clip_val=..., gradient_clip_algorithm=...) instead."
            )


def _with_moments(writer: StoreWriter) -> set[str]:
    """Parameters whose moments are already in the block of steps with which a log goes on."""
    begun = range(len(writer) // MOMENTS_EVERY * MOMENTS_EVERY, len(writer))
    reader = StoreReader(writer.dirpath) if len(begun) else None
    names = [name for index in begun for name in reader.names(index)] if reader is not None else []
    return {name.split("/", 2)[2] for name in names if name.startswith("moment/")}


def _in_snapshots(writer: StoreWriter) -> set[str]:
    """Parameters that the snapshots hold of a log that goes on."""
    if not len(writer):
        return set()
    reader = StoreReader(writer.dirpath)
    names = [
        n for artifact in reader.artifacts() if artifact.startswith(SNAPSHOT) for n in reader.artifact_names(artifact)
    ]
    return {name.removeprefix("parameter/") for name in names if name.startswith("parameter/")}


def _total_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    norms = [torch.linalg.vector_norm(g.detach(), dtype=_wide(g.dtype)) for g in gradients if g is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_sum(name: str, total: Tensor, gradient: Tensor | None) -> None:
    """The safety net under all capture rules: shares are additive parts of the gradient."""
    reference = torch.zeros_like(total) if gradient is None else gradient.detach().flatten()[None].to(total)
    error = float((total - reference).norm())
    if error > _SUM_TOLERANCE * max(float(reference.norm()), 1e-12):
        raise ConfigurationError(
            f"the per-sample gradient shares of {name} sum to its gradient only up to a relative error of "
            f"{error / max(float(reference.norm()), 1e-12):.3g}. The parameter is used in a way that its module's rule does "
            "not see (outside its module's forward, say). Freeze it, name it in exclude=, or use record='replay'."
        )
