"""Everything that a module holds, put back after its training step was run for another purpose than training."""

from __future__ import annotations

import argparse
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_influence.run.lightning_names import is_a

_LARGE = 2**24  # bytes of a tensor that is not copied before it is written to

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range})
"""Types of values that cannot change and hold nothing that can."""

_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.GeneratorType)
_NOT_THE_MODULE_S = (Dataset, DataLoader, Sampler, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, Enum)
"""What a module may refer to, and no training step changes; data can be large."""

_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_LIBRARIES = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_influence"})

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
"""Hooks and the like."""

_OF_LIGHTNING = frozenset({"_trainer", "_fabric"})


@contextmanager
def unchanged(module: nn.Module, datamodule: Any = None) -> Iterator[None]:
    """Whatever is reachable from a module is afterwards as it was.

    Parameters, buffers and other tensors, gradients, modes, counters and other attributes, metrics, lists, dicts, sets, arrays,
    random generators and objects of the user's own classes that hold any of these; objects of libraries, which may have
    threads and files, are left alone. What a training step does to the world outside cannot be undone. Large tensors are copied
    when torch first writes to them, and only then; a write through numpy goes unseen.

    Args:
        datamodule: whose hooks prepare batches; its attributes are put back, too, but not what they are like inside.
    """
    snapshot = _Kept(own=_packages_of(module))
    for value in (module, *module.parameters(), *module.buffers()):  # a scripted module's are not among its attributes
        snapshot.look(value)
    snapshot.note_attributes(datamodule)
    try:
        with snapshot.large if snapshot.large.tensors else nullcontext():
            yield
    finally:
        snapshot.put_back()


def _packages_of(module: nn.Module) -> frozenset[str]:
    """Where a module's class comes from."""
    return frozenset(_package(kind) for kind in type(module).__mro__) - _LIBRARIES


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


