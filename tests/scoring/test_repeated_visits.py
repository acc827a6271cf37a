"""A sample that several steps consume: the optimizer answers to its removals together, not to each on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modules import Classifier, digits, fit, loader
from toy import RUNS, Toy, ToyTrajectory

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.core.sweep import Method, RowScores, sweep


def per_sample(rows: RowScores, values: torch.Tensor) -> dict[int, torch.Tensor]:
    return {int(z): values[rows.sample_ids == z].sum(0) for z in rows.sample_ids.unique()}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("counterfactual", ["drop", "zero"])
def test_a_removal_from_every_step_is_that_of_retraining(name: str, counterfactual: str) -> None:
    """At a learning rate where only the optimizer is nonlinear; the sum of single removals is off by much more."""
    toy = RUNS[name]
    run_at_lr = Toy(toy.optimizer, toy.schedule, toy.clip, lambda t: toy.lr_factor(t) * 1e-3)
    run = ToyTrajectory(run_at_lr)
    rows = sweep(run, run.query_gradients(), Method("hessian", "finite", counterfactual=counterfactual))
    mine, single = per_sample(rows, rows.scores + rows.interaction), per_sample(rows, rows.scores)
    truth = {z: run_at_lr.true_effect(z, None, counterfactual == "drop") for z in mine}
    size = torch.stack(list(truth.values())).norm()
    error = torch.stack([mine[z] - truth[z] for z in truth]).norm() / size
    assert error <= 2e-3
    if "sgd" not in name and "nesterov" not in name:  # whose moments, if they have any, are linear
        assert torch.stack([single[z] - truth[z] for z in truth]).norm() / size >= 5 * error


def test_a_memory_that_ends_before_the_next_visit_adds_nothing() -> None:
    run = ToyTrajectory(RUNS["adamw"])
    options = {"curvature": "hessian", "response": "finite"}
    within = sweep(run, run.query_gradients(), Method(memory_window=8, **options))  # type: ignore[arg-type]
    beyond = sweep(run, run.query_gradients(), Method(memory_window=1, **options))  # type: ignore[arg-type]
    visits = {z: within.steps[within.sample_ids == z].tolist() for z in within.sample_ids.tolist()}
    assert max(map(len, visits.values())) > 1
    for row, (z, t) in enumerate(zip(within.sample_ids.tolist(), within.steps.tolist(), strict=True)):
        later = [s - t for s in visits[z] if s > t]
        assert bool(within.interaction[row].any()) == bool(later)
        assert bool(beyond.interaction[row].any()) == any(s <= 1 for s in later)


def test_a_report_adds_the_interaction_and_keeps_it(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, loader(digits(24), 8), InfluenceCallback(tmp_path / "log", record="replay"), max_epochs=2)
    report = attribute(tmp_path / "log", queries=loader(digits(40), 8), model=module, data=digits(24), target="mean")
    rows = report.rows
    assert rows.interaction is not None and bool(rows.interaction.any())
    for z in report.sample_ids:
        own = rows.sample_ids == z
        expected = rows.scores[own].sum(0) + rows.interaction[own].sum(0)
        torch.testing.assert_close(report.scores[report.sample_ids == z][0], expected)
    report.save(tmp_path / "report.safetensors")
    assert torch.equal(InfluenceReport.load(tmp_path / "report.safetensors").scores, report.scores)
