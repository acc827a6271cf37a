"""A failure of recording is told and noted, and the run and its checkpoints are those of a run without recording."""

from __future__ import annotations

import os
import resource
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Classifier, Forked, fit, loader, split_digits, two_groups
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.capture.hooks import GradientCapture
from lightning_influence.errors import ConfigurationError, InfluenceError, LogError
from lightning_influence.log import writer as store
from lightning_influence.log.format import step_name
from lightning_influence.log.missing import note_missing, read_missing
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.recorder import Recorder
from lightning_influence.log.steps import LoggedTrajectory
from lightning_influence.run import tap

TRAIN, VAL = split_digits(64, 8)
STEPS = 8  # of two epochs


def run(callback: L.Callback | None, folder: Path, module: Classifier | None = None, *others: L.Callback) -> Any:
    """A run with dropout whose last checkpoint is saved; its end."""
    module = module or Classifier(two_groups, net=plain_net())
    torch.manual_seed(0)
    saves = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    callbacks = [*others, saves] if callback is None else [callback, *others, saves]
    fit(module, loader(TRAIN), *callbacks, val=DataLoader(VAL, 4), max_epochs=2, enable_checkpointing=True)
    return (
        module.state_dict(),
        torch.get_rng_state(),
        torch.load(folder / "last.ckpt", weights_only=False)["global_step"],
    )


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and torch.equal(a[1], b[1]) and a[2] == b[2] == STEPS


class AtStep(L.Callback):
    """Does something once, when a number of steps have been taken."""

    def __init__(self, step: int, what: Callable[[], object]) -> None:
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.what()


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("it broke")


def full_from(step: int) -> Callable[[Path, Any], None]:
    """A disk on which everything before a step has found room, however far behind the thread is that writes."""
    replace, is_full = store._replace, False

    def write(path: Path, parts: Any) -> None:
        nonlocal is_full
        is_full |= path.name == f"{step_name(step)}.safetensors"
        if is_full:
            raise OSError(28, "No space left on device")
        replace(path, parts)

    return write


def wait_for_the_log(trainer: L.Trainer) -> None:
    callback = next(c for c in trainer.callbacks if isinstance(c, InfluenceCallback))  # type: ignore[attr-defined]
    with suppress(LogError):
        callback._recorder.writer.flush()  # type: ignore[union-attr]


def deleted(log: Path) -> None:
    """While its thread writes, which renames files that were just listed."""
    while log.exists():
        shutil.rmtree(log, ignore_errors=True)


PATCHES: dict[str, Callable[[pytest.MonkeyPatch, Path], object]] = {
    "a full disk": lambda patch, log: patch.setattr(store, "_replace", full_from(5)),
    "the log deleted": lambda patch, log: deleted(log),
    "the manifest deleted": lambda patch, log: (log / "manifest.json").unlink(),
    "collecting": lambda patch, log: patch.setattr(Recorder, "before_step", broken),
    "beginning": lambda patch, log: patch.setattr(Recorder, "begin", broken),
    "inside the optimizer's step": lambda patch, log: patch.setattr(Recorder, "_stepped", broken),
    "inside the forward pass": lambda patch, log: patch.setattr(GradientCapture, "_watch", broken),
    "inside the backward pass": lambda patch, log: patch.setattr(GradientCapture, "_add", broken),
    "looking at the loss": lambda patch, log: patch.setattr(tap, "seen", broken),
}


@pytest.mark.parametrize("failure", PATCHES)
@pytest.mark.parametrize("record", ["gradients", "both"])
def test_a_failure_in_the_middle_stops_recording_and_nothing_else(
    failure: str, record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(None, tmp_path / "plain")
    log, module = tmp_path / "log", Classifier(two_groups, net=plain_net())
    fails = AtStep(5, lambda: PATCHES[failure](monkeypatch, log))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        callback = InfluenceCallback(log, record=record)
        recorded = run(callback, tmp_path / "recorded", module, fails)
    assert same(plain, recorded)
    told = [str(w.message) for w in seen if "Recording has stopped" in str(w.message)]
    assert len(told) == 1 and "Traceback" in told[0] and str(log) in told[0]
    assert not any(m._forward_hooks for m in module.modules()) and "training_step" not in vars(module)
    if "deleted" in failure:
        return
    monkeypatch.undo()
    reader = StoreReader(log)
    assert list(reader.missing) == ["the steps from 5 on"] and len(reader) == len(LoggedTrajectory(log)) == 5
    with pytest.warns(UserWarning, match="lacks the steps from 5 on"):
        attribute(log, queries=DataLoader(VAL, 4), model=module, curvature="fisher", progress=False)


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.3), nn.Linear(8, 10))


