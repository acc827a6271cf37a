"""Collated batches as trees of tensors: how many samples they hold, some of them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError

_NO_DATA = (type, ModuleType, FunctionType, MethodType, nn.Module)


@dataclass
class OneExample:
    """A batch that is one example whatever its rows are, such as a graph, whose rows are nodes."""

    batch: Any


def leaves(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of its structure, and then those inside its objects."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    return tensors + [tensor for part in objects(batch) for tensor in _tensors_inside(part)]


def objects(batch: Any) -> list[Any]:
    """The parts of a batch that are objects of some class with tensors inside (a graph of another library, say), which nobody else
    can take apart.
    """
    return [end for end in _ends(batch) if not isinstance(end, Tensor) and _tensors_inside(end)]


def _ends(node: Any) -> Iterator[Any]:
    """What a structure of dicts, lists, tuples and dataclasses holds."""
    if isinstance(node, Mapping):
        inside: Iterable[Any] = node.values()
    elif isinstance(node, (list, tuple)):
        inside = node
    elif is_dataclass(node) and not isinstance(node, type):
        inside = [getattr(node, f.name) for f in fields(node)]
    else:
        yield node
        return
    for value in inside:
        yield from _ends(value)


def _tensors_inside(thing: Any) -> list[Tensor]:
    tensors, seen, waiting = list[Tensor](), set[int](), [thing]
    while waiting:
        for end in _ends(waiting.pop(0)):
            if isinstance(end, Tensor):
                tensors.append(end)
            elif id(end) not in seen and hasattr(end, "__dict__") and not isinstance(end, _NO_DATA):
                seen.add(id(end))
                waiting.append(vars(end))
    return tensors


def copied(batch: Any) -> Any:
    """The batch with tensors of its own, since a training step may write into them."""
    kinds = {type(part) for part in objects(batch)}
    return apply_to_collection(
        batch, (Tensor, *kinds), lambda part: part.detach().clone() if isinstance(part, Tensor) else deepcopy(part)
    )


def batch_size(batch: Any) -> int:
    """Number of samples: the length of the first list that holds one item a sample, or else the first dimension of the first
    tensor that has one.

    Raises:
        ConfigurationError: the batch holds neither.
    """
    if isinstance(batch, OneExample):
        return 1
    for node in _lists(batch):
        if _holds_samples(node, batch):
            return len(node)
    for leaf in leaves(batch):
        if leaf.dim() > 0:
            return leaf.shape[0]
    raise ConfigurationError(
        f"a batch of type {type(batch).__name__} holds no tensor with a batch dimension; collate samples into tensors."
    )


def samples_of(batch: Any, samples: slice, n: int | None = None) -> Any:
    """Some samples of a batch of ``n``: of every tensor whose first dimension is the batch's, and of every list that holds one
    item a sample.
    """
    n = batch_size(batch) if n is None else n
    if isinstance(batch, OneExample):
        return batch
    return _chosen(batch, batch, n, list(range(n))[samples])


def without(batch: Any, rows: Tensor, n: int | None = None) -> Any:
    """A batch of ``n`` without some of its samples, ``rows`` ``(k,)`` int64, as of `samples_of`."""
    n = batch_size(batch) if n is None else n
    leave = set(rows.tolist())
    return _chosen(batch, batch, n, [i for i in range(n) if i not in leave])


def _chosen(node: Any, batch: Any, n: int, rows: list[int]) -> Any:
    def chosen(inner: Any) -> Any:
        if isinstance(inner, np.ndarray):
            return inner[rows] if inner.ndim and len(inner) == n else inner
        if isinstance(inner, Tensor):
            has_samples = inner.dim() > 0 and inner.shape[0] == n
            return inner[torch.tensor(rows, device=inner.device)] if has_samples else inner
        if len(inner) == n and (_is_plain(inner) or (inner is not batch and _holds_samples(inner, batch))):
            return type(inner)([inner[i] for i in rows])
        values = [_chosen(value, batch, n, rows) for value in inner]
        return type(inner)(*values) if hasattr(inner, "_fields") else type(inner)(values)

    return apply_to_collection(node, (Tensor, np.ndarray, list, tuple), chosen)


def _lists(batch: Any) -> list[Any]:
    """The lists and tuples inside a batch."""
    lists: list[Any] = []

    def look(node: Any) -> Any:
        if node is not batch:
            lists.append(node)
        for value in node:
            apply_to_collection(value, (list, tuple), look)
        return node

    apply_to_collection(batch, (list, tuple), look)
    return lists


def _holds_samples(node: Any, batch: Any) -> bool:
    """Whether a list inside a batch holds one item a sample, rather than several tensors of all samples."""
    inside = leaves(node)
    if not node or not all(isinstance(item, (Tensor, Mapping)) for item in node) or not inside:
        return False
    own = {id(leaf) for leaf in inside}
    lengths = {len(leaf) if leaf.dim() else None for leaf in inside}
    outside = {len(leaf) for leaf in leaves(batch) if id(leaf) not in own and leaf.dim()}
    return len(lengths) > 1 or bool(outside and not lengths & outside)


def _is_plain(node: Any) -> bool:
    """Whether a list holds no tensors: names, numbers, boxes as lists, images of another library."""
    return bool(node) and not leaves(node)


def example(batch: Any, index: int) -> Any:
    """A batch of one."""
    return samples_of(batch, slice(index, index + 1))


def to_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in another precision."""
    return apply_to_collection(batch, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return apply_to_collection(batch, Tensor, lambda t: t.to(device))


def fingerprint(batch: Any) -> Tensor:
    """Two float64 numbers a tensor, ``(n_tensors, 2)``, that tell one batch from another up to rounding."""
    parts = []
    for leaf in leaves(batch):
        values = leaf.detach().flatten().double()
        ramp = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
        parts.append(torch.stack([values.abs().sum(), (values * ramp.cos()).sum()]))
    return torch.stack(parts).cpu() if parts else torch.zeros(0, 2, dtype=torch.float64)


def pack_batch(batch: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a batch by number, and its structure as JSON.

    Raises:
        TypeError: the batch holds something that is neither a tensor, an array, a plain value nor a dict, list or tuple.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors[str(len(tensors))] = node.detach()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(node, np.ndarray) and node.dtype.kind in "biuf":
            tensors[str(len(tensors))] = torch.from_numpy(node.copy())
            return {"array": str(len(tensors) - 1)}
        if isinstance(node, Mapping) and all(isinstance(key, str) for key in node):
            return {"dict": {key: walk(value) for key, value in node.items()}}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return {"named": [type(node).__name__, {k: walk(v) for k, v in zip(node._fields, node, strict=True)}]}
        if type(node) in (list, tuple):
            return {type(node).__name__: [walk(value) for value in node]}
        if node is None or isinstance(node, (bool, int, float, str)):
            return {"value": node}
        raise TypeError(f"a batch that holds {type(node).__name__}")

    return tensors, walk(batch)


def unpack_batch(structure: Any, load: Callable[[str], Tensor]) -> Any:
    """The inverse of `pack_batch`; any mapping comes back as a dict, and a named tuple as one of a class of its own."""
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return load(content)
    if kind == "array":
        return load(content).numpy()
    if kind == "dict":
        return {key: unpack_batch(value, load) for key, value in content.items()}
    if kind == "named":
        name, fields = content
        return namedtuple(name, list(fields))(*(unpack_batch(value, load) for value in fields.values()))  # type: ignore[misc]
    if kind in ("list", "tuple"):
        values = [unpack_batch(value, load) for value in content]
        return values if kind == "list" else tuple(values)
    return content
