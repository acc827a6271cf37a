"""Groups as users give them, from replays and from logs, and kept by a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from modules import Classifier, digits, fit, loader
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.errors import ConfigurationError
from lightning_influence.report.groups import Groups
from lightning_influence.report.membership import named_groups
from lightning_influence.run.batches import to_dtype
from lightning_influence.trust.retraining import leave_one_out, recorded_run

GROUPS = {"even": range(0, 48, 2), "first": range(6), "never seen": [70]}


def optimizer(module: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=3e-4)


class SeesTheBatch(Classifier):
    """Samples are centred over their batch, so only a rerun says what leaves with one."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x - x.mean(0)), y)


def groups_of(report: InfluenceReport) -> Groups:
    assert report.groups is not None
    return report.groups


def each_loss(module: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return torch.nn.functional.cross_entropy(module.net(x), y, reduction="none")


def trained(make: Any, log: Path, record: str) -> tuple[Any, list[Any]]:
    module = make(optimizer, width=8)
    fit(module, loader(digits(48), 8), InfluenceCallback(log, record=record), max_epochs=2)  # type: ignore[arg-type]
    return module, list(DataLoader(torch.utils.data.Subset(digits(60), range(48, 60)), 12))


@pytest.mark.parametrize("make", [Classifier, SeesTheBatch])
def test_groups_are_those_of_retraining(make: Any, tmp_path: Path) -> None:
    module, queries = trained(make, tmp_path, "replay")
    options: dict[str, Any] = {"data": digits(48), "groups": GROUPS, "samples": (), "progress": False}
    report = attribute(tmp_path, queries=queries, model=module, query_loss=each_loss, **options)
    assert groups_of(report).names == list(GROUPS) and list(groups_of(report).sizes) == [24, 6, 0]
    assert groups_of(report).members == [[*range(0, 48, 2)], [*range(6)], []], "of those that the run consumed"
    assert report.provenance.removals is not None
    assert report.provenance.removals.by == ("shares" if make is Classifier else "rerun")
    (query,) = (to_dtype(q, torch.float64) for q in queries)

    def losses(m: Any) -> torch.Tensor:
        with torch.no_grad():
            return each_loss(m, query)

    run = recorded_run(tmp_path, lambda: make(optimizer, width=8), digits(48), dtype=torch.float64)
    removed = [frozenset(ids) for ids in list(GROUPS.values())[:2]]
    truth = leave_one_out(run, removed, losses, progress=False)
    found = groups_of(report).scores
    assert float((found[:2] - truth).norm() / truth.norm()) < 0.03
    assert float(found[2].abs().max()) < 1e-5 * float(truth.norm())
    assert groups_of(report).as_sizes[:2] == [True, True], "where they are that near, they may be read so"


def test_a_bend_is_how_far_the_losses_are_from_straight_lines(tmp_path: Path) -> None:
    """Of a run of one step, whose removals move the parameters just as the optimizer does by itself."""

    def at_rate(module: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), lr=0.03)

    module, train = Classifier(at_rate, width=8), digits(8)
    fit(module, loader(train, 8), InfluenceCallback(tmp_path, record="replay"))
    query = next(iter(loader(digits(30), 30)))
    options: dict[str, Any] = {"queries": [query], "model": module, "data": train, "progress": False}
    report = attribute(tmp_path, **options, query_loss=each_loss, groups={"two": [0, 5], "none": [99]})
    less = Classifier(at_rate, width=8)
    fit(less, loader(torch.utils.data.Subset(train, [1, 2, 3, 4, 6, 7]), 6))
    change = each_loss(less, query) - each_loss(module, query)
    moves = [p.detach() - q.detach() for p, q in zip(less.parameters(), module.parameters(), strict=True)]
    _, line = torch.func.jvp(
        lambda *values: each_loss(at_values(module, values), query),
        tuple(p.detach() for p in module.parameters()),
        tuple(moves),
    )
    groups = groups_of(report)
    assert groups.bends is not None and groups.bends[0] == pytest.approx(
        float((change - line).norm() / line.norm()), rel=1e-3
    )
    assert groups.bends[0] > 0.1 and groups.bends[1] is None and groups.as_sizes == [False, False]
    report.save(tmp_path / "report.safetensors")
    again = groups_of(InfluenceReport.load(tmp_path / "report.safetensors"))
    assert again.bends == groups.bends and list(again.to_pandas().columns)[-3:] == ["bend", "as_size", "read_as"]
    assert "rank only" in report.to_html(tmp_path / "page.html").read_text()
    asked = attribute(tmp_path, **options, query_loss=each_loss, target="mean", groups={"two": [0, 5]})
    expected = float((change.mean() - line.mean()).abs() / line.mean().abs())
    assert groups_of(asked).bends == [pytest.approx(expected, rel=1e-2)]
    tangent = attribute(tmp_path, **options, query_loss=each_loss, groups={"two": [0, 5]}, response="tangent")
    assert groups_of(tangent).bends is None and groups_of(tangent).as_sizes == [False]


