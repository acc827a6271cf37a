"""Which training samples a batch holds, as indices into the training dataset.

A map-style `DataLoader` draws those indices from its batch sampler in the main process and delivers the
batches in the same order, whatever its workers do. `SampleIds` listens there, so neither the dataset
nor the collate function has to change.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.random_state import read_random_state

IdSource: TypeAlias = "str | Callable[[Any], Tensor | list[int]] | None"

_REMEDY = (
    "Give the ids yourself: InfluenceCallback(..., sample_ids='key') where the batch is a mapping that holds "
    "them, or sample_ids=function, called with the batch and returning one integer per sample."
)


_Drawn: TypeAlias = "tuple[list[int], dict[str, Tensor] | None]"
"""Indices of a batch, and the random state in which its samples were fetched, unless that was in a worker."""


class RecordedBatchSampler(BatchSampler):
    """A batch sampler that remembers what it drew, in order, until each of its listeners has asked for it."""

    def __init__(self, wrapped: Any) -> None:  # no super().__init__: everything else is the wrapped sampler's
        self._wrapped = wrapped
        self._drawn: dict[int, deque[_Drawn]] = {}
        self.random = False

    def subscribe(self, listener: object, *, random: bool) -> None:
        """Remember batches for a listener from now on; ``random``: and the random state before each is fetched."""
        self._drawn.setdefault(id(listener), deque())
        self.random |= random

    def unsubscribe(self, listener: object) -> None:
        """Remember nothing more for a listener."""
        self._drawn.pop(id(listener), None)

    def __iter__(self) -> Iterator[list[int]]:
        queues: dict[int, deque[_Drawn]] = {listener: deque() for listener in self._drawn}
        self._drawn = queues  # an abandoned iterator goes on filling the old ones
        for indices in self._wrapped:
            drawn = [int(i) for i in indices], read_random_state() if self.random else None
            for queue in list(queues.values()):
                queue.append(drawn)
            yield indices

    def __len__(self) -> int:
        return len(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":  # while unpickled in a worker, before __dict__ is there
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def next_batch(self, listener: object) -> _Drawn:
        """The oldest batch that was drawn and that the listener has not yet asked for."""
        queue = self._drawn[id(listener)]
        if not queue:
            raise ConfigurationError(f"a batch arrived that the data loader's sampler never drew. {_REMEDY}")
        return queue.popleft()


class SampleIds:
    """The dataset indices of each training batch, in the order in which the loop receives them.

    Args:
        source: None to listen at the sampler, a key of the batch, or a function of the batch.
        random: note the random state in which samples are fetched, too.
    """

    def __init__(self, source: IdSource = None, *, random: bool = False) -> None:
        self.source, self.random = source, random
        self._recorder: RecordedBatchSampler | None = None
        self._listening: list[DataLoader[Any]] = []
        self.fetched: dict[str, Tensor] | None = None  # random state before the present batch was fetched

    def listen(self, loader: Any) -> Any:
        """Put a recorder in front of a map-style loader's batch sampler, before it is iterated."""
        if self.source is None and is_map_style(loader) and not isinstance(loader.batch_sampler, RecordedBatchSampler):
            _set_batch_sampler(loader, RecordedBatchSampler(loader.batch_sampler))
            self._listening.append(loader)
        sampler = getattr(loader, "batch_sampler", None)
        if self.source is None and isinstance(sampler, RecordedBatchSampler):
            # samples are fetched right after they are drawn, where that happens in this process
            sampler.subscribe(self, random=self.random and loader.num_workers == 0)
        return loader

    def start(self, loader: Any) -> None:
        """Choose the loader that the training batches come from, and let go of those before it.

        Raises:
            ConfigurationError: the ids cannot be known and no source was given.
        """
        if self.source is not None:
            return
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(sampler, RecordedBatchSampler):
            raise ConfigurationError(
                f"the training data is {_describe(loader)}, which does not say which samples a batch holds. {_REMEDY}"
            )
        self._recorder = sampler
        self._let_go([before for before in self._listening if before.batch_sampler is not sampler])

    def stop(self) -> None:
        """Give every loader its own batch sampler back."""
        if self._recorder is not None:
            self._recorder.unsubscribe(self)
        self._recorder = None
        self._let_go(self._listening)

    def _let_go(self, loaders: Sequence[DataLoader[Any]]) -> None:
        self._listening = [loader for loader in self._listening if not any(loader is one for one in loaders)]
        for loader in loaders:
            if isinstance(loader.batch_sampler, RecordedBatchSampler):
                _set_batch_sampler(loader, loader.batch_sampler._wrapped)

    def next(self, batch: Any) -> Tensor:
        """``(n,)`` int64 for the next batch.

        Raises:
            ConfigurationError: the source does not yield integers, or the batch lacks the key.
        """
        if self.source is None:
            assert self._recorder is not None, "start() comes first"
            drawn, self.fetched = self._recorder.next_batch(self)
            return torch.tensor(drawn, dtype=torch.int64)
        if isinstance(self.source, str):
            if not isinstance(batch, Mapping) or self.source not in batch:
                keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
                raise ConfigurationError(f"sample_ids={self.source!r}: the batch holds no such key, but {keys}.")
            ids = torch.as_tensor(batch[self.source])
        else:
            ids = torch.as_tensor(self.source(batch))
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ConfigurationError(
                f"sample_ids gave {ids.dtype} of shape {tuple(ids.shape)}; it has to give one integer per sample."
            )
        return ids.detach().to("cpu", torch.int64)


def is_map_style(loader: Any) -> bool:
    """Whether a loader's batches are drawn by a batch sampler from a dataset with indices."""
    return (
        isinstance(loader, DataLoader)
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, torch.utils.data.IterableDataset)
    )


def _set_batch_sampler(loader: DataLoader[Any], sampler: Any) -> None:
    # past DataLoader.__setattr__, which forbids this after construction; no iterator is running
    object.__setattr__(loader, "batch_sampler", sampler)


def with_batch_sampler(loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    """The same loader with another batch sampler; the given one stays as it is."""
    twin = copy.copy(loader)
    held = vars(twin)  # past what Lightning puts in the place of DataLoader.__setattr__
    held["_iterator"] = None  # workers that outlive an epoch are each loader's own
    if type(twin) is DataLoader:
        # what Lightning noted of the other's arguments, to make it anew, names no batch sampler
        for name in [name for name in held if name.startswith("__pl_saved")]:
            del held[name]
    _set_batch_sampler(twin, sampler)
    return twin


def _describe(loader: Any) -> str:
    if isinstance(loader, (Mapping, list, tuple)):
        return f"{len(loader)} loaders, whose batches come together, so that a sample is the rows of all of them at one place,"
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__}"
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return f"an iterable dataset ({type(loader.dataset).__name__})"
    return "a DataLoader with batch_size=None"
