"""A loader or a datamodule without some of its training samples, in the batches of before."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.data import kept
from lightning_influence.run.lightning_names import is_a
from lightning_influence.run.sample_ids import is_map_style, with_batch_sampler

T = TypeVar("T")


class KeptBatches(BatchSampler):
    """The batches of another sampler without some samples, whose places stay empty.

    Args:
        wrapped: draws the batches.
        gone: sample ids that are left out.
        alone: whether each batch is one sample and each sample comes once, so that it is known how many batches remain.
    """

    def __init__(self, wrapped: Any, gone: frozenset[int], *, alone: bool) -> None:  # the rest is the wrapped sampler's
        self._wrapped, self._gone, self._alone = wrapped, gone, alone

    def __iter__(self) -> Iterator[list[int]]:
        for drawn in self._wrapped:
            batch = kept(drawn, self._gone)
            if batch:
                yield batch
            elif not self._alone:
                raise ConfigurationError(
                    f"nothing is left of the batch of the samples {sorted(map(int, drawn))[:10]}, and a trainer counts batches that do not "
                    "come; give the loader larger batches, or leave the samples out with clean(...)."
                )

    def __len__(self) -> int:
        return len(self._wrapped) - (len(self._gone) if self._alone else 0)

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":  # while unpickled, before __dict__ is there
            raise AttributeError(name)
        return getattr(self._wrapped, name)


def without(data: T, ids: Collection[int]) -> T:
    """A loader or a datamodule without some of its training samples.

    Every batch is what it was without them, as `clean` trains, so a run over it ends where the model of ``clean`` does. The other
    samples keep their ids, and what is given is not changed. A sample that is left out is not read.

    Args:
        data: a `DataLoader` of a map-style dataset, or a datamodule whose ``train_dataloader`` gives one.
        ids: of the samples that are left out, such as ``suspects(log).sample_id`` or ``report.select()``.

    Raises:
        ConfigurationError: other data, or ids that the dataset does not have. While it is iterated: nothing is left of a batch of
            several samples.
    """
    gone = frozenset(int(z) for z in ids)
    if is_a(data, "LightningDataModule"):
        twin: Any = copy.copy(data)
        whole = twin.train_dataloader

        def train_dataloader() -> Any:
            return _loader_without(whole(), gone)

        twin.__dict__["train_dataloader"] = train_dataloader
        return twin  # type: ignore[no-any-return]
    return _loader_without(data, gone)


def _loader_without(loader: Any, gone: frozenset[int]) -> Any:
    if not is_map_style(loader):
        of = f" of a {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else ""
        raise ConfigurationError(
            f"samples cannot be taken out of a {type(loader).__name__}{of}; give a DataLoader of a dataset with indices, or a datamodule "
            "whose train_dataloader gives one."
        )
    unknown = sorted(z for z in gone if not 0 <= z < len(loader.dataset))
    if unknown:
        raise ConfigurationError(f"sample {unknown[0]} is not one of the {len(loader.dataset)} of the training data.")
    alone = loader.batch_size == 1 and _each_once(loader.sampler)
    return with_batch_sampler(loader, KeptBatches(loader.batch_sampler, gone, alone=alone))


def _each_once(sampler: Any) -> bool:
    """Whether a sampler draws every sample of its dataset once."""
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return isinstance(sampler, SequentialSampler)
