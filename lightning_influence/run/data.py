"""Training data as samples: what a dataset, a loader or a datamodule has to offer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, default_collate

from lightning_influence.errors import ConfigurationError, LogError
from lightning_influence.run.lightning_names import is_a, overrides


def set_up(datamodule: Any) -> None:
    """Let a datamodule make its data, unless the fit that it was in has: a split without a seed would be another the second time."""
    if not _is_set_up(datamodule):
        datamodule.setup("fit")


def _is_set_up(datamodule: Any) -> bool:
    trainer: Any = getattr(datamodule, "trainer", None)
    if trainer is None or trainer.datamodule is not datamodule or overrides(datamodule, "teardown"):
        return False
    return trainer.state.fn == "fit" and trainer.state.status != "interrupted"


def kept(drawn: Iterable[int], without: Collection[int]) -> list[int]:
    """What is left of the sample ids of a batch."""
    return [int(z) for z in drawn if int(z) not in without]


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run and how they become batches.

    Attributes:
        dataset: indexable by sample id; None where none was given.
        collate: samples to a batch.
        datamodule: whose hooks prepare batches.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any] = default_collate
    datamodule: Any = None

    @classmethod
    def of(cls, data: Any) -> TrainingData:
        """From a dataset, a loader or a datamodule, which is set up.

        Raises:
            LogError: something else without indices.
        """
        if isinstance(data, TrainingData):
            return data
        datamodule = None
        if is_a(data, "LightningDataModule"):
            datamodule = data
            set_up(data)
            data = data.train_dataloader()
        if isinstance(data, DataLoader):
            return cls(data.dataset, data.collate_fn, datamodule)
        if data is not None and not hasattr(data, "__getitem__"):
            raise LogError(
                f"data={type(data).__name__}; give a LightningDataModule, a DataLoader or a dataset with indices."
            )
        return cls(data, datamodule=datamodule)

    def batch(self, sample_ids: Sequence[int], without: Collection[int] = ()) -> Any:
        """The collated batch of some samples.

        Args:
            without: samples that are left out once all have been fetched, so that the others come as they do with them.

        Raises:
            ConfigurationError: the data has fewer samples.
        """
        if hasattr(self.dataset, "__len__") and sample_ids and max(sample_ids) >= len(self.dataset):
            raise ConfigurationError(
                f"the training data has {len(self.dataset)} samples, and the log has sample {max(sample_ids)}; give the data "
                "of the run."
            )
        samples = [(z, self.dataset[z]) for z in sample_ids]
        return self.collate([sample for z, sample in samples if z not in without])
