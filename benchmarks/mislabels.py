"""Wrong labels found first: suspects of a log against what else is used for it, on MNIST images.

python benchmarks/mislabels.py                       # the table: CNN, all settings, five seeds
python benchmarks/mislabels.py --net mlp
python benchmarks/mislabels.py --influence --seeds 2 # whether influence on 100 held-out images adds anything to the suspects

Needs cleanlab: `pip install 'lightning-influence[labels]'`. Seeds from 100 on were used to choose the constants of the ranking.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from cleanlab.rank import get_label_quality_scores
from measure import quiet
from selection import fit
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset
from workloads import mnist

from lightning_influence import InfluenceCallback, attribute, suspects

LR = {"cnn": 2e-3, "mlp": 1e-3}
SETTINGS = {"3 epochs of 3,000": (3, 3000), "40 epochs of 1,000": (40, 1000)}
NOISE = ("any class, 10 %", "4 and 9, 20 %")
FOLDS = 5


def network(kind: str) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, stride=2), nn.GroupNorm(2, 8), nn.GELU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.GroupNorm(2, 16), nn.GELU(),
        nn.Flatten(), nn.Linear(400, 10),
    )  # fmt: skip


class Net(L.LightningModule):
    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = network(kind)
        self.lr = LR[kind]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def noisy(seed: int, noise: str, n: int) -> tuple[TensorDataset, Tensor, TensorDataset]:
    """Training images of which some carry another label, which those are, and 100 clean images."""
    x, y = mnist().tensors
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=g)
    x, y, rest = x[order[:n]], y[order[:n]], order[n : n + 100]
    if noise == NOISE[0]:
        bad = torch.rand(n, generator=g) < 0.1
        labels = torch.where(bad, (y + torch.randint(1, 10, (n,), generator=g)) % 10, y)
    else:
        bad = ((y == 4) | (y == 9)) & (torch.rand(n, generator=g) < 0.2)
        labels = torch.where(bad, 13 - y, y)
    return TensorDataset(x, labels), bad, TensorDataset(*(t[rest] for t in mnist().tensors))


class SelfInfluence(L.Callback):
    """TracIn of every sample with itself: squared norms of its gradient at the end of each epoch, times the learning rate."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.total = data, torch.zeros(len(data))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = {k: p.detach() for k, p in pl_module.named_parameters()}

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(
                functional_call(pl_module.net, {k.removeprefix("net."): v for k, v in values.items()}, (x[None],)),
                y[None],
            )

        for rows in torch.arange(len(self.data)).split(250):
            x, y = self.data[rows]
            each = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
            self.total[rows] += pl_module.lr * sum(g.flatten(1).square().sum(1) for g in each.values())


def trained(kind: str, seed: int, data: TensorDataset, epochs: int, *callbacks: L.Callback) -> Net:
    module = Net(kind, seed)
    fit(module, DataLoader(data, 64, shuffle=True, generator=torch.Generator().manual_seed(seed)), epochs, *callbacks)
    return module


@torch.no_grad()
def log_probabilities(module: Net, data: TensorDataset) -> Tensor:
    return module.net(data.tensors[0]).log_softmax(1)


def out_of_fold(kind: str, seed: int, data: TensorDataset, epochs: int) -> Tensor:
    """Probabilities ``(n, classes)`` of every sample by a network that was trained without its fold."""
    fold = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)) % FOLDS
    found = torch.zeros(len(data), 10)
    for i in range(FOLDS):
        module = trained(kind, seed, TensorDataset(*data[fold != i]), epochs)
        found[fold == i] = log_probabilities(module, TensorDataset(*data[fold == i])).exp()
    return found


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double() / len(values)


def by_sample(table: pd.DataFrame, column: str) -> Tensor:
    return torch.tensor(table.sort_values("sample_id")[column].to_numpy().copy())


def one(kind: str, seed: int, noise: str, epochs: int, n: int, influence: bool) -> dict[str, float]:
    data, bad, clean = noisy(seed, noise, n)
    own = SelfInfluence(data)
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)
        module = trained(kind, seed, data, epochs, InfluenceCallback(log, record="replay"), own)
        table = suspects(log, n)
        found["suspects(log)"] = by_sample(table, "suspicion")
        found["suspects(log, model=..., data=...)"] = by_sample(suspects(log, n, model=module, data=data), "suspicion")
        if influence:
            queries = DataLoader(clean, 100)
            report = attribute(log, queries=queries, model=module, response="tangent", data=data, progress=False)
            harm = by_sample(report.suspects(n), "relative_harm")
            found["suspects of a report"] = harm
            for weight in (0.1, 0.3, 1.0):  # of ranks, since the two have no unit in common
                found[f"suspects(log), and {weight:g} times their harm"] = ranks(
                    found["suspects(log)"]
                ) + weight * ranks(harm)
            return {name: float(average_precision_score(bad, values)) for name, values in found.items()}
    labels = data.tensors[1]
    found["AUM"] = -by_sample(table, "margin")
    found["loss, mean over the epochs"] = by_sample(table, "loss")
    found["loss at the end"] = nn.functional.nll_loss(log_probabilities(module, data), labels, reduction="none")
    out = out_of_fold(kind, seed, data, epochs).numpy()
    for method in ("self_confidence", "normalized_margin"):
        for adjusted in (False, True):
            options: dict[str, Any] = {"method": method, "adjust_pred_probs": adjusted}
            quality = torch.tensor(get_label_quality_scores(labels.numpy(), out, **options))
            found[f"cleanlab, {method.replace('_', ' ')}{', adjusted' if adjusted else ''}"] = -quality
    found["TracIn self-influence"] = own.total
    return {name: float(average_precision_score(bad, values)) for name, values in found.items()}


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(LR), default="cnn")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--influence", action="store_true")
    args = parser.parse_args()
    columns = {}
    for noise in NOISE:
        for setting, (epochs, n) in SETTINGS.items():
            seeds = range(args.first_seed, args.first_seed + args.seeds)
            found = pd.DataFrame([one(args.net, seed, noise, epochs, n, args.influence) for seed in seeds])
            told = [f"{m:.3f} +- {s:.3f}" for m, s in zip(found.mean(), found.std(), strict=True)]
            columns[f"{noise}; {setting}"] = pd.Series(told, found.columns)
            print(f"\n{noise}; {setting}\n{columns[f'{noise}; {setting}'].to_string()}", flush=True)
    print(
        f"\naverage precision, mean and standard deviation over {args.seeds} seeds\n{pd.DataFrame(columns).to_string()}"
    )


if __name__ == "__main__":
    main()
