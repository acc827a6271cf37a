"""A run trained again from its own log is the run that Lightning trains without the sample, in whatever way it was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from kinds import QUERIES, Base, N
from test_kinds import losses, samples, trained
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.run.data import TrainingData
from lightning_influence.run.task import as_task
from lightning_influence.scoring.queries import Queries, query_losses
from lightning_influence.trust.own_run import own_run
from lightning_influence.trust.retraining import leave_one_out

AGAIN: list[tuple[type[Base], str]] = [
    (kind, record)
    for kind in (
        kinds.Accumulated,
        kinds.Again,
        kinds.AnnealedInDict,
        kinds.ByEpoch,
        kinds.ByTrainer,
        kinds.Clipped,
        kinds.EverySecond,
        kinds.FrozenBatchNorm,
        kinds.FrozenLater,
        kinds.Nodes,
        kinds.Skipped,
        kinds.SummedWindows,
        kinds.Thawed,
        kinds.WarmUp,
    )
    for record in ("gradients", "replay")
    if record not in kind.refused
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "record"), AGAIN, ids=lambda value: getattr(value, "__name__", value))
def test_its_truth_is_lightning_s(kind: type[Base], record: Any, tmp_path: Path) -> None:
    removed = [1, 6]
    before = losses(kind, trained(kind))
    expected = torch.stack([losses(kind, trained(kind, z)) - before for z in removed])
    module = trained(kind, callbacks=[InfluenceCallback(tmp_path, record=record, **kind.options)])
    steps, task = LoggedSteps.of(tmp_path), as_task(module)
    data = TrainingData.of(kind.loader(samples(kind)[:N], None))
    run = own_run(steps, task, data, kind if record == "gradients" else None)
    queries = DataLoader(samples(kind)[N:], QUERIES, collate_fn=kind.collate)  # type: ignore[arg-type]
    asked = Queries.of(queries, data=data, precision="64-true").held()
    found = leave_one_out(run, removed, lambda m: query_losses(task.on(m), asked), progress=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_data_without_indices_and_a_module_that_cannot_be_copied_are_named(tmp_path: Path) -> None:
    module = trained(kinds.Streamed, callbacks=[InfluenceCallback(tmp_path / "a", record="replay", sample_ids="id")])
    data = TrainingData.of(kinds.Streamed.loader(samples(kinds.Streamed)[:N], None))
    with pytest.raises(ConfigurationError, match="data is a Stream, whose samples cannot be asked for by their ids"):
        own_run(LoggedSteps.of(tmp_path / "a"), as_task(module), data)
    kind = kinds.OldWeightNorm
    module = trained(kind, callbacks=[InfluenceCallback(tmp_path / "b", record="replay")])
    data = TrainingData.of(kind.loader(samples(kind)[:N], None))
    run = own_run(LoggedSteps.of(tmp_path / "b"), as_task(module), data)
    with pytest.raises(ConfigurationError, match="OldWeightNorm cannot be copied .* give make_model="):
        run.make_module()
