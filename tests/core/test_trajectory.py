"""What a trajectory says of its steps."""

from __future__ import annotations

import torch
from toy import ACCUMULATED, RUNS, ToyTrajectory

from lightning_influence.core.trajectory import Trajectory, as_rows, extrapolation


def test_rows_are_the_schedule() -> None:
    run = ToyTrajectory(RUNS["adamw, accumulated"])
    assert isinstance(run, Trajectory)
    samples, steps = as_rows(run.records)
    expected = [(z, t) for t, parts in enumerate(ACCUMULATED) for micro in parts for z in micro]
    assert list(zip(samples, steps, strict=True)) == expected


def test_a_mask_extrapolates_sums_without_bias() -> None:
    """Over all masks of a size, the extrapolated sum of squares is the whole sum on average."""
    values = torch.randn(6, dtype=torch.float64).square()
    masks = torch.combinations(torch.arange(6), 2)
    scale = extrapolation({"a": (2, 6)})["a"]
    torch.testing.assert_close(scale * values[masks].sum(1).mean(), values.sum())
    assert extrapolation({"kept whole": (4, 4), "not kept": (0, 3)}) == {"kept whole": 1.0, "not kept": 3.0}