def at_values(module: Any, values: Any) -> Any:
    """The module as a thing with a ``net``, at other parameters."""
    names = [name for name, _ in module.named_parameters()]
    at = {name.removeprefix("net."): value for name, value in zip(names, values, strict=True)}
    return SimpleNamespace(net=lambda x: torch.func.functional_call(module.net, at, (x,)))


def test_gradient_logs_know_groups(tmp_path: Path) -> None:
    module, queries = trained(Classifier, tmp_path, "both")
    labels = ["even" if i % 2 == 0 else None for i in range(48)]
    options: dict[str, Any] = {"queries": queries, "model": module, "target": "mean", "progress": False}
    replayed, logged = (
        attribute(tmp_path, **options, data=digits(48), groups=labels, curvature=c) for c in ("hessian", "none")
    )
    assert len(logged.sample_ids) == 48 and groups_of(logged).names == ["even"]
    # without curvature the two differ by little: the learning rate is small
    torch.testing.assert_close(groups_of(logged).scores, groups_of(replayed).scores, rtol=0.2, atol=1e-5)
    first_order = attribute(tmp_path, **options, groups=labels, curvature="none", response="tangent")
    assert not torch.equal(groups_of(first_order).scores, groups_of(logged).scores)
    assert not groups_of(first_order).nonlinearity.any()


def test_a_report_keeps_its_groups(tmp_path: Path) -> None:
    module, queries = trained(Classifier, tmp_path / "log", "gradients")
    options: dict[str, Any] = {"queries": queries, "model": module, "progress": False}
    report = attribute(tmp_path / "log", **options, groups={"=1+1": [0, 5], "b": [1]})
    report.save(tmp_path / "report.safetensors")
    again = groups_of(InfluenceReport.load(tmp_path / "report.safetensors"))
    assert torch.equal(again.scores, groups_of(report).scores) and again.names == groups_of(report).names
    table = again.to_pandas()
    assert list(table.columns) == ["group", "samples", *map(str, range(12)), "per_sample", "nonlinearity"]
    torch.testing.assert_close(torch.tensor(table[["3"]].to_numpy()), groups_of(report).scores[:, 3:4])
    torch.testing.assert_close(
        torch.tensor(table.per_sample.to_numpy()), groups_of(report).scores.double().mean(1) / torch.tensor([2, 1])
    )
    groups_of(report).to_csv(tmp_path / "groups.csv")
    assert pd.read_csv(tmp_path / "groups.csv").group[0] == "'=1+1"
    assert again.members == groups_of(report).members == [[0, 5], [1]]
    before = replace(groups_of(report), members=None)  # as an older version wrote it
    older = InfluenceReport(report.rows, query_ids=report.query_ids, groups=before)
    older.save(tmp_path / "older.safetensors")
    read = groups_of(InfluenceReport.load(tmp_path / "older.safetensors"))
    assert read.members is None and torch.equal(read.scores, again.scores) and list(read.sizes) == [2, 1]
    with pytest.raises(ConfigurationError, match="do not fit the ids of their members"):
        replace(before, members=[[0, 5], [1, 2]])
    without = attribute(tmp_path / "log", **options)
    assert without.groups is None
    assert torch.equal(without.scores, report.scores)


def test_queries_in_turns_are_the_same(tmp_path: Path) -> None:
    module, queries = trained(Classifier, tmp_path, "replay")
    options: dict[str, Any] = {"queries": queries, "model": module, "data": digits(48), "progress": False}
    whole, turns = (
        attribute(tmp_path, **options, groups=GROUPS, samples=[3], max_memory=memory) for memory in (2**32, 2**20)
    )
    torch.testing.assert_close(groups_of(whole).scores, groups_of(turns).scores)
    assert groups_of(whole).bends == pytest.approx(groups_of(turns).bends, rel=1e-3)
    torch.testing.assert_close(whole.scores, turns.scores)
    assert whole.sample_ids.tolist() == [3]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "names no group"),
        ([None, None], "names no group"),
        ({1: [0], "1": [2]}, "one name"),
        ({"a": ["x"]}, "'a' does not hold sample ids"),
        ({"a": [-1]}, "count from 0"),
        ({"a": [0.5]}, "count from 0"),
        ({"a": []}, "count from 0"),
        ({"a": [1000]}, "consumed none"),
    ],
)
def test_groups_that_are_none_are_refused(groups: Any, message: str, tmp_path: Path) -> None:
    if message != "consumed none":
        with pytest.raises(ConfigurationError, match=message):
            named_groups(groups)
        return
    module, queries = trained(Classifier, tmp_path, "gradients")
    with pytest.raises(ConfigurationError, match=message):
        attribute(tmp_path, queries=queries, model=module, groups=groups, progress=False)


def test_labels_of_any_kind() -> None:
    assert named_groups(torch.tensor([1, 0, 1])) == {"1": [0, 2], "0": [1]}
    assert named_groups({"a": torch.tensor([4, 2, 4])}) == {"a": [2, 4]}
