"""Paths that a training step stops: through ``detach`` and ``no_grad`` its gradient depends on parameters all the same.

With pseudo labels, self-distillation or a detached target the loss is ``L(theta, s(theta))`` and the gradient is taken in the
first argument alone. A second derivative of that gradient sees only the first argument; the change of the gradient with the
parameters also has the part through ``s``. To follow it, the step runs twice: once with the paths open, at leaves of its
own, whose values at every stop are noted; then as it is, with those values in the places where it stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_influence.core.torch_function import keywords_of

_LEAVING = (Tensor.numpy, Tensor.__array__)
"""Out of torch, where no path can be followed."""

_DETACHING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class _StopMode(TorchFunctionMode):
    """Calls `at_stop` for every function at which the path from a parameter stops."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = keywords_of(func, kwargs)
        if func in _LEAVING:
            with torch._C.DisableTorchFunction():
                args = (args[0].detach(), *args[1:])
        if _stops(func, args, kwargs):
            return self.at_stop(func, args, kwargs)
        return func(*args, **kwargs)

    def at_stop(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class StopWatch(_StopMode):
    """Notes whether a path stops.

    Attributes:
        seen: whether one did.
    """

    seen = False

    def at_stop(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen = True
        return func(*args, **kwargs)


class OpenPaths(_StopMode):
    """Lets every path go on.

    Attributes:
        values: what the functions at the stops returned, with their graphs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []

    def at_stop(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _DETACHING:
            result = args[0]
        else:
            with torch.enable_grad():
                result = func(*args, **kwargs)
        if _holds_tensors(result):
            self.values.append(result)
        return result


class NotedPaths(_StopMode):
    """Puts the noted values in the places where the paths stop."""

    def __init__(self, noted: OpenPaths) -> None:
        super().__init__()
        self._noted: Iterator[Any] = iter(noted.values)

    def at_stop(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        return next(self._noted, result) if _holds_tensors(result) else result


def _stops(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func in _DETACHING:
        return bool(args[0].requires_grad)
    name = getattr(func, "__name__", "")
    if (
        torch.is_grad_enabled()
        or "out" in kwargs
        or name == "__get__"
        or (name.endswith("_") and not name.endswith("__"))
    ):
        return False  # a property, or written in place
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((args, kwargs)))


def _holds_tensors(result: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
