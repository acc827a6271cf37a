"""Wrong labels found first: suspects of a report against self-influence, loss and random ranking.

python benchmarks/mislabels.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from measure import quiet, show
from selection import Net, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import mnist

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.log.steps import LoggedTrajectory


def flipped(seed: int, wrong: float = 0.1, n: int = 3000) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Training images of which some carry another label, clean images, and which are wrong."""
    x, y = mnist().tensors
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=g)
    x, y = x[order], y[order]
    bad = torch.rand(n, generator=g) < wrong
    labels = torch.where(bad, (y[:n] + torch.randint(1, 10, (n,), generator=g)) % 10, y[:n])
    return TensorDataset(x[:n], labels), TensorDataset(x[n:], y[n:]), bad


def self_influence(log: Path, n: int) -> Tensor:
    """Squared norm of a sample's own gradient over the run times the learning rate: TracIn with itself."""
    run, total = LoggedTrajectory(log), torch.zeros(n)
    for index in range(len(run)):
        record = run.record(index)
        for name, shares in run.shares(index).items():
            rows = shares.dense()
            total[record.sample_ids] += record.hyper[name]["lr"] * rows.square().sum(1)
    return total


def one(seed: int, epochs: int) -> dict[str, float]:
    train, clean, bad = flipped(seed)
    module = Net(784, 1e-3, seed)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)
        loader = DataLoader(train, 64, shuffle=True, generator=torch.Generator().manual_seed(seed))
        fit(module, loader, epochs, InfluenceCallback(log, record="both", compression="factored"))
        queries = DataLoader(TensorDataset(*(t[:100] for t in clean.tensors)), 100)
        options = {"queries": queries, "model": module, "response": "tangent", "progress": False}
        exact, mean = (attribute(log, target=target, **options) for target in (None, "mean"))
        plain = attribute(log, curvature="none", **options)
        own = self_influence(log, len(bad))
    x, y = train.tensors
    with torch.no_grad():
        loss = nn.functional.cross_entropy(module.net(x), y, reduction="none")
    rankings = {
        **{
            f"suspects, {name}": torch.tensor(report.suspects(len(bad)).sample_id.to_numpy().copy())
            for name, report in (("100 queries", exact), ("mean target", mean), ("no curvature", plain))
        },
        "self-influence": own.argsort(descending=True),
        "loss": loss.argsort(descending=True),
        "random": torch.randperm(len(bad), generator=torch.Generator().manual_seed(seed)),
    }
    return {name: float(bad[order[: len(bad) // 5]].sum() / bad.sum()) for name, order in rankings.items()}


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    found = [one(seed, args.epochs) for seed in range(args.seeds)]
    print("share of the wrong labels (10 % of 3,000) in the first fifth of the ranking, mean and spread over seeds")
    values = {name: torch.tensor([row[name] for row in found]) for name in found[0]}
    show([{"ranking": k, "found": float(v.mean()), "+-": float(v.std(correction=0))} for k, v in values.items()], 3)


if __name__ == "__main__":
    main()
