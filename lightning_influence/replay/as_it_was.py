"""A module that is put back after it was used, without a copy of what it does not train."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class AsItWas:
    """Parameters, buffers, gradients and modes of a module, to be restored.

    A training step may write to parameters that do not train (an average of the others). Those are copied, but only
    those: the first time that it runs it is watched for what it writes.

    Args:
        trained: names of the parameters that are put in their places by others, and are not watched.
    """

    def __init__(self, module: nn.Module, trained: Collection[str]) -> None:
        self._module = module
        named = dict(module.named_parameters())
        self._storages = {k: p.data for k, p in [*named.items(), *module.named_buffers()]}
        self._gradients = {k: p.grad for k, p in named.items()}
        self._modes = {m: m.training for m in module.modules()}
        self._watch: _CopyOnWrite | None = _CopyOnWrite({k: p for k, p in named.items() if k not in trained})
        self._copies: dict[str, Tensor] = {}

    def first_run(self) -> AbstractContextManager[Any]:
        """Around a training step: watches the first."""
        watch, self._watch = self._watch, None
        return nullcontext() if watch is None else self._watched(watch)

    @contextmanager
    def _watched(self, watch: _CopyOnWrite) -> Iterator[None]:
        try:
            with watch:
                yield
        finally:
            self._copies |= watch.copies

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for k, t in [*self._module.named_parameters(), *self._module.named_buffers()]:
                t.data = self._storages[k]
                if k in self._copies:
                    t.copy_(self._copies[k])
        for k, p in self._module.named_parameters():
            p.grad = self._gradients[k]
        for m, mode in self._modes.items():
            m.training = mode


class _CopyOnWrite(TorchDispatchMode):
    """Copies tensors before they are first written to.

    Attributes:
        copies: by name.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.copies: dict[str, Tensor] = {}
        self._tensors, self._names = tensors, {t.untyped_storage().data_ptr(): k for k, t in tensors.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._copy(args[place] if place < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _copy(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            name = self._names.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
            if name is not None and name not in self.copies:
                self.copies[name] = self._tensors[name].detach().clone()
