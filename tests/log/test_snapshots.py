"""Snapshots: their number in a run whose length nobody knows, moments that are rounded, and shards that are joined."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from modules import Classifier, digits, fit, loader, split_digits

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.errors import LogCorrupted
from lightning_influence.log.logged_snapshots import LoggedSnapshots
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.snapshots import ReplaySettings
from lightning_influence.log.writer import StoreWriter


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


def test_moments_that_are_rounded_take_less_and_cost_little(tmp_path: Path) -> None:
    train, val = split_digits(240, 3)
    queries, reports, sizes = [val.tensors], [], []
    for moments in ("full", "bfloat16"):
        log, module = tmp_path / moments, Classifier(width=64)
        fit(
            module,
            loader(train, 8),
            InfluenceCallback(log, record="replay", snapshot_every=5, snapshot_moments=moments),
        )
        reports.append(attribute(log, queries=queries, model=module, data=train, progress=False))
        sizes.append((log / "rank-0" / "snapshot-00000025.safetensors").stat().st_size)
    full, rounded = reports
    assert sizes[1] == pytest.approx(2 / 3 * sizes[0], rel=0.05)
    assert 0 < max(rounded.metadata["replay_drift"].values()) < 5e-3, "rounding moves the run a little"
    assert max(full.metadata["replay_drift"].values()) < 1e-6
    error = (rounded.scores - full.scores).norm() / full.scores.norm()
    assert 0 < error < 0.01


WHOLE = torch.arange(15.0).view(5, 3)
Shard = tuple[tuple[int, int], torch.Tensor]
HALVES: list[Shard] = [((0, 0), WHOLE[:3]), ((3, 0), WHOLE[3:])]


def sharded(log: Path, shards: list[Shard], shape: tuple[int, int] = (5, 3)) -> LoggedSnapshots:
    """The snapshots of a log of several processes, each of which wrote a part of one parameter."""
    writers = [StoreWriter(log, rank=rank, ranks=len(shards)) for rank in range(len(shards))]
    writers[0].write_manifest({})
    for writer, (offset, part) in zip(writers, shards, strict=True):
        chunk = {"shape": shape, "offset": offset, "size": part.shape}
        writer.save("snapshot-00000000", {"parameter/p": part.contiguous()}, {"chunks": {"parameter/p": chunk}})
        writer.append(0, {}, {})
        writer.close()
    return LoggedSnapshots(StoreReader(log))


@pytest.mark.parametrize(
    "shards",
    [
        HALVES,
        HALVES[::-1],
        [((0, 0), WHOLE[:, :1]), ((0, 1), WHOLE[:, 1:])],
        [((0, 0), WHOLE), ((5, 0), WHOLE[5:])],
        [*HALVES, ((5, 0), WHOLE[5:])],
    ],
    ids=["rows", "in another order", "columns", "one holds all", "one holds nothing"],
)
def test_shards_are_joined(shards: list[Shard], tmp_path: Path) -> None:
    snapshots = sharded(tmp_path, shards)
    assert snapshots.steps == [0] and snapshots.names(0) == ["parameter/p"]
    assert torch.equal(snapshots.tensor(0, "parameter/p"), WHOLE)


@pytest.mark.parametrize(
    ("shards", "shape"),
    [
        (HALVES[:1], (5, 3)),
        ([HALVES[0], ((0, 0), WHOLE[3:])], (5, 3)),
        ([HALVES[0], ((2, 0), WHOLE[2:])], (5, 3)),
        ([HALVES[0], ((3, 0), WHOLE[3:].double())], (5, 3)),
        (HALVES, (6, 3)),
    ],
    ids=["one is missing", "one twice", "overlapping", "of two types", "of a larger whole"],
)
def test_shards_that_do_not_make_up_the_whole_are_no_answer(
    shards: list[Shard], shape: tuple[int, int], tmp_path: Path
) -> None:
    snapshots = sharded(tmp_path, shards, shape)
    with pytest.raises(LogCorrupted, match="parameter/p in the snapshot before step 0 is not what was written"):
        snapshots.tensor(0, "parameter/p")
