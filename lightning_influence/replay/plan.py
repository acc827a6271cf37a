"""What a run consumed at each step, and its state at some of them: all that a replay needs besides the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_influence.core.optimizers import Moments
from lightning_influence.core.trajectory import Clip, Hyper
from lightning_influence.run.moment import Moment


@dataclass(frozen=True)
class State:
    """A module and its optimizer before a step: trained parameters, their moments, and buffers, in their shapes."""

    parameters: dict[str, Tensor]
    moments: dict[str, Moments]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class PlannedMicroBatch:
    """One forward and backward pass.

    Attributes:
        moment: what the training step reads besides the batch.
        factor: of its loss in the step's loss.
        n_samples: in the batch.
        random: the generators' states before its training step; None to leave them.
        less: gives the batch without some samples, by their ids; None where that is the batch without their rows.
    """

    batch: Any
    moment: Moment
    factor: float
    n_samples: int
    random: Mapping[str, Tensor] | None = None
    less: Callable[[frozenset[int]], Any] | None = None


@dataclass(frozen=True)
class PlannedStep:
    """What one optimizer step consumed; the fields of `StepRecord` that do not follow from running it.

    Attributes:
        clip: its ``raw_norm`` is the recorded one, against which the replay is checked; 0 if unknown.
    """

    micro_batches: Sequence[PlannedMicroBatch]
    sample_ids: Tensor
    loss_weights: Tensor
    micro_batch_numbers: Tensor
    hyper: Mapping[str, Hyper]
    clip: Clip
    averaged: bool


class Plan(Protocol):
    """What a run consumed, and its state at some of its steps."""

    optimizer: str

    @property
    def snapshots(self) -> Sequence[int]:
        """Steps before which the state is known, ascending, the first of them 0; the number of steps may be the last."""

    def __len__(self) -> int: ...

    def sample_ids(self, index: int) -> Tensor:
        """Samples ``(n,)`` that a step consumed."""

    def step(self, index: int) -> PlannedStep:
        """What a step consumed."""

    def snapshot(self, index: int) -> State:
        """The state before a step of `snapshots`."""

    def parameters(self, index: int) -> dict[str, Tensor]:
        """Of `snapshot`, the parameters alone."""
