"""The selector: what a selection is asked for, how its scores come about, and what it decided.

The loader that selects in rounds and the callback that selects inside the step share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import lightning as L
import torch
from torch import Tensor

from lightning_influence.capture.step import StepOptions
from lightning_influence.core.sweep import Method
from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.removals import RemovalCheck
from lightning_influence.report.provenance import RemovalSummary
from lightning_influence.selection.decisions import SelectionReport
from lightning_influence.selection.lookahead import Candidates, look_ahead
from lightning_influence.selection.policies import Policy, Soft, decide


@dataclass(frozen=True)
class Settings:
    """What a selection is asked for; the attributes are arguments of `SelectionDataModule`.

    Attributes:
        portions: the policies by which it removes, one after the other.
        method: the estimator of the scores.
        options: how the loss of a step is made of its samples.

    Raises:
        ConfigurationError: choices that do not go together.
    """

    portions: Sequence[Policy]
    method: Method
    horizon: int = 0
    every: int | Literal["epoch"] = "epoch"
    rebatch: bool = False
    floor: float = 0.1
    options: StepOptions = field(default_factory=StepOptions)
    coordinates: float = 1.0

    def __post_init__(self) -> None:
        if self.horizon < 0:
            raise ConfigurationError(f"horizon={self.horizon}; it counts optimizer steps and is at least 0.")
        if self.every != "epoch" and (isinstance(self.every, str) or self.every < 1):
            raise ConfigurationError(f"every={self.every!r}; give 'epoch' or a number of optimizer steps from 1.")
        if not 0 < self.coordinates <= 1:
            raise ConfigurationError(f"coordinates={self.coordinates}; it is a fraction above 0 and at most 1.")
        if not 0 <= self.floor <= 1:
            raise ConfigurationError(f"floor={self.floor}; it is a fraction of a batch, from 0 to 1.")
        if self.every_step and self.rebatch:
            raise ConfigurationError("rebatch=True fills batches, but horizon=0, every=1 selects inside the step.")

    @property
    def every_step(self) -> bool:
        """Whether samples can leave the gradient of the step instead of its batch."""
        return self.horizon == 0 and self.every == 1


class Scorer(Protocol):
    """Scores the samples of the steps to come.

    Attributes:
        reads_batches: whether the candidates have to hold their batches.
    """

    reads_batches: bool

    def __call__(self, trainer: L.Trainer, candidates: Sequence[Sequence[Candidates]], scored: int) -> list[Tensor]:
        """Scores ``(n,)`` of each of the first ``scored`` steps, a step being a list of micro-batches."""


class LookAhead:
    """Scores by rolling the run out (`lookahead.look_ahead`).

    Args:
        queries: gives the queries, as `look_ahead` takes them.
        settings: of the selection.

    Attributes:
        removals: what the first roll-out found out of the run's removals; later ones go on with it.
    """

    reads_batches = True

    def __init__(self, queries: Callable[[], Any], settings: Settings) -> None:
        self.queries, self.settings = queries, settings
        self.forget()

    def forget(self) -> None:
        """Nothing is known of the run's removals any more."""
        self.removals = RemovalCheck(unverifiable=None if self.settings.options.verify else "verify=False")

    def __call__(self, trainer: L.Trainer, candidates: Sequence[Sequence[Candidates]], scored: int) -> list[Tensor]:
        s = self.settings
        return look_ahead(
            trainer, candidates, self.queries(), s.horizon, s.method, scored, options=s.options, removals=self.removals
        )


class Known:
    """Scores that are known beforehand, of a report; samples without one are kept.

    Args:
        scores: by sample id.
    """

    reads_batches = False

    def __init__(self, scores: Mapping[int, float]) -> None:
        self.scores = scores

    def __call__(self, trainer: L.Trainer, candidates: Sequence[Sequence[Candidates]], scored: int) -> list[Tensor]:
        ids = [torch.cat([c.sample_ids for c in step]).tolist() for step in candidates[:scored]]
        return [torch.tensor([self.scores.get(z, torch.inf) for z in step]) for step in ids]


class Selector:
    """Decides which samples are kept, and keeps what it decided.

    Args:
        settings: what is asked for.
        scorer: of the rounds; None where samples are scored inside the step.

    Attributes:
        report: what was decided so far.
        removals: what is known of the run's removals, inside the step.

    Raises:
        ConfigurationError: weights between 0 and 1 where only whole samples can leave.
    """

    def __init__(self, settings: Settings, scorer: Scorer | None) -> None:
        if scorer is not None and any(isinstance(policy, Soft) for policy in settings.portions):
            raise ConfigurationError("Soft weighs gradients, which horizon=0, every=1 does; a batch has no weights.")
        self.settings, self.scorer = settings, scorer
        self.report = SelectionReport()
        self.removals: RemovalCheck | None = None

    @property
    def inside_the_step(self) -> bool:
        """Whether samples leave the gradient instead of the batch."""
        return self.scorer is None

    def decide(
        self, policy: Policy, scores: Tensor, sample_ids: Tensor, batches: Tensor, left: Tensor | None = None
    ) -> Tensor:
        """Weights ``(n,)`` of one portion; what is not ``left`` stays away."""
        left = torch.ones(len(scores), dtype=torch.bool) if left is None else left
        weights = torch.zeros(len(scores))
        weights[left] = decide(policy, scores[left].float(), sample_ids[left], batches[left], self.settings.floor)
        return weights

    def note(self, trainer: L.Trainer, sample_ids: Tensor, scores: Tensor, weights: Tensor) -> None:
        """Keep a decision, and log it through the trainer's loggers."""
        self.report.add(trainer.global_step, sample_ids, scores, weights)
        checked = self.removals or getattr(self.scorer, "removals", None)
        self.report.removals = None if checked is None else RemovalSummary.from_json(checked.to_metadata())
        every = trainer.log_every_n_steps if self.inside_the_step else 1  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:  # 0 of a trainer that logs nothing
            means = {
                "selection/kept": float(weights.mean()),
                "selection/score": float(scores[scores.isfinite()].mean()),
            }
            for logger in trainer.loggers:
                logger.log_metrics(means, trainer.global_step)
