"""What is kept of per-sample gradients, and the contractions each form supports.

Forms (all are `trajectory.Shares`): `Dense` rows, `Outer` products of layer inputs and output gradients,
sparse `SparseRows` of an embedding, `Sum` over several uses of a parameter, `Stack` over micro-batches.
`sum_at` of each is the sum of all its shares on a `CoordinateBlock` of coordinates, `weighted` the same with each share times a weight
of its sample, ``(n,)``.
`Coordinates` says which coordinates of a parameter a log holds; `choose_coordinates` chooses it
(docs/method.md, "Where a trajectory comes from").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core.trajectory import Shares

_GATHER_ELEMENTS = 2**24  # of a block of gathered factors
_FORMED_ELEMENTS = 2**21  # of a block of products that were formed
_FEW = (4, 8)  # rows and columns of a block


@dataclass(frozen=True)
class CoordinateBlock:
    """A few coordinates of a parameter, seen as a matrix ``shape`` of its first dimension and all others together.

    Example:
        >>> CoordinateBlock((3, 2), slice(0, 3, 2), slice(1, 2)).select(torch.tensor([[1, 2], [3, 4], [5, 6]]))
        tensor([[2],
                [6]])
        >>> block = CoordinateBlock.of(torch.zeros(100, 8, 8))
        >>> block.size, block.columns
        (32, slice(3, 59, 7))
    """

    shape: tuple[int, int]
    rows: slice
    columns: slice

    @classmethod
    def of(cls, parameter: Tensor) -> CoordinateBlock:
        """A few rows times a few columns, spread evenly."""
        rows = parameter.shape[0] if parameter.dim() else 1
        columns = parameter.numel() // max(rows, 1)
        return cls((rows, columns), *(_spread(n, few) for n, few in zip((rows, columns), _FEW, strict=True)))

    @property
    def size(self) -> int:
        """Number of the coordinates."""
        return math.prod(
            len(range(*part.indices(n))) for part, n in zip((self.rows, self.columns), self.shape, strict=True)
        )

    def select(self, values: Tensor) -> Tensor:
        """``(rows, columns)`` of one tensor in the shape of the parameter, or flat."""
        return values.reshape(self.shape)[self.rows, self.columns]


def _spread(n: int, few: int) -> slice:
    """A few of ``n`` in equal steps, which have no divisor in common with ``n``: of an image they would all meet its border."""
    step = max(1, n // few)
    while math.gcd(step, n) > 1:
        step -= 1
    start = (step - 1) // 2
    return slice(start, min(start + step * few, n), step)


@dataclass(frozen=True)
class Dense:
    """Rows ``(n, d)``.

    Example:
        >>> shares = Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> shares.inner(torch.ones(1, 2))
        tensor([[3., 7.]])
        >>> shares.combine(torch.ones(1, 2))
        tensor([[4., 6.]])
    """

    values: Tensor

    @property
    def n_samples(self) -> int:
        return self.values.shape[0]

    @property
    def n_coordinates(self) -> int:
        return self.values.shape[1]

    def inner(self, vectors: Tensor) -> Tensor:
        return vectors @ self.values.to(vectors).T

    def combine(self, weights: Tensor) -> Tensor:
        return weights @ self.values.to(weights)

    def dense(self, samples: slice = slice(None)) -> Tensor:
        return self.values[samples]

    def scaled(self, factor: float) -> Dense:
        return Dense(self.values * factor)

    def weighted(self, weights: Tensor) -> Dense:
        return Dense(self.values * weights[:, None].to(self.values))

    def at(self, coordinates: Tensor) -> Dense:
        return Dense(self.values[:, coordinates])

    def sum_at(self, block: CoordinateBlock) -> Tensor:
        return self.values.unflatten(1, block.shape)[:, block.rows, block.columns].sum(0)


@dataclass(frozen=True)
class Outer:
    """``sum_t left_t right_t^T`` for ``left (n, t, r)`` and ``right (n, t, c)``, flattened to ``(n, r c)``.

    Example:
        >>> shares = Outer(left=torch.tensor([[[1.0, 2.0]]]), right=torch.tensor([[[3.0, 4.0, 5.0]]]))
        >>> shares.dense()
        tensor([[ 3.,  4.,  5.,  6.,  8., 10.]])
    """

    left: Tensor
    right: Tensor

    @property
    def n_samples(self) -> int:
        return self.left.shape[0]

    @property
    def n_coordinates(self) -> int:
        return self.left.shape[2] * self.right.shape[2]

    def inner(self, vectors: Tensor) -> Tensor:
        left, right = self.left.to(vectors), self.right.to(vectors)
        if self._is_cheaper_formed(len(vectors)):
            return torch.cat([vectors @ Outer(left[s], right[s]).dense().T for s in self._blocks()], 1)
        matrices = vectors.unflatten(1, (left.shape[2], right.shape[2]))
        return torch.stack([((left @ m) * right).sum((1, 2)) for m in matrices])

    def combine(self, weights: Tensor) -> Tensor:
        used = (weights != 0).any(0)
        if 2 * int(used.sum()) < self.n_samples:  # a product as large as the samples that take part in it
            return Outer(self.left[used], self.right[used]).combine(weights[:, used])
        if self._is_cheaper_formed(len(weights)):
            formed = weights.new_zeros(len(weights), self.n_coordinates)
            for s in self._blocks():
                formed.addmm_(weights[:, s], Outer(self.left[s], self.right[s]).dense().to(weights))
            return formed
        left, right = self.left.to(weights).flatten(0, 1), self.right.to(weights).flatten(0, 1)
        total = weights.new_empty(len(weights), left.shape[1], right.shape[1])
        for matrix, weight in zip(total, weights.repeat_interleave(self.left.shape[1], 1), strict=True):
            torch.mm((weight[:, None] * left).T, right, out=matrix)
        return total.flatten(1)

    def _is_cheaper_formed(self, queries: int) -> bool:
        """Whether a share is to be formed once and read by every query, rather than each query taken through its factors:
        per coordinate and sample ``t + q`` multiplications against ``t q``.
        """
        tokens = self.left.shape[1]
        return tokens + queries < tokens * queries

    def _blocks(self) -> list[slice]:
        """Samples whose formed shares fit in a bounded block."""
        return sample_chunks(self.n_samples, self.n_coordinates, _FORMED_ELEMENTS)

    def dense(self, samples: slice = slice(None)) -> Tensor:
        return (self.left[samples].mT @ self.right[samples]).flatten(1)

    def scaled(self, factor: float) -> Outer:
        return Outer(self.left * factor, self.right)

    def weighted(self, weights: Tensor) -> Outer:
        return Outer(self.left * weights[:, None, None].to(self.left), self.right)

    def at(self, coordinates: Tensor) -> Dense:
        rows, columns = coordinates // self.right.shape[2], coordinates % self.right.shape[2]
        unique_rows, row_of = rows.unique(return_inverse=True)
        unique_columns, column_of = columns.unique(return_inverse=True)
        if len(unique_rows) * len(unique_columns) <= 4 * len(coordinates):
            # a block of rows x columns: one small matrix product a sample
            block = self.left[..., unique_rows].mT @ self.right[..., unique_columns]
            return Dense(block[:, row_of, column_of])
        size = max(1, _GATHER_ELEMENTS // max(self.left.shape[0] * self.left.shape[1], 1))
        parts = zip(rows.split(size), columns.split(size), strict=True)
        return Dense(torch.cat([(self.left[..., r] * self.right[..., c]).sum(1) for r, c in parts], 1))

    def sum_at(self, block: CoordinateBlock) -> Tensor:
        left, right = self.left[..., block.rows].flatten(0, 1), self.right[..., block.columns].flatten(0, 1)
        return left.T @ right.to(left)


@dataclass(frozen=True)
class SparseRows:
    """Sparse rows of a matrix of ``n_rows``: ``values (n, t, e)`` added at row ``rows (n, t)``.

    Example:
        >>> shares = SparseRows(torch.tensor([[2, 0, 2]]), torch.tensor([[[1.0], [5.0], [3.0]]]), n_rows=4)
        >>> shares.dense()
        tensor([[5., 0., 4., 0.]])
    """

    rows: Tensor
    values: Tensor
    n_rows: int

    @property
    def n_samples(self) -> int:
        return self.rows.shape[0]

    @property
    def n_coordinates(self) -> int:
        return self.n_rows * self.values.shape[2]

    def inner(self, vectors: Tensor) -> Tensor:
        tables = vectors.unflatten(1, (self.n_rows, self.values.shape[2]))
        values = self.values.to(vectors)
        return torch.stack([(table[self.rows] * values).sum((1, 2)) for table in tables])

    def combine(self, weights: Tensor) -> Tensor:
        values, index = self.values.to(weights), self.rows.flatten()
        total = weights.new_zeros(weights.shape[0], self.n_rows, self.values.shape[2])
        for table, weight in zip(total, weights, strict=True):
            table.index_add_(0, index, (weight[:, None, None] * values).flatten(0, 1))
        return total.flatten(1)

    def dense(self, samples: slice = slice(None)) -> Tensor:
        rows, values = self.rows[samples], self.values[samples]
        total = values.new_zeros(len(rows), self.n_rows, values.shape[2])
        index = rows[..., None].expand_as(values)
        return total.scatter_add_(1, index, values).flatten(1)

    def scaled(self, factor: float) -> SparseRows:
        return SparseRows(self.rows, self.values * factor, self.n_rows)

    def weighted(self, weights: Tensor) -> SparseRows:
        return SparseRows(self.rows, self.values * weights[:, None, None].to(self.values), self.n_rows)

    def at(self, coordinates: Tensor) -> Dense:
        rows, columns = coordinates // self.values.shape[2], coordinates % self.values.shape[2]
        position = torch.full((self.n_rows,), -1, dtype=torch.int64, device=rows.device)
        unique_rows, row_of = rows.unique(return_inverse=True)
        position[unique_rows] = torch.arange(len(unique_rows), device=rows.device)
        where = position[self.rows]
        present = self.values * (where >= 0)[..., None]
        table = present.new_zeros(self.n_samples, len(unique_rows), self.values.shape[2])
        table.scatter_add_(1, where.clamp(min=0)[..., None].expand_as(present), present)
        return Dense(table[:, row_of, columns])

    def sum_at(self, block: CoordinateBlock) -> Tensor:
        values = self.values[..., block.columns].flatten(0, 1)
        wanted = torch.arange(self.n_rows, device=self.rows.device)[block.rows]
        return (self.rows.flatten() == wanted[:, None]).to(values) @ values


@dataclass(frozen=True)
class Sum:
    """The sum of several forms of the same samples: a parameter used more than once.

    Example:
        >>> Sum([Dense(torch.ones(2, 1)), Dense(torch.tensor([[1.0], [2.0]]))]).dense()
        tensor([[2.],
                [3.]])
    """

    parts: Sequence[Form]

    @property
    def n_samples(self) -> int:
        return self.parts[0].n_samples

    @property
    def n_coordinates(self) -> int:
        return self.parts[0].n_coordinates

    def inner(self, vectors: Tensor) -> Tensor:
        return torch.stack([part.inner(vectors) for part in self.parts]).sum(0)

    def combine(self, weights: Tensor) -> Tensor:
        return torch.stack([part.combine(weights) for part in self.parts]).sum(0)

    def dense(self, samples: slice = slice(None)) -> Tensor:
        return torch.stack([part.dense(samples) for part in self.parts]).sum(0)

    def scaled(self, factor: float) -> Sum:
        return Sum([part.scaled(factor) for part in self.parts])

    def weighted(self, weights: Tensor) -> Sum:
        return Sum([part.weighted(weights) for part in self.parts])

    def at(self, coordinates: Tensor) -> Dense:
        return Dense(torch.stack([part.at(coordinates).values for part in self.parts]).sum(0))

    def sum_at(self, block: CoordinateBlock) -> Tensor:
        return torch.stack([part.sum_at(block) for part in self.parts]).sum(0)


@dataclass(frozen=True)
class Stack:
    """Forms of different samples, one after the other: the micro-batches of a step, or its ranks.

    Example:
        >>> Stack([Dense(torch.ones(1, 2)), Dense(torch.zeros(2, 2))]).dense(slice(0, 2))
        tensor([[1., 1.],
                [0., 0.]])
    """

    parts: Sequence[Form]

    @property
    def n_samples(self) -> int:
        return sum(part.n_samples for part in self.parts)

    @property
    def n_coordinates(self) -> int:
        return self.parts[0].n_coordinates

    def inner(self, vectors: Tensor) -> Tensor:
        return torch.cat([part.inner(vectors) for part in self.parts], 1)

    def combine(self, weights: Tensor) -> Tensor:
        sizes = [part.n_samples for part in self.parts]
        pairs = zip(self.parts, weights.split(sizes, 1), strict=True)
        return torch.stack([part.combine(w) for part, w in pairs]).sum(0)

    def dense(self, samples: slice = slice(None)) -> Tensor:
        start, stop, _ = samples.indices(self.n_samples)
        blocks, offset = [], 0
        for part in self.parts:
            own = slice(max(start - offset, 0), max(min(stop - offset, part.n_samples), 0))
            if own.start < own.stop:
                blocks.append(part.dense(own))
            offset += part.n_samples
        return torch.cat(blocks) if blocks else self.parts[0].dense(slice(0, 0))

    def scaled(self, factor: float) -> Stack:
        return Stack([part.scaled(factor) for part in self.parts])

    def weighted(self, weights: Tensor) -> Stack:
        parts = zip(self.parts, weights.split([part.n_samples for part in self.parts]), strict=True)
        return Stack([part.weighted(own) for part, own in parts])

    def at(self, coordinates: Tensor) -> Dense:
        return Dense(torch.cat([part.at(coordinates).values for part in self.parts]))

    def sum_at(self, block: CoordinateBlock) -> Tensor:
        return torch.stack([part.sum_at(block) for part in self.parts]).sum(0)


Form = Dense | Outer | SparseRows | Sum | Stack


def sample_chunks(n_samples: int, n_coordinates: int, elements: int, *, least: int = 1) -> list[slice]:
    """Slices of the samples whose dense shares stay within a block of so many elements, about as long as one another.

    Args:
        least: samples of a slice, where there are so many.

    Example:
        >>> sample_chunks(5, n_coordinates=16_000, elements=2**15)
        [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
        >>> sample_chunks(5, n_coordinates=2**20, elements=2**15, least=2)
        [slice(0, 2, None), slice(2, 5, None)]
    """
    size = max(1, elements // max(n_coordinates, 1))
    count = min(-(-n_samples // size), max(1, n_samples // least))
    return [slice(n_samples * i // count, n_samples * (i + 1) // count) for i in range(count)]


def add(first: Form, second: Form) -> Form:
    """The sum of two uses of one parameter; two products are one with more tokens.

    Example:
        >>> use = Outer(left=torch.ones(1, 1, 1), right=torch.ones(1, 1, 2))
        >>> add(use, use).dense()
        tensor([[2., 2.]])
        >>> type(add(use, use)).__name__
        'Outer'
    """
    if isinstance(first, Outer) and isinstance(second, Outer):
        return Outer(torch.cat([first.left, second.left], 1), torch.cat([first.right, second.right], 1))
    if isinstance(first, Dense) and isinstance(second, Dense):
        return Dense(first.values + second.values)
    return Sum([*(first.parts if isinstance(first, Sum) else [first]), second])


def merged(form: Form, n: int) -> Form:
    """The form of ``n`` samples whose tokens were captured as items of their own, batch first.

    Example:
        >>> merged(Dense(torch.tensor([[1.0], [2.0], [3.0], [4.0]])), n=2).dense()
        tensor([[3.],
                [7.]])
    """
    if isinstance(form, Dense):
        return Dense(form.values.unflatten(0, (n, -1)).sum(1))
    if isinstance(form, Outer):
        left, right = (x.unflatten(0, (n, -1)).flatten(1, 2) for x in (form.left, form.right))
        return Outer(left, right)
    if isinstance(form, SparseRows):
        rows, values = form.rows.unflatten(0, (n, -1)), form.values.unflatten(0, (n, -1))
        return SparseRows(rows.flatten(1), values.flatten(1, 2), form.n_rows)
    raise TypeError(f"{type(form).__name__} is not what a rule returns")


# -- as named tensors ----------------------------------------------------------------------------------

_FIELDS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "dense": (Dense, ("values",)),
    "outer": (Outer, ("left", "right")),
    "rows": (SparseRows, ("rows", "values")),
}
_OF_PARTS = ("sum", "stack")


@dataclass(frozen=True)
class Layout:
    """How a form is made of named tensors.

    Attributes:
        form: ``"dense"``, ``"outer"``, ``"rows"``, or ``"sum"`` or ``"stack"`` of parts.
        parts: of a sum or a stack.
        n_rows: of all rows, where only some of them are there.
    """

    form: str
    parts: tuple[Layout, ...] = ()
    n_rows: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written into a log."""
        if self.form in _OF_PARTS:
            return {"form": self.form, "parts": [part.to_json() for part in self.parts]}
        return {"form": self.form} if self.n_rows is None else {"form": self.form, "n_rows": self.n_rows}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Layout:
        """The inverse of `to_json`; an entry that is none raises one of `log.shard.UNDECODABLE`."""
        form = entry["form"]
        parts = entry["parts"] if form in _OF_PARTS else ()
        return cls(form, tuple(map(cls.from_json, parts)), int(entry["n_rows"]) if form == "rows" else None)


def pack(shares: Shares) -> tuple[dict[str, Tensor], Layout]:
    """The tensors from which `unpack` makes the same form, and how.

    Example:
        >>> tensors, layout = pack(Sum([Dense(torch.ones(1, 1)), Dense(torch.zeros(1, 1))]))
        >>> layout.to_json()
        {'form': 'sum', 'parts': [{'form': 'dense'}, {'form': 'dense'}]}
        >>> list(tensors)
        ['0/values', '1/values']
        >>> unpack(layout, tensors.__getitem__).dense()
        tensor([[1.]])
    """
    if isinstance(shares, (Sum, Stack)):
        parts = [pack(part) for part in shares.parts]
        tensors = {f"{i}/{key}": t for i, (part, _) in enumerate(parts) for key, t in part.items()}
        return tensors, Layout(type(shares).__name__.lower(), tuple(layout for _, layout in parts))
    for form, (kind, fields) in _FIELDS.items():
        if isinstance(shares, kind):
            n_rows = shares.n_rows if isinstance(shares, SparseRows) else None
            return {field: getattr(shares, field) for field in fields}, Layout(form, n_rows=n_rows)
    raise TypeError(f"{type(shares).__name__} is not a form of per-sample gradients")


def unpack(layout: Layout, load: Callable[[str], Tensor]) -> Form:
    """The inverse of `pack`; ``load`` gives a tensor by its name."""
    if layout.form in _OF_PARTS:
        parts = [unpack(part, lambda key, i=i: load(f"{i}/{key}")) for i, part in enumerate(layout.parts)]  # type: ignore[misc]
        return Sum(parts) if layout.form == "sum" else Stack(parts)
    kind, fields = _FIELDS[layout.form]
    extra = {} if layout.n_rows is None else {"n_rows": layout.n_rows}
    result: Form = kind(*(load(field) for field in fields), **extra)
    return result


def nbytes(shares: Shares) -> int:
    """Memory that a form takes.

    Example:
        >>> nbytes(Dense(torch.zeros(2, 5)))
        40
    """
    return sum(t.numel() * t.element_size() for t in pack(shares)[0].values())
