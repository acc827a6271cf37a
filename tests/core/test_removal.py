"""Removal against the weighted mean computed again without the sample, clipping against torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.core.removal import consumed_change, consumed_gradients, gradient_change
from lightning_influence.core.shares import Dense
from lightning_influence.core.trajectory import Clip, StepRecord
from lightning_influence.errors import ConfigurationError

WHOLE = slice(None)
UNCLIPPED = Clip()


@dataclass(frozen=True)
class Batch:
    """A step of micro-batches: who is in them, with which weight, and each row's own gradient."""

    ids: list[int]
    micro: list[int]
    weights: list[float]
    gradients: Tensor
    averaged: bool = True

    def gradient(self, without: int | None = None, *, keep_denominator: bool = False) -> Tensor:
        """The batch gradient, by the definition of a weighted mean: ``sum w g / sum w`` in every micro-batch, and the mean
        of those over the micro-batches; under a sum, ``sum w g``.
        """
        numbers = sorted(set(self.micro))
        total = torch.zeros(self.gradients.shape[1], dtype=torch.float64)
        for number in numbers:
            rows = [i for i, m in enumerate(self.micro) if m == number]
            left = [i for i in rows if self.ids[i] != without]
            counted = rows if keep_denominator or not self.averaged else left
            weight = sum(self.weights[i] for i in counted) if self.averaged else 1.0
            for i in left:
                if weight > 0:
                    total += self.weights[i] * self.gradients[i] / weight / len(numbers)
        return total

    def record(self, clip: Clip = UNCLIPPED) -> StepRecord:
        """What is logged of the step: each row's coefficient in the loss, and the batch gradient."""
        kappa = []
        for m, w in zip(self.micro, self.weights, strict=True):
            of_micro = sum(v for n, v in zip(self.micro, self.weights, strict=True) if n == m)
            kappa.append(w / (of_micro if self.averaged and of_micro > 0 else 1.0) / len(set(self.micro)))
        return StepRecord(
            0,
            torch.tensor(self.ids),
            torch.tensor(kappa, dtype=torch.float64),
            torch.tensor(self.micro),
            {"a": self.gradient()},
            {},
            {},
            averaged=self.averaged,
            clip=clip,
        )

    def shares(self) -> Dense:
        return Dense(self.record().loss_weights[:, None] * self.gradients)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Samples several times in a step, in several micro-batches, alone in one, ignored, and all at once."""
    n = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return Batch(
        draw(st.lists(st.sampled_from([30, 4, 11, 7]), min_size=n, max_size=n)),
        draw(st.lists(st.sampled_from([5, 0, 2]), min_size=n, max_size=n)),
        draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=n, max_size=n)),
        torch.randn(n, 4, generator=generator, dtype=torch.float64),
        draw(st.booleans()),
    )


def chunks(n: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, n, size)]


@settings(max_examples=200, deadline=None)
@given(batch=batches(), counterfactual=st.sampled_from(["drop", "zero"]), size=st.integers(1, 8))
def test_removal_is_the_mean_without_the_sample(batch: Batch, counterfactual: str, size: int) -> None:
    record, shares = batch.record(), batch.shares()
    removed = gradient_change(record, counterfactual)  # type: ignore[arg-type]
    assert removed.sample_ids.tolist() == list(dict.fromkeys(batch.ids)), "each once, in the order of the step"
    whole = batch.gradient()
    reference = torch.stack(
        [batch.gradient(z, keep_denominator=counterfactual == "zero") - whole for z in removed.sample_ids.tolist()]
    )
    totals = removed.totals(shares, whole)
    torch.testing.assert_close(totals.sum(0), whole)
    changes = torch.cat([removed.change(shares, samples, totals) for samples in chunks(len(removed), size)])
    torch.testing.assert_close(changes, reference)
    vectors = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(removed.inner(shares.inner(vectors)), vectors @ reference.T)


@settings(max_examples=30, deadline=None)
@given(batch=batches(), counterfactual=st.sampled_from(["drop", "zero"]))
def test_measured_changes_are_taken_as_they_are(batch: Batch, counterfactual: str) -> None:
    """Whatever they are: nothing is averaged, and the rows of a sample belong together."""
    record = replace(batch.record(), measured=True)
    measured = Dense(batch.gradients)
    removed = gradient_change(record, counterfactual)  # type: ignore[arg-type]
    changes = removed.change(measured, WHOLE, removed.totals(measured, batch.gradients))
    for z, change in zip(removed.sample_ids.tolist(), changes, strict=True):
        rows = [i for i, own in enumerate(batch.ids) if own == z]
        torch.testing.assert_close(change, batch.gradients[rows].sum(0))


def test_changes_come_in_the_precision_of_the_totals() -> None:
    batch = Batch([1, 2, 2], [0, 0, 1], [1.0, 2.0, 1.0], torch.randn(3, 4, dtype=torch.float64))
    removed, shares = gradient_change(batch.record(), "drop"), batch.shares()
    single = removed.totals(shares, torch.zeros(4))
    assert single.dtype == removed.change(shares, WHOLE, single).dtype == torch.float32
    double = removed.totals(shares, torch.zeros(4, dtype=torch.float64))
    assert double.dtype == removed.change(shares, WHOLE, double).dtype == torch.float64


def test_unknown_counterfactuals_are_refused() -> None:
    batch = Batch([1, 2], [0, 0], [1.0, 1.0], torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(ConfigurationError, match="'halve'; choose one of drop, zero"):
        gradient_change(batch.record(), "halve")  # type: ignore[arg-type]


def clipped_by_torch(clip: Clip, gradients: Sequence[Tensor]) -> list[Tensor]:
    """What torch's own clipping leaves of gradients."""
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    if clip.rule == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, clip.bound)
    elif clip.rule == "value":
        torch.nn.utils.clip_grad_value_(parameters, clip.bound)
    return [p.grad for p in parameters]  # type: ignore[misc]


