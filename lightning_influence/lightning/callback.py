"""The Lightning face of the log: one callback that records a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_influence.capture.step import StepOptions
from lightning_influence.core.coordinates import COMPRESSIONS
from lightning_influence.errors import ConfigurationError, LogError, check_choice
from lightning_influence.lightning.failures import tell_missing
from lightning_influence.lightning.live_run import LiveRun
from lightning_influence.lightning.run_log import RunLog
from lightning_influence.lightning.run_report import RunReport, refuse_no_queries, refuse_sharded_report
from lightning_influence.live.ways import Ways, budget_of
from lightning_influence.log.format import refuse_undecodable
from lightning_influence.log.manifest import RECORDS, Manifest, Mask
from lightning_influence.log.place import is_remote, place_of
from lightning_influence.log.recorder import Compression, CompressionName, Recorder
from lightning_influence.log.snapshots import SNAPSHOT_MOMENTS, ReplaySettings, SnapshotMoments
from lightning_influence.report import InfluenceReport
from lightning_influence.report.tables import in_notebook
from lightning_influence.run.sample_ids import IdSource, SampleIds
from lightning_influence.run.sample_weights import WeightSource
from lightning_influence.run.trainer import clip_of, loss_scaler, ranks_of, steps_left
from lightning_influence.words import renamed


def _while_recording(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that does nothing where nothing is recorded, and whose failures are those of recording."""

    @wraps(hook)
    def guarded(self: InfluenceCallback, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._recorder is not None:
            with self._guarded(trainer):
                self._raise_failure()
                hook(self, trainer, *args, **kwargs)

    return guarded


class InfluenceCallback(L.Callback):
    """Records, for every optimizer step, what `attribute` needs to say which samples helped or hurt.

    Per-sample gradients come out of the training backward pass itself; nothing in the module, the dataset
    or the loader has to change, and the run's random numbers stay as they are.

    Args:
        log: directory of the log, created at the start of ``fit``, or a URL that fsspec knows, such as ``"s3://bucket/run"``, to which
            it is uploaded step by step (docs/log-format.md).
        record: ``"replay"`` writes snapshots and what is needed to run the training again, for exact curvature and for any
            module; ``"gradients"`` per-sample gradients, moments and hyperparameters, from which approximate scores follow
            without the data; ``"both"``. ``"auto"`` is both as far as they are possible and cheap: per-sample gradients
            within ``budget``, left out where the layers do not give them; one line says so, and how large the log will be.
        snapshot_every: steps between snapshots; None for about the square root of their number.
        snapshot_moments: ``"bfloat16"`` rounds the optimizer's moments in snapshots, which then take two thirds of the bytes; what
            it costs in accuracy is measured in docs/benchmarks.md, "Fidelity".
        store_batches: whether the batches themselves go into the log for replay; None where they are
            small or their loader has workers.
        compression: ``"full"`` keeps every coordinate of every per-sample gradient, ``"factored"`` the same
            without loss in fewer bytes where a layer allows it, ``"mask"`` a fixed random set of
            coordinates per parameter, ``"auto"`` the smallest lossless form within a budget and masks beyond.
        mask_size: coordinates kept per parameter under a mask.
        budget: bytes that per-sample gradients may take for a sample and step, under which ``compression="auto"`` chooses the
            size of the masks; None for 64 kB with ``record="auto"``, and otherwise for masks of ``mask_size`` beyond 4 MB.
        sample_ids: how a batch says which samples it holds, for data that is not a map-style dataset:
            a key of the batch or a function of it. By default the indices that the sampler drew.
        reduction: whether the training loss is a mean or a sum over the samples.
        sample_weights: function of the batch that gives the relative weight ``(n,)`` of every sample in the
            batch's mean loss; see `sample_weights.sample_weights` for the default.
        exclude: pattern or patterns (`fnmatch`) of parameter names that train but are not recorded.
        frozen_batch_norm: train batch normalisation with its running statistics, so that samples do not
            depend on each other; refused otherwise.
        verify: hold what per-sample gradients say of a removal against training steps without the sample, at the first step,
            and their sum against the gradient at every step; of a run that is to be replayed, run the first steps again.
            What disagrees is refused. Reports say what was verified.
        report: attribute the run when ``fit`` ends, with the validation data as queries and their mean loss as target:
            ``report.html`` and ``report.safetensors`` in ``log``, a figure and numbers through the trainer's loggers, and
            the `report` attribute.
        on_error: what to do where recording fails after the first step: ``"stop_recording"`` warns, closes the log, which notes
            why it ends, and lets training go on as it would without recording; ``"raise"`` ends the run. At the start and at
            the first step every error is raised; at the end none is.
        existing: what to do where the directory already holds a log. A run resumed from a checkpoint goes on
            with its own log in any case, also where that was moved to this directory.
        seed: of the mask.
        dirpath: the old word for ``log``.

    Attributes:
        dirpath: the directory of the log, or its URL; an attribute called ``log`` is overwritten by the trainer.
        report: of the run that has ended, with ``report=True``.

    Raises:
        ConfigurationError: no directory, or an unknown choice; at the start of ``fit`` or at its first step, where the run
            cannot be attributed.
        LogError: there, where the log cannot be written.
    """

    def __init__(
        self,
        log: str | Path | None = None,
        *,
        record: Literal["auto", "gradients", "replay", "both"] = "auto",
        snapshot_every: int | None = None,
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
        report: bool = False,
        on_error: Literal["raise", "stop_recording"] = "stop_recording",
        existing: Literal["error", "overwrite", "resume"] = "error",
        seed: int = 0,
        dirpath: str | Path | None = None,
    ) -> None:
        log = renamed("log", log, "dirpath", dirpath)
        if log is None:
            raise ConfigurationError("log is missing; give the directory that the log is to be written to.")
        # of a callback's attribute `log` the trainer makes its logging function
        self.dirpath = log if is_remote(log) else Path(log)
        refuse_undecodable(Path(log))
        if report and is_remote(log):
            raise ConfigurationError(
                f"report=True writes the report into the log's directory, and {log} is a URL; leave it out, and call attribute(...) "
                "with the URL after the run."
            )
        where = self.dirpath if isinstance(self.dirpath, str) else str(self.dirpath.resolve())
        self._state_key = self._generate_state_key(dirpath=where)  # asked for at every hook
        for name, value, known in (
            ("record", record, ("auto", *RECORDS)),
            ("compression", compression, COMPRESSIONS),
            ("existing", existing, ("error", "overwrite", "resume")),
            ("on_error", on_error, ("raise", "stop_recording")),
            ("snapshot_moments", snapshot_moments, SNAPSHOT_MOMENTS),
        ):
            check_choice(name, value, known)
        if mask_size < 1:
            raise ConfigurationError(f"mask_size={mask_size}; a mask keeps at least one coordinate per parameter")
        if budget is not None and budget < 1:
            raise ConfigurationError(f"budget={budget}; it counts the bytes of a sample and step and is at least 1")
        if snapshot_every is not None and snapshot_every < 1:
            raise ConfigurationError(f"snapshot_every={snapshot_every}; it counts steps and is at least 1")
        self.record, self.snapshot_every, self.store_batches = record, snapshot_every, store_batches
        self._moments = SNAPSHOT_MOMENTS[snapshot_moments]
        self.compression = Compression(compression, mask_size, seed, budget_of(record, budget))
        self.options = StepOptions(reduction, sample_weights, exclude, frozen_batch_norm, verify)
        self.sample_ids = SampleIds(sample_ids, random=True)
        self._live = LiveRun(
            self.options,
            self.sample_ids,
            self,
            otherwise="use record='replay'",
            sharded=record in ("auto", "replay"),
            guard=self._inside,
            give_up=self._leave_out if record == "auto" else None,
        )
        self._ways = Ways(record)
        self.on_error = on_error
        self._log = RunLog(self.dirpath, existing)
        self.writes_report = report
        self._report = RunReport(Path(log))
        self._recorder: Recorder | None = None
        self._failure: Exception | None = (
            None  # inside the training or the optimizer's step, to be dealt with at the next hook
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.dirpath)!r}, {', '.join(f'{k}={v!r}' for k, v in self._settings())})"

    def _repr_html_(self) -> str:
        import pandas as pd

        return in_notebook(repr(self), pd.DataFrame(self._settings(), columns=["setting", "value"]))

    def _settings(self) -> list[tuple[str, Any]]:
        return [("record", self.record), ("compression", self.compression.kind), ("report", self.writes_report)]

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        if self._recorder is None:
            return self._log.state_dict()
        try:
            self._recorder.writer.flush()  # a checkpoint never knows of more steps than the log
        except LogError as error:  # which must not cost the checkpoint
            self._failure = self._failure or error
        stopped = None if self._failure is None else str(self._failure)
        known = {"steps": self._recorder.writer.complete, "stopped": stopped, "left": self._recorder.left}
        return self._log.state_dict() | known

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._log.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._log.look_for(self.state_key, checkpoint["callbacks"])

    # -- start and end of fit ---------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._live.listen(trainer, pl_module)
        if self.writes_report:
            refuse_sharded_report(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.writes_report:
            refuse_no_queries(trainer)
        self._ways = Ways(self.record, self._log.begun_as(), rank_zero_info)
        asked = self._ways.record
        collector = self._live.start(trainer, pl_module, captures=asked != "replay", rehearses=asked != "gradients")
        manifest = Manifest.of_run(
            pl_module,
            collector.optimizer,
            collector.capture,
            self.options,
            record=self._ways.record,
            compression=self.compression.kind,
            mask=Mask(self.compression.mask_size, self.compression.seed),
            precision=str(trainer.precision),
            budget=self.compression.budget,
        )
        with ExitStack() as undo:
            writer = self._log.open(manifest, collector.ranks, undo)
            self._failure = None
            self._recorder = Recorder(
                collector,
                writer,
                compression=self.compression,
                replay=None if self._ways.record == "gradients" else self._replay_settings(trainer),
                guard=self._inside,
                give_up=self._leave_out if self.record == "auto" else None,
            )
            self._recorder.left = self._log.left
            undo.pop_all()
        self._ways.begin(self._live.steps, self._recorder, replace(manifest, run=self._log.run))

    def _leave_out(self, what: str, error: ConfigurationError) -> None:
        """As of `Ways.give_up`."""
        self._ways.give_up(what, error)

    def _replay_settings(self, trainer: L.Trainer) -> ReplaySettings:
        steps = trainer.estimated_stepping_batches
        known = steps >= 0 and math.isfinite(steps)  # -1 where neither the loader nor the trainer says when a run ends
        every = self.snapshot_every or (max(1, math.isqrt(int(steps))) if known else 8)
        thinned = self.snapshot_every is None and not known
        return ReplaySettings(every, self.store_batches, thinned, self._moments)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # an error here would keep the checkpoints of the end from being saved
        whole = all(ranks_of(trainer, sharded=True).gather(self._is_complete(trainer)))
        self._close(trainer, finished=whole)
        if self.writes_report:
            self._report.write(trainer, pl_module, whole)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._log.awaited:
            return
        # the run went on from its very end, of which the hooks of training hear nothing
        try:
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        except Exception as error:
            tell_missing(place_of(self.dirpath), trainer.global_rank, "its end", error, "Training is not affected.")

    def _is_complete(self, trainer: L.Trainer) -> bool:
        """Whether every step of this process is on disk."""
        if self._recorder is None:
            return False
        try:
            self._raise_failure()
            self._recorder.writer.flush()
        except Exception as error:
            self._stop_recording(trainer, error)
            return False
        return True

    @property
    def report(self) -> InfluenceReport | None:
        """The report of the last run, where ``report=True``; that of a run in processes of their own is read from its log."""
        return self._report.read() if self.writes_report else None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close(trainer, finished=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close(trainer, finished=False)

    def _close(self, trainer: L.Trainer, *, finished: bool) -> None:
        self._live.stop(trainer)
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        try:
            recorder.close(finished=finished)
        except Exception as error:
            tell_missing(recorder.writer.place, recorder.ranks.rank, "its end", error, "Training is not affected.")
        self._log.steps, self._log.left = recorder.writer.complete, recorder.left

    # -- failures ---------------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self, trainer: L.Trainer) -> Iterator[None]:
        """Of a hook, which may end recording."""
        try:
            yield
        except Exception as error:
            if self._ends_the_run:
                raise
            self._stop_recording(trainer, error)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Of what is done inside the training step or the optimizer's, where nothing can be taken away."""
        try:
            yield
        except Exception as error:
            if self._ends_the_run:
                raise
            self._failure = self._failure or error

    @property
    def _ends_the_run(self) -> bool:
        """Whether a failure that happens now is raised."""
        return self.on_error == "raise" or self._recorder is None or not self._recorder.begun or self._live.trying

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _stop_recording(self, trainer: L.Trainer, error: Exception) -> None:
        """Leave the run to itself."""
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        self._live.stop(trainer, trains=True)
        with suppress(LogError):  # which is the error, or comes of it
            recorder.close(finished=False)
        self._log.steps, self._log.stopped = recorder.writer.complete, str(error)
        tell_missing(
            recorder.writer.place,
            recorder.ranks.rank,
            f"the steps from {self._log.steps} on",
            error,
            "Recording has stopped. Training goes on as it would without it, and the log can be read up to its last complete "
            "step; on_error='raise' ends the run instead.",
        )

    # -- one optimizer step -----------------------------------------------------------------------------

    @_while_recording
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._live.start_epoch(trainer)

    @_while_recording
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._recorder is not None
        self._recorder.end_epoch()

    @_while_recording
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._recorder is not None
        moment = self._live.start_batch(trainer, pl_module, batch, batch_idx)
        steps = self._live.steps
        less = None if self._ways.record == "gradients" else steps.recollated()
        self._recorder.begin(batch, steps.noted(moment), self.sample_ids.fetched, less)

    @_while_recording
    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self._recorder is not None
        self._live.before_zero_grad()
        self._recorder.before_zero_grad()

    @_while_recording
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        assert self._recorder is not None
        self._recorder.observe(self._live.steps.dynamics)
        self._live.before_backward(trainer, loss)

    @_while_recording
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._recorder is not None
        self._live.after_backward(trainer)
        self._recorder.after_backward()
        self._recorder.verified = self._live.steps.verified

    @_while_recording
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self._recorder is not None
        self._recorder.before_step(clip_of(trainer), may_skip=loss_scaler(trainer) is not None)

    @_while_recording
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        line = self._ways.first_step(self.dirpath, steps_left(trainer) + 1)
        if line is not None:
            rank_zero_info(line)
