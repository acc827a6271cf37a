"""What users are told about data, processes, disks and reports: the text, in their words."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, fit, loader, split_digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence import InfluenceCallback, InfluenceReport, SelectionDataModule, attribute
from lightning_influence.errors import ConfigurationError, LogError
from lightning_influence.live.first_step import first_step_line
from lightning_influence.log import writer as store
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.steps import LoggedTrajectory
from lightning_influence.scoring import pace

TRAIN, VAL = split_digits(64, 8)
QUERIES = DataLoader(VAL, 4)


@pytest.mark.parametrize("record", ["gradients", "replay", "both"])
def test_the_first_step_says_what_is_recorded_and_what_it_takes(
    record: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        callback = InfluenceCallback(tmp_path / "log", record=record, snapshot_every=8)
        fit(Classifier(), loader(TRAIN, 4), callback, max_epochs=2)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Influence: ")]
    what = {"gradients": "per-sample gradients", "replay": "what a replay needs"}.get(record, "and what a replay needs")
    assert what in line and str(tmp_path / "log") in line and "a step" in line and "of disk are free" in line
    assert ("on 100% of the coordinates" in line) == (record != "replay")
    assert ("a snapshot" in line) == (record != "gradients")
    told = line.split("about ")[1].split(" at the end")[0].split()
    expected = float(told[0]) * {"kB": 1e3, "MB": 1e6}[told[1]]
    held = sum(f.stat().st_size for f in (tmp_path / "log").rglob("*.safetensors"))
    assert expected == pytest.approx(held, rel=0.2)


def test_a_disk_that_will_be_full_is_told_at_the_first_step(tmp_path: Path) -> None:
    line = first_step_line(tmp_path, "both", 0.5, 2.0**40, 100.0, 10_000, 10)
    assert "on 50% of the coordinates" in line and "THE DISK WILL BE FULL BEFORE THE RUN ENDS" in line
    assert "for as long as the run goes on" in first_step_line(tmp_path, "both", 0.5, 1.0, 0.0, float("inf"), 1.0)


def test_the_share_of_the_coordinates_is_that_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under a budget that masks most of them."""
    module = Classifier()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(module, loader(TRAIN, 4), InfluenceCallback(tmp_path / "log", budget=1024), max_steps=2)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Influence: ")]
    held = sum(kept for kept, _ in LoggedTrajectory(tmp_path / "log").sizes.values())
    share = held / sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert share < 0.5, "the budget binds"
    assert f"per-sample gradients on {share:.0%} of the coordinates" in line


def test_a_report_says_where_its_page_is_and_how_to_open_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(
            Classifier(),
            loader(TRAIN),
            InfluenceCallback(tmp_path / "log", report=True, record="gradients"),
            val=QUERIES,
        )
    (line,) = [r.getMessage() for r in caplog.records if "influence report" in r.getMessage()]
    page = tmp_path / "log" / "report.html"
    assert str(page) in line and f"open it in a browser: {page.as_uri()}" in line


def test_a_full_disk_says_what_became_of_the_run_and_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fills(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                monkeypatch.setattr(store, "_replace", full)
            return super().training_step(batch, batch_idx)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="lacks the steps") as seen:
        fit(Fills(), loader(TRAIN), InfluenceCallback(tmp_path / "log", record="gradients"))
    (told,) = [str(w.message) for w in seen if "Recording has stopped" in str(w.message)]
    for part in (
        f"{tmp_path / 'log'} lacks the steps from ",
        "No space left on device",
        "Training goes on as it would",
    ):
        assert part in told
    assert "can be read up to its last complete step" in told and "on_error='raise'" in told
    assert "No space left" in next(iter(StoreReader(tmp_path / "log").missing.values()))


def test_data_that_is_shorter_than_the_run_s(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, loader(TRAIN), InfluenceCallback(tmp_path, record="replay", store_batches=False))
    few = split_digits(40, 0)[0]
    with pytest.raises(
        ConfigurationError, match=r"the training data has 40 samples, and the log has sample \d+; give the data"
    ):
        attribute(tmp_path, queries=QUERIES, model=module, data=few, progress=False)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (({"x": x, "id": torch.tensor(i)}, y) for i, (x, y) in enumerate(TRAIN))


class Streaming(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch[0]["x"], batch[1]), batch_idx)


