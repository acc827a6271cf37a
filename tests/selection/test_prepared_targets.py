"""The target of selection is prepared as Lightning prepares batches: by the datamodule's hooks, and in the trainer's precision."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, split_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import SelectionDataModule


class Raw(L.LightningDataModule):
    """Single precision, which a hook shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.train, self.val = split_digits(32, 12)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 8)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, 5)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2 - 1, batch[1]]


class Ready(Raw):
    """The same as the training step takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.train, self.val = (
            TensorDataset(d.tensors[0].double() * 2 - 1, d.tensors[1]) for d in (self.train, self.val)
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


@pytest.mark.parametrize("options", [{"every": 1}, {"every": "epoch"}, {"every": 2, "horizon": 1}], ids=str)
def test_hooks_and_precision_reach_the_target(options: dict[str, Any]) -> None:
    tables = []
    for kind in (Raw, Ready):
        selected = SelectionDataModule(kind(), keep=0.7, **options)
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, precision="64-true",
                            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
        trainer.fit(Classifier(), selected)
        tables.append(selected.selection_report.to_pandas())
    one, other = (torch.tensor(t.score.to_numpy(copy=True)) for t in tables)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert tables[0].weight.equals(tables[1].weight) and one.abs().max() > 0
