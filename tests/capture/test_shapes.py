"""Shapes and dtypes of what the public functions return, for any numbers of samples, queries, batches and epochs."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import Classifier, digits, fit
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceReport, SelectionDataModule, attribute, error_proxy

FEW = settings(max_examples=6, deadline=None)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def run(folder: Path, n: int, batch: int, epochs: int, dtype: torch.dtype, record: Any) -> Classifier:
    module = Classifier(width=4).to(dtype)
    data = DataLoader(digits(n, dtype), batch, shuffle=True)
    fit(module, data, InfluenceCallback(folder, record=record), max_epochs=epochs)
    return module


def asked(n: int, batch: int, dtype: torch.dtype) -> DataLoader[Any]:
    x, y = digits(200, dtype).tensors
    return DataLoader(TensorDataset(x[-n:], y[-n:]), batch)


@FEW
@given(
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 3),
    st.integers(1, 7),
    DTYPES,
    st.sampled_from(["gradients", "replay"]),
)
@pytest.mark.filterwarnings("ignore")
def test_reports(n: int, batch: int, epochs: int, n_queries: int, dtype: torch.dtype, record: str) -> None:
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        module, queries = run(log, n, batch, epochs, dtype, record), asked(n_queries, 3, dtype)
        report = attribute(log, queries=queries, model=module, progress=False)
        mean = attribute(log, queries=queries, model=module, target="mean", response="tangent", progress=False)
        report.save(Path(folder) / "r.safetensors")
        again = InfluenceReport.load(Path(folder) / "r.safetensors")
    steps = math.ceil(n / batch) * epochs
    assert report.sample_ids.tolist() == list(range(n))
    assert report.scores.shape == (n, n_queries) and mean.scores.shape == (n, 1)
    assert report.scores.dtype == dtype and report.sample_ids.dtype == report.rows.steps.dtype == torch.int64
    assert report.rows.scores.shape == report.rows.tangent.shape == (n * epochs, n_queries)
    assert report.rows.steps.min() == 0 and report.rows.steps.max() == steps - 1
    assert report.to_pandas().columns[0] == "sample_id"
    assert len(report.top(5)) == len(report.bottom(5)) == min(5, n)
    assert torch.equal(again.scores, report.scores) and again.query_ids == report.query_ids


@FEW
@given(st.integers(2, 20), st.integers(2, 6), st.integers(1, 4), st.integers(1, 6), DTYPES)
@pytest.mark.filterwarnings("ignore")
def test_proxies(n: int, batch: int, n_queries: int, pairs: int, dtype: torch.dtype) -> None:
    with TemporaryDirectory() as folder:
        module = run(Path(folder), n, batch, 1, dtype, "replay")
        options: Any = {"queries": asked(n_queries, 4, dtype), "model": module, "progress": False, "pairs": pairs}
        found = error_proxy(folder, target=None, **options)
    proxy = found.proxies[1.0]
    k = len(proxy.sample_ids)
    assert 1 <= k <= pairs
    assert proxy.total.shape == proxy.tangent.shape == proxy.corrected.shape == (k, n_queries)
    assert proxy.total.dtype == torch.float64
    assert len(found.to_pandas()) == k * n_queries
    assert found.curve().shape == (len(set(proxy.steps.tolist())), 1)


@FEW
@given(
    st.integers(1, 30),
    st.integers(1, 8),
    st.floats(0.1, 1.0),
    st.sampled_from([{"every": 1}, {"every": 2}, {}]),
    DTYPES,
)
@pytest.mark.filterwarnings("ignore")
def test_decisions(n: int, batch: int, keep: float, every: dict[str, Any], dtype: torch.dtype) -> None:
    data = SelectionDataModule(DataLoader(digits(n, dtype), batch), asked(4, 4, dtype), keep=keep, **every)
    fit(Classifier(width=4).to(dtype), data)
    table = data.selection_report.to_pandas()
    assert sorted(table.sample_id) == list(range(n))
    assert table.score.notna().all() and table.weight.between(0, 1).all()
    assert (table.weight > 0).sum() >= math.ceil(n / batch)
