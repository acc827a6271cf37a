"""Whether the removals of a replay follow from shares, which are verified, or are measured by evaluating steps again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_influence.capture.sums import block_sums, first_disagreement
from lightning_influence.core.shares import CoordinateBlock, Form
from lightning_influence.core.trajectory import Vectors

_TOLERANCE = 1e-3  # relative to the change that a removal makes
_TOLERANCE_HALF = 5e-2  # of gradients in half precision
_NOISE = 1e-6  # relative to the gradient: what single precision leaves of a difference


@dataclass
class RemovalCheck:
    """How the changes of the gradient by removals are found.

    Attributes:
        reason: why they are measured; None where shares give them.
        unverifiable: why shares could not be verified.
        verified: samples whose removal was compared with an evaluation without them.
        largest_error: relative, among those.
        without_gradient: removals, by step, batch and number, that leave some parameter without a gradient, whose step an optimizer skips.
        not_summed: the parameter whose shares do not sum to its gradient.
        few: samples of the first step that are verified; of later ones it is one.
    """

    reason: str | None = None
    unverifiable: str | None = None
    verified: int = 0
    largest_error: float = 0.0
    not_summed: str | None = None
    few: int = 3
    without_gradient: set[tuple[int | float, ...]] = field(default_factory=set)
    _parts: set[tuple[int, ...]] = field(default_factory=set)

    def is_due(self, *part: int) -> bool:
        """Whether a part of the run has yet to be verified."""
        return part not in self._parts

    def passed(self, *part: int) -> None:
        """A part of the run is taken to be verified."""
        self._parts.add(part)

    def choose(self, n: int) -> list[int]:
        """Which of ``n`` samples are to be verified next: the first, the last and those between, later in turn."""
        if self.verified:
            return [self.verified % n]
        return sorted({round(i * (n - 1) / (self.few - 1)) for i in range(self.few)})

    @property
    def measuring(self) -> bool:
        """Whether every removal is measured."""
        return self.reason is not None

    def measure(self, reason: str) -> None:
        """From now on, measure."""
        self.reason = self.reason or reason

    def compare(self, predicted: Vectors, measured: Vectors, gradients: Vectors, *, autocast: bool = False) -> None:
        """Compare the change that shares give for one sample with the measured one; measure from now on if they differ.

        Args:
            autocast: whether the step was evaluated in half precision.
        """
        # one parameter after another, so that no difference of all of them is held
        misses = {k: _norm({k: predicted[k].double() - measured[k].double()}) for k in measured}
        missed, size, whole = math.hypot(*misses.values()), _norm(measured), _norm(gradients)
        half = autocast or any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients.values())
        error = missed / max(size, 1e-30)
        if missed > (_TOLERANCE_HALF if half else _TOLERANCE) * size + _NOISE * whole:
            most = max(misses, key=misses.__getitem__)
            self.measure(
                f"the per-sample gradients miss the effect of a removal by {error:.2g} of its size (most at {most})"
            )
            return
        self.verified += 1
        self.largest_error = max(self.largest_error, missed / max(size, _NOISE * whole, 1e-30))

    def to_metadata(self) -> dict[str, Any]:
        """As a report keeps it."""
        skipped = {"skipped": len(self.without_gradient)} if self.without_gradient else {}
        return {
            "by": "rerun" if self.measuring else "shares",
            "reason": self.reason or self.unverifiable,
            "verified": self.verified,
            "largest_error": self.largest_error,
        } | skipped


def not_the_sum(shares: Mapping[str, Form], gradients: Vectors) -> str | None:
    """The first parameter of whose gradient the shares are not additive parts, seen on a small block of coordinates."""
    blocks = {k: CoordinateBlock.of(gradients[k]) for k in shares}
    expected = {k: block.select(gradients[k]) for k, block in blocks.items()}
    disagreement = first_disagreement(blocks, block_sums(blocks, shares), expected, _norm(gradients))
    return None if disagreement is None else disagreement.parameter


def _norm(tensors: Vectors) -> float:
    return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors.values()]).norm())
