"""A trajectory whose large parameters are cut into pieces, so that what is computed of one at a time stays small.

The algebra of an optimizer's step is elementwise, so a range of a parameter's coordinates goes through it as a parameter does.
Nothing is copied: a piece is a view, but for the products with a curvature, which are made of whole parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.core.shares import Dense, Outer, SparseRows, Stack, Sum
from lightning_influence.core.trajectory import Shares, StepRecord, Trajectory, Vectors, extrapolation

_COORDINATES = 2**17
"""Of a piece: what a processor's cache holds while a step is computed, and few enough pieces for a model of billions."""


@dataclass(frozen=True)
class Piece:
    """A range of the coordinates of a parameter."""

    parameter: str
    coordinates: slice


class Pieces:
    """A trajectory of pieces, each a parameter of its own.

    Args:
        trajectory: of whole parameters.
        size: the most coordinates of a piece; as many as a processor's cache holds by default.
    """

    def __init__(self, trajectory: Trajectory, size: int | None = None) -> None:
        size = size or _COORDINATES
        self._whole, self.optimizer = trajectory, trajectory.optimizer
        self.pieces: dict[str, list[str]] = {}
        self._of: dict[str, Piece] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        for name, (kept, total) in trajectory.sizes.items():
            starts = range(0, kept, size) if kept > size else [0]
            self.pieces[name] = [name if kept <= size else f"{name}[{start}:]" for start in starts]
            for piece, start in zip(self.pieces[name], starts, strict=True):
                stop = min(start + size, kept)
                self._of[piece] = Piece(name, slice(start, stop))
                self.sizes[piece] = (stop - start, round(total * (stop - start) / max(kept, 1)))

    @property
    def starts(self) -> Sequence[int]:
        return self._whole.starts

    def __len__(self) -> int:
        return len(self._whole)

    def cut(self, vectors: Mapping[str, Tensor]) -> Vectors:
        """Pieces ``(..., d')`` of vectors ``(..., d)`` of whole parameters."""
        return {p: v[..., self._of[p].coordinates] for k, v in vectors.items() for p in self.pieces.get(k, ())}

    def joined(self, vectors: Mapping[str, Tensor]) -> Vectors:
        """Vectors of whole parameters from those of all their pieces."""
        whole: dict[str, list[Tensor]] = {}
        for piece, vector in vectors.items():
            whole.setdefault(self._of[piece].parameter, []).append(vector)
        return {k: parts[0] if len(parts) == 1 else torch.cat(parts, -1) for k, parts in whole.items()}

    def record(self, index: int) -> StepRecord:
        whole = self._whole.record(index)
        return replace(
            whole,
            gradients=self.cut(whole.gradients),
            moments={
                p: tuple(m[self._of[p].coordinates] for m in moments)
                for k, moments in whole.moments.items()
                for p in self.pieces[k]
            },
            hyper={p: hyper for k, hyper in whole.hyper.items() for p in self.pieces.get(k, ())},
            parameters=None if whole.parameters is None else self.cut(whole.parameters),
        )

    def sample_ids(self, index: int) -> Tensor:
        return self._whole.sample_ids(index)

    def shares(self, index: int) -> Mapping[str, Shares]:
        return _PieceShares(self._whole.shares(index), self.pieces, self._of)

    def select(self, name: str, values: Tensor) -> Tensor:
        piece = self._of[name]
        return self._whole.select(piece.parameter, values)[..., piece.coordinates]

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        return self.cut(self._whole.curvature_product(index, kind, self.joined(vectors)))

    def third_derivative(self, index: int, vectors: Vectors) -> Vectors:
        """As of `second_variation.SmoothTrajectory`, of a trajectory that is one."""
        return self.cut(self._whole.third_derivative(index, self.joined(vectors)))  # type: ignore[attr-defined]


