"""Runs of every mode killed at random moments, and gone on with: nothing may be lost.

    python benchmarks/soak.py --kills 200

Each run is killed by SIGKILL, with all of its processes. Its log has to read up to the last complete step, with every
checksum verified and every tensor that of an uninterrupted run. Then it is started again from its last checkpoint, and has to
end with the log, the decisions, the report and the parameters of an uninterrupted one. Runs are forked after everything
has been imported, so that each takes about a second. Exits with 1 after any failure.
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
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from measure import quiet
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, TensorDataset
from workloads import digits

from lightning_influence import InfluenceCallback, InfluenceReport, SelectionDataModule
from lightning_influence.log.format import MANIFEST
from lightning_influence.log.reader import StoreReader
from lightning_influence.selection import decisions

SAMPLES, QUERIES, BATCH, EPOCHS = 64, 16, 8, 3


class SeedsSteps(L.Callback):
    """Random numbers that follow from the step: a checkpoint does not hold the generators' states.

    Also before an epoch, which selection in rounds may begin with a roll-out.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        L.seed_everything(trainer.global_step, verbose=False)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        L.seed_everything(trainer.global_step, verbose=False)


@dataclass(frozen=True)
class Mode:
    """A way to run: what is recorded, what is selected, on how many processes."""

    recording: dict[str, Any] | None = None
    selection: dict[str, Any] | None = None
    processes: int = 1
    epochs: int = EPOCHS


MODES = {
    "gradients": Mode({"record": "gradients"}),
    "replay": Mode({"record": "replay", "snapshot_every": 3}),
    "both, report": Mode({"record": "both", "snapshot_every": 3, "report": True}),
    "selection inside the step": Mode(None, {"every": 1}),
    "rounds, recorded": Mode({"record": "both", "snapshot_every": 3}, {"every": "epoch"}),
    "look-ahead, report": Mode({"record": "replay", "report": True}, {"every": 2, "horizon": 1}),
    # which take a checkpoint at the end of an epoch only, and a while until they train
    "two processes": Mode({"record": "both", "snapshot_every": 3}, processes=2, epochs=10),
    "two processes, rounds, report": Mode(
        {"record": "gradients", "report": True}, {"every": "epoch"}, processes=2, epochs=10
    ),
}


class Net(L.LightningModule):
    """Without dropout where the run is rolled out in the middle of an epoch: a checkpoint does not hold the state of the
    generators, so that a roll-out right after a resume would draw other random numbers.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Seeded(BatchSampler):
    """Shuffled batches that follow from the epoch, from any of them on."""

    def __init__(self) -> None:
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        if self.start >= len(self):
            self.epoch, self.start = self.epoch + 1, 0
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for number in range(self.start, len(self)):
            self.start = number + 1
            yield order[number * BATCH : (number + 1) * BATCH]

    def __len__(self) -> int:
        return SAMPLES // BATCH


class Resumable(DataLoader[Any]):
    """Knows where it is, so that a checkpoint in the middle of an epoch can go on there."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.order = Seeded()
        super().__init__(data, batch_sampler=self.order)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.order.epoch, "start": self.order.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.epoch, self.order.start = state["epoch"], state["start"]


def data_of(mode: Mode) -> tuple[Any, Any]:
    """The data of a run, and its validation data where those are given apart."""
    x, y = digits()[: SAMPLES + QUERIES]
    train, val = TensorDataset(x[:SAMPLES], y[:SAMPLES]), TensorDataset(x[SAMPLES:], y[SAMPLES:])
    queries = DataLoader(val, 8)
    if mode.selection is None:
        return (Resumable(train) if mode.processes == 1 else DataLoader(train, BATCH, shuffle=True)), queries

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            if mode.selection == {"every": 1}:
                return Resumable(train)
            return DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))

        def val_dataloader(self) -> Any:
            return queries

    return SelectionDataModule(Data(), keep=0.5, **mode.selection), None


