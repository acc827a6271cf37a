"""Beside other callbacks and trainer features: training is not changed, the log is right, and nothing of ours is left behind."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from modules import Classifier, hooks_of, loader, split_digits
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.errors import LogError
from lightning_influence.log.steps import LoggedTrajectory

TRAIN, VAL = split_digits(72, 16)
BATCH = 8


class Witness(L.Callback):
    """The optimizer steps really taken: which samples, seen from outside, and by which gradient."""

    def __init__(self) -> None:
        self.sizes, self.gradients = list[int](), list[torch.Tensor]()
        self._open = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._open += len(batch[0])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())
        self.sizes.append(self._open)
        self._open = 0


@dataclass
class Case:
    """What stands beside our callback."""

    callbacks: Callable[[Path], list[L.Callback]] = lambda path: []
    options: dict[str, Any] = field(default_factory=dict)
    val: bool = False


def newer(name: str) -> L.Callback:
    """A callback that the oldest supported Lightning does not have yet."""
    if not hasattr(lightning_callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    callback: L.Callback = getattr(lightning_callbacks, name)()
    return callback


CASES = {
    "ModelCheckpoint": Case(lambda path: [ModelCheckpoint(path, every_n_train_steps=2, save_top_k=-1)]),
    "EarlyStopping": Case(
        lambda path: [EarlyStopping("val_loss", min_delta=9, patience=1)], {"max_epochs": 5}, val=True
    ),
    "GradientAccumulationScheduler": Case(
        lambda path: [GradientAccumulationScheduler({0: 1, 1: 2})], {"max_epochs": 3}
    ),
    "StochasticWeightAveraging": Case(
        lambda path: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)], {"max_epochs": 3}
    ),
    "EMAWeightAveraging": Case(lambda path: [newer("EMAWeightAveraging")], {"max_epochs": 2}),
    "LearningRateMonitor": Case(lambda path: [LearningRateMonitor("step")], {"logger": "csv"}),
    "Timer": Case(lambda path: [Timer("00:01:00:00")]),
    "last incomplete accumulation": Case(options={"accumulate_grad_batches": 4, "max_epochs": 2}),
    "fast_dev_run": Case(options={"fast_dev_run": 2}),
    "overfit_batches": Case(options={"overfit_batches": 2, "max_epochs": 3}),
    "limit_train_batches": Case(options={"limit_train_batches": 3, "max_epochs": 2}),
    "max_steps": Case(options={"max_steps": 5, "max_epochs": -1}),
    "validation inside training": Case(options={"val_check_interval": 2}, val=True),
    "detect_anomaly": Case(options={"detect_anomaly": True}),
    "inference_mode off": Case(options={"inference_mode": False}, val=True),
    "reload_dataloaders": Case(options={"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}),
}


def run(case: Case, path: Path, *callbacks: L.Callback) -> Classifier:
    module = Classifier()
    options = dict(case.options)
    if options.get("logger") == "csv":
        options["logger"] = CSVLogger(path)
    settings: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        **{**settings, "enable_model_summary": False, **options},
        callbacks=[*case.callbacks(path), *callbacks],
        default_root_dir=path,
    )
    torch.manual_seed(0)
    trainer.fit(module, loader(TRAIN, BATCH), DataLoader(VAL, 8) if case.val else None)
    return module


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("record", ["gradients", "replay"])
def test_beside(name: str, record: Any, tmp_path: Path) -> None:
    case, witness = CASES[name], Witness()
    recorded = run(case, tmp_path / "a", witness, InfluenceCallback(tmp_path / "log", record=record))
    plain = run(case, tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(recorded.parameters(), plain.parameters(), strict=True))
    assert hooks_of(recorded) == hooks_of(plain) == 0
    assert recorded.__dict__.keys() == plain.__dict__.keys()
    with warnings.catch_warnings(record=True) as told:
        scores = attribute(tmp_path / "log", queries=DataLoader(VAL, 8), model=recorded, target="mean", progress=False)
    said = any("changed after the last optimizer step" in str(w.message) for w in told)
    assert said == ("Averaging" in name)
    if record == "gradients":
        log = LoggedTrajectory(tmp_path / "log")
        assert [len(log.record(t).sample_ids) for t in range(len(log))] == witness.sizes
        for t, consumed in enumerate(witness.gradients):
            shares = log.shares(t).values()
            total = torch.cat([share.combine(torch.ones(1, share.n_samples))[0] for share in shares])
            torch.testing.assert_close(total, consumed, rtol=1e-4, atol=1e-6)
    assert sum(witness.sizes) == len(scores.rows.steps)


def trainer_of(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return L.Trainer(
        **{**settings, "enable_model_summary": False, "enable_checkpointing": False, **options},
        callbacks=list(callbacks),
    )


class Raises(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, MemoryError])
def test_an_exception_leaves_a_module_without_hooks_and_a_log_of_its_steps(
    error: type[BaseException], tmp_path: Path
) -> None:
    module, batches = Raises(), loader(TRAIN, BATCH)
    module.error = error
    sampler, trainer = batches.batch_sampler, trainer_of(InfluenceCallback(tmp_path, record="gradients"))
    with pytest.raises(error if error is not KeyboardInterrupt else SystemExit):
        trainer.fit(module, batches)
    assert hooks_of(module) == 0
    assert batches.batch_sampler is sampler
    assert "process_dataloader" not in trainer.strategy.__dict__
    assert not trainer.optimizers or not trainer.optimizers[0]._optimizer_step_post_hooks
    assert len(LoggedTrajectory(tmp_path)) == 3


def test_fit_twice(tmp_path: Path) -> None:
    module, callback = Classifier(), InfluenceCallback(tmp_path, existing="resume", record="gradients")
    trainer = trainer_of(callback)
    trainer.fit(module, loader(TRAIN, BATCH))
    assert len(LoggedTrajectory(tmp_path)) == 9
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(TRAIN, BATCH))
    assert len(LoggedTrajectory(tmp_path)) == 18
    with pytest.raises(LogError, match="already holds a log of 18 steps"):
        trainer_of(InfluenceCallback(tmp_path, record="gradients")).fit(Classifier(), loader(TRAIN, BATCH))
    trainer_of(InfluenceCallback(tmp_path, existing="overwrite", record="gradients")).fit(
        Classifier(), loader(TRAIN, BATCH)
    )
    assert len(LoggedTrajectory(tmp_path)) == 9


def test_validate_test_and_predict_record_nothing(tmp_path: Path) -> None:
    class Whole(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    module, trainer = Whole(), trainer_of(InfluenceCallback(tmp_path / "log", record="gradients"))
    for verb in (trainer.validate, trainer.test):
        verb(module, DataLoader(VAL, 8), verbose=False)
    assert not (tmp_path / "log").exists()
    assert hooks_of(module) == 0


@pytest.mark.filterwarnings("ignore")
def test_the_learning_rate_finder_before_fit(tmp_path: Path) -> None:
    class Tunable(Classifier):
        def __init__(self) -> None:
            super().__init__(lambda m: torch.optim.AdamW(m.parameters(), lr=m.lr))
            self.lr = 1e-3

    module = Tunable()
    trainer = trainer_of(
        InfluenceCallback(tmp_path / "log", existing="overwrite", record="gradients"),
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    Tuner(trainer).lr_find(module, loader(TRAIN, BATCH), num_training=20)
    assert hooks_of(module) == 0
    trainer.fit(module, loader(TRAIN, BATCH))
    log = LoggedTrajectory(tmp_path / "log")
    assert len(log) == 9
    assert next(iter(log.record(0).hyper.values()))["lr"] == module.lr


def test_two_callbacks_write_two_logs(tmp_path: Path) -> None:
    callbacks = [
        InfluenceCallback(tmp_path / "full", compression="full", record="gradients"),
        InfluenceCallback(tmp_path / "replay", record="replay"),
    ]
    module = Classifier()
    trainer_of(*callbacks).fit(module, loader(TRAIN, BATCH))
    scores = [
        attribute(tmp_path / name, queries=DataLoader(VAL, 8), model=module, curvature="none", progress=False).scores
        for name in ("full", "replay")
    ]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-6)


def test_the_documented_table_is_what_is_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    table = page.split("## Beside")[1].split("## ")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)) == CASES.keys()
