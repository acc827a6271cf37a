"""A recorder for loops of one's own: the log that `InfluenceCallback` writes, without a trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor, nn

from lightning_influence.capture.step import StepOptions
from lightning_influence.core.coordinates import COMPRESSIONS
from lightning_influence.core.trajectory import Clip
from lightning_influence.errors import ConfigurationError, check_choice
from lightning_influence.live.steps import LiveSteps
from lightning_influence.live.ways import Ways, budget_of
from lightning_influence.log.manifest import RECORDS, Manifest, Mask
from lightning_influence.log.recorder import Compression, CompressionName, Recorder
from lightning_influence.log.snapshots import SNAPSHOT_MOMENTS, ReplaySettings, SnapshotMoments
from lightning_influence.log.writer import StoreWriter
from lightning_influence.run.moment import Moment
from lightning_influence.run.sample_ids import IdSource, SampleIds
from lightning_influence.run.sample_weights import WeightSource
from lightning_influence.run.tap import LossTap
from lightning_influence.run.task import as_task

_log = logging.getLogger(__name__)
_PRECISION = "32-true"  # of batches: a loss function converts and casts by itself


@contextmanager
def recording(
    log: str | Path,
    task: Any,
    optimizer: torch.optim.Optimizer,
    *,
    record: Literal["auto", "gradients", "replay", "both"] = "auto",
    snapshot_every: int = 100,
    snapshot_moments: SnapshotMoments = "full",
    store_batches: bool | None = None,
    compression: CompressionName = "auto",
    mask_size: int = 8192,
    budget: int | None = None,
    sample_ids: IdSource = None,
    reduction: Literal["mean", "sum"] = "mean",
    sample_weights: WeightSource = None,
    exclude: str | Sequence[str] = (),
    frozen_batch_norm: bool = False,
    verify: bool = True,
    existing: Literal["error", "overwrite"] = "error",
    seed: int = 0,
) -> Iterator[LoopRecorder]:
    """Record a training loop of one's own, for `attribute`.

    The loop takes its batches from the recorder and lets it run the backward pass; everything else stays as it is. A loop
    that is recorded ends bit for bit where it ends without. Arguments that are not listed are as of
    `InfluenceCallback`.

    Args:
        log: directory to write, or a URL that fsspec knows.
        task: what is trained: a `FunctionTask(module, loss)`, or a `LightningModule`.
        optimizer: of the loop, of the task's parameters.
        snapshot_every: steps between the snapshots of a log that can be replayed.
        existing: what to do where the directory already holds a log.

    Yields:
        The recorder; the log is finished at the end of the block, and left as it is where an exception ends it.

    Raises:
        ConfigurationError: a run that cannot be followed, or an unknown choice.
        UnsupportedOptimizer: the optimizer's step is not a known function.
        LogError: the directory holds a log already, or cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> from lightning_influence import FunctionTask
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> module, data = nn.Sequential(nn.Linear(2, 1)), TensorDataset(torch.randn(8, 2), torch.randn(8, 1))
        >>> task = FunctionTask(module, lambda m, batch: nn.functional.mse_loss(m(batch[0]), batch[1]))
        >>> optimizer = torch.optim.AdamW(module.parameters())
        >>> with recording(mkdtemp(), task, optimizer) as recorder:
        ...     for batch in recorder.batches(DataLoader(data, batch_size=4)):
        ...         optimizer.zero_grad()
        ...         loss = recorder.backward(batch)
        ...         optimizer.step()
        >>> recorder.n_steps
        2
    """
    for name, value, known in (
        ("record", record, ("auto", *RECORDS)),
        ("compression", compression, COMPRESSIONS),
        ("existing", existing, ("error", "overwrite")),
        ("snapshot_moments", snapshot_moments, SNAPSHOT_MOMENTS),
    ):
        check_choice(name, value, known)
    for name, number in (("mask_size", mask_size), ("snapshot_every", snapshot_every), ("budget", budget)):
        if number is not None and number < 1:
            raise ConfigurationError(f"{name}={number}; it is at least 1")
    _refuse_processes()
    task = as_task(task)
    ways = Ways(record, tell=_tell)
    options = StepOptions(reduction, sample_weights, exclude, frozen_batch_norm, verify)
    steps = LiveSteps(
        task,
        optimizer,
        options,
        SampleIds(sample_ids, random=True),
        captures=record != "replay",
        rehearses=record != "gradients",
        watches=True,
        give_up=ways.give_up if record == "auto" else None,
    )
    settings = Compression(compression, mask_size, seed, budget_of(record, budget))
    manifest = Manifest.of_run(
        task.module,
        optimizer,
        steps.collector.capture,
        options,
        record=ways.record,
        compression=compression,
        mask=Mask(mask_size, seed),
        precision=_PRECISION,
        budget=settings.budget,
    )
    manifest = replace(manifest, run=uuid4().hex)
    replays = (
        None
        if ways.record == "gradients"
        else ReplaySettings(snapshot_every, store_batches, moments=SNAPSHOT_MOMENTS[snapshot_moments])
    )
    with ExitStack() as undo:
        undo.callback(steps.close)
        writer = undo.enter_context(StoreWriter(log, existing=existing))
        writer.write_manifest(manifest.to_json())
        written = Recorder(
            steps.collector,
            writer,
            compression=settings,
            replay=replays,
            give_up=ways.give_up if record == "auto" else None,
        )
        ways.begin(steps, written, manifest)
        recorder = LoopRecorder(steps, written, ways)
        finished = False
        try:
            yield recorder
            finished = True
        finally:
            recorder.close(finished=finished)


class LoopRecorder:
    """Records the steps of a loop; `recording` makes one.

    Args:
        steps: follows the run.
        recorder: writes it.
        ways: what it is recorded as.
    """

    def __init__(self, steps: LiveSteps, recorder: Recorder, ways: Ways) -> None:
        self._steps, self._recorder, self._task, self._ways = steps, recorder, steps.task, ways
        self._optimizer = steps.collector.optimizer
        self._loader: Any = None
        self._is_due = False  # the present batch has not yet been run
        self._inside_epoch = False
        self._hooks = [
            self._optimizer.register_step_pre_hook(lambda *_: self._before_step(Clip())),
            self._optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def __repr__(self) -> str:
        return f"LoopRecorder({self.n_steps} steps in {str(self._recorder.writer.log)!r}, record={self._ways.record!r})"

    @property
    def n_steps(self) -> int:
        """Optimizer steps that were recorded so far."""
        return len(self._recorder.writer)

    def batches(self, loader: Any) -> Iterator[Any]:
        """One epoch of a loader, each batch on the device of the task's module.

        Args:
            loader: a `DataLoader` of a dataset with indices, which are the ids of the samples.

        Raises:
            ConfigurationError: a loader that does not say which samples a batch holds, without ``sample_ids``.
        """
        self._steps.sample_ids.listen(loader)
        if self._loader is None:
            self._steps.attach(loader)
        elif loader is not self._loader:
            self._steps.take_from(loader)
        self._loader = loader
        self._inside_epoch = True
        try:
            for batch in loader:
                self._is_due = True
                yield self._task.prepared(batch)
                if self._is_due:  # the loop has passed it over, and its samples with it
                    self._steps.sample_ids.next(batch)
        finally:
            self._is_due = self._inside_epoch = False
            self._recorder.end_epoch()

    def backward(self, batch: Any, *, parts: int = 1) -> Tensor:
        """The task's loss of a batch and its backward pass, as ``(task.loss(batch) / parts).backward()``.

        Args:
            batch: the last of `batches`, or what the loop made of it.
            parts: backward passes of this step, over which gradients are accumulated.

        Returns:
            The loss ``()``, detached and not divided.

        Raises:
            ConfigurationError: no batch is due, gradients that are left of the last step, or, at the first steps, something that makes
                influence say what is not so.
        """
        if not self._is_due:
            raise ConfigurationError(
                "backward(batch) was called without a batch that is due; call it once for each batch of recorder.batches(loader)."
            )
        self._is_due, collector = False, self._steps.collector
        if collector.inside_a_step and all(p.grad is None or not p.grad.any() for p in collector.parameters()):
            collector.before_zero_grad()  # the loop has dropped what it had accumulated
            self._recorder.before_zero_grad()
        moment = Moment.of(self._task.module)  # a task in a loop knows no epoch and no number of a batch
        self._steps.start_batch(batch, moment, parts)
        less = None if self._recorder.replay is None else self._steps.recollated()
        self._recorder.begin(batch, self._steps.noted(moment), self._steps.sample_ids.fetched, less)
        with LossTap() as losses:
            loss = self._task.loss(batch)
        self._steps.read_loss(losses)
        self._recorder.observe(self._steps.dynamics)
        self._steps.before_backward(loss, self.n_steps)
        (loss / parts).backward()
        self._steps.after_backward()
        self._recorder.after_backward()
        self._recorder.verified = self._steps.verified
        return loss.detach()

    def clip_grad_norm(self, max_norm: float) -> None:
        """Clip the gradient of the step, as `torch.nn.utils.clip_grad_norm_` does, in whose place it is called."""
        self._before_step(Clip("norm", max_norm))
        nn.utils.clip_grad_norm_(self._steps.collector.parameters(), max_norm)

    def clip_grad_value(self, clip_value: float) -> None:
        """Clip the gradient of the step, as `torch.nn.utils.clip_grad_value_` does, in whose place it is called."""
        self._before_step(Clip("value", clip_value))
        nn.utils.clip_grad_value_(self._steps.collector.parameters(), clip_value)

    def close(self, *, finished: bool) -> None:
        """Nothing of this is left in the run; ``finished``: it ended as intended."""
        for hook in self._hooks:
            hook.remove()
        self._recorder.close(finished=finished)

    def _before_step(self, clip: Clip) -> None:
        if self._steps.collector.inside_a_step:  # otherwise clipping has said so already
            self._recorder.before_step(clip)

    def _after_step(self) -> None:
        line = self._ways.first_step(self._recorder.writer.log, float("inf"))
        if line is not None:
            _tell(line)
        if not self._inside_epoch:  # the last step, of what the epoch had accumulated
            self._recorder.end_epoch()


def _tell(line: str) -> None:
    """Shown as Lightning shows its lines, unless the program has set up logging in a way of its own."""
    if not logging.getLogger().hasHandlers() and not _log.hasHandlers():
        _log.addHandler(logging.StreamHandler())
        _log.setLevel(logging.INFO)
    _log.info(line)


def _refuse_processes() -> None:
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ConfigurationError(
            f"{torch.distributed.get_world_size()} processes train together, and a loop of one's own is recorded of one; train in "
            "one process, or through a Trainer with strategy='ddp' and InfluenceCallback."
        )