def train(folder: Path, mode: Mode) -> None:
    """Start the run, or go on from its last checkpoint."""
    data, val = data_of(mode)
    last = folder / "last.ckpt"
    # a sampler that Lightning deals out to processes does not say where in the epoch it is
    alone = mode.processes == 1
    when: dict[str, Any] = (
        {"every_n_train_steps": 3} if alone else {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    )
    callbacks: list[L.Callback] = [
        SeedsSteps(),
        ModelCheckpoint(folder, save_last=True, save_top_k=0 if alone else 1, **when),
    ]
    if mode.recording is not None:
        callbacks.append(InfluenceCallback(folder / "log", existing="overwrite", on_error="raise", **mode.recording))
    trainer = L.Trainer(
        max_epochs=mode.epochs,
        accelerator="cpu",
        devices=mode.processes,
        strategy="ddp_fork" if mode.processes > 1 else "auto",
        logger=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    module = Net(0.0 if mode.selection and "horizon" in mode.selection else 0.1)
    trainer.fit(module, data, val, ckpt_path=last if last.exists() else None)
    torch.save({k: v.clone() for k, v in module.state_dict().items()}, folder / "end.pt")
    if mode.selection is not None and mode.processes == 1:
        data.selection_report.to_csv(folder / "decisions.csv")


def in_process(work: Callable[[], None], kill_after: float | None = None) -> float:
    """Seconds that work took in a process group of its own, all of which is killed after some of them."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.setsid()
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        if kill_after is not None:
            os.dup2(sink, 2)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or has not yet a group
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if kill_after is None and status != 0:
        raise RuntimeError("the run failed; its traceback is above")
    return time.perf_counter() - start


@dataclass
class Left:
    """What a run has left behind."""

    steps: list[dict[str, bytes]] = field(default_factory=list)
    end: dict[str, bytes] = field(default_factory=dict)


def left_in(folder: Path) -> Left:
    """Every tensor of every step of every process, verified, and what is there only at the end."""
    left = Left()
    if (folder / "log" / MANIFEST).exists():
        reader = StoreReader(folder / "log")
        left.steps = [
            {
                f"{r}/{k}": reader.tensor(t, k, r).numpy().tobytes()
                for r in range(reader.ranks)
                for k in reader.names(t, r)
            }
            for t in range(len(reader))
        ]
    if (folder / "end.pt").exists():
        left.end = {k: v.numpy().tobytes() for k, v in torch.load(folder / "end.pt").items()}
    if (folder / "decisions.csv").exists():
        left.end["decisions"] = (folder / "decisions.csv").read_bytes()
    if (folder / "log" / "report.safetensors").exists():
        left.end["report"] = InfluenceReport.load(folder / "log" / "report.safetensors").scores.numpy().tobytes()
    return left


def one(mode: Mode, reference: Left, duration: float, rng: random.Random) -> tuple[str, int]:
    """What became of one killed run, and the complete steps that its log held."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_process(
            lambda: train(folder, mode), kill_after=rng.uniform(0.3 if mode.processes > 1 else 0, 1.1) * duration
        )
        left = left_in(folder)
        if left.steps != reference.steps[: len(left.steps)]:
            return "WRONG after the kill", len(left.steps)
        resumed = (folder / "last.ckpt").exists()
        in_process(lambda: train(folder, mode))
        again = left_in(folder)
        if again != reference:
            parts = [k for k in reference.end if again.end.get(k) != reference.end[k]]
            return f"WRONG after resuming: {len(again.steps)} steps, {parts}", len(left.steps)
        return "resumed, the same" if resumed else "killed before a checkpoint, begun again, the same", len(left.steps)


def main() -> int:
    quiet()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    decisions._IN_MEMORY = 200  # so that decisions go to their file in runs as short as these
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after as many")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    args = parser.parse_args()
    rng, outcomes, references = random.Random(args.seed), Counter[tuple[str, str]](), dict[str, tuple[Left, float]]()
    start, steps, n = time.perf_counter(), list[int](), 0
    for name in args.modes:
        for _ in range(2):  # the first takes longer than any that follows
            with tempfile.TemporaryDirectory() as folder:
                duration = in_process(lambda name=name, folder=folder: train(Path(folder), MODES[name]))
                references[name] = left_in(Path(folder)), duration
        if (MODES[name].recording or {}).get("report") and "report" not in references[name][0].end:
            raise RuntimeError(f"{name}: the uninterrupted run left no report, so nothing could be compared with it")
    for n in range(1, args.kills + 1):
        name = args.modes[n % len(args.modes)]
        try:
            outcome, complete = one(MODES[name], *references[name], rng)
            steps.append(complete)
        except Exception as error:
            outcome = f"WRONG: {type(error).__name__}: {error}"
        outcomes[name, outcome] += 1
        print(f"\r{n} kills", end="", file=sys.stderr, flush=True)
        if time.perf_counter() - start > args.seconds:
            break
    print(f"\n{n} runs killed, with 0 to {max(steps, default=0)} complete steps in their logs")
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{count:5d}  {name}: {outcome}")
    return int(any("WRONG" in outcome for _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
