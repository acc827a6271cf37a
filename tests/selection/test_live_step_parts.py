"""Scores on a part of the coordinates: right on average over the parts, and of every coordinate in turn."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.core.shares import Dense, Outer
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.core.trajectory import StepRecord
from lightning_influence.run.ranks import Ranks
from lightning_influence.selection.live_step import LiveStep

ROWS, COLUMNS, N, TOKENS = 128, 160, 5, 3
FIRST_ORDER = Method(curvature="none", response="tangent")


def live_step() -> tuple[LiveStep, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    forms = {"weight": Outer(normal(N, TOKENS, ROWS), normal(N, TOKENS, COLUMNS)), "bias": Dense(normal(N, ROWS))}
    shapes = {"weight": torch.Size([ROWS, COLUMNS]), "bias": torch.Size([ROWS])}
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    hyper |= {"decoupled": 1.0, "maximize": 0.0, "step": 7.0}
    sizes = {k: shape.numel() for k, shape in shapes.items()}
    record = StepRecord(
        0,
        torch.arange(N),
        torch.full((N,), 1 / N, dtype=torch.float64),
        torch.zeros(N, dtype=torch.int64),
        {k: form.dense().sum(0) for k, form in forms.items()},
        {k: (normal(d), normal(d).square()) for k, d in sizes.items()},
        dict.fromkeys(shapes, hyper),
    )
    step = LiveStep("adam", {k: (d, d) for k, d in sizes.items()}, shapes, record, forms, torch.ones(N), Ranks())
    return step, {k: normal(1, d) for k, d in sizes.items()}


@pytest.mark.parametrize("taken", [0, 2])
def test_the_scores_of_all_parts_have_those_of_the_whole_as_their_mean(taken: int) -> None:
    step, target = live_step()
    weights = torch.ones(N)
    weights[:taken] = 0.0
    step = step.weighted(weights)
    whole = sweep(step, target, FIRST_ORDER, progress=False).scores
    of_parts = []
    for number in range(4):
        part = step.part(0.25, number)
        assert sum(n for n, _ in part.sizes.values()) == ROWS * COLUMNS // 4 + ROWS
        of_parts.append(sweep(part, part.extrapolated(target), FIRST_ORDER, progress=False).scores)
    # the bias is small and looked at as a whole
    torch.testing.assert_close(torch.stack(of_parts).mean(0), whole)
    assert not torch.allclose(of_parts[0], whole, rtol=1e-2)
    everything = step.part(1.0, 3)
    torch.testing.assert_close(sweep(everything, everything.extrapolated(target), FIRST_ORDER).scores, whole)
