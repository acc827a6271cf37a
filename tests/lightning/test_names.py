"""The same package under its other name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
from modules import split_digits
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, SelectionDataModule, attribute


@pytest.mark.parametrize("package", [L, pl], ids=["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("record", ["gradients", "replay"])
def test_both_names_work(package: Any, record: Any, tmp_path: Path) -> None:
    train, val = split_digits(24, 8)

    class Module(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(64, 10)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Data(package.LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return DataLoader(train, 8)

        def val_dataloader(self) -> Any:
            return DataLoader(val, 8)

    def fit(data: Any, *callbacks: Any) -> Any:
        module = Module()
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
        package.Trainer(**options, limit_val_batches=0, callbacks=list(callbacks)).fit(module, datamodule=data)
        return module

    module = fit(Data(), InfluenceCallback(tmp_path / "log", record=record))
    report = attribute(tmp_path / "log", queries=DataLoader(val, 8), model=module, data=Data(), target="mean")
    assert report.scores.shape == (24, 1) and report.scores.isfinite().all()
    selecting = SelectionDataModule(Data(), every=1, keep=0.5)
    fit(selecting)
    assert selecting.selection_report.kept == pytest.approx(0.5)
