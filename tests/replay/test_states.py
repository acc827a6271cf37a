"""States of a run within bounded memory: run forward in parts, or walked back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, fit, loader, split_digits
from torch import nn

from lightning_influence import InfluenceCallback
from lightning_influence.core.scores import RowScores
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.scoring.attribution import open_trajectory
from lightning_influence.scoring.queries import query_gradients

STEPS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A log of forty steps with a snapshot every ten, its module and queries."""
    log = tmp_path_factory.mktemp("run") / "log"
    train, val = split_digits(STEPS * 8, 4)
    module = Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1))
    fit(module, loader(train, 8), InfluenceCallback(log, record="replay", snapshot_every=10))
    return log, module, [val.tensors]


def swept(run: tuple[Path, Any, Any], memory: int | None, *, walks: bool = True) -> tuple[RowScores, ReplayTrajectory]:
    log, module, queries = run
    with open_trajectory(log, module, "hessian") as replay:
        assert isinstance(replay, ReplayTrajectory)
        if memory is not None:
            replay.states.memory = replay.states.least() + memory
        replay.states.walks = walks
        gradients = query_gradients(module, queries, list(replay.sizes), replay.select)
        return sweep(replay, gradients, Method("hessian")), replay


def gradient_bytes(module: nn.Module) -> int:
    return sum(4 * p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def whole(run: tuple[Path, Any, Any]) -> RowScores:
    """With memory for every state."""
    rows, everything = swept(run, None)
    assert everything.states.evaluated == STEPS + 1, "all kept on the way; one more tells how large they are"
    return rows


@pytest.mark.parametrize("gradients", [0, 1, 4, 12, 30])
@pytest.mark.parametrize("walks", [False, True])
def test_scores_do_not_depend_on_memory(
    run: tuple[Path, Any, Any], whole: RowScores, gradients: int, walks: bool
) -> None:
    rows, replay = swept(run, gradients * gradient_bytes(run[1]), walks=walks)
    error = (rows.scores - whole.scores).norm() / whole.scores.norm()
    assert error <= (1e-4 if walks else 1e-6)
    assert replay.drift.keys() >= {10, 20, 30}
    if walks and gradients >= 20:  # the first ten steps forward, each evaluated twice, and the last of them once
        assert replay.states.evaluated <= 30 + 19 + 1


def test_walking_back_is_the_forward_replay(run: tuple[Path, Any, Any]) -> None:
    """States and gradients, step by step."""
    log, module, _ = run
    with open_trajectory(log, module, "hessian") as forward, open_trajectory(log, module, "hessian") as back:
        assert isinstance(forward, ReplayTrajectory)
        assert isinstance(back, ReplayTrajectory)
        back.states.memory = back.states.least() + 20 * gradient_bytes(module)
        for t in reversed(range(STEPS)):
            a, b = forward.record(t), back.record(t)
            assert (back.states._walk is not None) == (t >= 10)
            for k, gradient in a.gradients.items():
                assert (b.gradients[k] - gradient).norm() <= 1e-5 * gradient.norm()
                for mine, theirs in zip(b.moments[k], a.moments[k], strict=True):
                    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
        assert max(back.drift.values()) <= 1e-4


def test_a_walk_that_goes_astray_is_run_forward(
    run: tuple[Path, Any, Any], whole: RowScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that disagrees on the way sends the part forward, with the same scores."""
    from lightning_influence.replay import walking_back

    before = walking_back.parameter_before
    wrong = lambda *args: before(*args) * 1.01
    monkeypatch.setattr(walking_back, "parameter_before", wrong)
    rows, replay = swept(run, 20 * gradient_bytes(run[1]))
    assert (rows.scores - whole.scores).norm() <= 1e-6 * whole.scores.norm()
    assert not any(replay.states._ways.values())
