"""A training run, step by step, as the backward sweep sees it.

`Trajectory` is the one seam of the package: a run read back from its log and a run replayed from
its snapshots both implement it, and the sweep, the look-ahead and the error proxy are written once
against it.

Shapes: ``n`` samples in a step, ``q`` queries, ``d`` kept coordinates of a parameter (all of them
unless a mask compressed it). Every per-parameter tensor is flat: ``(d,)``, ``(q, d)`` or ``(n, d)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Hyper: TypeAlias = Mapping[str, float]
"""Hyperparameters of one parameter's group at one step, plus ``step``, the 1-based step count."""

Vectors: TypeAlias = dict[str, Tensor]
"""One tensor per parameter name."""


@dataclass(frozen=True)
class Clip:
    """Gradient clipping of one step (docs/method.md, "What a removal changes").

    Attributes:
        rule: ``"none"``, ``"norm"`` (global norm) or ``"value"`` (elementwise clamp).
        bound: the largest norm or absolute value let through.
        raw_norm: norm of the whole gradient before clipping, over every trained coordinate,
            kept or not.
    """

    rule: Literal["none", "norm", "value"] = "none"
    bound: float = 0.0
    raw_norm: float = 0.0


@dataclass(frozen=True)
class StepRecord:
    """What is known of one optimizer step, per-sample gradients apart.

    Attributes:
        index: position in the trajectory, from 0.
        sample_ids: ``(n,)`` int64, indices into the training dataset; a sample drawn twice has two rows.
        loss_weights: ``(n,)`` float64, the coefficient of each sample's own loss in the loss that was
            differentiated: ``1/n`` under a mean, ``w_z/w`` under a token mean, divided by the number
            of accumulated micro-batches and of ranks.
        micro_batch_numbers: ``(n,)`` int64, samples averaged together share a number.
        averaged: whether the loss is a mean over its samples (otherwise a sum).
        measured: whether the shares are the changes of the batch gradient by the removal of each sample (``drop``),
            found by evaluating the step without it, rather than additive parts of the gradient.
        gradients: ``(d,)`` each, the batch gradient before clipping; a parameter that had none, and was
            skipped by the optimizer, is absent here, in ``moments``, ``hyper`` and the shares.
        moments: ``(d,)`` each, the optimizer's moments before the step, in the order of
            `optimizers.Update.moments`; zeros before the first step.
        hyper: per parameter.
        clip: gradient clipping.
        parameters: ``(d,)`` each, before the step; None where the optimizer's step does not depend
            on them (only coupled weight decay does).
    """

    index: int
    sample_ids: Tensor
    loss_weights: Tensor
    micro_batch_numbers: Tensor
    gradients: Vectors
    moments: dict[str, tuple[Tensor, ...]]
    hyper: Mapping[str, Hyper]
    averaged: bool = True
    measured: bool = False
    clip: Clip = field(default_factory=Clip)
    parameters: Vectors | None = None


class Shares(Protocol):
    """Per-sample gradient shares of one parameter in one step, in whatever form they are kept.

    Row ``z`` is sample ``z``'s additive share of the batch gradient as trained (docs/method.md, "What a removal changes").
    """

    @property
    def n_samples(self) -> int: ...

    @property
    def n_coordinates(self) -> int: ...

    def inner(self, vectors: Tensor) -> Tensor:
        """Inner products ``(q, n)`` of ``vectors`` ``(q, d)`` with every share."""

    def combine(self, weights: Tensor) -> Tensor:
        """Weighted sums ``(q, d)`` of the shares for ``weights`` ``(q, n)``."""

    def dense(self, samples: slice = slice(None)) -> Tensor:
        """The shares themselves, ``(n', d)``."""


@runtime_checkable
class Trajectory(Protocol):
    """A run of ``len(trajectory)`` optimizer steps that can be walked in any order."""

    optimizer: str
    """Name of the update rule, a key of `optimizers.UPDATES`."""

    sizes: dict[str, tuple[int, int]]
    """``{parameter: (kept coordinates d, all coordinates)}``, in the order of the module."""

    @property
    def starts(self) -> Sequence[int]:
        """Steps, ascending from 0, that can be walked from to the next of them without going back."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> StepRecord:
        """The step's record. Raises IndexError outside ``range(len(self))``."""

    def sample_ids(self, index: int) -> Tensor:
        """Samples ``(n,)`` int64 that a step consumed, without its record."""

    def shares(self, index: int) -> Mapping[str, Shares]:
        """Per-sample shares of the step by parameter; may load each on access."""

    def select(self, name: str, values: Tensor) -> Tensor:
        """Kept coordinates ``(..., d)`` of ``values`` ``(..., *shape)`` of a parameter."""

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        """Exact Hessian (``"hessian"``) or Gauss-Newton (``"gauss_newton"``) of the step's batch loss
        times ``vectors`` ``(q, d)``. Raises `errors.CurvatureUnavailable` where the trajectory cannot.
        """


def extrapolation(sizes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """All coordinates over kept ones, by parameter: the factor that extrapolates an inner product over a mask.

    Example:
        >>> extrapolation({"weight": (100, 400), "bias": (10, 10)})
        {'weight': 4.0, 'bias': 1.0}
    """
    return {k: total / max(kept, 1) for k, (kept, total) in sizes.items()}


def as_rows(records: Sequence[StepRecord]) -> tuple[list[int], list[int]]:
    """``(sample_id, step)`` of every row of a trajectory, in order of step."""
    pairs = [(int(z), r.index) for r in records for z in r.sample_ids]
    return [z for z, _ in pairs], [t for _, t in pairs]
