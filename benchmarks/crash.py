"""Runs killed at random moments: what their logs hold, and whether a resumed run ends with the log of an uninterrupted one.

    python benchmarks/crash.py --kills 100

Each run is killed by SIGKILL, its log is read to the end with every checksum verified, and it is started again from its
last checkpoint, which was saved in the middle of an epoch. Exits with 1 after any failure.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from measure import quiet
from torch.utils.data import BatchSampler, DataLoader
from workloads import WORKLOADS, digits

from lightning_influence import InfluenceCallback
from lightning_influence.log.format import MANIFEST
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.steps import LoggedTrajectory

EPOCHS, BATCH = 2, 64


class Seeded(BatchSampler):
    """Shuffled batches that follow from the epoch, from any of them on."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch, self.start = n, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        if self.start >= len(self):
            self.epoch, self.start = self.epoch + 1, 0
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        batches = [order[i : i + BATCH] for i in range(0, self.n, BATCH)]
        for number in range(self.start, len(batches)):
            self.start = number + 1
            yield batches[number]

    def __len__(self) -> int:
        return -(-self.n // BATCH)


class Resumable(DataLoader[Any]):
    """Knows where it is, so that a checkpoint in the middle of an epoch can go on there."""

    def __init__(self) -> None:
        data = digits()
        self.order = Seeded(len(data))
        super().__init__(data, batch_sampler=self.order)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.order.epoch, "start": self.order.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.epoch, self.order.start = state["epoch"], state["start"]


class SeedsSteps(L.Callback):
    """Random numbers that follow from the step: a checkpoint does not hold the generators' states.

    Also before an epoch, which selection in rounds may begin with a roll-out.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        L.seed_everything(trainer.global_step, verbose=False)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        L.seed_everything(trainer.global_step, verbose=False)


def train(folder: Path) -> None:
    """Start the run, or go on from its last checkpoint."""
    last = folder / "last.ckpt"
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            SeedsSteps(),
            InfluenceCallback(folder / "log", record="both", existing="overwrite", snapshot_every=5),
            ModelCheckpoint(folder, every_n_train_steps=4, save_last=True, save_top_k=0),
        ],
    )
    trainer.fit(WORKLOADS["cnn"].make(), Resumable(), ckpt_path=last if last.exists() else None)


def in_process(work: Callable[[], None], kill_after: float | None = None) -> float:
    """Seconds that work took in a process of its own, which is killed after some of them."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if kill_after is None and status != 0:
        raise RuntimeError("the run failed; its traceback is above")
    return time.perf_counter() - start


def read(log: Path) -> list[dict[str, bytes]]:
    """Every tensor of every step, verified."""
    if not (log / MANIFEST).exists():
        return []  # killed before the log was begun
    reader = StoreReader(log)
    if len(reader):
        run = LoggedTrajectory(log)
        for index in range(len(run)):
            assert all(share.dense().isfinite().all() for share in run.shares(index).values())
    return [
        {name: reader.tensor(index, name).numpy().tobytes() for name in reader.names(index)}
        for index in range(len(reader))
    ]


def one(reference: list[dict[str, bytes]], duration: float, rng: random.Random) -> tuple[str, int]:
    """What became of one killed run, and the complete steps that its log held."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_process(lambda: train(folder), kill_after=rng.uniform(0, duration))
        left = read(folder / "log")
        if left != reference[: len(left)]:
            return "wrong after the kill", len(left)
        resumed = (folder / "last.ckpt").exists()
        in_process(lambda: train(folder))
        if read(folder / "log") != reference:
            return "wrong after resuming", len(left)
        return "resumed, same log" if resumed else "killed before a checkpoint, begun again", len(left)


def main() -> int:
    quiet()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, outcomes, steps = random.Random(args.seed), Counter[str](), list[int]()
    with tempfile.TemporaryDirectory() as folder:
        duration = in_process(lambda: train(Path(folder)))
        reference = read(Path(folder) / "log")
    for number in range(args.kills):
        try:
            outcome, complete = one(reference, duration, rng)
            steps.append(complete)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        outcomes[outcome] += 1
        print(f"\r{number + 1} kills", end="", file=sys.stderr, flush=True)
    print(f"\n{args.kills} runs of {len(reference)} steps and {duration:.1f} s, killed after 0 to {max(steps)} steps")
    for outcome, count in outcomes.most_common():
        print(f"{count:5d}  {outcome}")
    return int(any("same log" not in o and "begun again" not in o for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
