"""Training data as samples: what a dataset, a loader or a datamodule has to offer."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, default_collate

from lightning_influence.errors import LogError
from lightning_influence.run.lightning_names import is_a


def samples_of(data: Any) -> tuple[Any, Any]:
    """The dataset and the collate function of training data."""
    if is_a(data, "LightningDataModule"):
        data.setup("fit")
        data = data.train_dataloader()
    if isinstance(data, DataLoader):
        return data.dataset, data.collate_fn
    if data is not None and not hasattr(data, "__getitem__"):
        raise LogError(
            f"data={type(data).__name__}; give a LightningDataModule, a DataLoader or a dataset with indices."
        )
    return data, default_collate
