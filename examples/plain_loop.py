"""A training loop of one's own, without a Trainer: recorded, attributed, and shown on a page.

python examples/plain_loop.py --out runs/plain_loop
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import FunctionTask, InfluenceReport, attribute, recording


def main(argv: list[str] | None = None) -> InfluenceReport:
    """Train, attribute and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/plain_loop"))
    out = parser.parse_args(argv).out
    torch.manual_seed(0)
    x = torch.randn(96, 8)
    y = (x[:, 0] > x[:, 1]).long()
    train, val = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])

    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    task = FunctionTask(module, lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]))
    loader = DataLoader(train, batch_size=16, shuffle=True)
    with recording(out / "log", task, optimizer, existing="overwrite") as recorder:
        for _ in range(5):
            for batch in recorder.batches(loader):
                optimizer.zero_grad()
                recorder.backward(batch)  # task.loss(batch).backward(), seen by the recorder
                optimizer.step()

    report = attribute(out / "log", queries=DataLoader(val, batch_size=32), model=task, target="mean")
    report.to_html(out / "report.html", data=train)
    print(f"{report}\nThe page is {out / 'report.html'}.")
    return report


if __name__ == "__main__":
    main()
