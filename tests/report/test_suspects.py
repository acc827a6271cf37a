"""A report's suspects: those of the log, with their harm beside them, or without a log those that harm."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from modules import Classifier, digits, fit, loader
from pandas.testing import assert_frame_equal
from torch.utils.data import TensorDataset

from lightning_influence import InfluenceCallback, InfluenceReport, attribute, suspects, training_dynamics
from lightning_influence.errors import ConfigurationError

N, SCORED = 60, range(0, 60, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier, TensorDataset, InfluenceReport]:
    """A run over digits of which a tenth has a wrong label, and the scores of half of them."""
    log = tmp_path_factory.mktemp("suspects") / "log"
    x, y = digits(N + 12).tensors
    labels = y[:N].clone()
    labels[::10] = (labels[::10] + 3) % 10
    train, module = TensorDataset(x[:N], labels), Classifier(width=8)
    fit(module, loader(train, 10), InfluenceCallback(log, record="replay"), max_epochs=3)
    report = attribute(
        log, queries=[(x[N:], y[N:])], model=module, data=train, samples=SCORED, response="tangent", progress=False
    )
    return log, module, train, report


def test_with_dynamics_they_are_those_of_the_log_with_their_harm(
    run: tuple[Path, Classifier, TensorDataset, InfluenceReport],
) -> None:
    log, module, train, report = run
    size = report.scores.double().square().mean(0).sqrt()
    for k in (None, 7):
        for more in ({}, {"model": module, "data": train}):
            alone, found = suspects(log, k, **more), report.suspects(k, dynamics=training_dynamics(log, **more))
            assert_frame_equal(found[list(alone.columns)], alone)
            assert list(found.columns[len(alone.columns) :]) == ["score", "relative_harm", "harmed"]
            for row in found.itertuples():
                if row.sample_id not in SCORED:
                    assert np.isnan([row.score, row.relative_harm, row.harmed]).all()
                    continue
                own = report.scores[report.sample_ids.tolist().index(row.sample_id)].double()
                assert row.score == pytest.approx(float(own.mean()), rel=1e-5, abs=1e-12)
                harm = sum(max(0.0, -float(s / t)) for s, t in zip(own, size, strict=True)) / len(own)
                assert row.relative_harm == pytest.approx(harm, rel=1e-5)
                assert row.harmed == pytest.approx(float((own < 0).double().mean()))
            ids = found.sample_id.tolist()
            assert {z in SCORED for z in ids} == {True, False}, "some with scores and some without"
            assert ids != report.suspects(k).sample_id.tolist()
            assert report.select(k, by="suspicion", dynamics=training_dynamics(log, **more)) == ids
    with pytest.raises(ConfigurationError, match="give by='suspicion'"):
        report.select(3, dynamics=training_dynamics(log))


def test_the_column_s_old_name_reads_it_with_a_warning() -> None:
    report = InfluenceReport.from_rows(torch.arange(9), torch.zeros(9, dtype=torch.int64), torch.randn(9, 3))
    table = report.suspects(5)
    assert "suspicion" not in table.columns
    for read in (lambda: table.suspicion, lambda: table["suspicion"], lambda: table.head(5).suspicion):
        with pytest.warns(DeprecationWarning, match="suspicion is the old word for relative_harm") as warned:
            assert read().tolist() == table.relative_harm.tolist()
        assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table.relative_harm.tolist() == table["relative_harm"].tolist()
        own = pd.DataFrame(table).assign(suspicion=1.0)
        assert table.assign(suspicion=1.0).suspicion.tolist() == own.suspicion.tolist() == [1.0] * 5
