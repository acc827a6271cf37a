"""From the collected steps of a training loop to the steps of a log.

The calls are those of the collector, each after its own; then follows the optimizer's own step, whose post hook writes the
record: a step is in the log if and only if the optimizer took it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.step import StepCollector, total_norm
from lightning_influence.core.clipping import norm_coefficient
from lightning_influence.core.coordinates import Coordinates, choose_coordinates, within_budget
from lightning_influence.core.shares import Form
from lightning_influence.core.trajectory import Clip, StepRecord
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.end import MOVED, pack_end
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
from lightning_influence.log.steps import FINAL, LAYOUT, MOMENTS_EVERY, pack_dynamics, pack_layout, pack_step
from lightning_influence.log.writer import StoreWriter
from lightning_influence.run.between_steps import BetweenSteps
from lightning_influence.run.losses import Dynamics, joined
from lightning_influence.run.refusals import left_out
from lightning_influence.run.sharding import let_go, local

CompressionName = Literal["auto", "full", "factored", "mask"]

_CLIP_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Compression:
    """What is kept of the per-sample gradients (`coordinates.choose_coordinates`).

    Attributes:
        budget: bytes per sample and step within which ``"auto"`` chooses masks (`coordinates.within_budget`); None for lossless
            forms as long as they are moderate, and masks of ``mask_size`` beyond.
    """

    kind: CompressionName = "auto"
    mask_size: int = 8192
    seed: int = 0
    budget: int | None = None


@dataclass(frozen=True)
class _Noted:
    """Of one micro-batch: what it needs to be run again, and what its loss said of its samples."""

    replay: Packed
    dynamics: Dynamics | None = None


class Recorder:
    """Writes every optimizer step of a training loop to a log.

    Args:
        collector: collects the steps.
        replay: what is written so that the run can be replayed; None for nothing. Of several processes, the first writes
            what they share, and each the shards that it holds. None waits for another.
        guard: makes the context of what is done inside the optimizer's step, where an error would tear the run.
        give_up: told ``"replay"`` and why a batch cannot be kept for it, where the run is recorded without; None to raise that.

    Attributes:
        verified: what is known of the run's removals so far, as reports tell it; None where they are not looked at.
        left: a number for each parameter, as the steps of an epoch left it; None where another step followed.
    """

    def __init__(
        self,
        collector: StepCollector,
        writer: StoreWriter,
        *,
        compression: Compression,
        replay: ReplaySettings | None,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        give_up: Callable[[str, ConfigurationError], None] | None = None,
    ) -> None:
        self._give_up = give_up
        self.collector, self.writer = collector, writer
        self.module, self.optimizer, self.ranks = collector.module, collector.optimizer, collector.ranks
        self.replay, self.compression = replay, compression
        self.keeps: dict[str, Coordinates] | None = None
        self.verified: Mapping[str, Any] | None = None
        self._with_moments = _with_moments(writer)  # parameters whose moments the present block of steps holds
        self._holds_state = self.ranks.rank == 0 or self.ranks.sharded
        self._names = {id(p): name for name, p in self.module.named_parameters()}
        self._between = BetweenSteps(self.module)
        self._buffers: dict[str, Tensor] = {}  # before the first micro-batch of a step whose state is due
        self._in_snapshots = _in_snapshots(writer)  # parameters
        self._regular: list[int] = []  # steps of this part of the run whose snapshots may be dropped
        self._begun: _Noted | None = None
        self._took_step = False  # the optimizer took a step since the last micro-batch was begun
        self._noted: list[_Noted] = []
        self._pending: tuple[StepRecord, dict[str, Form], list[_Noted]] | None = None
        self.left: list[float] | None = None
        self._guard, self._first = guard, len(writer)  # the first step of this part of the run
        self._moment_bytes = 0  # in the first step
        self._post_hook = self.optimizer.register_step_post_hook(lambda *_: self._after_step())

    def begin(
        self,
        batch: Any,
        moment: Mapping[str, Any],
        fetched: Mapping[str, Tensor] | None = None,
        less: Mapping[int, Any] | None = None,
    ) -> None:
        """A micro-batch is about to be run.

        Args:
            batch: as the training step gets it.
            moment, fetched, less: as of `snapshots.pack_micro_batch`.
        """
        self._between.check()
        self._took_step = False
        if self._snapshot_due() and not self.collector.inside_a_step:
            self._buffers = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        self._begun = _Noted(self._packed(batch, moment, fetched, less))

    def _packed(
        self,
        batch: Any,
        moment: Mapping[str, Any],
        fetched: Mapping[str, Tensor] | None,
        less: Mapping[int, Any] | None,
    ) -> Packed:
        if self.replay is not None:
            with left_out("replay", self._give_up):
                return pack_micro_batch(batch, moment, fetched, self.replay, less)
        return {}, dict(moment)  # by which the run can be trained again

    def observe(self, dynamics: Dynamics | None) -> None:
        """The training step has run; what the micro-batch's loss said of its samples."""
        self._between.note_training_step()
        if self._begun is not None:
            self._begun = replace(self._begun, dynamics=dynamics)

    def before_zero_grad(self) -> None:
        """Gradients are about to be cleared, and with them those of micro-batches that no step has consumed."""
        self._noted.clear()

    def after_backward(self) -> None:
        """The collector has collected the micro-batch."""
        if self._begun is not None:
            self._noted.append(self._begun)
            self._begun = None

    def before_step(self, clip: Clip, *, may_skip: bool = False) -> None:
        """All gradients are there, not yet clipped; arguments and errors as of `StepCollector.before_step`."""
        noted, self._noted = self._noted, []
        index = len(self.writer)
        step = self.collector.before_step(index, clip, may_skip=may_skip)
        if step is None:
            return
        shares = step.shares
        if self.keeps is None and self.collector.capture is not None:
            shares = self._plan(shares, self.collector.capture)
        if self._snapshot_due():
            self._snapshot(index, self._buffers)
        record = self._kept_of(step.record)
        self._pending = record, {name: shares[name] for name in record.gradients}, noted

    @property
    def begun(self) -> bool:
        """Whether a step was written."""
        return self.writer.complete > self._first

    @property
    def n_coordinates(self) -> int:
        """Coordinates on which per-sample gradients are kept, as the first step decided."""
        return sum(coordinates.size for coordinates in (self.keeps or {}).values())

    def bytes_written(self) -> tuple[float, int]:
        """Of an average step, and of a snapshot (0 where there is none), as the first ones turned out.

        Moments are in one step of several.
        """
        step, snapshot = self.writer.first_bytes(SNAPSHOT)
        parts = self.ranks.size if self.ranks.sharded else 1
        return step - (1 - 1 / MOMENTS_EVERY) * self._moment_bytes, snapshot * parts

    def close(self, *, finished: bool) -> None:
        """Write what is pending and let go of the optimizer.

        Args:
            finished: the run ended as intended, and every process has written all of its steps; the log then notes its last
                parameters.
        """
        self._post_hook.remove()
        try:
            if finished and len(self.writer) and self._holds_state:
                self._finish()
        finally:
            self.writer.close()

    def _finish(self) -> None:
        """Note the parameters that the run ended with, and whether they are still those of its last step."""
        if self.left is not None and self._sums() != self.left:
            self.writer.save(FINAL, *MOVED)
            return
        if self.replay is not None:
            self._snapshot(len(self.writer), dict(self.module.named_buffers()))
        trained = ((self._names.get(id(p)), p) for p in self.collector.parameters() if p.requires_grad)
        self.writer.save(FINAL, *pack_end({name: p for name, p in trained if name is not None}))

    def end_epoch(self) -> None:
        """An epoch's last step was taken; what changes the parameters after this is not the run's doing."""
        self.left = self._sums()

    def _sums(self) -> list[float]:
        """A number for each parameter, for what this process holds of it, that tells whether it was changed."""
        sums: list[float] = torch.stack([local(p).double().sum() for p in self.collector.parameters()]).tolist()
        return sums

    def _snapshot_due(self) -> bool:
        """Whether the state before this step is written: every few steps, and where a parameter begins to train."""
        if self.replay is None or not self._holds_state:
            return False
        return (
            len(self.writer) % self.replay.spacing(len(self.writer)) == 0 or not self._training() <= self._in_snapshots
        )

    def _training(self) -> set[str]:
        """Names of the parameters that the optimizer is to move."""
        return {self._names[id(p)] for p in self.collector.parameters() if p.requires_grad and id(p) in self._names}

    def _snapshot(self, index: int, buffers: Mapping[str, Tensor]) -> None:
        self._thin(index)
        if index and self._training() <= self._in_snapshots:
            self._regular.append(index)
        self._in_snapshots |= self._training()
        if self.ranks.sharded:
            let_go(self.module)  # what validation has gathered
        own = buffers if self.ranks.rank == 0 else {}
        assert self.replay is not None
        of_optimizer = self.optimizer, self.collector.update_name
        packed = pack_snapshot(self.module, *of_optimizer, self._in_snapshots, own, self.replay.moments)
        self.writer.save(snapshot_name(index), *packed)

    def _thin(self, steps: int) -> None:
        """Drop the snapshots between those that are kept of a run so long; one with which a parameter began to train stays."""
        assert self.replay is not None
        spacing = self.replay.spacing(steps)
        dropped = [index for index in self._regular if index % spacing]
        if dropped:
            self.writer.drop([snapshot_name(index) for index in dropped])
            self._regular = [index for index in self._regular if index % spacing == 0]

    def _plan(self, shares: dict[str, Form], capture: GradientCapture) -> dict[str, Form]:
        """Decide at the first step what is kept."""
        parameters = capture.parameters
        shapes = {name: tuple(parameters[name].shape) for name in shares}
        compression = self.compression
        if compression.kind == "auto" and compression.budget is not None:
            keeps = within_budget(shares, shapes, compression.budget, seed=compression.seed)
        else:
            keeps = choose_coordinates(
                shares, shapes, compression=compression.kind, mask_size=compression.mask_size, seed=compression.seed
            )
        self.keeps = self.ranks.first(keeps)  # the sizes of the first batch may differ between the processes
        if self.ranks.rank == 0:
            self.writer.save(LAYOUT, *pack_layout(self.keeps, self.collector.update_name))
        self.collector.compress = self._compress
        return {name: self._compress(name, share) for name, share in shares.items()}

    def _compress(self, name: str, share: Form) -> Form:
        assert self.keeps is not None
        return self.keeps[name].compress(share)

    def _kept_of(self, record: StepRecord) -> StepRecord:
        """A copy of a step's record on the kept coordinates, with the moments that are not yet in the block of steps."""
        if record.index % MOMENTS_EVERY == 0:
            self._with_moments = set()
        reduced = replace(
            record,
            gradients={k: self._kept(k, g) for k, g in record.gradients.items()},
            moments={
                k: tuple(self._kept(k, m) for m in moments)
                for k, moments in record.moments.items()
                if k not in self._with_moments
            },
            parameters={k: self._kept(k, p) for k, p in (record.parameters or {}).items()},
        )
        self._with_moments |= reduced.moments.keys()
        if not self.begun:
            self._moment_bytes = sum(m.nbytes for moments in reduced.moments.values() for m in moments)
        return reduced

    def _kept(self, name: str, values: Tensor) -> Tensor:
        assert self.keeps is not None
        index = self.keeps[name].index
        return (values if index is None else values[index.to(values.device)]).to("cpu", copy=True)

    def _after_step(self) -> None:
        with self._guard():
            self._stepped()
            if len(self.writer) == self._first + 1:
                self.writer.flush()  # what cannot be written is told at once

    def _stepped(self) -> None:
        """The optimizer took the step: its gradients are now the clipped ones."""
        if self._pending is None:
            if self._begun is None and self._took_step:
                raise ConfigurationError(
                    f"step {len(self.writer) - 1}: the optimizer stepped once more without another backward pass: optimizer_step is "
                    "overridden and steps twice. Influence follows one step for each gradient; step once."
                )
            return
        self._took_step, self.left = True, None
        (record, shares, noted), self._pending = self._pending, None
        self._between.note_step()
        self._check_clip(record.clip, record.index)
        tensors, meta = pack_step(record, shares, state=self.ranks.rank == 0, norm=self.ranks.sharded)
        tensors |= pack_dynamics(joined([m.dynamics for m in noted]))
        replays = [m.replay for m in noted]
        for number, replay in enumerate(replays):
            tensors |= numbered(replay, number)
        meta |= {"micro_batches": [entry for _, entry in replays]}
        self.writer.append(record.index, tensors, meta if self.verified is None else meta | {"removals": self.verified})

    def _check_clip(self, clip: Clip, index: int) -> None:
        consumed = float(total_norm(p.grad for p in self.collector.parameters()))
        if clip.rule == "value":
            expected = consumed  # a clamp cannot be told from its norm; every coordinate is within the bound
            held = (local(p.grad) for p in self.collector.parameters() if p.grad is not None)
            largest = max((float(g.abs().max()) for g in held if g.numel()), default=0.0)
            agrees = largest <= clip.bound * (1 + _CLIP_TOLERANCE)
        elif clip.rule == "norm" and self.ranks.sharded:
            expected = min(clip.raw_norm, clip.bound)  # at most: by how much less, the other processes know
            agrees = consumed <= expected * (1 + _CLIP_TOLERANCE)
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
    """Parameters whose moments are already in the last block of steps of a log that is continued."""
    begun = range(len(writer) // MOMENTS_EVERY * MOMENTS_EVERY, len(writer))
    reader = StoreReader(writer.log) if len(begun) else None
    names = [name for index in begun for name in reader.names(index)] if reader is not None else []
    return {name.split("/", 2)[2] for name in names if name.startswith("moment/")}


def _in_snapshots(writer: StoreWriter) -> set[str]:
    """Parameters that the snapshots of a log hold, when a resumed run continues it."""
    if len(writer) == 0:
        return set()
    reader = StoreReader(writer.log)
    snapshots = [name for name in reader.artifacts() if name.startswith(SNAPSHOT)]
    kind = "parameter/"
    names = reader.artifact_names(max(snapshots)) if snapshots else []
    return {name.removeprefix(kind) for name in names if name.startswith(kind)}
