"""A run of 3,000 steps: memory, open files, threads and checkpoints stay as they were after the first 500."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import FunctionTask, InfluenceCallback, SelectionDataModule, recording

BATCH, STEPS, SETTLED = 8, 3000, 500
GROWTH = 6 * 2**20  # bytes of memory that the allocator may keep in 2,500 steps: 2.5 kB a step


def loader(**options: Any) -> DataLoader[Any]:
    x, y = digits(400).tensors
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=True, **options)


def queries() -> DataLoader[Any]:
    x, y = digits(440).tensors
    return DataLoader(TensorDataset(x[400:], y[400:]), 20)


def held() -> dict[str, int]:
    """What the process holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free and was not given back says nothing
    return {
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tensors": sum(isinstance(o, torch.Tensor) for o in gc.get_objects()),
    }


class Watches(L.Callback):
    """What the process holds, after the first steps and at the end, and how large a checkpoint would be."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[dict[str, int]]()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in (SETTLED, STEPS - 1):
            trainer.save_checkpoint(self.folder / "size.ckpt")
            self.seen.append(held() | {"checkpoint": (self.folder / "size.ckpt").stat().st_size})


def refuse_growth(mode: str, start: dict[str, int], end: dict[str, int]) -> None:
    print(mode, {k: (start[k], end[k]) for k in start})
    assert end["files"] == start["files"] and end["threads"] == start["threads"]
    assert end["tensors"] <= start["tensors"] + 3 * 2**17 // (16 * BATCH)  # what is kept in memory of the decisions
    assert end["memory"] <= start["memory"] + GROWTH


MODES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "gradients": ({"record": "gradients", "compression": "mask", "mask_size": 64}, None),
    "replay": ({"record": "replay", "snapshot_every": 500}, None),
    "default": ({}, None),
    "both, with a report": ({"record": "both", "report": True}, None),
    "inside the step": (None, {"every": 1}),
    "rounds": (None, {"every": "epoch"}),
    "look-ahead": (None, {"every": 5, "horizon": 1}),
    "look-ahead, recorded": ({"record": "replay", "snapshot_every": 500}, {"every": 5, "horizon": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_nothing_grows(mode: str, tmp_path: Path) -> None:
    options, selection = MODES[mode]
    watch = Watches(tmp_path)
    callbacks: list[L.Callback] = [watch]
    if options is not None:
        callbacks.append(InfluenceCallback(tmp_path / "log", **options))
    trainer = L.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
    )
    data = loader() if selection is None else SelectionDataModule(loader(), queries(), keep=0.5, **selection)
    with_report = options is not None and options.get("report", False)
    trainer.fit(Classifier(width=4), data, queries() if with_report else None)
    start, end = watch.seen
    refuse_growth(mode, start, end)
    assert end["checkpoint"] <= start["checkpoint"] + 2**18  # what is kept in memory of the decisions
    assert (tmp_path / "log" / "report.html").exists() == with_report


@pytest.mark.slow
def test_nothing_grows_in_a_loop_of_one_s_own(tmp_path: Path) -> None:
    task = FunctionTask(
        nn.Sequential(nn.Linear(64, 4), nn.GELU(), nn.Linear(4, 10)),
        lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1]),
    )
    optimizer, seen = torch.optim.AdamW(task.module.parameters()), []
    with recording(tmp_path / "log", task, optimizer) as recorder:
        while recorder.n_steps < STEPS:
            for batch in recorder.batches(loader()):
                recorder.backward(batch)
                optimizer.step()
                optimizer.zero_grad()
                if recorder.n_steps in (SETTLED, STEPS - 1):
                    seen.append(held())
    assert recorder.n_steps == STEPS
    refuse_growth("a loop of one's own", *seen)
