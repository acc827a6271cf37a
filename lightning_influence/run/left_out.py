"""A loader or a datamodule without some of its training samples, in the batches of before."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.data import kept
from lightning_influence.run.lightning_names import is_a
from lightning_influence.run.sample_ids import is_map_style, with_batch_sampler

T = TypeVar("T")


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
    return with_batch_sampler(loader, _kept_batches(loader.batch_sampler, gone))


def _kept_batches(batches: Any, gone: frozenset[int]) -> Any:
    """A batch sampler of the same class that leaves samples out, whose places stay empty.

    Lightning makes a batch sampler of the same class anew where it deals the data out to processes, so it is the class that
    leaves out.
    """
    kind: Any = type(batches)
    if kind.__module__ == "builtins":
        raise ConfigurationError(
            f"samples cannot be taken out of the batches of a {kind.__name__}; take them out of it, or give a loader whose batch_sampler "
            "is a torch.utils.data.BatchSampler."
        )

    class KeptBatches(kind):  # type: ignore[misc]
        def __iter__(self) -> Iterator[list[int]]:
            alone = _of_one_each(self)
            for drawn in super().__iter__():
                batch = kept(drawn, gone)
                if batch:
                    yield batch
                elif not alone:
                    raise ConfigurationError(
                        f"nothing is left of the batch of the samples {sorted(map(int, drawn))[:10]}, and a trainer counts batches that do "
                        "not come; give the loader larger batches, or leave the samples out with clean(...)."
                    )

        def __len__(self) -> int:
            return super().__len__() - (len(gone) if _of_one_each(self) else 0)  # type: ignore[no-any-return]

    twin = copy.copy(batches)
    twin.__class__ = KeptBatches
    return twin


def _of_one_each(batches: Any) -> bool:
    """Whether each batch is one sample and each sample comes once, so that it is known how many batches are left."""
    return getattr(batches, "batch_size", None) == 1 and _each_once(getattr(batches, "sampler", None))


def _each_once(sampler: Any) -> bool:
    """Whether a sampler draws every sample of its dataset once."""
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return isinstance(sampler, SequentialSampler)
