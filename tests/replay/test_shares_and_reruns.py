"""Where both are right, shares and evaluations without the sample give the same scores, by replay of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kinds import KINDS, Base, N
from test_kinds import samples, trained
from torch import Tensor

from lightning_influence import InfluenceCallback
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.replay.removals import RemovalCheck
from lightning_influence.run.data import TrainingData
from lightning_influence.scoring.attribution import open_trajectory
from lightning_influence.scoring.queries import Queries, query_gradients

RIGHT = [kind for kind in KINDS if not kind.refused]


def scores(log: Path, kind: type[Base], module: Base, removals: RemovalCheck) -> Tensor:
    data = TrainingData.of(kind.loader(samples(kind)[:N], None) if kind.needs_data else None)
    with open_trajectory(log, module, "none", data, progress=False, removals=removals) as run:
        queries = Queries.of([kind.collate(samples(kind)[N:])], data=data, precision="64-true")
        gradients = query_gradients(module, queries, list(run.sizes), run.select, target="mean", progress=False)
        rows = sweep(run, gradients, Method("none", "finite", memory_window=2), progress=False)
    order = torch.stack([rows.steps.double() * 1e6, rows.sample_ids.double()]).sum(0).argsort()
    return rows.scores[order]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_both_give_the_same_scores(kind: type[Base], tmp_path: Path) -> None:
    module = trained(kind, callbacks=[InfluenceCallback(tmp_path / "log", record="replay", **kind.options)])
    by_shares = RemovalCheck()
    shares = scores(tmp_path / "log", kind, module, by_shares)
    reruns = scores(tmp_path / "log", kind, module, RemovalCheck(reason="asked for"))
    assert not by_shares.measuring, by_shares.reason
    assert (shares - reruns).norm() <= 1e-6 * reruns.norm()
