"""The number of snapshots of a run whose length nobody knows."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
from modules import Classifier, digits, fit, loader, split_digits

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.snapshots import ReplaySettings


class Stop(L.Callback):
    """Ends a run that would go on."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= 300


def snapshots(log: Path) -> list[int]:
    return sorted(int(name.rpartition("-")[2]) for name in StoreReader(log).artifacts() if name.startswith("snapshot-"))


def test_as_many_as_the_square_root_of_the_steps_so_far(tmp_path: Path) -> None:
    settings = ReplaySettings(8, thinned=True)
    for steps in (256, 1000, 10_000, 123_456):
        kept = len(range(0, steps, settings.spacing(steps)))
        assert math.isqrt(steps) <= kept + 1 <= 2 * math.isqrt(steps) + 2
    assert ReplaySettings(8).spacing(10**6) == 8, "what a user asked for stays"


def test_a_long_run_of_unknown_length_is_thinned_and_can_be_replayed(tmp_path: Path) -> None:
    log, module = tmp_path / "log", Classifier(width=4)
    fit(module, loader(digits(160), 8), InfluenceCallback(log, record="replay"), Stop(), max_epochs=-1)
    assert snapshots(log) == [*range(0, 300, 16), 300]
    held = {path.name for path in (log / "rank-0").glob("snapshot-*")}
    assert len(held) == 20, "the files of the others are gone"
    queries = [split_digits(1, 3)[1].tensors]
    report = attribute(log, queries=queries, model=module, data=digits(160), target="mean", samples=[0, 1])
    assert len(report.metadata["replay_drift"]) >= 18
