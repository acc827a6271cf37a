"""Everything that a module holds, put back after its training step was run for another purpose than training; and what
datasets and loaders keep of having been read.
"""

from __future__ import annotations

import argparse
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
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
from lightning_influence.run.sharding import is_sharded, local

_LARGE = 2**24  # bytes of a tensor that is not copied before it is written to
_OF_DATA = 2**8  # elements of what a dataset holds besides its data

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range})
"""Types of values that cannot change and hold nothing that can."""

_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.GeneratorType)
_FUNCTIONS = (types.FunctionType, types.MethodType, partial)
_CONTAINERS = (dict, list, deque, set, frozenset, tuple, bytearray)
_SOURCES = (Dataset, Sampler)
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
    random generators and objects of the user's own classes that hold any of these, and what those classes themselves hold;
    objects of libraries, which may have threads and files, are left alone. What a training step does to the world outside cannot be
    undone. Large tensors are copied when torch first writes to them, and only then; a write through numpy goes unseen.

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


class Apart:
    """A source of data that is read beside the run, which then reads it as if nobody else had.

    Every reading goes on where the last one ended: counters, random generators and other small things that datasets, samplers and
    collate functions hold are the reading's own. What they hold of data, or make only when it is read, is left alone.

    Args:
        source: a loader, a dataset, or whatever else gives data.

    Example:
        >>> data = [[1]]
        >>> apart = Apart(data)
        >>> with apart():
        ...     data.append([2])
        >>> len(data)
        1
        >>> with apart():
        ...     print(len(data))
        2
    """

    def __init__(self, source: Any) -> None:
        self._roots = _roots_of(source)
        self._inside: _Kept | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context of a reading."""
        outside = self._now()
        if self._inside is not None:
            self._inside.put_back()
        try:
            yield
        finally:
            self._inside = self._now()
            outside.put_back()

    def _now(self) -> _Kept:
        kept = _Kept(own=frozenset().union(*map(_packages_of, self._roots)), at_most=_OF_DATA)
        for root in self._roots:
            kept.look(root)
            if not isinstance(root, _CODE) and not kept.is_the_user_s(root):
                kept.note_attributes(root)
        return kept


def _roots_of(source: Any) -> list[Any]:
    """What holds the state of a source of data; a loader itself may have workers that are running."""
    if not isinstance(source, DataLoader):
        return [source]
    return [source.dataset, source.sampler, source.batch_sampler, source.collate_fn, source.generator]


def _packages_of(value: Any) -> frozenset[str]:
    """Where an object's class comes from."""
    packages = {_package(kind) for kind in type(value).__mro__} - _LIBRARIES
    return frozenset(package for package in packages if not _is_python_s(package))


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


