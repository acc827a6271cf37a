"""The Lightning face of the log: one callback that records a run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import lightning as L
import torch
from torch.utils._pytree import tree_flatten

from lightning_influence.capture import GradientCapture
from lightning_influence.capture.step import StepOptions
from lightning_influence.core.coordinates import COMPRESSIONS
from lightning_influence.errors import ConfigurationError
from lightning_influence.lightning.live_run import LiveRun
from lightning_influence.lightning.loggers import log_report
from lightning_influence.log.format import MANIFEST
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.recorder import Compression, CompressionName, Recorder
from lightning_influence.log.snapshots import ReplaySettings
from lightning_influence.log.writer import StoreWriter
from lightning_influence.report import InfluenceReport
from lightning_influence.run.optimizer import update_name
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.sample_ids import IdSource, SampleIds
from lightning_influence.run.sample_weights import WeightSource
from lightning_influence.run.trainer import clip_of, loss_scaler
from lightning_influence.scoring.attribution import attribute

_PACKAGES = ("lightning-influence", "torch", "lightning", "safetensors", "transformers", "peft")


class InfluenceCallback(L.Callback):
    """Records, for every optimizer step, what `attribute` needs to say which samples helped or hurt.

    Per-sample gradients come out of the training backward pass itself; nothing in the module, the dataset
    or the loader has to change, and the run's random numbers stay as they are.

    Args:
        dirpath: directory of the log, created at the start of ``fit``.
        record: ``"gradients"`` writes per-sample gradients, moments and hyperparameters, from which scores
            follow without model or data; ``"replay"`` snapshots and what is needed to run the training
            again, for exact curvature and for any module; ``"both"``.
        snapshot_every: steps between snapshots; None for about the square root of their number.
        store_batches: whether the batches themselves go into the log for replay; None where they are
            small or their loader has workers.
        compression: ``"full"`` keeps every coordinate of every per-sample gradient, ``"factored"`` the same
            without loss in fewer bytes where a layer allows it, ``"mask"`` a fixed random set of
            coordinates per parameter, ``"auto"`` the smallest lossless form within a budget and masks beyond.
        mask_size: coordinates kept per parameter under a mask.
        exclude: pattern or patterns (`fnmatch`) of parameter names that train but are not recorded.
        sample_ids: how a batch says which samples it holds, for data that is not a map-style dataset:
            a key of the batch or a function of it. By default the indices that the sampler drew.
        sample_weights: function of the batch that gives the relative weight ``(n,)`` of every sample in the
            batch's mean loss; see `sample_weights.sample_weights` for the default.
        reduction: whether the training loss is a mean or a sum over the samples.
        frozen_batch_norm: train batch normalisation with its running statistics, so that samples do not
            depend on each other; refused otherwise.
        report: attribute the run to the validation loss when ``fit`` ends: ``report.html`` and ``report.safetensors`` in
            ``dirpath``, a figure and numbers through the trainer's loggers, and the `report` attribute.
        existing: what to do where ``dirpath`` already holds a log. A run resumed from a checkpoint goes on
            with its own log in any case, also where that was moved to ``dirpath``.
        seed: of the mask.

    Raises:
        ConfigurationError: at the start of ``fit``, where the run cannot be attributed.
    """

    def __init__(
        self,
        dirpath: str | Path,
        *,
        record: Literal["gradients", "replay", "both"] = "gradients",
        snapshot_every: int | None = None,
        store_batches: bool | None = None,
        compression: CompressionName = "auto",
        mask_size: int = 8192,
        exclude: str | Sequence[str] = (),
        sample_ids: IdSource = None,
        sample_weights: WeightSource = None,
        reduction: Literal["mean", "sum"] = "mean",
        frozen_batch_norm: bool = False,
        report: bool = False,
        existing: Literal["error", "overwrite", "resume"] = "error",
        seed: int = 0,
    ) -> None:
        self.dirpath = Path(dirpath)
        self._state_key = self._generate_state_key(dirpath=str(self.dirpath.resolve()))  # asked for at every hook
        for name, value, known in (
            ("record", record, ("gradients", "replay", "both")),
            ("compression", compression, COMPRESSIONS),
            ("existing", existing, ("error", "overwrite", "resume")),
        ):
            if value not in known:
                raise ConfigurationError(f"{name}={value!r}; choose one of {', '.join(known)}")
        if mask_size < 1:
            raise ConfigurationError(f"mask_size={mask_size}; a mask keeps at least one coordinate per parameter")
        if snapshot_every is not None and snapshot_every < 1:
            raise ConfigurationError(f"snapshot_every={snapshot_every}; it counts steps and is at least 1")
        self.record, self.snapshot_every, self.store_batches = record, snapshot_every, store_batches
        self.compression = Compression(compression, mask_size, seed)
        self.options = StepOptions(reduction, sample_weights, exclude, frozen_batch_norm)
        self.sample_ids = SampleIds(sample_ids, random=record != "gradients")
        self._live = LiveRun(self.options, self.sample_ids, self, otherwise="use record='replay'")
        self.existing = existing
        self.writes_report = report
        self.report: InfluenceReport | None = None
        self._recorder: Recorder | None = None
        self._steps: int | None = None  # of the run that the trainer's present state comes from
        self._run: str | None = None  # by which a log is known wherever it lies; on the process that saves checkpoints
        self._resume_at: int | None = None

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        if self._recorder is None:
            return {"steps": self._steps, "run": self._run}
        self._recorder.writer.flush()  # a checkpoint never knows of more steps than the log
        return {"steps": len(self._recorder.writer), "run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = self._resume_at = state_dict["steps"]
        self._run = state_dict.get("run")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states, run = checkpoint["callbacks"], _run_of(self.dirpath)
        if self.state_key in states or run is None:
            return
        own = [state for state in states.values() if isinstance(state, dict) and state.get("run") == run]
        if own:  # of a log that was moved, whose state lies under its former place
            self.load_state_dict(own[0])
        elif self.existing == "resume":
            raise _not_its_log(self.dirpath)

    # -- start and end of fit ---------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._live.listen(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.writes_report:
            _refuse_no_queries(trainer)
        collector = self._live.start(
            trainer, pl_module, captures=self.record != "replay", rehearses=self.record != "gradients"
        )
        manifest = self._manifest(trainer, pl_module, collector.capture, collector.optimizer)
        with ExitStack() as undo:
            self._recorder = Recorder(
                collector,
                self._writer(collector.ranks, manifest, undo),
                compression=self.compression,
                replay=None if self.record == "gradients" else self._replay_settings(trainer),
            )
            undo.pop_all()

    def _writer(self, ranks: Ranks, manifest: dict[str, Any], undo: ExitStack) -> StoreWriter:
        """The log, open for the steps that come; ``undo`` closes it."""
        resume_at, self._resume_at = self._resume_at, None
        existing = self.existing if resume_at is None else "resume"
        if existing == "resume":
            _refuse_another_run(self.dirpath, manifest | {"ranks": ranks.size})
        recorded = _run_of(self.dirpath) if existing == "resume" else None
        if resume_at is not None and recorded not in (None, self._run):  # another run has overwritten the checkpoint's
            raise _not_its_log(self.dirpath)
        self._run = recorded or uuid4().hex
        writer = undo.enter_context(StoreWriter(self.dirpath, rank=ranks.rank, ranks=ranks.size, existing=existing))
        # without a checkpoint, up to where every process came
        steps = min(ranks.gather(len(writer))) if resume_at is None else resume_at
        if ranks.rank == 0:
            writer.truncate(steps)
        ranks.wait()  # first the one whose part says that the log is whole; and until all have seen what was there
        if ranks.rank == 0:
            writer.write_manifest(manifest | {"run": self._run})
        else:
            writer.truncate(steps)
        return writer

    def _replay_settings(self, trainer: L.Trainer) -> ReplaySettings:
        steps = trainer.estimated_stepping_batches
        known = steps >= 0 and math.isfinite(steps)  # -1 where neither the loader nor the trainer says when a run ends
        every = self.snapshot_every or (max(1, math.isqrt(int(steps))) if known else 100)
        return ReplaySettings(every, self.store_batches)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(trainer, finished=True)
        if self.writes_report:
            Ranks.of(trainer).wait()  # until the whole log is written
            if trainer.is_global_zero:
                self.report = self._report(trainer, pl_module)

    def _report(self, trainer: L.Trainer, module: L.LightningModule) -> InfluenceReport:
        """Scores against the mean validation loss, written and logged."""
        (queries,), _ = tree_flatten(trainer.val_dataloaders)
        training = trainer.train_dataloader
        report = attribute(self.dirpath, queries=queries, model=module, target="mean", data=training)
        saved, page = self.dirpath / "report.safetensors", self.dirpath / "report.html"
        for path in (saved, page):
            path.unlink(missing_ok=True)  # it may be a link, which must not be written through
        report.save(saved)
        report.to_html(page, data=getattr(training, "dataset", None))
        log_report(report, trainer)
        return report

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close(trainer, finished=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close(trainer, finished=False)

    def _close(self, trainer: L.Trainer, *, finished: bool) -> None:
        self._live.stop(trainer)
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            self._steps = len(recorder.writer)
            recorder.close(finished=finished)

    # -- one optimizer step -----------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._live.start_epoch(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._recorder is not None
        self._recorder.end_epoch()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._recorder is not None
        moment = self._live.start_batch(trainer, pl_module, batch, batch_idx)
        ids, drawn = self._live.ids, self._live.drawn
        assert drawn is not None
        noted = asdict(moment) | ({} if torch.equal(ids, drawn) else {"drawn": drawn.tolist()})
        less = None if self.record == "gradients" else self._live.recollated()
        self._recorder.begin(batch, noted, self.sample_ids.fetched, less)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._recorder is not None:
            self._live.before_zero_grad()
            self._recorder.before_zero_grad()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        assert self._recorder is not None
        self._recorder.observe(self._live.dynamics)
        self._live.before_backward(trainer, loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._recorder is not None
        self._live.after_backward(trainer, pl_module)
        self._recorder.after_backward()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self._recorder is not None
        self._recorder.before_step(clip_of(trainer), may_skip=loss_scaler(trainer) is not None)

    # -- what the log says of itself --------------------------------------------------------------------

    def _manifest(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        capture: GradientCapture | None,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, Any]:
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {k: p for k, p in pl_module.named_parameters() if p.requires_grad and id(p) in optimized}
        size = sum(p.numel() for p in trained.values())
        recorded = size if capture is None else sum(p.numel() for p in capture.parameters.values())
        return {
            "module": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
            "optimizer": type(optimizer).__name__,
            "update": update_name(optimizer),
            "record": self.record,
            "frozen_batch_norm": self.options.frozen_batch_norm,
            "parameters": [] if capture is None else capture.table,
            "shapes": {k: list(p.shape) for k, p in pl_module.named_parameters()},
            "excluded": list(self.options.exclude),
            "coverage": {"trained": size, "recorded": recorded},
            "compression": self.compression.kind,
            "mask": {"size": self.compression.mask_size, "seed": self.compression.seed},
            "reduction": self.options.reduction,
            "precision": str(trainer.precision),
            "versions": _versions(),
        }


def _run_of(log: Path) -> str | None:
    """By which the log that a directory holds is known; None where it holds none."""
    return StoreReader(log).manifest.get("run") if (log / MANIFEST).exists() else None


def _not_its_log(log: Path) -> ConfigurationError:
    return ConfigurationError(
        f"the checkpoint is not of the run whose log is {log}, so the log cannot go on from it; give the dirpath of the "
        "checkpoint's own log, or another directory."
    )


def _refuse_another_run(log: Path, manifest: dict[str, Any]) -> None:
    """A log goes on only as it began: other settings would make its first steps mean something else."""
    if not (log / MANIFEST).exists():
        return
    recorded = StoreReader(log).manifest
    for key, value in json.loads(json.dumps(manifest)).items():
        if key != "versions" and recorded.get(key) != value:
            raise ConfigurationError(
                f"the log {log} was recorded with {key}={recorded.get(key)!r:.200} and cannot go on with {value!r:.200}; "
                "resume with the settings it began with, or record to another directory."
            )


def _refuse_no_queries(trainer: L.Trainer) -> None:
    """What a report would miss at the end of the run is said at its start."""
    if not trainer.enable_validation:
        raise ConfigurationError(
            "report=True scores against the validation loss; give fit a validation loader and the module a validation_step, "
            f"and keep limit_val_batches={trainer.limit_val_batches} above 0."
        )
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.setup_data()  # which does nothing where a validation has already run
    loaders, _ = tree_flatten(trainer.val_dataloaders)
    if len(loaders) > 1:
        raise ConfigurationError(
            f"report=True scores against one validation loader, and this run has {len(loaders)}; join their datasets "
            "(torch.utils.data.ConcatDataset), or call attribute(...) with each of them after the run."
        )
    if not any(validation.max_batches):
        raise ConfigurationError(
            "report=True scores against the validation loss; the validation loader has no batch, give it at least one."
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional one
    return found
