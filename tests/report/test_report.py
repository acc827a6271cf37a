"""The report's verbs that people read: suspects, influence over steps, figures, the notebook's cell."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modules import Classifier, digits, fit, loader
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.core.scores import RowScores
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.report.groups import Groups


def images(n: int = 40) -> TensorDataset:
    x, y = digits(n).tensors
    return TensorDataset(x.view(-1, 1, 8, 8), y)


def some_report(n: int = 40, q: int = 3) -> InfluenceReport:
    scores = torch.randn(n, q, generator=torch.Generator().manual_seed(0))
    metadata = {"curvature": "fisher", "response": "finite"}
    return InfluenceReport.from_rows(torch.arange(n), torch.arange(n) // 8, scores, metadata=metadata)


def test_suspects_are_ordered_by_harm_alone() -> None:
    """What a sample helps one query does not excuse what it does to another."""
    columns = [[2.0, -6.0, -2.0, 2.0], [2.0, 4.0, -2.0, -4.0]]  # root mean squares sqrt(12) and sqrt(10)
    scores = torch.tensor(columns).T
    report = InfluenceReport.from_rows(torch.tensor([10, 11, 12, 13]), torch.zeros(4, dtype=torch.int64), scores)
    found = report.suspects()
    assert found.sample_id.tolist() == [11, 13, 12]
    harm = [6 / 12**0.5 / 2, 4 / 10**0.5 / 2, (2 / 12**0.5 + 2 / 10**0.5) / 2]
    assert found.suspicion.tolist() == pytest.approx(harm)
    assert found.score.tolist() == pytest.approx([-1.0, -1.0, -2.0])
    assert found.harmed.tolist() == [0.5, 0.5, 1.0]
    assert report.suspects(4).sample_id.tolist() == [11, 13, 12, 10]
    assert report.suspects(1).sample_id.tolist() == [11]


def test_every_query_counts_alike_for_suspects() -> None:
    report = some_report()
    scaled = InfluenceReport.from_rows(
        report.rows.sample_ids, report.rows.steps, report.rows.scores * torch.tensor([1.0, 1e3, 1e-6])
    )
    assert scaled.suspects().sample_id.tolist() == report.suspects().sample_id.tolist()


def test_suspects_are_the_flipped_labels(tmp_path: Path) -> None:
    x, y = digits(360).tensors
    flipped = torch.arange(0, 300, 10)
    labels = y[:300].clone()
    labels[flipped] = (labels[flipped] + 5) % 10
    module = Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=5e-3), width=32)
    log = tmp_path / "log"
    fit(module, loader(TensorDataset(x[:300], labels), 32), InfluenceCallback(log, record="replay"), max_epochs=3)
    queries = DataLoader(TensorDataset(x[300:], y[300:]), 100)
    report = attribute(log, queries=queries, model=module, response="tangent", progress=False)
    first = report.suspects(60)
    assert sum(z in flipped.tolist() for z in first.sample_id) > 0.4 * len(flipped)  # by chance 0.2


@pytest.mark.parametrize("bins", [3, 5, 100])
def test_influence_over_time_keeps_the_total(bins: int) -> None:
    rows = some_report().rows
    first, helped, harmed = rows.over_time(bins)
    assert len(first) == min(bins, 5) and first[0] == 0 and (first.diff() > 0).all()
    sizes = [b - a for a, b in zip(first.tolist(), [*first.tolist()[1:], 5], strict=True)]
    totals = {True: 0.0, False: 0.0}
    for step, row in zip(rows.steps.tolist(), rows.scores.tolist(), strict=True):
        assert step < 5
        totals[sum(row) > 0] += sum(row) / len(row)
    assert float((helped * torch.tensor(sizes)).sum()) == pytest.approx(totals[True], rel=1e-5)
    assert float((harmed * torch.tensor(sizes)).sum()) == pytest.approx(totals[False], rel=1e-5)


def test_figures_show_every_sample_and_step() -> None:
    report = some_report()
    assert sum(bar.get_height() for bar in report.plot.histogram().axes[0].patches) == 40
    bars = report.plot.over_time().axes[0].patches
    assert len(bars) == 10  # helped and harmed at five steps
    assert sum(bar.get_height() for bar in bars) == pytest.approx(float(report.scores.mean(1).sum()), rel=1e-4)
    assert report.plot.over_time(bins=2).axes[0].patches[-1].get_x() == 3  # steps 0 to 2, and 3 to 4


def test_the_figure_of_samples_shows_the_extremes() -> None:
    report, data = some_report(), images()
    axes = report.plot.samples(data, k=3).axes
    assert len(axes) == 6
    for place, z in zip(axes, [*report.top(3).sample_id, *report.bottom(3).sample_id], strict=True):
        assert f"sample {z}, label {int(data[z][1])}" in place.get_title()
        shown = torch.tensor(place.images[0].get_array().tolist())
        torch.testing.assert_close(shown / 255, data[z][0][0], atol=1 / 255, rtol=0)
    whole = report.plot.samples(["a"] * 40, k=2, show=lambda _: Image.new("RGB", (5, 4)))
    assert whole.axes[0].images[0].get_array().shape == (4, 5, 3)
    with pytest.raises(ConfigurationError, match="shown as dict, but a figure shows images"):
        report.plot.samples(digits(40))


def test_a_notebook_shows_both_ends() -> None:
    report = some_report()
    cell = report._repr_html_()
    for row in [*report.top(5).itertuples(), *report.bottom(5).itertuples()]:
        assert f"<td>{row.sample_id}</td>" in cell
    assert "Most helpful" in cell and "Most harmful" in cell and "<svg" in cell and "fisher" in cell
    assert "<script" not in cell and "<style" not in cell  # it must not reach into the rest of the notebook


def test_a_report_is_saved_into_a_new_directory(tmp_path: Path) -> None:
    report = some_report()
    report.save(tmp_path / "new" / "er" / "report.safetensors")
    torch.testing.assert_close(
        InfluenceReport.load(tmp_path / "new" / "er" / "report.safetensors").scores, report.scores, atol=0, rtol=0
    )
    report.to_csv(tmp_path / "table" / "report.csv")
    report.to_parquet(tmp_path / "rows" / "report.parquet")
    assert (tmp_path / "table" / "report.csv").exists() and (tmp_path / "rows" / "report.parquet").exists()


@pytest.mark.parametrize(
    ("changed", "body", "told"),
    [
        ({}, None, "KeyError"),
        ({}, "{", "JSONDecodeError"),
        ({}, "[" * 100_000, "RecursionError"),
        ({}, '{"metadata": {}}', "query_ids"),
        ({}, '{"metadata": [1], "query_ids": null}', "cannot be read as a report"),
        ({}, '{"metadata": {}, "query_ids": 3}', "cannot be read as a report"),
        ({"steps": torch.tensor([0, 1, 2, 2**40])}, "ok", "steps from 0 to 1099511627776"),
        ({"steps": torch.tensor([0, 1, 2, -5])}, "ok", "steps from -5"),
        ({"steps": torch.rand(4)}, "ok", "expected integers"),
        ({"sample_ids": torch.rand(4)}, "ok", "expected integers"),
        ({"sample_ids": torch.zeros(4, 1, dtype=torch.int64)}, "ok", "rows of shapes"),
        ({"scores": torch.ones(4, 1, dtype=torch.int64)}, "ok", "expected integers"),
        ({"tangent": None}, "ok", "cannot be read as a report"),
    ],
)
def test_a_file_that_is_no_report_is_named(
    tmp_path: Path, changed: dict[str, torch.Tensor | None], body: str | None, told: str
) -> None:
    whole = {
        "sample_ids": torch.arange(4),
        "steps": torch.arange(4),
        "scores": torch.rand(4, 1),
        "tangent": torch.rand(4, 1),
    }
    metadata = {"format": "lightning-influence-report/1"}
    if body is not None:
        metadata["report"] = '{"metadata": {}, "query_ids": null}' if body == "ok" else body
    path = tmp_path / "report.safetensors"
    save_file({k: v for k, v in (whole | changed).items() if v is not None}, path, metadata)
    with pytest.raises(InfluenceError, match=re.escape(told)) as raised:
        InfluenceReport.load(path)
    assert str(path) in str(raised.value)


def test_a_late_step_costs_no_memory() -> None:
    late = InfluenceReport.from_rows(torch.arange(2), torch.tensor([0, 2**39]), torch.ones(2, 1))
    first, helped, harmed = late.rows.over_time(80)
    assert len(first) == 80 and float(helped[0]) * int(first[1]) == pytest.approx(1) and not harmed.any()
    assert len(late.plot.over_time().axes[0].patches) == 400


def test_the_error_proxy_is_drawn_against_the_truth() -> None:
    predicted, measured = torch.randn(5, 2), torch.randn(5, 2)
    axes = some_report().plot.proxy_against_truth(predicted, measured).axes[0]
    assert (
        axes.collections[0].get_offsets().tolist() == torch.stack([measured.flatten(), predicted.flatten()], 1).tolist()
    )
    assert "measured" in axes.get_xlabel() and "predicted" in axes.get_ylabel()
    with pytest.raises(ConfigurationError, match=r"\(5, 2\) predicted and \(5,\) measured"):
        some_report().plot.proxy_against_truth(predicted, measured[:, 0])


def test_groups_are_drawn_by_their_effect(tmp_path: Path) -> None:
    report = some_report()
    scores = torch.tensor([[1.0, 3.0, 2.0], [-4.0, -5.0, -6.0], [0.1, 0.2, 0.0]])
    rows = RowScores(torch.arange(3), torch.zeros(3, dtype=torch.int64), scores, scores)
    report.groups = Groups(["web", "$\\bad", "few"], [30, 10, 2], rows, report.query_ids, bends=[0.01, 0.5, None])
    axes = report.plot.groups().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$\\bad", "few", "web"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([-5.0, 0.1, 2.0])
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [True, True, False], "rank only"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rank at most"]
    report.plot.groups().savefig(tmp_path / "groups.png")
    two = report.plot.groups(k=2).axes[0]
    assert [label.get_text() for label in two.get_yticklabels()] == ["$\\bad", "web"]
    report.groups = replace(report.groups, bends=[0.0, 0.0, 0.0])
    assert report.plot.groups().axes[0].get_legend() is None
    with pytest.raises(ConfigurationError, match="k=0"):
        report.plot.groups(k=0)
    report.groups = None
    with pytest.raises(ConfigurationError, match="has no groups"):
        report.plot.groups()


def test_what_cannot_be_drawn_or_written_is_named(tmp_path: Path) -> None:
    report = some_report()
    with pytest.raises(ConfigurationError, match="bins=0"):
        report.plot.over_time(bins=0)
    with pytest.raises(ConfigurationError, match="k=0"):
        report.plot.samples(images(), k=0)
    report.metadata["loss"] = torch.ones(1)
    with pytest.raises(ConfigurationError, match="Tensor is not JSON serializable"):
        report.save(tmp_path / "report.safetensors")