class _Kept:
    """What objects were like, each once; holding them keeps their ids their own.

    Args:
        own: packages whose objects are the user's, wherever they are installed.
        at_most: elements of tensors and containers; larger ones are left alone. None for data that is left alone and tensors of
            any size.
    """

    def __init__(self, own: frozenset[str], at_most: int | None = None) -> None:
        self._own, self._at_most = own, at_most
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
        if not hasattr(owner, "__dict__"):
            return
        attributes = vars(owner)
        if self._at_most is None:
            self._later(_restore, attributes, dict(attributes))
        else:
            self._later(_restore_known, attributes, dict(attributes), shadowed=type(owner))

    def look(self, root: Any) -> None:
        """Note what a value and everything that it holds is like."""
        waiting = [root]
        while waiting:
            value = waiting.pop()
            if type(value) in _PLAIN or id(value) in self._seen or self._is_data(value):
                continue
            self._seen[id(value)] = value
            waiting.extend(self._note(value))

    def _is_data(self, value: Any) -> bool:
        """Whether it is too large to be anything else."""
        if self._at_most is None:
            return False
        if isinstance(value, Tensor):
            return value.numel() > self._at_most
        if isinstance(value, np.ndarray):
            return value.size > self._at_most
        return isinstance(value, _CONTAINERS) and len(value) > self._at_most

    def _note(self, value: Any) -> Iterator[Any]:
        """Note what one value is like; yields what it holds."""
        if isinstance(value, Tensor):
            self._note_tensor(value)
        elif isinstance(value, dict):
            if self._at_most is None:
                self._later(_restore, value, dict(value), ordered=True)
            else:
                self._later(_restore_known, value, dict(value))
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
            yield from self._note_classes(value)
        elif self._at_most is not None and isinstance(value, _FUNCTIONS):
            yield from _closed_over(value)
        elif isinstance(value, _NAMESPACES) or self.is_the_user_s(value):
            yield from self._note_object(value)
            yield from self._note_classes(value)

    def _note_tensor(self, tensor: Tensor) -> None:
        gradient = tensor.grad if tensor.is_leaf else None
        if gradient is not None or isinstance(tensor, nn.Parameter):
            self._later(setattr, tensor, "grad", gradient)
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_inference() or is_lazy(tensor):
            return  # it cannot be written to
        if is_sharded(tensor):  # to compare the whole, all processes would have to be here
            self._later(tensor.requires_grad_, tensor.requires_grad)
            tensor = local(tensor)
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

    def is_the_user_s(self, value: Any) -> bool:
        """Whether to look into an object."""
        if self._at_most is not None and isinstance(value, _SOURCES):
            return True
        if isinstance(value, (*_CODE, *_NOT_THE_MODULE_S)) or is_a(value, "Trainer"):
            return False
        return self._is_own(type(value))

    def _is_own(self, kind: type) -> bool:
        """Whether a class is the user's."""
        package = _package(kind)
        return package not in _LIBRARIES and (package in self._own or not _is_installed(package))

    def _note_classes(self, value: Any) -> Iterator[Any]:
        """Note what the user's classes of a value hold."""
        for kind in type(value).__mro__:
            if id(kind) in self._seen or not self._is_own(kind):
                continue
            self._seen[id(kind)] = kind
            before = _held_by_class(kind)
            self._later(_restore_class, kind, before)
            yield from _not_plain(before.values())

    def _note_object(self, value: Any) -> Iterator[Any]:
        self.note_attributes(value)
        yield from _not_plain(getattr(value, "__dict__", {}).values())
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


def _closed_over(function: Any) -> Iterator[Any]:
    """What a function has besides its arguments."""
    if isinstance(function, types.MethodType):
        yield function.__self__
    elif isinstance(function, partial):
        yield from (function.func, function.args, function.keywords)
    else:
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty one
                yield cell.cell_contents


def _not_plain(values: Any) -> Iterator[Any]:
    return (value for value in values if type(value) not in _PLAIN)


def _is_python_s(package: str) -> bool:
    return package in sys.stdlib_module_names and package != "__main__"


def _is_installed(package: str) -> bool:
    """Whether it belongs to Python or was installed, rather than written by the user."""
    if _is_python_s(package):
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


def _restore_known(table: dict[Any, Any], before: Mapping[Any, Any], *, shadowed: type | None = None) -> None:
    """What was there is back, also in the class; what was first made since stays, such as a file that was opened or a cache."""
    for key in [key for key in table if key not in before and getattr(shadowed, str(key), None) is not None]:
        del table[key]
    for key, value in before.items():
        if value is not None and table.get(key) is not value:
            table[key] = value


def _held_by_class(kind: type) -> dict[str, Any]:
    """The attributes of a class that are no code."""
    named = {name: value for name, value in vars(kind).items() if not name.startswith(("__", "_abc_"))}
    return {
        name: value for name, value in named.items() if not isinstance(value, _CODE) and not hasattr(value, "__get__")
    }


def _restore_class(kind: type, before: Mapping[str, Any]) -> None:
    now = _held_by_class(kind)
    for name in now.keys() - before.keys():
        delattr(kind, name)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            setattr(kind, name, value)


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