CLIPS = {
    "none": UNCLIPPED,
    "norm": Clip("norm", 0.7),
    "norm that some removals pass": Clip("norm", 1.2),
    "norm that nothing reaches": Clip("norm", 100.0),
    "value": Clip("value", 0.2),
}


@pytest.mark.parametrize("rule", CLIPS)
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_consumed_change_is_torch_s_clipping_without_the_sample(rule: str, repeats: int, size: int) -> None:
    """Under a mask too. Parameter ``a`` repeats its kept coordinates, so that what a mask over it does not see is exactly
    what it extrapolates, and clipping the whole gradient is known.
    """
    n, kept, other = 6, 4, 3
    own = {"a": 2 * torch.randn(n, kept, dtype=torch.float64), "b": torch.randn(n, other, dtype=torch.float64)}
    batches = {k: Batch([1, 2, 3, 4, 2, 5], [0, 0, 0, 1, 1, 1], [1.0] * n, g) for k, g in own.items()}

    def whole(without: int | None = None) -> list[Tensor]:
        parts = {k: batch.gradient(without) for k, batch in batches.items()}
        return clipped_by_torch(CLIPS[rule], [parts["a"].repeat(repeats), parts["b"]])

    norm = float(torch.cat([batches["a"].gradient().repeat(repeats), batches["b"].gradient()]).norm())
    record = replace(
        batches["a"].record(replace(CLIPS[rule], raw_norm=norm)),
        gradients={k: batch.gradient() for k, batch in batches.items()},
    )
    shares = {k: batch.shares() for k, batch in batches.items()}
    removed = gradient_change(record, "drop")
    scales = {"a": float(repeats), "b": 1.0}
    change = consumed_change(removed, record, shares, scales, dict.fromkeys(shares, chunks(len(removed), size)))
    before = whole()
    for k, recorded in consumed_gradients(record).items():
        torch.testing.assert_close(recorded, before["ab".index(k)][: len(recorded)])
    for k, share in shares.items():
        totals = removed.totals(share, record.gradients[k])
        mine = torch.cat(
            [change.change(record.gradients[k], share, samples, totals) for samples in chunks(len(removed), size)]
        )
        for row, z in zip(mine, removed.sample_ids.tolist(), strict=True):
            after = whole(z)["ab".index(k)]
            torch.testing.assert_close(row, (after - before["ab".index(k)])[: len(row)])