class Waits(L.Callback):
    """For the thread that writes the log, whose error the run then sees at once."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        wait_for_the_log(trainer)


@pytest.mark.parametrize(
    "failure",
    ["a full disk", "the manifest deleted", "collecting", "inside the optimizer's step", "inside the forward pass"],
)
def test_on_error_raise_ends_the_run(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = AtStep(5, lambda: PATCHES[failure](monkeypatch, tmp_path / "log"))
    told = "it broke|No space left|manifest.json was deleted, replaced or cut while the run wrote to it"
    with pytest.raises((RuntimeError, LogError, ConfigurationError), match=told):
        fit(
            Classifier(),
            loader(TRAIN),
            InfluenceCallback(tmp_path / "log", on_error="raise", record="gradients"),
            fails,
            Waits(),
            max_epochs=2,
        )


@pytest.mark.parametrize(
    "failure", ["a full disk", "collecting", "inside the optimizer's step", "inside the forward pass"]
)
def test_a_failure_at_the_first_step_is_raised(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Early(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            if failure == "a full disk":
                monkeypatch.setattr(store, "_replace", full_from(0))
            else:
                PATCHES[failure](monkeypatch, tmp_path / "log")

    callback = InfluenceCallback(tmp_path / "log", record="gradients")
    with pytest.raises((RuntimeError, LogError, ConfigurationError), match="it broke|No space left"):
        fit(Classifier(), loader(TRAIN), callback, Early(), Waits(), max_epochs=2)
    monkeypatch.undo()
    fit(
        Classifier(), loader(TRAIN), InfluenceCallback(tmp_path / "log", record="gradients")
    )  # nothing is in the way of the next run
    assert len(LoggedTrajectory(tmp_path / "log")) == 4


def test_frozen_batch_norm_stays_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Classifier:
        torch.manual_seed(0)
        return Classifier(net=nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)))

    ends = []
    for name in ("whole", "stopped"):
        module = make()
        fails = AtStep(3, lambda name=name: name == "stopped" and monkeypatch.setattr(Recorder, "begin", broken))  # type: ignore[misc]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(
                module,
                loader(TRAIN),
                InfluenceCallback(tmp_path / name, frozen_batch_norm=True, record="gradients"),
                fails,
                max_epochs=2,
            )
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def failing_attribution(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("no scores")


ENDS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], object]]] = {
    "attribution": (
        "report.html",
        lambda patch: patch.setattr("lightning_influence.lightning.run_report.attribute", failing_attribution),
    ),
    "the page": (
        "report.html",
        lambda patch: patch.setattr("lightning_influence.report.InfluenceReport.to_html", broken),
    ),
    "the loggers": (
        "the report in the loggers",
        lambda patch: patch.setattr("lightning_influence.lightning.run_report.log_report", broken),
    ),
    "the end of the log": ("its end", lambda patch: patch.setattr(Recorder, "_finish", broken)),
}


@pytest.mark.parametrize("failure", ENDS)
@pytest.mark.parametrize("on_error", ["raise", "stop_recording"])
def test_a_failure_at_the_end_never_stops_fit(
    failure: str, on_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(None, tmp_path / "plain")
    what, patch = ENDS[failure]
    patch(monkeypatch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        callback = InfluenceCallback(tmp_path / "log", report=True, on_error=on_error, record="gradients")
        recorded = run(callback, tmp_path / "recorded", Classifier(two_groups, net=plain_net()))
    assert same(plain, recorded)
    told = [str(w.message) for w in seen if f"lacks {what}:" in str(w.message) and "Traceback" in str(w.message)]
    assert len(told) == 1
    assert what in StoreReader(tmp_path / "log").missing
    assert len(LoggedTrajectory(tmp_path / "log")) == STEPS
    made = failure != "attribution"
    assert (callback.report is not None) == (tmp_path / "log" / "report.safetensors").exists() == made
    assert (tmp_path / "log" / "report.html").exists() == (made and failure != "the page")


def test_a_run_that_stopped_recording_does_not_go_on_with_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = AtStep(5, lambda: monkeypatch.setattr(Recorder, "begin", broken))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options: dict[str, Any] = {"enable_checkpointing": True}
    with pytest.warns(UserWarning, match="Recording has stopped"):
        fit(
            Classifier(),
            loader(TRAIN),
            InfluenceCallback(tmp_path / "log", record="gradients"),
            fails,
            saves,
            max_epochs=2,
            **options,
        )
    monkeypatch.undo()

    def resume(step: int) -> None:
        trainer = L.Trainer(
            callbacks=[InfluenceCallback(tmp_path / "log", record="gradients")],
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            default_root_dir=tmp_path,
            **options,
        )
        trainer.fit(Classifier(), loader(TRAIN), ckpt_path=tmp_path / f"step={step}.ckpt")

    with pytest.raises(ConfigurationError, match="stopped during the run that goes on here.*it broke"):
        resume(7)
    resume(4)
    assert len(LoggedTrajectory(tmp_path / "log")) == STEPS and not StoreReader(tmp_path / "log").missing


def test_a_checkpoint_is_saved_also_where_the_log_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint waits for the log, whose failure it is then the first to see."""
    log, module = tmp_path / "log", Classifier(two_groups, net=plain_net())
    saves = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1)
    fails = AtStep(5, lambda: monkeypatch.setattr(store, "_replace", full_from(5)))
    plain = run(None, tmp_path / "plain")
    with pytest.warns(UserWarning, match="Recording has stopped"):
        recorded = run(InfluenceCallback(log, record="gradients"), tmp_path / "recorded", module, fails, saves)
    assert same(plain, recorded) and len(list((tmp_path / "steps").glob("*.ckpt"))) == STEPS


