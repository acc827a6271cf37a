"""Which coordinates of every parameter a log keeps, and in which form (docs/method.md, "Where a trajectory comes from")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.core.shares import Dense, Form, Outer, Stack, Sum, nbytes, pack
from lightning_influence.core.trajectory import Shares

COMPRESSIONS = ("auto", "full", "factored", "mask")

_BUDGET = 2**22  # bytes per sample and step that "auto" spends on all parameters together
_STATE = 1.25
"""Numbers that a step keeps of every coordinate besides the shares: its gradient, and moments every few steps."""

# -- what is kept ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coordinates:
    """Which coordinates of one parameter are kept, and in which form.

    Attributes:
        kind: ``"full"`` dense rows, ``"factored"`` the form they were captured in, ``"mask"`` a fixed set
            of coordinates.
        shape: of the parameter.
        index: ``(d,)`` int64, ascending flat coordinates under a mask, else None.

    Example:
        >>> keep = Coordinates("mask", (2, 3), torch.tensor([0, 4]))
        >>> keep.size, keep.total
        (2, 6)
        >>> keep.select(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        tensor([1., 5.])
        >>> keep.compress(Dense(torch.arange(12.0).view(2, 6))).dense()
        tensor([[ 0.,  4.],
                [ 6., 10.]])
    """

    kind: Literal["full", "factored", "mask"]
    shape: tuple[int, ...]
    index: Tensor | None = None

    @property
    def total(self) -> int:
        """All coordinates of the parameter."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Kept coordinates ``d``."""
        return self.total if self.index is None else len(self.index)

    def select(self, values: Tensor) -> Tensor:
        """``(..., *shape) -> (..., d)``; a view where everything is kept."""
        flat = values.reshape(*values.shape[: values.dim() - len(self.shape)], self.total)
        return flat if self.index is None else flat[..., self.index.to(flat.device)]

    def compress(self, shares: Form) -> Form:
        """The shares in the form and on the coordinates that are kept."""
        if self.index is not None:
            return shares.at(self.index.to(_device(shares)))
        return Dense(shares.dense()) if self.kind == "full" else shares


def choose_coordinates(
    shares: Mapping[str, Shares],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    compression: Literal["auto", "full", "factored", "mask"],
    mask_size: int = 8192,
    budget: int = _BUDGET,
    seed: int = 0,
) -> dict[str, Coordinates]:
    """What to keep of every parameter, from the shares of a first step.

    Args:
        compression: ``"full"`` dense rows; ``"factored"`` the smaller lossless form; ``"mask"`` at most
            ``mask_size`` coordinates a parameter; ``"auto"`` lossless while all parameters together stay
            within ``budget`` bytes per sample and step, the most expensive ones masked beyond it.

    Example:
        >>> shares = {"weight": Outer(torch.zeros(8, 1, 100), torch.zeros(8, 1, 50)), "bias": Dense(torch.zeros(8, 100))}
        >>> shapes = {"weight": (100, 50), "bias": (100,)}
        >>> {name: keep.kind for name, keep in choose_coordinates(shares, shapes, compression="auto").items()}
        {'weight': 'factored', 'bias': 'full'}
        >>> {name: keep.size for name, keep in choose_coordinates(shares, shapes, compression="mask", mask_size=64).items()}
        {'weight': 64, 'bias': 64}
    """
    lossless = {name: _smaller(share, shapes[name]) for name, share in shares.items()}
    if compression == "full":
        return {name: Coordinates("full", shape) for name, shape in shapes.items()}
    if compression == "factored":
        return {name: Coordinates(kind, shapes[name]) for name, (kind, _) in lossless.items()}
    masked = set(shapes) if compression == "mask" else _beyond(lossless, shapes, mask_size, budget)
    return {
        name: _mask(shape, mask_size, shares[name], seed + i)
        if name in masked and math.prod(shape) > mask_size
        else Coordinates(lossless[name][0], shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def within_budget(
    shares: Mapping[str, Shares], shapes: Mapping[str, tuple[int, ...]], budget: int, *, seed: int = 0
) -> dict[str, Coordinates]:
    """What to keep of every parameter so that a sample and step costs about ``budget`` bytes, the step's gradient and moments
    included: one size of mask for all parameters, and those whole that cost less than their mask.

    Example:
        >>> shares = {"weight": Dense(torch.zeros(8, 5000)), "bias": Dense(torch.zeros(8, 100))}
        >>> kept = within_budget(shares, {"weight": (100, 50), "bias": (100,)}, budget=4096)
        >>> {name: (keep.kind, keep.size) for name, keep in kept.items()}
        {'weight': ('mask', 785), 'bias': ('full', 100)}
    """
    n = {name: max(share.n_samples, 1) for name, share in shares.items()}
    coordinate = {name: 4 * (1 + _STATE / n[name]) for name in shares}  # bytes of one that is kept
    whole = {}
    for name, share in shares.items():
        kind, size = _smaller(share, shapes[name])
        whole[name] = kind, size + 4 * _STATE / n[name] * math.prod(shapes[name])

    def cost(mask_size: int) -> float:
        return sum(min(whole[k][1], coordinate[k] * min(mask_size, math.prod(shapes[k]))) for k in shares)

    low, high = 1, max((math.prod(shape) for shape in shapes.values()), default=1)
    while low < high:  # the largest mask within the budget
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return {
        name: Coordinates(whole[name][0], shape)
        if whole[name][1] <= coordinate[name] * min(low, math.prod(shape))
        else _mask(shape, min(low, math.prod(shape)), shares[name], seed + i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def _smaller(share: Shares, shape: tuple[int, ...]) -> tuple[Literal["full", "factored"], float]:
    """The smaller lossless form and its bytes per sample."""
    captured = nbytes(share) / max(share.n_samples, 1)
    dense = math.prod(shape) * 4
    return ("factored", captured) if captured < dense else ("full", dense)


def _beyond(
    lossless: Mapping[str, tuple[str, float]], shapes: Mapping[str, tuple[int, ...]], mask_size: int, budget: int
) -> set[str]:
    """The parameters to mask, most expensive first, until the rest fits."""
    masked: set[str] = set()
    total = sum(size for _, size in lossless.values())
    for name, (_, size) in sorted(lossless.items(), key=lambda item: -item[1][1]):
        saved = size - 4 * min(mask_size, math.prod(shapes[name]))
        if total > budget and saved > 0:
            masked.add(name)
            total -= saved
    return masked


def _mask(shape: tuple[int, ...], size: int, share: Shares, seed: int) -> Coordinates:
    """A fixed random set of coordinates; for products of factors random rows times random columns, so that
    capturing costs one small matrix product.
    """
    generator = torch.Generator().manual_seed(seed)
    total = math.prod(shape)
    if _is_product(share):
        rows, columns = shape[0], total // shape[0]
        n_rows = min(rows, max(1, math.isqrt(size), -(-size // columns)))
        n_columns = min(columns, max(1, size // n_rows))
        row = torch.randperm(rows, generator=generator)[:n_rows].sort().values
        column = torch.randperm(columns, generator=generator)[:n_columns].sort().values
        return Coordinates("mask", shape, (row[:, None] * columns + column).flatten())
    return Coordinates("mask", shape, torch.randperm(total, generator=generator)[:size].sort().values)


def _is_product(share: Shares) -> bool:
    if isinstance(share, (Sum, Stack)):
        return any(_is_product(part) for part in share.parts)
    return isinstance(share, Outer)


def _device(form: Form) -> torch.device:
    return next(iter(pack(form)[0].values())).device


def pack_coordinates(keep: Coordinates) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON metadata from which `unpack_coordinates` makes the same decision."""
    tensors = {} if keep.index is None else {"index": keep.index}
    return tensors, {"kind": keep.kind, "shape": list(keep.shape)}


def unpack_coordinates(meta: Mapping[str, Any], load: Callable[[str], Tensor]) -> Coordinates:
    """The inverse of `pack_coordinates`."""
    return Coordinates(meta["kind"], tuple(meta["shape"]), load("index") if meta["kind"] == "mask" else None)
