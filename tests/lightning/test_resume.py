"""Runs that are interrupted: their log goes on as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from modules import Classifier, digits, fit, loader
from torch.utils.data import BatchSampler, DataLoader

from lightning_influence import InfluenceCallback, InfluenceReport
from lightning_influence.errors import ConfigurationError, LogCorrupted, LogError
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.steps import LoggedTrajectory
from lightning_influence.replay.logged_plan import LoggedPlan

STEPS = 12  # of an epoch


class Batches(BatchSampler):
    """Batches in order, from any of them on."""

    def __init__(self) -> None:
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.start % STEPS, STEPS):
            self.start = number + 1
            yield list(range(8 * number, 8 * number + 8))

    def __len__(self) -> int:
        return STEPS


class Resumable(DataLoader[Any]):
    """A loader that knows where it is."""

    def __init__(self) -> None:
        self.batches = Batches()
        super().__init__(digits(8 * STEPS), batch_sampler=self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"start": self.batches.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches.start = state["start"]


class SeedsSteps(L.Callback):
    """Random numbers that follow from the step: a checkpoint does not hold the generators' states."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        random.seed(trainer.global_step)
        np.random.seed(trainer.global_step)
        torch.manual_seed(trainer.global_step)


class Interrupts(L.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("the machine went away")


def train(
    folder: Path,
    *callbacks: L.Callback,
    ckpt_path: Path | None = None,
    log: Path | None = None,
    epochs: int = 2,
    **options: Any,
) -> L.Trainer:
    torch.manual_seed(0)
    module = Classifier(
        net=torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.GELU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 10))
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            SeedsSteps(),
            InfluenceCallback(log or folder / "log", record="both", snapshot_every=5, **options),
            ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}"),
            *callbacks,
        ],
    )
    trainer.fit(module, Resumable(), ckpt_path=ckpt_path)
    return trainer


def content(log: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a log."""
    reader = StoreReader(log)
    steps = {f"{i}/{name}": reader.tensor(i, name) for i in range(len(reader)) for name in reader.names(i)}
    artifacts = {
        f"{a}/{name}": reader.artifact(a, name) for a in reader.artifacts() for name in reader.artifact_names(a)
    }
    return steps | artifacts


@pytest.mark.parametrize("at", [4, 10, 17])
def test_a_run_resumed_inside_an_epoch_ends_with_the_log_of_an_uninterrupted_one(at: int, tmp_path: Path) -> None:
    train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="went away"):
        train(tmp_path / "broken", Interrupts(at))
    assert len(StoreReader(tmp_path / "broken" / "log")) == at
    train(tmp_path / "broken", ckpt_path=tmp_path / "broken" / f"step={at // 3 * 3}.ckpt")
    whole, resumed = content(tmp_path / "whole" / "log"), content(tmp_path / "broken" / "log")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_a_run_goes_on_from_a_checkpoint_that_was_saved_after_it(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "broken", epochs=1).save_checkpoint(tmp_path / "end.ckpt")
    train(tmp_path / "broken", ckpt_path=tmp_path / "end.ckpt")
    whole, resumed = content(tmp_path / "whole" / "log"), content(tmp_path / "broken" / "log")
    # the first run ended with a snapshot of its own
    assert {name: t for name, t in resumed.items() if not name.startswith("snapshot-00000012")}.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


class InterruptsTheEnd(L.Callback):
    """Every step is taken and the last epoch's checkpoint saved, when the machine goes away."""

    def on_train_end(self, *_: Any) -> None:
        raise RuntimeError("the machine went away")


class Averages(L.Callback):
    """Moves the parameters when the last epoch has ended, before its checkpoint is saved."""

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(0.9)


@pytest.mark.parametrize("last", ["step", "epoch", "moved"])
def test_a_run_that_was_interrupted_at_its_very_end_ends_with_its_log_and_report(last: str, tmp_path: Path) -> None:
    # Lightning calls no hook of training when such a run is resumed
    validation = loader(digits(30), 10)
    averages = [Averages()] if last == "moved" else []
    kinds = {"step": {"every_n_train_steps": 24}, "epoch": {"save_on_train_epoch_end": True}}
    saves = ModelCheckpoint(tmp_path / last, filename="end", **kinds.get(last, kinds["epoch"]))

    def run(folder: Path, *callbacks: L.Callback, **options: Any) -> InfluenceReport | None:
        recording = InfluenceCallback(folder / "log", record="both", snapshot_every=5, report=True)
        module = Classifier()
        again = [SeedsSteps(), *callbacks, recording, *averages]
        torch.manual_seed(0)
        fit(
            module,
            Resumable(),
            *again,
            max_epochs=2,
            val=validation,
            enable_checkpointing=InterruptsTheEnd in map(type, callbacks),
            **options,
        )
        return recording.report

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="went away"):
        run(tmp_path / "broken", InterruptsTheEnd(), saves)
    assert "final" not in StoreReader(tmp_path / "broken" / "log").artifacts()
    resumed = run(tmp_path / "broken", ckpt_path=tmp_path / last / "end.ckpt")
    assert whole is not None and resumed is not None
    torch.testing.assert_close(resumed.scores, whole.scores, rtol=0, atol=1e-6 * float(whole.scores.abs().max()))
    assert (tmp_path / "broken" / "log" / "report.html").exists()
    whole_log, resumed_log = content(tmp_path / "whole" / "log"), content(tmp_path / "broken" / "log")
    assert whole_log.keys() == resumed_log.keys()
    assert [name for name in whole_log if not torch.equal(whole_log[name], resumed_log[name])] == []
    ends = [StoreReader(tmp_path / run / "log").artifact_meta("final") for run in ("whole", "broken")]
    assert ends[0] == ends[1]
    assert bool(ends[0].get("moved")) == (last == "moved")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["OnExceptionCheckpoint", "ModelCheckpoint"])