class Part(Pieces):
    """A trajectory of which one range of each parameter's coordinates is looked at, for all of them.

    Args:
        trajectory: of whole parameters.
        ranges: by parameter; one that is missing is looked at as a whole.
    """

    def __init__(self, trajectory: Trajectory, ranges: Mapping[str, slice]) -> None:
        self._whole, self.optimizer = trajectory, trajectory.optimizer
        self.pieces, self._of, self.sizes = {}, {}, {}
        for name, (kept, total) in trajectory.sizes.items():
            coordinates = ranges.get(name, slice(0, kept))
            size = coordinates.stop - coordinates.start
            piece = name if size == kept else f"{name}[{coordinates.start}:{coordinates.stop}]"
            self.pieces[name], self._of[piece] = [piece], Piece(name, coordinates)
            self.sizes[piece] = size, total

    def extrapolated(self, vectors: Mapping[str, Tensor]) -> Vectors:
        """Pieces of vectors, scaled so that an inner product with them stands for one over all coordinates."""
        scales = extrapolation(self.sizes)
        return {piece: vector * scales[piece] for piece, vector in self.cut(vectors).items()}


class _PieceShares(Mapping[str, Shares]):
    """The shares of pieces, each made when it is asked for."""

    def __init__(
        self, whole: Mapping[str, Shares], pieces: Mapping[str, Sequence[str]], of: Mapping[str, Piece]
    ) -> None:
        self._whole, self._pieces, self._of = whole, pieces, of

    def __getitem__(self, name: str) -> Shares:
        piece = self._of[name]
        share = self._whole[piece.parameter]
        return share if name == piece.parameter else within(share, piece.coordinates.start, piece.coordinates.stop)

    def __iter__(self) -> Iterator[str]:
        return (piece for name in self._whole for piece in self._pieces[name])

    def __len__(self) -> int:
        return sum(len(self._pieces[name]) for name in self._whole)


def within(shares: Shares, start: int, stop: int) -> Shares:
    """Shares of the coordinates from ``start`` to ``stop``.

    Example:
        >>> shares = Outer(left=torch.tensor([[[1.0, 2.0, 3.0]]]), right=torch.tensor([[[1.0, 10.0]]]))
        >>> shares.dense()
        tensor([[ 1., 10.,  2., 20.,  3., 30.]])
        >>> within(shares, 1, 4).dense()
        tensor([[10.,  2., 20.]])
    """
    if isinstance(shares, Dense):
        return Dense(shares.values[:, start:stop])
    if isinstance(shares, Sum | Stack):
        return type(shares)([within(part, start, stop) for part in shares.parts])  # type: ignore[misc]
    if not isinstance(shares, Outer | SparseRows):
        return Dense(shares.dense()[:, start:stop])
    columns = (shares.right if isinstance(shares, Outer) else shares.values).shape[2]
    first, last = start // columns, -(-stop // columns)
    rows = _of_rows(shares, first, last)
    inside = slice(start - first * columns, stop - first * columns)
    return rows if (last - first) * columns == stop - start else _Range(rows, inside)


def _of_rows(shares: Outer | SparseRows, first: int, last: int) -> Outer | SparseRows:
    """Shares of some rows of a matrix."""
    if isinstance(shares, Outer):
        return Outer(shares.left[..., first:last], shares.right)
    inside = (shares.rows >= first) & (shares.rows < last)
    used = inside.any(0)
    rows, values, inside = shares.rows[:, used], shares.values[:, used], inside[:, used]
    return SparseRows((rows - first).clamp(0, last - first - 1), values * inside[..., None], last - first)


@dataclass(frozen=True)
class _Range:
    """Consecutive coordinates of shares, where they are no whole rows."""

    whole: Outer | SparseRows
    coordinates: slice

    @property
    def n_samples(self) -> int:
        return self.whole.n_samples

    @property
    def n_coordinates(self) -> int:
        return int(self.coordinates.stop - self.coordinates.start)

    def inner(self, vectors: Tensor) -> Tensor:
        before, after = self.coordinates.start, self.whole.n_coordinates - self.coordinates.stop
        return self.whole.inner(torch.nn.functional.pad(vectors, (before, after)))

    def combine(self, weights: Tensor) -> Tensor:
        return self.whole.combine(weights)[:, self.coordinates]

    def dense(self, samples: slice = slice(None)) -> Tensor:
        return self.whole.dense(samples)[:, self.coordinates]
