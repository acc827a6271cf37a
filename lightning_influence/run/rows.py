"""Which row of a batch is which sample, told by content: a collate function may rearrange what was drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_influence.run.batches import batch_size, leaves
from lightning_influence.run.random_state import random_state
from lightning_influence.run.training_step import prepared

_LOOKED_AT = 3  # batches, before it is believed that rows stay in the order in which they were drawn


Order: TypeAlias = Callable[[Any, Tensor], Tensor]
"""``(batch, sample_ids as drawn (n,)) -> sample_ids (n,)`` in the order of the batch's rows."""


def as_drawn(batch: Any, sample_ids: Tensor) -> Tensor:
    """The `Order` of batches whose rows are in the order of drawing."""
    return sample_ids


def row_order(loader: Any, module: LightningModule) -> Order:
    """The order of the rows in the batches of a training loader; that of drawing where it does not say how it collates."""
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collate is None:
        return as_drawn
    return RowOrder(dataset, collate, partial(prepared, module))


class RowOrder:
    """Puts the ids of drawn samples in the order of the rows of their batch.

    The first batches are compared with their samples, each collated alone. Where their order differs from the one in
    which they were drawn, every batch is. Samples that do not come twice alike (augmentation) are taken to be in order.

    Args:
        dataset, collate: of the training loader.
        prepare: a batch as Lightning hands it to the training step.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], prepare: Callable[[Any], Any] = lambda b: b
    ) -> None:
        self._dataset, self._collate, self._prepare = dataset, collate, prepare
        self._left = _LOOKED_AT
        self.rearranged = False

    def __call__(self, batch: Any, sample_ids: Tensor) -> Tensor:
        """The ids ``(n,)`` of the rows of a batch, from those in the order in which they were drawn."""
        if not self._left and not self.rearranged:
            return sample_ids
        self._left = max(0, self._left - 1)
        ids = sample_ids.tolist()
        if batch_size(batch) != len(ids):
            return sample_ids
        with random_state(None):
            try:
                alone = [self._prepare(self._collate([self._dataset[z]])) for z in ids]
            except Exception:  # a collate function that takes no sample alone says nothing of the order
                return sample_ids
        order = matching_rows(batch, alone)
        if order is None:
            return sample_ids
        self.rearranged |= order != list(range(len(ids)))
        return sample_ids[order]


def matching_rows(batch: Any, alone: Sequence[Any]) -> list[int] | None:
    """For every row of a batch, the position of the batch of one that holds the same; None where some row has none."""
    columns = [leaf for leaf in leaves(batch) if leaf.dim() > 0 and len(leaf) == len(alone)]
    positions: dict[bytes, list[int]] = defaultdict(list)
    for position, one in enumerate(alone):
        rows = [leaf for leaf in leaves(one) if leaf.dim() > 0 and len(leaf) == 1]
        if len(rows) != len(columns):
            return None
        positions[_bytes([row[0].to(column.dtype) for row, column in zip(rows, columns, strict=True)])].append(position)
    order = []
    for row in range(len(alone)):
        same = positions.get(_bytes([column[row] for column in columns]))
        if not same:
            return None
        order.append(same.pop(0))
    return order


def _bytes(tensors: Sequence[Tensor]) -> bytes:
    flat = [t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in tensors if t.numel()]
    return torch.cat(flat).numpy().tobytes() if flat else b""
