"""Removals that are measured: how often a step is run for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, digits, fit
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.replay.passes import Passes

N, BATCH = 12, 4


class SeesTheBatch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x - x.mean(0)), y)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_whole_batch_is_run_once_for_all_of_its_samples(
    accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample more to ask about is a pass more, whatever else a replay runs."""
    module, data = SeesTheBatch(width=8), digits(N)
    callback = InfluenceCallback(tmp_path / "log", record="replay")
    fit(module, DataLoader(data, BATCH), callback, accumulate_grad_batches=accumulated)
    run, passes = Passes.run, list[int]()

    def counted(self: Passes, *args: Any, **options: Any) -> Any:
        passes[-1] += 1
        return run(self, *args, **options)

    monkeypatch.setattr(Passes, "run", counted)
    for samples in ([0, 4, 8], [0, 1, 4, 5, 8, 9], range(N)):  # some of each batch
        passes.append(0)
        report = attribute(
            tmp_path / "log", queries=[data.tensors], model=module, data=data, target="mean", samples=samples
        )
        assert report.metadata["removals"]["by"] == "rerun"
    assert passes[1] - passes[0] == 3
    assert passes[2] - passes[0] == N - 3
