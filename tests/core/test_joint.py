"""Groups against retraining without them, in float64; and the sets that leave a step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from toy import RUNS, Toy, ToyTrajectory

from lightning_influence.core.removal_sets import RemovalSets
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.errors import ConfigurationError

GROUPS = [[0, 1, 2], [4, 5, 6], [2, 4, 9, 11], [3], [99]]  # the second is a whole batch, the last in none


def scores_of(run: ToyTrajectory, method: Method, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    sets = RemovalSets((), groups)
    samples, rows = sets.split(sweep(run, run.query_gradients(), method, sets=sets, progress=False))
    assert not len(samples)
    total = torch.zeros(len(groups), rows.n_queries, dtype=torch.float64)
    return total.index_add_(0, rows.sample_ids, (rows.scores + rows.interaction).double())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("counterfactual", ["drop", "zero"])
def test_a_group_s_removal_is_that_of_retraining(name: str, counterfactual: str) -> None:
    """At a learning rate where only the optimizer is nonlinear; the sum of single removals is off by much more."""
    toy = RUNS[name]
    run = ToyTrajectory(Toy(toy.optimizer, toy.schedule, toy.clip, lambda t: toy.lr_factor(t) * 1e-3, toy.unused))
    method = Method("hessian", "finite", counterfactual=counterfactual)  # type: ignore[arg-type]
    found = scores_of(run, method, GROUPS)
    truth = torch.stack([run.toy.true_effect(frozenset(g), None, counterfactual == "drop") for g in GROUPS])
    error = (found - truth).norm() / truth.norm()
    assert error <= 1e-3
    assert float(found[4].abs().max()) <= 1e-6 * float(truth.norm())
    rows = sweep(run, run.query_gradients(), method, progress=False)
    ids, each = rows.per_sample(rows.scores + rows.interaction)
    summed = torch.stack([each[torch.isin(ids, torch.tensor(g))].double().sum(0) for g in GROUPS])
    if counterfactual == "drop" or "ad" in name or "ams" in name:  # the others' sums are as good: they are linear
        assert (summed - truth).norm() / truth.norm() > 20 * error


def test_the_memory_window_is_of_samples_alone() -> None:
    run = ToyTrajectory(RUNS["adamw"])
    short, long = (scores_of(run, Method("hessian", memory_window=w), GROUPS) for w in (0, 8))
    assert torch.equal(short, long)


def test_a_first_order_group_is_the_derivative() -> None:
    """Under the counterfactual that is linear, it is also the sum of its samples."""
    run = ToyTrajectory(RUNS["adamw, accumulated and clipped"])
    method = Method("hessian", "tangent", counterfactual="zero")
    rows = sweep(run, run.query_gradients(), method, progress=False)
    ids, each = rows.per_sample(rows.scores)
    groups = GROUPS[2:]
    summed = torch.stack([each[torch.isin(ids, torch.tensor(g))].double().sum(0) for g in groups])
    torch.testing.assert_close(scores_of(run, method, groups).float(), summed.float())


def test_groups_and_samples_are_scored_in_one_walk() -> None:
    run = ToyTrajectory(RUNS["adamw"])
    method = Method("hessian")
    both = RemovalSets(None, GROUPS)
    samples, groups = both.split(sweep(run, run.query_gradients(), method, sets=both, progress=False))
    alone = sweep(run, run.query_gradients(), method, progress=False)
    assert torch.equal(samples.scores, alone.scores) and torch.equal(samples.interaction, alone.interaction)
    total = torch.zeros(len(GROUPS), 3, dtype=torch.float64).index_add_(0, groups.sample_ids, groups.scores.double())
    torch.testing.assert_close(total, scores_of(run, method, GROUPS))
    some = RemovalSets([4, 7])
    rows = sweep(run, run.query_gradients(), method, sets=some, progress=False)
    kept = torch.isin(alone.sample_ids, torch.tensor([4, 7]))
    assert torch.equal(rows.sample_ids, alone.sample_ids[kept])
    torch.testing.assert_close(rows.scores, alone.scores[kept])
    with pytest.raises(ConfigurationError, match="whole run"):
        sweep(run, run.query_gradients(), method, sets=both, scored=range(1))


def test_a_repeated_sample_leaves_with_its_group() -> None:
    sets = RemovalSets(groups=[[1, 2], [2, 3]])
    leaving = sets.within(torch.tensor([2, 5, 2, 1]))
    assert leaving.sets.tolist() == [2, 5, 1, -1, -2]
    of = {z: leaving.row[leaving.owner == i].tolist() for i, z in enumerate(leaving.sets.tolist())}
    assert of == {2: [0, 2], 5: [1], 1: [3], -1: [0, 2, 3], -2: [0, 2]}
    assert sets.members(-2) == {2, 3} and sets.members(5) == {5}


def test_measured_rows_are_sets() -> None:
    numbers = torch.tensor([4, 7, -1, -2])
    sets = RemovalSets([7], [[4], [7]])
    leaving = sets.measured(numbers)
    assert leaving.sets.tolist() == [7, -1, -2] and leaving.row.tolist() == [1, 2, 3]
    assert replace(sets, samples=None).alone.measured(numbers).sets.tolist() == [4, 7]
    assert sets.together.measured(numbers).sets.tolist() == [-1, -2]
