"""A module at other parameters and buffers than its own, for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


@contextmanager
def parameters_at(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other values in its parameters meanwhile; they and their gradients are afterwards as they were."""
    own = {k: p for k, p in module.named_parameters() if k in values}
    before = {k: (p.data, p.grad) for k, p in own.items()}
    for k, p in own.items():
        p.data = values[k].to(p).view_as(p)  # nothing is copied
    try:
        yield
    finally:
        for k, (data, gradient) in before.items():
            own[k].data, own[k].grad = data, gradient


@contextmanager
def placed(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The module with other tensors in the place of its parameters and buffers, by name; tied ones everywhere.

    Nothing is copied, and autograd sees the tensors that are given. Yields the tensors by name; after the block it
    holds those that the module then had, since a buffer may have been assigned anew.
    """
    owners = {k: _owner(module, k) for k in values}
    originals = {k: owner[name] for k, (owner, name) in owners.items()}
    ids = {id(t): k for k, t in originals.items()}
    every = [
        (table, name, ids[id(t)])
        for m in module.modules()
        for table in (m._parameters, m._buffers)
        for name, t in table.items()
        if t is not None and id(t) in ids
    ]
    before = [(table, name, table[name]) for table, name, _ in every]
    inside = dict(values)
    for table, name, k in every:
        table[name] = values[k]  # type: ignore[assignment]
    try:
        yield inside
    finally:
        for k, (owner, name) in owners.items():
            now = owner[name]
            assert now is not None
            inside[k] = now
        for table, name, tensor in before:
            table[name] = tensor  # type: ignore[assignment]


def _owner(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, local = name.rpartition(".")
    owner = module.get_submodule(path)
    return (owner._parameters if local in owner._parameters else owner._buffers), local


def copy_sharing_parameters(module: _Module, *, also: Any = None) -> _Module | None:
    """A copy of a module that shares its parameters; None where the module cannot be copied.

    Args:
        also: another object that the copy shares, such as its trainer.
    """
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    if also is not None:
        memo[id(also)] = also
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # whatever a module holds
        return None