def test_a_run_goes_on_from_the_checkpoint_of_its_exception(kind: str, first: bool, tmp_path: Path) -> None:
    class Keeps(OnExceptionCheckpoint):
        def teardown(self, *_: Any, **__: Any) -> None:
            """It would delete the checkpoint, even after an exception."""

    keeps = (
        Keeps(tmp_path, "broken")
        if kind == "OnExceptionCheckpoint"
        else ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True)
    )
    callbacks = [keeps, Interrupts(7)] if first else [Interrupts(7), keeps]
    with pytest.raises(RuntimeError, match="went away"):
        train(tmp_path, *callbacks)
    saved = torch.load(tmp_path / "broken.ckpt", weights_only=False)
    assert [state["steps"] for key, state in saved["callbacks"].items() if key.startswith("Influence")] == [7]
    train(tmp_path, ckpt_path=tmp_path / "broken.ckpt")
    assert len(StoreReader(tmp_path / "log")) > 2 * STEPS - 2


def test_a_log_is_the_same_however_its_place_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="went away"):
        train(tmp_path, Interrupts(7), log=Path("log"))
    train(tmp_path, ckpt_path=tmp_path / "step=6.ckpt", log=tmp_path / "x" / ".." / "log")
    assert len(StoreReader(tmp_path / "log")) == 2 * STEPS


@pytest.mark.parametrize("existing", ["error", "overwrite", "resume"])
def test_a_log_that_was_moved_goes_on(existing: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        train(tmp_path, Interrupts(7))
    (tmp_path / "log").rename(tmp_path / "moved")
    train(tmp_path, ckpt_path=tmp_path / "step=6.ckpt", log=tmp_path / "moved", existing=existing)
    assert len(StoreReader(tmp_path / "moved")) == 2 * STEPS


def test_a_log_does_not_go_on_from_the_checkpoint_of_another(tmp_path: Path) -> None:
    train(tmp_path / "a", epochs=1)
    train(tmp_path / "b", epochs=1)
    with pytest.raises(ConfigurationError, match="not of the run whose log is .*b/log"):
        train(tmp_path / "b", ckpt_path=tmp_path / "a" / "step=6.ckpt", existing="resume")
    with pytest.raises(LogError, match="already holds a log of 12 steps"):
        train(tmp_path / "b", ckpt_path=tmp_path / "a" / "step=6.ckpt")
    assert len(StoreReader(tmp_path / "b" / "log")) == STEPS
    (tmp_path / "a" / "step=6.ckpt").rename(tmp_path / "of a.ckpt")
    train(tmp_path / "a", epochs=1, existing="overwrite")
    with pytest.raises(ConfigurationError, match="not of the run whose log is .*a/log"):
        train(tmp_path / "a", ckpt_path=tmp_path / "of a.ckpt")
    assert len(StoreReader(tmp_path / "a" / "log")) == STEPS


def test_a_resume_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    fit(Classifier(), loader(digits(64)), InfluenceCallback(tmp_path, record="gradients"))
    index = tmp_path / "rank-0" / "index.jsonl"
    whole = index.read_bytes()
    shard = tmp_path / "rank-0" / "step-00000000.safetensors"
    module = Classifier()
    for path, content in ((index, b"x" + whole), (shard, b"")):
        path.write_bytes(content)
        with pytest.raises(LogCorrupted) as raised:
            fit(module, loader(digits(64)), InfluenceCallback(tmp_path, existing="resume", record="gradients"))
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
        index.write_bytes(whole)
    fit(module, loader(digits(64)), InfluenceCallback(tmp_path, existing="overwrite", record="gradients"))
    assert len(StoreReader(tmp_path)) == 4
    del raised  # its traceback held the writer


def test_a_log_goes_on_only_as_it_began(tmp_path: Path) -> None:
    fit(
        Classifier(),
        loader(digits(32)),
        InfluenceCallback(tmp_path, compression="mask", mask_size=50, record="gradients"),
    )
    other = InfluenceCallback(tmp_path, compression="mask", mask_size=60, existing="resume", record="gradients")
    with pytest.raises(ConfigurationError, match="recorded with mask="):
        fit(Classifier(), loader(digits(32)), other)
    again = InfluenceCallback(tmp_path, compression="mask", mask_size=50, existing="resume", record="gradients")
    fit(Classifier(), loader(digits(32)), again)
    assert len(LoggedTrajectory(tmp_path)) == 4


class Branches(Classifier):
    """Uses one of its layers in few steps, so that the optimizer skips it in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        logits = self.net(x) + (self.extra(x) if batch_idx in (0, 5, 11) else 0)
        return torch.nn.functional.cross_entropy(logits, y)


def test_moments_of_a_parameter_that_is_used_now_and_then(tmp_path: Path) -> None:
    module = Branches()
    fit(module, loader(digits(8 * STEPS), 8), InfluenceCallback(tmp_path, record="both", snapshot_every=1))
    run, plan = LoggedTrajectory(tmp_path), LoggedPlan(LoggedTrajectory(tmp_path), module)
    used = [t for t in range(len(run)) if "extra.weight" in run.record(t).gradients]
    assert used == [0, 5, 11]
    for t in used:
        for own, theirs in zip(
            run.record(t).moments["extra.weight"], plan.snapshot(t).moments["extra.weight"], strict=True
        ):
            torch.testing.assert_close(run.select("extra.weight", theirs), own, rtol=1e-5, atol=1e-8)
