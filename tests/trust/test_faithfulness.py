"""The check of scores against retraining, and the error proxy as users call it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, digits, fit, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, attribute, check_faithfulness, error_proxy
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedTrajectory
from lightning_influence.run.batches import to_dtype
from lightning_influence.trust.faithfulness import CEILING
from lightning_influence.trust.retraining import leave_one_out, recorded_run


def optimizer(module: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=3e-3)


def trained(tmp_path: Path, record: str = "replay", **options: Any) -> tuple[Any, TensorDataset, list[Any]]:
    module, train = Classifier(optimizer, width=8), digits(48)
    fit(module, loader(train, 8), InfluenceCallback(tmp_path / "log", record=record), max_epochs=2, **options)  # type: ignore[arg-type]
    x, y = digits(60).tensors
    return module, train, list(DataLoader(TensorDataset(x[48:], y[48:]), 12))


def test_the_better_estimator_agrees_better(tmp_path: Path) -> None:
    module, train, queries = trained(tmp_path)
    check = check_faithfulness(
        tmp_path / "log", model=module, data=train, queries=queries, removals=12, subsets=4, progress=False
    )
    table = check.to_pandas().set_index("estimator")
    assert list(table.index) == ["SGD assumed", "first order", "finite", CEILING]
    assert table.spearman["finite"] > 0.98 > table.spearman["SGD assumed"]
    assert table.relative_error["finite"] < 0.05 < table.relative_error["first order"]
    assert table.lds["finite"] > 0.8
    assert check.levels["config"] > check.levels["algorithm"] > check.levels["system"]
    assert "order can be relied on" in str(check) and "read as a change of the loss" in str(check)
    report = attribute(tmp_path / "log", queries=queries, model=module, target="mean", progress=False)
    report.metadata |= check.trust
    text = report.to_html(tmp_path / "report.html").read_text()
    assert str(check.single[CEILING].spearman) in text and "order can be relied on" in text
    run = recorded_run(tmp_path / "log", lambda: Classifier(optimizer, width=8), train, dtype=torch.float64)
    ((x, y),) = (to_dtype(q, torch.float64) for q in queries)

    def losses(m: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(m.net(x), y, reduction="none")

    by_hand = leave_one_out(run, check.removals[:12], losses, progress=False)
    torch.testing.assert_close(check.truth[:12], by_hand, rtol=1e-9, atol=1e-12)


def test_groups_and_subsets_are_predicted_as_wholes(tmp_path: Path) -> None:
    module, train, queries = trained(tmp_path)
    options: dict[str, Any] = {"model": module, "data": train, "queries": queries, "ceiling": False, "progress": False}
    labels = [f"source {i % 4}" for i in range(48)]
    check = check_faithfulness(
        tmp_path / "log", **options, removals=3, subsets=4, subset_size=0.25, groups=labels, estimators={"finite": {}}
    )
    assert check.removals[7:] == [frozenset(range(i, 48, 4)) for i in range(4)]
    report = attribute(tmp_path / "log", queries=queries, model=module, data=train, groups=labels, progress=False)
    assert report.groups is not None
    torch.testing.assert_close(check.scores["finite"][7:], report.groups.scores.double())
    drawn = {str(i): sorted(subset) for i, subset in enumerate(check.removals[3:7])}
    joint = attribute(tmp_path / "log", queries=queries, model=module, data=train, groups=drawn, progress=False)
    assert joint.groups is not None and all(len(ids) == 12 for ids in drawn.values())
    torch.testing.assert_close(check.scores["finite"][3:7], joint.groups.scores.double())
    alone = torch.stack([report.scores[ids].double().sum(0) for ids in drawn.values()])
    assert float((check.scores["finite"][3:7] - alone).norm() / alone.norm()) > 0.05, "not the sums of single scores"
    summed = torch.stack([report.scores[i::4].double().sum(0) for i in range(4)])
    error = float((summed - check.truth[7:]).norm() / check.truth[7:].norm())
    assert check.groups["finite"].relative_error.value < 0.15 < error
    assert check.groups["finite"].n_removals == check.subsets["finite"].n_removals == 4
    assert check.to_pandas().groups_relative_error[0] == check.groups["finite"].relative_error.value
    assert "4 subsets and 4 groups" in repr(check)
    with pytest.raises(ConfigurationError, match="2 groups are too few"):
        check_faithfulness(tmp_path / "log", **options, groups={"a": [0], "b": [1]})


def test_an_interrupted_check_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, train, queries = trained(tmp_path)
    options: dict[str, Any] = {
        "model": module, "data": train, "queries": queries, "target": "mean", "ceiling": False, "progress": False,
        "removals": [1, 5, 7, 9], "estimators": {"finite": {}},
    }  # fmt: skip
    whole = check_faithfulness(tmp_path / "log", **options)
    first = check_faithfulness(tmp_path / "log", **{**options, "removals": [1, 5, 7]}, results=tmp_path / "done")
    with open(tmp_path / "done", "a") as file:
        file.write('{"what": "retraining", "removal": "9", "eff')
    asked: list[Any] = []

    import lightning_influence.trust.faithfulness as faithfulness

    real = faithfulness.each_effect

    def watched(run: Any, removals: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend(removals)
        return real(run, removals, *args, **kwargs)

    monkeypatch.setattr(faithfulness, "each_effect", watched)
    rest = check_faithfulness(tmp_path / "log", **options, results=tmp_path / "done")
    assert asked == [9]
    assert torch.equal(rest.truth, whole.truth) and torch.equal(first.truth, whole.truth[:3])
    again = check_faithfulness(tmp_path / "log", **options, results=tmp_path / "done")
    assert asked == [9] and torch.equal(again.truth, whole.truth)
    with_ceiling = check_faithfulness(tmp_path / "log", **{**options, "ceiling": True}, results=tmp_path / "done")
    assert asked == [9, 1, 5, 7, 9] and torch.equal(with_ceiling.truth, whole.truth)
    assert with_ceiling.single[CEILING].relative_error.value > 0
    for other in ({"counterfactual": "zero"}, {"queries": [tuple(t[:5] for t in queries[0])]}, {"dtype": None}):
        with pytest.raises(ConfigurationError, match="holds the retrainings of another check"):
            check_faithfulness(tmp_path / "log", **{**options, **other}, results=tmp_path / "done")


def test_the_seed_reaches_the_noise_of_the_ceiling(tmp_path: Path) -> None:
    module, train, queries = trained(tmp_path)
    options: dict[str, Any] = {"model": module, "data": train, "queries": queries, "target": "mean", "progress": False}
    options |= {"removals": [1, 5, 7], "estimators": {"finite": {}}}
    found = [check_faithfulness(tmp_path / "log", **options, seed=seed) for seed in (0, 0, 1)]
    errors = [check.single[CEILING].relative_error.value for check in found]
    assert errors[0] == errors[1] != errors[2]
    assert torch.equal(found[0].truth, found[2].truth)


def test_random_numbers_of_the_module_are_the_check_s_own(tmp_path: Path) -> None:
    """With dropout the truth does not depend on the caller's generator, and the ceiling says how little it repeats itself."""
    net = lambda: nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 10))
    module, train = Classifier(optimizer, net=net()), digits(48)
    fit(module, loader(train, 8), InfluenceCallback(tmp_path / "log", record="replay"))
    x, y = digits(60).tensors
    options: dict[str, Any] = {"model": module, "data": train, "queries": [(x[48:], y[48:])], "progress": False}
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(check_faithfulness(tmp_path / "log", **options, removals=12, target="mean"))
    assert torch.equal(found[0].truth, found[1].truth)
    assert found[0].single[CEILING].spearman.value < 0.8
    assert "reproducible only to" in found[0].conclusion


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    module, train, queries = trained(tmp_path, record="gradients")
    options: dict[str, Any] = {"model": module, "data": train, "queries": queries, "progress": False}
    with pytest.raises(ConfigurationError, match="make_model="):
        check_faithfulness(tmp_path / "log", **options)
    with pytest.raises(ConfigurationError, match="sample 99 was not used"):
        check_faithfulness(
            tmp_path / "log", **options, removals=[1, 2, 99], make_model=lambda: Classifier(optimizer, 8)
        )
    for wrong, message in (
        ({"subsets": 2}, "2 subsets are too few"),
        ({"removals": 0, "subsets": 5}, "0 removals are too few"),
        ({"estimators": {}}, "estimators is empty"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check_faithfulness(tmp_path / "log", **options, **wrong, make_model=lambda: Classifier(optimizer, 8))
    for wrong, message in (({"curvature": "none"}, "curvature='none'"), ({"pairs": []}, "pairs is empty")):
        with pytest.raises(ConfigurationError, match=message):
            error_proxy(tmp_path / "log", queries=queries, model=module, **wrong)


def test_proxy_predicts_the_error_of_first_order_scores(tmp_path: Path) -> None:
    """Against truth minus tangent, removals from one step, float64."""
    x, y = digits(60).tensors
    train, queries = TensorDataset(x[:48].double(), y[:48]), [(x[48:].double(), y[48:])]
    slow = lambda m: torch.optim.AdamW(m.parameters(), lr=3e-4)
    module = Classifier(slow, width=8)
    fit(module, loader(train, 8), InfluenceCallback(tmp_path / "log", record="replay"), precision="64-true")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    found = error_proxy(tmp_path / "log", queries=queries, model=module, target="mean", pairs=14, progress=False)
    assert found.curvature == "hessian"
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    proxy = found.proxies[1.0]
    pairs = list(zip(proxy.sample_ids.tolist(), proxy.steps.tolist(), strict=True))
    # in the first steps of Adam the removed share bends the run by more than a second variation can say
    later = [i for i, (_, step) in enumerate(pairs) if step > 1]

    def loss(m: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(m.net(queries[0][0]), queries[0][1])[None]

    run = recorded_run(tmp_path / "log", lambda: Classifier(slow, width=8).double(), train)
    truth = leave_one_out(run, [pairs[i] for i in later], loss, progress=False)
    missed = (truth - proxy.tangent[later])[:, 0]
    assert float((proxy.total[later, 0] - missed).norm() / missed.norm()) < 0.6
    assert torch.corrcoef(torch.stack([proxy.total[later, 0], missed]))[0, 1] > 0.8
    table = found.to_pandas()
    torch.testing.assert_close(
        torch.tensor((table.of_optimizer + table.of_curvature).to_numpy()), torch.tensor(table.error.to_numpy())
    )
    torch.testing.assert_close(
        torch.tensor((table.of_step + table.of_memory + table.of_curvature).to_numpy()),
        torch.tensor(table.second_order.to_numpy()),
    )


def test_curvature_part_shrinks_with_the_learning_rate_and_needs_no_data(tmp_path: Path) -> None:
    module, _, queries = trained(tmp_path, record="gradients")
    found = error_proxy(
        tmp_path / "log", queries=queries, model=module, target="mean", pairs=6, lr_factors=(0.1, 1.0), progress=False
    )
    assert found.curvature == "fisher"
    sizes = {f: float(p.curvature.norm() / p.tangent.norm()) for f, p in found.proxies.items()}
    assert 0 < sizes[0.1] < sizes[1.0], "Adam's own response does not depend on the learning rate, what follows does"
    assert found.relative()[1.0] == float(found.proxies[1.0].total.norm() / found.proxies[1.0].tangent.norm())
    curve, table = found.curve(), found.to_pandas()
    assert set(curve.index) == set(len(LoggedTrajectory(tmp_path / "log")) - 1 - table.step)
    last = table[(table.horizon == curve.index[0]) & (table.lr_factor == 1.0)]
    assert curve[1.0].iloc[0] == pytest.approx(math.sqrt((last.error**2).sum() / (last.tangent**2).sum()))
    assert [line.get_label() for line in found.plot().axes[0].lines] == ["lr_factor 0.1", "lr_factor 1.0"]
    exact = attribute(tmp_path / "log", queries=queries, model=module, target="mean", response="tangent").rows
    proxy = found.proxies[1.0]
    for i, (z, t) in enumerate(zip(proxy.sample_ids, proxy.steps, strict=True)):
        row = ((exact.sample_ids == z) & (exact.steps == t)).nonzero()[0, 0]
        torch.testing.assert_close(proxy.tangent[i].float(), exact.scores[row], rtol=1e-3, atol=1e-9)
