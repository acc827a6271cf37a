"""The decisions of a long run are in a file, and neither memory nor checkpoints grow with them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from modules import Classifier, digits
from modules import fit as trained
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, SelectionDataModule
from lightning_influence.errors import LogCorrupted
from lightning_influence.selection import decisions
from lightning_influence.selection.decisions import SelectionReport


def noted(report: SelectionReport, steps: range, seed: int = 0) -> SelectionReport:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        n = step % 4  # now and then a decision about nothing
        report.add(step, torch.arange(n) + step, torch.randn(n, generator=generator), torch.ones(n) * 0.5)
    return report


def table(report: SelectionReport) -> pd.DataFrame:
    return report.to_pandas()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "_IN_MEMORY", 200)


@pytest.mark.usefixtures("small")
def test_what_is_written_is_read(tmp_path: Path) -> None:
    whole, filed = noted(SelectionReport(), range(100)), noted(SelectionReport(tmp_path / "a" / "rank-0"), range(100))
    pd.testing.assert_frame_equal(table(whole), table(filed))
    assert repr(whole) == repr(filed) and whole.kept == filed.kept == 0.5
    assert (tmp_path / "a" / "rank-0").stat().st_size > 2000
    assert len(pickle.dumps(filed.state_dict())) < 1000 < len(pickle.dumps(whole.state_dict()))
    assert [step for step, *_ in filed.rows] == list(range(100)) and len(filed.rows) == 100


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("place", ["same", "another", "memory"])
def test_a_report_goes_on_from_its_state(place: str, tmp_path: Path) -> None:
    file, other = tmp_path / "rank-0", {"same": tmp_path / "rank-0", "another": tmp_path / "new", "memory": None}[place]
    report = noted(SelectionReport(file), range(50))
    state = pickle.loads(pickle.dumps(report.state_dict()))
    noted(report, range(50, 90), seed=1)  # a run that was killed went further
    resumed = table(noted(SelectionReport(other).restored(state), range(50, 100)))
    pd.testing.assert_frame_equal(resumed, table(noted(SelectionReport(), range(100))))
    old = noted(SelectionReport(other).restored(list(noted(SelectionReport(), range(50)).rows)), range(50, 100))
    pd.testing.assert_frame_equal(table(old), resumed)


@pytest.mark.usefixtures("small")
def test_processes_are_merged_in_the_order_of_their_steps(tmp_path: Path) -> None:
    parts = [noted(SelectionReport(tmp_path / str(rank)), range(40), seed=rank) for rank in range(2)]
    merged = SelectionReport.merged(parts)
    rows = sorted((row for part in parts for row in part.rows), key=lambda row: row[0])
    assert [row[0] for row in merged.rows] == [row[0] for row in rows]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(merged.rows, rows, strict=True))
    assert len(merged) == 80 and merged.n_samples == sum(len(row[1]) for row in rows)
    again = SelectionReport().restored(pickle.loads(pickle.dumps(merged.state_dict())))
    pd.testing.assert_frame_equal(table(again), table(merged))


@pytest.mark.usefixtures("small")
def test_a_file_that_changed_is_an_error_and_one_that_is_gone_a_warning(tmp_path: Path) -> None:
    report = noted(SelectionReport(tmp_path / "file"), range(50))
    state, content = report.state_dict(), (tmp_path / "file").read_bytes()
    for wrong in (content[:-3], content[:40] + b"x" + content[41:], b"\xff" * len(content)):
        (tmp_path / "file").write_bytes(wrong)
        with pytest.raises(LogCorrupted, match="not what selection wrote"):
            report.to_pandas()
    (tmp_path / "file").unlink()
    with pytest.raises(LogCorrupted, match="cannot be read"):
        report.to_pandas()
    with pytest.warns(UserWarning, match="which is not there; the selection report begins with those that follow"):
        assert len(SelectionReport().restored(state)) == 0


@pytest.mark.usefixtures("small")
def test_a_disk_that_is_full_keeps_decisions_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = SelectionReport(tmp_path / "file" / "rank-0")
    with pytest.warns(UserWarning, match="could not be written"):
        noted(report, range(100))
    pd.testing.assert_frame_equal(table(report), table(noted(SelectionReport(), range(100))))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("recorded", [False, True])
def test_a_run_writes_beside_its_log_or_under_the_trainer_s_root(recorded: bool, tmp_path: Path) -> None:
    x, y = digits(48).tensors
    data = SelectionDataModule(
        DataLoader(TensorDataset(x, y), 8), DataLoader(TensorDataset(x, y), 16), keep=0.5, every=2
    )
    callbacks = [InfluenceCallback(tmp_path / "log")] if recorded else []
    trained(Classifier(), data, *callbacks, default_root_dir=tmp_path, max_epochs=3)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("rank-0.bin")]
    assert len(files) == 1
    assert str(files[0].parent).startswith("log/decisions" if recorded else "selection-")
    assert len(data.selection_report.to_pandas()) == 3 * 48


def test_a_short_run_writes_no_file(tmp_path: Path) -> None:
    x, y = digits(48).tensors
    options: dict[str, Any] = {"keep": 0.5, "every": 1}
    data = SelectionDataModule(DataLoader(TensorDataset(x, y), 8), DataLoader(TensorDataset(x, y), 16), **options)
    trained(Classifier(), data, default_root_dir=tmp_path)
    assert not list(tmp_path.iterdir())