def recorded_twice(log: Path, limit: int) -> None:
    """The first run can write no file of more than ``limit`` bytes, the second any."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        fit(Classifier(), loader(TRAIN), InfluenceCallback(log, record="both"))
    except Exception as error:
        print(type(error).__name__, error)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    fit(Classifier(), loader(TRAIN), InfluenceCallback(log, record="both"))
    print("done")


@pytest.mark.parametrize("limit", [0, 700, 4000], ids=["nothing", "no manifest", "no step"])
def test_a_disk_that_is_full_from_the_start_leaves_nothing_in_the_way(limit: int, tmp_path: Path) -> None:
    code, out, err = Forked(recorded_twice, tmp_path / "log", limit).wait()
    assert code == 0, err
    first, last = out.splitlines()
    assert first.startswith("LogError") and "File too large" in first and last == "done"
    assert len(LoggedTrajectory(tmp_path / "log")) == 4


def test_two_processes_that_could_not_begin_are_not_in_the_way_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.StoreWriter(tmp_path / "log", rank=1, ranks=2).close()
    store.StoreWriter(tmp_path / "log", rank=0, ranks=2).close()
    fit(Classifier(), loader(TRAIN), InfluenceCallback(tmp_path / "log", record="gradients"))
    assert len(LoggedTrajectory(tmp_path / "log")) == 4


def test_steps_without_their_manifest_are_not_overwritten(tmp_path: Path) -> None:
    fit(Classifier(), loader(TRAIN), InfluenceCallback(tmp_path / "log", record="gradients"))
    (tmp_path / "log" / "manifest.json").unlink()
    with pytest.raises(LogError, match="already holds a log of 4 steps, without its manifest.json"):
        fit(Classifier(), loader(TRAIN), InfluenceCallback(tmp_path / "log", record="gradients"))


def test_a_path_that_is_not_utf8_is_refused_at_the_start(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/log\xff"))
    for open_it in (InfluenceCallback, StoreReader, store.StoreWriter):
        with pytest.raises(LogError, match="not UTF-8"):
            open_it(path)
    assert not path.exists()


def test_paths_of_any_language_work(tmp_path: Path) -> None:
    log = tmp_path / "журнал 日志 é"
    fit(Classifier(), loader(TRAIN), InfluenceCallback(log, report=True, record="gradients"), val=DataLoader(VAL, 4))
    assert (log / "report.html").exists()


def test_what_is_missing_is_read_with_care(tmp_path: Path) -> None:
    note_missing(tmp_path, "one", "why")
    note_missing(tmp_path, "other", "because \udcff")
    assert read_missing(tmp_path) == {"one": "why", "other": "because \udcff"}
    for wrong in (b"[1]", b"{", b'{"a": 1}', b"[" * 100_000, b" " * 2**21):
        (tmp_path / "missing.json").write_bytes(wrong)
        with pytest.raises(InfluenceError, match="missing.json is not what was written"):
            read_missing(tmp_path)
