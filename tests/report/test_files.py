"""Saved reports: no bit changes unseen, old ones can be read, and nothing in a table runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_report import some_report

from lightning_influence import InfluenceReport
from lightning_influence.errors import ConfigurationError, InfluenceError

METADATA = {
    "curvature": "fisher",
    "module": "Ünïcode",
    "note": [1, None, {"a": 0.5}],
    "ceiling": "0.930 [0.900, 0.950]",
}


def small_report(n: int = 5, q: int = 2) -> InfluenceReport:
    scores = torch.randn(n, q, generator=torch.Generator().manual_seed(1))
    return InfluenceReport.from_rows(
        torch.arange(n) * 3,
        torch.arange(n) // 2,
        scores,
        tangent=scores * 0.9,
        query_ids=["q", 7][:q],
        metadata=METADATA,
    )


def test_every_flipped_bit_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "report.safetensors"
    small_report(3, 1).save(path)
    data = path.read_bytes()
    InfluenceReport.load(path)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(InfluenceError, match=re.escape(str(path))):
            InfluenceReport.load(path)


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_file_that_was_cut_or_grew_is_an_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "report.safetensors"
    small_report().save(path)
    data = path.read_bytes()
    for wrong in (data[:cut], data + b"\0", data[:-1] + b"\0\0", data[:8] + b" " + data[8:]):
        path.write_bytes(wrong)
        with pytest.raises(InfluenceError, match="cannot be read as a report"):
            InfluenceReport.load(path)


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    report, path = small_report(), tmp_path / "report.safetensors"
    report.save(path)
    loaded = InfluenceReport.load(path)
    for name in ("sample_ids", "steps", "scores", "tangent"):
        assert torch.equal(getattr(loaded.rows, name), getattr(report.rows, name))
    assert loaded.query_ids == ["q", 7] and loaded.metadata == METADATA
    with safe_open(path, framework="pt") as file:  # a stranger's reader needs none of our code
        assert file.metadata()["format"] == "lightning-influence-report/2"
        assert torch.equal(file.get_tensor("scores"), report.rows.scores)


def test_a_report_without_checksums_is_read(tmp_path: Path) -> None:
    """As version 0.1.0 wrote it."""
    path, rows = tmp_path / "old.safetensors", small_report().rows
    metadata = {
        **METADATA,
        "conclusion": "Scores of 'finite' rank removals roughly as retraining does (0.700 [0.6, 0.8])",
    }
    body = {"metadata": metadata, "query_ids": ["q", 7]}
    tensors = {name: tensor.clone() for name, tensor in vars(rows).items()}
    save_file(tensors, path, {"format": "lightning-influence-report/1", "report": json.dumps(body)})
    old = InfluenceReport.load(path)
    assert torch.equal(old.scores, small_report().scores) and old.metadata == metadata
    assert "0.930 [0.900, 0.950]" in old.to_html(tmp_path / "old.html").read_text()
    old.save(tmp_path / "new.safetensors")
    assert torch.equal(InfluenceReport.load(tmp_path / "new.safetensors").scores, old.scores)


def test_sums_alone_do_not_make_a_report(tmp_path: Path) -> None:
    """A report whose tensors were replaced under the header of another."""
    path = tmp_path / "report.safetensors"
    small_report().save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors | {"scores": tensors["scores"] + 1}, path, metadata)
    with pytest.raises(InfluenceError, match="checksum"):
        InfluenceReport.load(path)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"sample_ids": torch.tensor([0, -3])}, "sample ids from -3"),
        ({"steps": torch.tensor([0.0, 1.0])}, "expected integers"),
        ({"sample_ids": torch.tensor([0j, 1j])}, "expected integers"),
        ({"scores": torch.tensor([[1e31], [0.0]]), "tangent": torch.zeros(2, 1)}, "sample 0 at step 0 is 1e\\+31"),
        (
            {"scores": torch.tensor([[0.0], [torch.nan]]), "tangent": torch.zeros(2, 1)},
            "sample 1 at step 0 is not finite",
        ),
    ],
)
def test_rows_that_no_run_has_are_refused(rows: dict[str, torch.Tensor], told: str) -> None:
    whole = {"sample_ids": torch.arange(2), "steps": torch.zeros(2, dtype=torch.int64), "scores": torch.zeros(2, 1)}
    with pytest.raises(InfluenceError, match=told):
        InfluenceReport.from_rows(**(whole | rows))


def test_query_ids_are_numbers_and_texts() -> None:
    with pytest.raises(ConfigurationError, match="query_ids holds something else"):
        InfluenceReport.from_rows(torch.arange(2), torch.arange(2), torch.zeros(2, 1), query_ids=[["a"]])  # type: ignore[list-item]


def test_a_spreadsheet_runs_nothing(tmp_path: Path) -> None:
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "plain", "a=b"]
    scores = torch.randn(4, len(names), generator=torch.Generator().manual_seed(0))
    report = InfluenceReport.from_rows(torch.arange(4), torch.arange(4), scores, query_ids=names)
    report.to_csv(tmp_path / "scores.csv")
    table = pd.read_csv(tmp_path / "scores.csv")
    assert list(table.columns) == ["sample_id", *(f"'{name}" for name in names[:5]), *names[5:], "nonlinearity"]
    assert (scores < 0).any(), "numbers are left alone"
    torch.testing.assert_close(torch.tensor(table["a=b"].to_numpy(), dtype=torch.float32), scores[:, -1])
    some_report().to_csv(tmp_path / "plain.csv")
    assert (tmp_path / "plain.csv").read_text().startswith("sample_id,0,1,2,nonlinearity\n")
