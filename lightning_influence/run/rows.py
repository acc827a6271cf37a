"""Which rows of a batch are which sample, told by content: a collate function may rearrange, drop or multiply what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.batches import batch_size, leaves, objects, samples_of, without
from lightning_influence.run.random_state import random_state
from lightning_influence.run.task import Task
from lightning_influence.run.unchanged import Apart

_PADDING = (0.0, -1.0, -100.0)  # of floating-point tensors
_LOOKED_AT = 3  # batches, before it is believed that rows stay in the order in which they were drawn, or samples


def row_order(loader: Any, task: Task) -> RowOrder | None:
    """Tells the order of the rows in the batches of a training loader; None where it does not say how it collates."""
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    return None if dataset is None or collate is None else RowOrder(dataset, collate, task.prepared, task.unchanged)


class RowOrder:
    """Puts the ids of drawn samples in the order of the rows of their batch.

    The first batches are compared with their samples, each collated alone. Where their order differs from the one in
    which they were drawn, every batch is. Samples that do not come twice alike (augmentation in workers) are taken to be in order.

    Args:
        dataset, collate: of the training loader.
        prepare: a batch as the training step takes it.
        apart: makes the context in which ``prepare`` leaves no trace.

    Attributes:
        assumed: whether the order of some rows was taken to be that in which they were drawn, since it could not be told.
        rearranged: whether rows are not the samples in the order in which they were drawn.
        recollates: whether a batch without a sample is another than the batch without that sample's rows: the collate function
            relates samples (a graph, offsets), so only it can leave one out.
        padded: a batch without its longest sample, collated anew and by taking its rows away, where the first is padded less;
            None where there is no such.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        prepare: Callable[[Any], Any] = lambda b: b,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._dataset, self._collate, self._prepare, self._apart = dataset, collate, prepare, apart
        self._left = _LOOKED_AT
        self.assumed = False
        self.rearranged = False
        self.recollates = False
        self.padded: tuple[Any, Any] | None = None

    def __call__(self, batch: Any, drawn: Tensor, fetched: Mapping[str, Tensor] | None = None) -> Tensor:
        """The ids ``(n,)`` of the rows of a batch, from those in the order in which they were drawn.

        Args:
            fetched: random state when the samples were fetched in this process; None if it is not known.

        Raises:
            ConfigurationError: a number of rows that is not that of the samples, and whose they are cannot be told.
        """
        if not self._left and not self.rearranged:
            return drawn
        looking, self._left = self._left > 0, max(0, self._left - 1)
        with self._beside(fetched):
            samples = [self._dataset[z] for z in drawn.tolist()]
            reproduced = self._collated(samples)
            owners = None
            if reproduced is not None and same_batch(reproduced, batch):
                alone = [self._collated([s]) for s in samples]
                owners = owners_of_rows(batch, alone)
                if objects(batch) or (owners is None and batch_size(batch) != len(samples)):
                    self.recollates = True  # rows of several samples, such as the nodes of graphs
                if looking and len(samples) > 1:
                    in_order = owners is None and batch_size(batch) == len(samples)
                    positions = list(range(len(samples))) if in_order else owners
                    longest = _longest(alone)
                    self.recollates |= positions is not None and self._relates(batch, samples, positions, longest)
            else:
                self.assumed |= len(samples) > 1
        if owners is None:
            if batch_size(batch) != len(drawn) and not self.recollates:
                raise ConfigurationError(
                    f"a batch of {len(drawn)} samples has {batch_size(batch)} rows: the collate function drops, adds or joins rows, and "
                    "whose they are cannot be told from their content. Let every sample be one row, or, of a run that is recorded, say it "
                    "by InfluenceCallback(sample_ids=function of the batch, one id a row)."
                )
            return drawn
        self.rearranged |= owners != list(range(len(drawn)))
        return drawn[owners]

    def less(self, drawn: Tensor, fetched: Mapping[str, Tensor] | None = None) -> dict[int, Any]:
        """For each sample of a batch, the batch collated without it, where that holds any other; ``fetched`` as of the call."""
        ids = drawn.tolist()
        with self._beside(fetched):
            whole = [(i, self._dataset[i]) for i in ids]
            rest = {z: [sample for i, sample in whole if i != z] for z in dict.fromkeys(ids)}
            return {z: self._prepare(self._collate(samples)) for z, samples in rest.items() if samples}

    @contextmanager
    def _beside(self, fetched: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Samples are fetched and collated anew, without a trace in the run."""
        with random_state(fetched), self._apart(), Apart(self._dataset)(), Apart(self._collate)():
            yield

    def _collated(self, samples: list[Any]) -> Any:
        """None where the collate function takes no such samples, which says nothing."""
        try:
            return self._prepare(self._collate(samples))
        except Exception:
            return None

    def _relates(self, batch: Any, samples: list[Any], owners: list[int], longest: int | None) -> bool:
        rows = torch.tensor(owners)
        looked_at = {owners[0], owners[len(owners) // 2], owners[-1], longest}
        for position in sorted(p for p in looked_at if p is not None):
            rest = self._collated([s for i, s in enumerate(samples) if i != position])
            left = without(batch, (rows == position).nonzero()[:, 0], len(owners))
            if rest is not None and not same_batch(rest, left):
                return True
            if rest is not None and [x.shape for x in leaves(rest)] != [x.shape for x in leaves(left)]:
                self.padded = rest, left
        return False


def _longest(alone: Sequence[Any]) -> int | None:
    """The position of the longest of samples that were collated alone; None where all are of one length."""
    sizes = [0 if one is None else sum(leaf.numel() for leaf in leaves(one)) for one in alone]
    return sizes.index(max(sizes)) if len(set(sizes)) > 1 else None


def relates_samples(dataset: Any, collate: Callable[[list[Any]], Any]) -> bool:
    """Whether a row of a small batch is another than the sample collated alone, as in a graph over the batch."""
    with random_state(None), Apart(dataset)(), Apart(collate)():
        try:
            n = min(_LOOKED_AT, len(dataset))
            samples = [dataset[i] for i in range(n)]
            together = collate(samples)
            return not all(
                same_batch(collate([s]), samples_of(together, slice(i, i + 1), n)) for i, s in enumerate(samples)
            )
        except Exception:  # fewer samples, or a collate function that takes no such batches: it says nothing
            return False


def owners_of_rows(batch: Any, alone: Sequence[Any]) -> list[int] | None:
    """For every row of a batch, the position of the batch of one sample that holds the same; None where some row has none.

    Rows may be padded further than they were alone.
    """
    n = batch_size(batch)
    columns = [leaf for leaf in leaves(batch) if leaf.dim() > 0 and len(leaf) == n]
    rows: list[tuple[int, list[Tensor]]] = []
    for position, one in enumerate(alone):
        parts = [] if one is None else [leaf for leaf in leaves(one) if leaf.dim() > 0]
        if not parts:
            continue
        k = batch_size(one)
        parts = [leaf for leaf in parts if len(leaf) == k]
        if len(parts) != len(columns):
            return None
        rows += [(position, [leaf[i] for leaf in parts]) for i in range(k)]
    owners: list[int] = []
    for row in range(n):
        own = [column[row] for column in columns]
        likely = rows[:1] if rows and _row_same(own, rows[0][1]) else rows  # most often they are in order
        same = [i for i, (_, parts) in enumerate(likely) if _row_same(own, parts)]
        if not same:
            return None
        best = max(same, key=lambda i: sum(part.numel() for part in rows[i][1]))
        owners.append(rows.pop(best)[0])
    return owners


def _row_same(row: Sequence[Tensor], alone: Sequence[Tensor]) -> bool:
    return all(_padded(a, b) for a, b in zip(row, alone, strict=True))


def same_batch(one: Any, other: Any) -> bool:
    """Whether two batches hold the same, up to padding."""
    a, b = leaves(one), leaves(other)
    return len(a) == len(b) and all(_padded(x, y) or _padded(y, x) for x, y in zip(a, b, strict=True))


def _padded(tensor: Tensor, content: Tensor) -> bool:
    """Whether a tensor holds ``content`` in its first places and padding in all others."""
    if tensor.dim() != content.dim() or any(a < b for a, b in zip(tensor.shape, content.shape, strict=True)):
        return False
    content = content.to(tensor)
    inside = tuple(slice(0, size) for size in content.shape)
    if not torch.equal(tensor[inside].nan_to_num(), content.nan_to_num()):
        return False
    if tensor.shape == content.shape:
        return True
    beyond = torch.ones_like(tensor, dtype=torch.bool)
    beyond[inside] = False
    rest = tensor[beyond]
    # a single number beyond is no padding by being alike
    usual = not rest.is_floating_point() or float(rest[0]) in _PADDING or not torch.isfinite(rest[0])
    return usual and bool(((rest == rest[0]) | rest.isnan()).all())
