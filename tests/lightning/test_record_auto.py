"""The default recording: exact by replay and approximate from the log alone, as far as each is possible."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, fit, loader, split_digits
from torch import nn

from lightning_influence import InfluenceCallback, attribute, check_faithfulness
from lightning_influence.errors import CurvatureUnavailable, LogError
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.steps import LoggedTrajectory

TRAIN, VAL = split_digits(32, 12)


class Doubled(nn.Linear):
    """A layer that no rule covers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class SeesTheBatch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x - x.mean(0)), y)


class HookedGradient(Classifier):
    """Per-sample gradients do not sum to the gradient from the third step on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            self.net[0].weight.register_hook(lambda g: 1.5 * g)  # type: ignore[union-attr]
        return loss


class ReadsAList(Classifier):
    """What a step does depends on what a replay does not see, and changes between the steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = [1.0]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        return loss * self.scale[0]

    def on_train_batch_end(self, *_: Any) -> None:
        self.scale[0] += 1


def recorded(module: Any, log: Path, **options: Any) -> str:
    fit(module, loader(TRAIN, 8), InfluenceCallback(log, **options))
    return str(StoreReader(log).manifest["record"])


def test_the_log_answers_exactly_with_the_data_and_approximately_without(tmp_path: Path) -> None:
    module = Classifier(width=8)
    assert recorded(module, tmp_path, store_batches=False) == "both"
    options: dict[str, Any] = {"queries": loader(VAL, 12), "model": module, "target": "mean", "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = attribute(tmp_path, **options, data=TRAIN)
        meant = attribute(tmp_path, **options, curvature="fisher")
    assert exact.provenance.curvature == "hessian"
    with pytest.warns(UserWarning, match=r"rest on the Fisher matrix .* Give data="):
        fallen_back = attribute(tmp_path, **options)
    assert fallen_back.provenance.curvature == "fisher"
    torch.testing.assert_close(fallen_back.scores, meant.scores)
    assert (exact.scores - meant.scores).norm() > 1e-3 * exact.scores.norm()
    correlation = torch.corrcoef(torch.stack([exact.scores[:, 0], meant.scores[:, 0]]))[0, 1]
    assert correlation > 0.8
    check = check_faithfulness(tmp_path, **options, data=TRAIN, removals=4, ceiling=False, estimators={"finite": {}})
    assert check.single["finite"].relative_error.value < 0.05


def test_logs_of_gradients_alone_say_what_they_cost(tmp_path: Path) -> None:
    module = Classifier(width=8)
    assert recorded(module, tmp_path, record="gradients") == "gradients"
    with pytest.warns(UserWarning, match="0.24 instead of 0.96"):
        attribute(tmp_path, queries=loader(VAL, 12), model=module, data=TRAIN, target="mean", progress=False)


@pytest.mark.parametrize("budget", [2**12, 2**14])
def test_gradients_stay_within_their_budget(budget: int, tmp_path: Path) -> None:
    """Those of a network that takes 260 kB a sample, with the gradients and moments of the steps."""
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
    recorded(Classifier(net=net), tmp_path, budget=budget)
    reader = StoreReader(tmp_path)
    kinds = ("gradient/", "moment/", "share/")
    size = sum(
        reader.tensor(step, name).numel() * 4
        for step in range(len(reader))
        for name in reader.names(step)
        if name.startswith(kinds)
    )
    # moments are kept every eight steps, and this run has four
    assert 0.5 * budget < size / 32 < 1.2 * budget


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Classifier(net=nn.Sequential(Doubled(64, 8), nn.GELU(), nn.Linear(8, 10))), "no rule for net.0"),
        (SeesTheBatch(width=8), "Samples see each other"),
        (HookedGradient(width=8), "net.0.weight sum to its gradient"),
    ],
    ids=["no rule", "sees the batch", "later"],
)
def test_gradients_are_left_out_where_they_are_none(
    module: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert recorded(module, tmp_path) == "replay"
    told = [m for m in caplog.messages if reason in m]
    assert len(told) == 1 and "no per-sample gradients" in told[0]
    assert len(StoreReader(tmp_path)) == 4
    with pytest.raises(LogError, match="no per-sample gradients"):
        LoggedTrajectory(tmp_path)
    if not isinstance(module, HookedGradient):  # whose hook a replay cannot know of
        report = attribute(tmp_path, queries=loader(VAL, 12), model=module, target="mean", data=TRAIN, progress=False)
        assert report.provenance.curvature == "hessian"


def test_replay_is_left_out_where_it_is_impossible(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = ReadsAList(width=8)
    with caplog.at_level(logging.INFO):
        assert recorded(module, tmp_path) == "gradients"
    assert sum("no snapshots for replay" in m for m in caplog.messages) == 1
    options: dict[str, Any] = {"queries": loader(VAL, 12), "model": module, "target": "mean", "progress": False}
    with pytest.raises(CurvatureUnavailable):
        attribute(tmp_path, **options, curvature="hessian", data=TRAIN)
    assert len(attribute(tmp_path, **options, curvature="fisher").sample_ids) == 32
    with pytest.warns(UserWarning, match="lacks the steps from 1 on: .*run again"):
        recorded(ReadsAList(width=8), tmp_path / "asked", record="replay")


def test_where_neither_is_possible_nothing_is_recorded(tmp_path: Path) -> None:
    class Neither(ReadsAList):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return super().training_step((x - x.mean(0), y), batch_idx)

    with pytest.warns(UserWarning, match="lacks the steps from 1 on: .*run again"):
        recorded(Neither(width=8), tmp_path)


def test_a_run_that_left_something_out_goes_on_without_it(tmp_path: Path) -> None:
    module = SeesTheBatch(width=8)
    callback = InfluenceCallback(tmp_path / "log")
    trainer = fit(module, loader(TRAIN, 8), callback)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    again = SeesTheBatch(width=8)
    import lightning as L

    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[InfluenceCallback(tmp_path / "log")], **options).fit(
        again, loader(TRAIN, 8), ckpt_path=tmp_path / "checkpoint"
    )
    reader = StoreReader(tmp_path / "log")
    assert len(reader) == 8 and reader.manifest["record"] == "replay"