class _Kept:
    """What objects were like, each once; holding them keeps their ids their own.

    Args:
        own: packages whose objects are the user's, wherever they are installed.
    """

    def __init__(self, own: frozenset[str]) -> None:
        self._own = own
        self.large = _CopyOnWrite()
        self._seen: dict[int, Any] = {}
        self._undo: list[Callable[[], object]] = []

    def put_back(self) -> None:
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _later(self, undo: Callable[..., object], *arguments: Any, **options: Any) -> None:
        self._undo.append(partial(undo, *arguments, **options))

    def note_attributes(self, owner: Any) -> None:
        """Which values the attributes of an object have, not what these are like inside."""
        if hasattr(owner, "__dict__"):
            self._later(_restore, vars(owner), dict(vars(owner)))

    def look(self, root: Any) -> None:
        """Note what a value and everything that it holds is like."""
        waiting = [root]
        while waiting:
            value = waiting.pop()
            if type(value) in _PLAIN or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            waiting.extend(self._note(value))

    def _note(self, value: Any) -> Iterator[Any]:
        """Note what one value is like; yields what it holds."""
        if isinstance(value, Tensor):
            self._note_tensor(value)
        elif isinstance(value, dict):
            self._later(_restore, value, dict(value), ordered=True)
            yield from _not_plain(value.values())
        elif isinstance(value, (list, deque)):
            self._later(_refill, value, list(value))
            yield from _not_plain(value)
        elif isinstance(value, (set, bytearray)):
            self._later(_renew, value, value.copy())
            yield from _not_plain(value)
        elif isinstance(value, (tuple, frozenset)):
            yield from _not_plain(value)
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            self._later(np.copyto, value, value.copy())
        elif isinstance(value, torch.Generator):
            self._later(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            self._later(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            self._later(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            self._later(value.set_state, value.get_state())
        elif isinstance(value, nn.Module):
            yield from self._note_module(value)
        elif isinstance(value, _NAMESPACES) or self._is_the_user_s(value):
            yield from self._note_object(value)

    def _note_tensor(self, tensor: Tensor) -> None:
        gradient = tensor.grad if tensor.is_leaf else None
        if gradient is not None or isinstance(tensor, nn.Parameter):
            self._later(setattr, tensor, "grad", gradient)
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_inference() or is_lazy(tensor):
            return  # it cannot be written to
        if tensor.numel() * tensor.element_size() < _LARGE:
            self._later(_rewrite, tensor, tensor.detach().clone(), tensor.requires_grad)
        else:
            self.large.watch(tensor)
            self._later(self.large.put_back, tensor, tensor.requires_grad)

    def _note_module(self, module: nn.Module) -> Iterator[Any]:
        attributes = vars(module)
        left_out = _OF_EVERY_MODULE | _OF_LIGHTNING
        before = {name: value for name, value in attributes.items() if name not in left_out}
        self._later(_restore, attributes, before, besides=left_out)
        yield from _not_plain(before.values())

    def _is_the_user_s(self, value: Any) -> bool:
        kind = type(value)
        if isinstance(value, (*_CODE, *_NOT_THE_MODULE_S)) or _package(kind) in _LIBRARIES or is_a(value, "Trainer"):
            return False
        return _package(kind) in self._own or not _is_installed(_package(kind))

    def _note_object(self, value: Any) -> Iterator[Any]:
        if hasattr(value, "__dict__"):
            yield vars(value)
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                held = getattr(value, slot, None)
                if held is not None and slot not in ("__dict__", "__weakref__"):
                    yield held
                    self._later(object.__setattr__, value, slot, held)


class _CopyOnWrite(TorchDispatchMode):
    """Copies tensors before an operation first writes to their storage.

    Attributes:
        tensors: by the address of their storage, which some may share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, list[Tensor]] = {}
        self._copies: dict[int, Tensor] = {}  # by id

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._copy(args[place] if place < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def watch(self, tensor: Tensor) -> None:
        self.tensors.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)

    def put_back(self, tensor: Tensor, requires_grad: bool) -> None:
        """As `_rewrite`, where it was written to."""
        if id(tensor) in self._copies:
            _rewrite(tensor, self._copies.pop(id(tensor)), requires_grad)
        elif tensor.is_leaf:
            tensor.requires_grad_(requires_grad)

    def _copy(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                for large in self.tensors.get(tensor.untyped_storage().data_ptr(), ()):
                    if id(large) not in self._copies:
                        self._copies[id(large)] = large.detach().clone()


def _not_plain(values: Any) -> Iterator[Any]:
    return (value for value in values if type(value) not in _PLAIN)


def _is_installed(package: str) -> bool:
    """Whether it belongs to Python or was installed, rather than written by the user."""
    if package in sys.stdlib_module_names and package != "__main__":
        return True
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return bool({"site-packages", "dist-packages"} & set(Path(file).parts))


def _restore(
    table: dict[Any, Any], before: Mapping[Any, Any], besides: frozenset[str] = frozenset(), *, ordered: bool = False
) -> None:
    if ordered and list(table) != list(before):
        table.clear()
    for key in [key for key in table if key not in before and key not in besides]:
        del table[key]
    for key, value in before.items():
        if key not in table or table[key] is not value:
            table[key] = value


def _rewrite(tensor: Tensor, before: Tensor, requires_grad: bool) -> None:
    if tensor.requires_grad and not requires_grad and not tensor.is_leaf:
        tensor.detach_()  # a graph was added to it
    if not torch.equal(tensor.detach(), before):  # a write would spoil a graph that waits for its backward pass
        tensor.detach().copy_(before)
    if tensor.is_leaf:
        tensor.requires_grad_(requires_grad)


def _refill(values: Any, before: list[Any]) -> None:
    if len(values) != len(before) or any(a is not b for a, b in zip(values, before, strict=True)):
        _renew(values, before)


def _renew(values: Any, before: Any) -> None:
    values.clear()
    (values.update if isinstance(values, set) else values.extend)(before)
