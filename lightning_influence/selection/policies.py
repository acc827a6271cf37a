"""Which samples to keep, given their scores: policies, and the record of what they decided."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_influence.errors import ConfigurationError, InfluenceError, check_choice

Policy: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(scores (n,), sample_ids (n,), batches (n,)) -> weights (n,)`` in [0, 1]; 0 removes a sample."""

Keep: TypeAlias = "float | Literal['positive'] | Policy"


@dataclass(frozen=True)
class Fraction:
    """Keep the best fraction of every batch, or of the whole round.

    Example:
        >>> scores, batches = torch.tensor([3.0, 2.0, 1.0, -1.0]), torch.tensor([0, 0, 1, 1])
        >>> Fraction(0.5)(scores, torch.arange(4), batches)
        tensor([1., 0., 1., 0.])
        >>> Fraction(0.5, per="round")(scores, torch.arange(4), batches)
        tensor([1., 1., 0., 0.])
    """

    fraction: float
    per: Literal["batch", "round"] = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigurationError(f"keep={self.fraction}; a fraction lies above 0 and is at most 1.")
        check_choice("per", self.per, ("batch", "round"))

    def __call__(self, scores: Tensor, sample_ids: Tensor, batches: Tensor) -> Tensor:
        groups = batches if self.per == "batch" else torch.zeros_like(batches)
        weights = torch.zeros_like(scores)
        for group in groups.unique():
            members = (groups == group).nonzero()[:, 0]
            best = scores[members].argsort(descending=True, stable=True)
            weights[members[best[: round(self.fraction * len(members))]]] = 1.0
        return weights


@dataclass(frozen=True)
class Threshold:
    """Keep what scores above a threshold; 0 keeps what helps.

    Example:
        >>> Threshold()(torch.tensor([3.0, 0.0, -1.0]), torch.arange(3), torch.zeros(3))
        tensor([1., 0., 0.])
    """

    above: float = 0.0

    def __call__(self, scores: Tensor, sample_ids: Tensor, batches: Tensor) -> Tensor:
        return (scores > self.above).to(scores)


@dataclass(frozen=True)
class Soft:
    """Weigh every sample by its score: ``sigmoid(score / (temperature * standard deviation of the batch))``.

    Example:
        >>> Soft()(torch.tensor([2.0, -2.0]), torch.arange(2), torch.zeros(2))
        tensor([0.7311, 0.2689])
        >>> Soft(temperature=0.1)(torch.tensor([2.0, -2.0]), torch.arange(2), torch.zeros(2))
        tensor([9.9995e-01, 4.5398e-05])
    """

    temperature: float = 1.0

    def __call__(self, scores: Tensor, sample_ids: Tensor, batches: Tensor) -> Tensor:
        weights = torch.zeros_like(scores)
        for batch in batches.unique():
            members = batches == batch
            spread = scores[members].std(correction=0).clamp(min=torch.finfo(scores.dtype).tiny)
            weights[members] = torch.sigmoid(scores[members] / (self.temperature * spread))
        return weights


def policy_of(keep: Keep) -> Policy:
    """The policy that the ``keep`` argument of a datamodule stands for.

    Raises:
        ConfigurationError: it stands for none.
    """
    if callable(keep):
        return keep
    if keep == "positive":
        return Threshold(0.0)
    if isinstance(keep, (int, float)) and not isinstance(keep, bool):
        return Fraction(float(keep))
    raise ConfigurationError(
        f"keep={keep!r}; give a fraction, 'positive', or a policy (scores, sample_ids, batches) -> weights."
    )


def decide(policy: Policy, scores: Tensor, sample_ids: Tensor, batches: Tensor, floor: float) -> Tensor:
    """Weights of a policy ``(n,)``, with at least a fraction ``floor`` of every batch kept.

    Raises:
        ConfigurationError: the policy returned something else than weights.
        InfluenceError: a score is NaN, so that samples cannot be ranked.
    """
    if scores.isnan().any():
        raise InfluenceError(
            f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN, the first that of sample "
            f"{int(sample_ids[scores.isnan()][0])}; what is kept would be chosen at random."
        )
    weights = policy(scores, sample_ids, batches)
    if not isinstance(weights, Tensor) or weights.shape != scores.shape or not ((weights >= 0) & (weights <= 1)).all():
        raise ConfigurationError(
            f"the keep policy returned {weights!r:.80}; it has to return a tensor of {len(scores)} weights in [0, 1]."
        )
    weights = weights.to(scores).clone()
    for batch in batches.unique():
        members = (batches == batch).nonzero()[:, 0]
        least = max(1, round(floor * len(members)))
        if int((weights[members] > 0).sum()) < least:
            warnings.warn(
                f"a batch of {len(members)} samples would have kept fewer than {least} of them; the best {least} stay "
                f"(floor={floor}). Nearly everything scores badly: do the queries stand for what the model is meant for?",
                stacklevel=2,
            )
            best = scores[members].argsort(descending=True, stable=True)[:least]
            weights[members[best]] = weights[members[best]].clamp(min=1.0)
    return weights


def stepwise(keep: Policy, rescore: int) -> Sequence[Policy]:
    """The same policy in ``rescore`` portions, each to be applied to scores of what the last one left."""
    if rescore < 1:
        raise ConfigurationError(f"rescore={rescore}; it counts portions and is at least 1.")
    if rescore == 1:
        return [keep]
    if not isinstance(keep, Fraction):
        raise ConfigurationError(f"rescore={rescore} divides a fraction into portions; give keep as a fraction.")
    dropped = 1 - keep.fraction
    left = [1 - dropped * i / rescore for i in range(rescore + 1)]
    return [Fraction(after / before, keep.per) for before, after in pairwise(left)]