def test_an_iterable_dataset_is_recorded_for_replay(tmp_path: Path) -> None:
    module = Streaming()
    callback = InfluenceCallback(tmp_path, record="replay", sample_ids=lambda batch: batch[0]["id"])
    fit(module, DataLoader(Stream(), 8), callback)
    asked = [({"x": VAL.tensors[0], "id": torch.arange(8)}, VAL.tensors[1])]
    report = attribute(tmp_path, queries=asked, model=module, target="mean", progress=False)
    assert sorted(report.sample_ids.tolist()) == list(range(64))


def test_several_training_loaders_say_how_their_ids_are_given(tmp_path: Path) -> None:
    class Both(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch["a"], batch_idx)

    loaders = {"a": loader(TRAIN), "b": loader(TRAIN)}
    with pytest.raises(ConfigurationError, match=r"2 loaders, whose batches come together.*sample_ids=function"):
        fit(Both(), loaders, InfluenceCallback(tmp_path / "log", record="gradients"))


def test_several_validation_loaders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"this run has 2; join their datasets .*or call attribute\(...\) with each"
    ):
        fit(
            Classifier(),
            loader(TRAIN),
            InfluenceCallback(tmp_path / "log", report=True, record="gradients"),
            val=[QUERIES, QUERIES],
            num_sanity_val_steps=0,
        )


@pytest.mark.parametrize("options", [{"every": 1}, {"every": "epoch"}, {"every": 2, "horizon": 1}], ids=str)
def test_batch_normalisation_under_selection_recommends_what_the_class_takes(options: dict[str, Any]) -> None:
    def run(**more: Any) -> None:
        module = Classifier(net=nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)))
        fit(module, SelectionDataModule(loader(TRAIN), QUERIES, **options, **more))

    with pytest.raises(ConfigurationError, match="frozen_batch_norm=True"):
        run()
    run(frozen_batch_norm=True)


def test_a_model_of_another_time_is_told_wherever_the_report_is_read(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, loader(TRAIN), InfluenceCallback(tmp_path / "log", record="gradients"))
    asked: dict[str, Any] = {"queries": QUERIES, "target": "mean", "curvature": "none", "progress": False}
    fine = attribute(tmp_path / "log", model=module, **asked)
    assert fine.provenance.queried is None and "queried" not in fine.metadata
    told = r"6 parameters \(net.0.weight, ...\) differ from those at the end of the logged run"
    with pytest.warns(UserWarning, match=told):
        report = attribute(tmp_path / "log", model=Classifier(seed=1), **asked)
    report.save(tmp_path / "report")
    for one in (report, InfluenceReport.load(tmp_path / "report")):
        assert re.search(told, repr(one)) and re.search(told, one.to_html(tmp_path / "page.html").read_text())


@pytest.mark.parametrize("record", ["gradients", "replay"])
def test_a_sweep_that_takes_long_says_how_long_and_what_takes_less(
    record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Classifier()
    fit(module, loader(TRAIN), InfluenceCallback(tmp_path / "log", record=record))
    ticks = iter(range(0, 10_000, 40))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(ticks))
    asked: dict[str, Any] = {"queries": QUERIES, "model": module, "curvature": "none", "progress": False}
    with pytest.warns(UserWarning, match="attribution will take about") as seen:
        attribute(tmp_path / "log", max_memory=2**30, **asked)
    (told,) = [str(w.message) for w in seen if "will take about" in str(w.message)]
    assert told.startswith(
        "attribution will take about 120 s more, and at most 1.1 GB of memory besides the model: 4 steps and 8 queries"
    )
    assert "target='mean' asks one query instead of 8; response='tangent'" in told and "samples=" in told
    with warnings.catch_warnings(record=True) as quiet:
        warnings.simplefilter("always")
        monkeypatch.setattr(pace, "_LONG", 1000.0)
        attribute(tmp_path / "log", target="mean", **asked)
    assert not any("will take about" in str(w.message) for w in quiet)


def test_a_log_in_use_is_told(tmp_path: Path) -> None:
    with (
        store.StoreWriter(tmp_path / "log"),
        pytest.raises(LogError, match="being written by another run; choose another directory"),
    ):
        fit(Classifier(), loader(TRAIN), InfluenceCallback(tmp_path / "log", record="gradients"))
