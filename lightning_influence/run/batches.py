"""Collated batches as trees of tensors: how many samples they hold, some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_influence.errors import ConfigurationError


def leaves(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of its structure."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def batch_size(batch: Any) -> int:
    """Number of samples: the first dimension of the first tensor that has one.

    Raises:
        ConfigurationError: the batch holds no such tensor.
    """
    for leaf in leaves(batch):
        if leaf.dim() > 0:
            return leaf.shape[0]
    raise ConfigurationError(
        f"a batch of type {type(batch).__name__} holds no tensor with a batch dimension; collate samples into tensors."
    )


def some(batch: Any, samples: slice) -> Any:
    """Some samples of a batch: of every tensor whose first dimension is the batch's."""
    n = batch_size(batch)

    def chosen(leaf: Tensor) -> Tensor:
        return leaf[samples] if leaf.dim() > 0 and leaf.shape[0] == n else leaf

    return apply_to_collection(batch, Tensor, chosen)


def without(batch: Any, rows: Tensor) -> Any:
    """A batch without some of its samples, ``rows`` ``(k,)`` int64: they leave every tensor whose first dimension is the batch's."""
    n = batch_size(batch)
    kept = torch.ones(n, dtype=torch.bool)
    kept[rows] = False

    def chosen(leaf: Tensor) -> Tensor:
        return leaf[kept.to(leaf.device)] if leaf.dim() > 0 and leaf.shape[0] == n else leaf

    return apply_to_collection(batch, Tensor, chosen)


def example(batch: Any, index: int) -> Any:
    """A batch of one."""
    return some(batch, slice(index, index + 1))


def to_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in another precision."""
    return apply_to_collection(batch, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


def fingerprint(batch: Any) -> Tensor:
    """Two float64 numbers a tensor, ``(n_tensors, 2)``, that tell one batch from another up to rounding."""
    found = []
    for leaf in leaves(batch):
        values = leaf.detach().flatten().double()
        ramp = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
        found.append(torch.stack([values.abs().sum(), (values * ramp.cos()).sum()]))
    return torch.stack(found).cpu() if found else torch.zeros(0, 2, dtype=torch.float64)


def pack_batch(batch: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a batch by number, and its structure as JSON.

    Raises:
        TypeError: the batch holds something that is neither a tensor, a plain value nor a dict, list or tuple.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors[str(len(tensors))] = node.detach()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(node, Mapping) and all(isinstance(key, str) for key in node):
            return {"dict": {key: walk(value) for key, value in node.items()}}
        if type(node) in (list, tuple):
            return {type(node).__name__: [walk(value) for value in node]}
        if node is None or isinstance(node, (bool, int, float, str)):
            return {"value": node}
        raise TypeError(f"a batch that holds {type(node).__name__}")

    return tensors, walk(batch)


def unpack_batch(structure: Any, load: Callable[[str], Tensor]) -> Any:
    """The inverse of `pack_batch`; any mapping comes back as a dict."""
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return load(content)
    if kind == "dict":
        return {key: unpack_batch(value, load) for key, value in content.items()}
    if kind in ("list", "tuple"):
        values = [unpack_batch(value, load) for value in content]
        return values if kind == "list" else tuple(values)
    return content
