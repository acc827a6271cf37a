"""Train a small network on scikit-learn's digits, ask which samples helped, and check the answer.

Run by ``make demo``. Fifty samples are really removed and the network really trained again without each, so
that every estimator is compared with the truth.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.scoring.queries import query_losses
from lightning_influence.trust.retraining import leave_one_out, recorded_run

BEST = "finite response, exact Hessian by replay"
ESTIMATORS = {
    "SGD-influence (the usual assumption)": {
        "optimizer_assumption": "sgd",
        "response": "tangent",
        "curvature": "fisher",
    },
    "AdamW-influence (the paper: tangent, Fisher)": {"response": "tangent", "curvature": "fisher"},
    "finite response, Fisher": {"response": "finite", "curvature": "fisher"},
    BEST: {"response": "finite", "curvature": "hessian"},
}


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data(n_train: int) -> tuple[TensorDataset, TensorDataset]:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    return TensorDataset(x[:n_train], y[:n_train]), TensorDataset(
        x[n_train : n_train + 200], y[n_train : n_train + 200]
    )


def show_hardest(module: Digits, train: TensorDataset, val: TensorDataset, out: Path, n: int = 9) -> Path:
    """The page that a person reads: what helped and what harmed the digits that the network finds hardest."""
    with torch.no_grad():
        losses = nn.functional.cross_entropy(module.net(val.tensors[0]), val.tensors[1], reduction="none")
    hardest = Subset(val, losses.topk(n).indices.tolist())
    report = attribute(out / "log", queries=DataLoader(hardest, n), model=module)
    return report.to_html(
        out / "report.html",
        data=as_images(train),
        queries=Subset(as_images(val), hardest.indices),
        groups=train.tensors[1],
        title=f"What taught the network its {n} hardest digits?",
    )


def as_images(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0].view(-1, 1, 8, 8), data.tensors[1])


def main(out: Path, n_train: int = 1500, epochs: int = 3, removals: int = 50) -> dict[str, float]:
    """Train, attribute, retrain; the Spearman correlation of each estimator with the truth."""
    train, val = data(n_train)
    module = Digits()
    batches = DataLoader(train, 32, shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[InfluenceCallback(out / "log", record="replay", existing="overwrite")],
    )
    trainer.fit(module, batches)

    queries = DataLoader(val, 200)
    reports = {
        name: attribute(out / "log", queries=queries, model=module, target="mean", **options)
        for name, options in ESTIMATORS.items()
    }
    best = reports[BEST]
    print(f"\n{best}\n\nmost helpful\n{best.top(5)}\n\nmost harmful\n{best.bottom(5)}")
    best.to_csv(out / "scores.csv")
    best.save(out / "report.safetensors")
    page = show_hardest(module, train, val, out)

    run = recorded_run(out / "log", Digits, train, dtype=torch.float64)
    val64 = [tuple(t.double() if t.is_floating_point() else t for t in val.tensors)]
    chosen = torch.randperm(n_train, generator=torch.Generator().manual_seed(1))[:removals].sort().values.tolist()
    truth = leave_one_out(run, chosen, lambda m: query_losses(m, val64).mean()[None])[:, 0]
    print(f"\nSpearman correlation with leave-one-out retraining of {removals} samples")
    fidelity = {}
    for name, report in reports.items():
        where = torch.searchsorted(report.sample_ids, torch.tensor(chosen))
        fidelity[name] = float(spearmanr(report.scores[where, 0], truth).statistic)
        print(f"  {name:46s} {fidelity[name]:.3f}")
    print(
        f"\nthe report for people: {page}\nits numbers: {out / 'report.safetensors'}, {out / 'scores.csv'}; the log: {out / 'log'}"
    )
    return fidelity


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    main(parser.parse_args().out)
