"""Harmful samples whose labels are right: influence on held-out data against rankings by loss, and what leaving them out really does.

python benchmarks/harmful.py                  # images and texts, three seeds
python benchmarks/harmful.py noise --seeds 1

A tenth of the training samples is spoilt, with their labels as they were. *upside_down*: images turned by half a turn. *noise*:
images of random pixels. *truncated*: a text of which eight tokens are left; the others are one token, which counts in the loss.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measure import quiet
from mislabels import Net
from selection import fit
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from workloads import WORKLOADS, mnist, text

from lightning_influence import InfluenceCallback, attribute, training_dynamics
from lightning_influence.scoring.queries import query_losses
from lightning_influence.trust.retraining import leave_one_out, recorded_run

SHARE = 0.1


@dataclass(frozen=True)
class Task:
    """Data with some samples spoilt, and what is trained on them."""

    train: TensorDataset
    spoilt: Tensor
    queries: TensorDataset
    test: TensorDataset
    make: Callable[[], Any]
    epochs: int
    batch: int
    each_loss: Callable[[Any, Any], Tensor]


def drawn(data: TensorDataset, seed: int, n: int, held: int) -> tuple[list[list[Tensor]], Tensor]:
    """Training, query and test samples, and which of the first are to be spoilt."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    parts = [[t[rows].clone() for t in data.tensors] for rows in (order[:n], order[n : n + held], order[n + held :])]
    return parts, torch.rand(n, generator=generator) < SHARE


def images(spoil: Callable[[Tensor, Tensor], Tensor], seed: int) -> Task:
    (train, queries, test), spoilt = drawn(mnist(), seed, 1000, 200)
    x, y = train
    x[spoilt] = spoil(x[spoilt], y[spoilt])
    return Task(
        TensorDataset(x, y), spoilt, TensorDataset(*queries), TensorDataset(*test), lambda: Net("cnn", seed), 5, 32,
        lambda m, batch: torch.nn.functional.cross_entropy(m.net(batch[0]), batch[1], reduction="none"),
    )  # fmt: skip


def upside_down(x: Tensor, y: Tensor) -> Tensor:
    return x.flip(1)


def noise(x: Tensor, y: Tensor) -> Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(0))


def truncated(seed: int) -> Task:
    workload = WORKLOADS["gpt2"]
    (train, queries, test), spoilt = drawn(text(), seed, 512, 32)
    (tokens,) = train
    tokens[spoilt, 8:] = 0
    return Task(
        TensorDataset(tokens), spoilt, TensorDataset(*queries), TensorDataset(test[0][:128]), lambda: workload.make(3e-4), 2, 16,
        lambda m, batch: m.each_loss(batch),
    )  # fmt: skip


TASKS: dict[str, Callable[[int], Task]] = {
    "upside_down": lambda seed: images(upside_down, seed),
    "noise": lambda seed: images(noise, seed),
    "truncated": truncated,
}


def rankings(task: Task, log: Path, module: Any) -> dict[str, Tensor]:
    """By how harmful a sample is said to be, ``(n,)`` each."""
    report = attribute(
        log, queries=DataLoader(task.queries, 50), model=module, data=task.train, target="mean",
        query_loss=task.each_loss, progress=False,
    )  # fmt: skip
    dynamics = training_dynamics(log)
    table = dynamics.to_pandas().sort_values("sample_id")
    with torch.no_grad():
        last = query_losses(module, DataLoader(task.train, 100), task.each_loss)
    loss = torch.tensor(table.loss.to_numpy())
    found = {
        "influence on the queries": -report.mean[report.sample_ids.argsort()].double(),
        "loss, mean over the epochs": loss,
        "the same, lowest first": -loss,
        "loss at the end": last.double(),
        "margin, mean (AUM)": -torch.tensor(table.margin.to_numpy()),
    }
    if int(dynamics.visits.labels.min()) >= 0:  # one label a sample
        suspects = dynamics.suspects(len(task.train)).sort_values("sample_id")
        found["suspects(log)"] = torch.tensor(suspects.suspicion.to_numpy())
    return found


def study(name: str, seed: int) -> list[dict[str, Any]]:
    task = TASKS[name](seed)
    with tempfile.TemporaryDirectory() as folder:
        log, module = Path(folder), task.make()
        loader = DataLoader(task.train, task.batch, shuffle=True, generator=torch.Generator().manual_seed(seed))
        fit(module, loader, task.epochs, InfluenceCallback(log, record="replay"))
        ranked = rankings(task, log, module)
        worst = {how: values.topk(int(task.spoilt.sum())).indices for how, values in ranked.items()}
        sets = {how: frozenset(rows.tolist()) for how, rows in worst.items()}
        sets["the spoilt ones"] = frozenset(task.spoilt.nonzero().flatten().tolist())
        sets["random ones"] = frozenset(
            torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1))[
                : int(task.spoilt.sum())
            ].tolist()
        )
        run = recorded_run(log, task.make, task.train)
        change = leave_one_out(
            run, list(sets.values()), lambda m: query_losses(m, DataLoader(task.test, 100), task.each_loss), progress=False
        ).mean(1)  # fmt: skip
        whole = float(query_losses(module, DataLoader(task.test, 100), task.each_loss).mean())
    rows = []
    for (how, _), effect in zip(sets.items(), change.tolist(), strict=True):
        precision = float(average_precision_score(task.spoilt, ranked[how])) if how in ranked else float("nan")
        rows.append({"task": name, "by": how, "average precision": precision, "change, %": 100 * effect / whole})
    return rows


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="task")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    every: list[dict[str, Any]] = []
    for name in args.tasks:
        started = time.process_time()
        every += [row for seed in range(args.seeds) for row in study(name, seed)]
        print(f"{name}: {time.process_time() - started:.0f} processor seconds", flush=True)
        table = pd.DataFrame(every).query("task == @name").drop(columns="task")
        print(
            table.groupby("by", sort=False).agg(["mean", "std"]).to_string(float_format=lambda v: f"{v:.3f}"),
            flush=True,
        )


if __name__ == "__main__":
    main()
