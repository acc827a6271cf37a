"""Which digits taught a network, and which confused it: exact influence on scikit-learn's digits.

python examples/digits_mlp.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceReport, attribute


class Digits(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def drawn(image: Tensor) -> str:
    """An 8 x 8 image in characters."""
    return "\n".join("".join(" .:*#"[min(4, int(5 * v))] for v in row) for row in image.view(8, 8))


def main(argv: Sequence[str] | None = None) -> InfluenceReport:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-train", type=int, default=1400)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_mlp"))
    args = parser.parse_args(argv)

    L.seed_everything(0, verbose=False)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    train, val = TensorDataset(x[: args.n_train], y[: args.n_train]), TensorDataset(x[1400:], y[1400:])

    module = Digits(args.width)
    influence = InfluenceCallback(args.out / "log", record="replay", existing="overwrite")
    trainer = L.Trainer(
        max_epochs=args.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[influence]
    )
    trainer.fit(module, DataLoader(train, 32, shuffle=True))

    report = attribute(args.out / "log", queries=DataLoader(val, 200), model=module, target="mean")
    for title, table in (("most helpful", report.top(3)), ("most harmful", report.bottom(3))):
        print(f"\n{title}")
        for row in table.itertuples():
            image, label = train[row.sample_id]
            print(f"sample {row.sample_id}, a {int(label)}, score {row.score:+.2e}\n{drawn(image)}\n")
    report.to_csv(args.out / "scores.csv")
    print(f"wrote {args.out / 'scores.csv'}")
    return report


if __name__ == "__main__":
    main()
