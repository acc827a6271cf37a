"""Replay: exact curvature of real Lightning runs, held to unrolled autograd and to retraining."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import Classifier, digits, fit, forged, loader, split_digits, two_groups
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.core import curvature
from lightning_influence.core.optimizers import UPDATES, step
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.errors import ConfigurationError, CurvatureUnavailable, ReplayDrift
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.scoring.attribution import open_trajectory
from lightning_influence.scoring.queries import query_gradients, query_losses
from lightning_influence.trust.retraining import leave_one_out, recorded_run


def adamw(lr: float, betas: tuple[float, float]):  # type: ignore[no-untyped-def]
    return lambda m: torch.optim.AdamW(m.parameters(), lr=lr, betas=betas)


def double(data: Any) -> list[Any]:
    return [tuple(t.double() if t.is_floating_point() else t for t in data.tensors)]


def replayed(tmp_path: Path, module: Any, data: Any, batch: int = 16, **options: Any) -> Path:
    callback = {"record": "replay", **options.pop("callback", {})}
    fit(module, loader(data, batch), InfluenceCallback(tmp_path / "log", **callback), **options)
    return tmp_path / "log"


def test_gradient_of_the_run_equals_unrolled_autograd(tmp_path: Path) -> None:
    """D loss / d weight of every (sample, step), through the whole run at once, float64."""
    train, val = split_digits(20, 3, torch.float64)
    module = Classifier(two_groups, width=4)
    log = replayed(tmp_path, module, train, 5, precision="64-true", callback={"snapshot_every": 3})
    queries = double(val)
    with open_trajectory(log, module, "hessian") as run:
        gradients = query_gradients(module, queries, list(run.sizes), run.select)
        rows = sweep(run, gradients, Method("hessian", "tangent", counterfactual="zero"))
        records = [run.record(t) for t in range(len(run))]
        start = {k: p.clone() for k, p in run.plan.snapshot(0).parameters.items()}

    weights = torch.zeros(len(rows.sample_ids), dtype=torch.float64, requires_grad=True)
    parameters, row = start, 0
    moments = {k: tuple(torch.zeros_like(p) for _ in range(2)) for k, p in start.items()}
    x, y = train.tensors
    for record in records:
        ids = record.sample_ids
        values = {k: p.requires_grad_() if p.is_leaf else p for k, p in parameters.items()}
        logits = functional_call(module.net, {k.removeprefix("net."): v for k, v in values.items()}, (x[ids],))
        losses = nn.functional.cross_entropy(logits, y[ids], reduction="none")
        loss = ((1 - weights[row : row + len(ids)]) * losses).mean()
        grads = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        row += len(ids)
        for (k, p), g in zip(values.items(), grads, strict=True):
            parameters[k], moments[k] = step(UPDATES["adam"], p, moments[k], g, record.hyper[k])
    qx, qy = queries[0]
    logits = functional_call(module.net, {k.removeprefix("net."): v for k, v in parameters.items()}, (qx,))
    final = nn.functional.cross_entropy(logits, qy, reduction="none")
    reference = torch.stack([torch.autograd.grad(f, weights, retain_graph=True)[0] for f in final], 1)
    assert (rows.scores - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("lr", [1e-3, 1e-4])
@pytest.mark.parametrize("counterfactual", ["drop", "zero"])
def test_finite_response_reproduces_retraining(lr: float, counterfactual: str, tmp_path: Path) -> None:
    train, val = split_digits(320, 20)
    make = adamw(lr, (0.9, 0.95))
    module = Classifier(make)
    log = replayed(tmp_path, module, train, 16, max_epochs=2)
    report = attribute(log, queries=DataLoader(val, 20), model=module, target="mean", counterfactual=counterfactual)
    assert report.metadata["curvature"] == "hessian"
    run = recorded_run(log, lambda: Classifier(make), train, dtype=torch.float64)
    chosen = list(range(0, 320, 16))
    queries = double(val)
    truth = leave_one_out(run, chosen, lambda m: query_losses(m, queries).mean()[None], counterfactual=counterfactual)
    scores = report.scores[chosen].double()
    assert spearmanr(scores[:, 0], truth[:, 0]).statistic >= 0.998  # one swap of neighbours among 20 costs 0.0015
    assert (scores - truth).norm() <= 0.05 * truth.norm()


OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {"gradient_clip_val": 0.5},
    "accumulated": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "accumulated and clipped by value": {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.02,
        "gradient_clip_algorithm": "value",
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_replay_arrives_at_its_snapshots(name: str, tmp_path: Path) -> None:
    """Schedules, groups, clipping, accumulation: the records of a replay are those of the log."""
    module = Classifier(two_groups)
    callback = {"record": "both", "snapshot_every": 4}
    log = replayed(tmp_path, module, digits(110), 24, max_epochs=2, callback=callback, **OPTIONS[name])
    with open_trajectory(log, module, "hessian") as replay, open_trajectory(log, module, "fisher") as logged:
        assert isinstance(replay, ReplayTrajectory)
        assert len(replay) == len(logged)
        tolerance = 5e-2 if name == "bf16" else 1e-4
        for t in range(len(replay)):
            a, b = replay.record(t), logged.record(t)
            assert torch.equal(a.sample_ids, b.sample_ids)
            assert a.hyper == b.hyper
            assert a.clip.raw_norm == pytest.approx(b.clip.raw_norm, rel=tolerance)
            for k in a.gradients:
                assert (a.gradients[k] - b.gradients[k]).norm() <= tolerance * b.gradients[k].norm()
                difference = replay.shares(t)[k].dense() - logged.shares(t)[k].dense()
                assert difference.norm() <= tolerance * logged.shares(t)[k].dense().norm()
        assert len(replay.drift) >= 2
        assert max(replay.drift.values()) < tolerance


class Noisy(Classifier):
    """Dropout, and noise of the module's own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = nn.functional.dropout(x, 0.3, self.training) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return nn.functional.cross_entropy(self.net(x + 0.1 * torch.randn_like(x)), y)


class Augmented(Dataset[Any]):
    """Random augmentation in the dataset, in the main process."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        x, y = digits(64)[index]
        return x + 0.3 * torch.randn_like(x), y


@pytest.mark.parametrize("store_batches", [False, True])
def test_dropout_and_augmentation_are_reproduced(store_batches: bool, tmp_path: Path) -> None:
    module = Noisy()
    callback = {"record": "both", "store_batches": store_batches}
    log = replayed(tmp_path, module, Augmented(), 16, max_epochs=2, callback=callback)
    data = None if store_batches else loader(Augmented())
    with open_trajectory(log, module, "hessian", data) as replay, open_trajectory(log, module, "fisher") as logged:
        for t in range(len(replay)):
            for k, gradient in logged.record(t).gradients.items():
                torch.testing.assert_close(replay.record(t).gradients[k], gradient, rtol=1e-4, atol=1e-7)
            vectors = {
                k: torch.randn(2, d, generator=torch.Generator().manual_seed(t)) for k, (d, _) in replay.sizes.items()
            }
            product = replay.curvature_product(t, "hessian", vectors)
            again = replay.curvature_product(t, "hessian", vectors)
            assert all(torch.equal(product[k], again[k]) for k in product), "the same random numbers every time"


def test_many_queries_are_single_ones_together(tmp_path: Path) -> None:
    train, val = split_digits(64, 5)
    module = Classifier()
    log = replayed(tmp_path, module, train, 16, max_epochs=2)
    together = attribute(log, queries=DataLoader(val, 5), model=module).scores
    for i in range(5):
        one = attribute(log, queries=[tuple(t[i : i + 1] for t in val.tensors)], model=module).scores
        torch.testing.assert_close(together[:, i : i + 1], one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("curvature", ["gauss_newton", "fisher", "none"])
def test_every_curvature_from_a_replay_log(curvature: str, tmp_path: Path) -> None:
    train, val = split_digits(64, 5)
    module = Classifier()
    log = replayed(tmp_path, module, train, 16, callback={"record": "both"})
    report = attribute(log, queries=DataLoader(val, 5), model=module, curvature=curvature)  # type: ignore[arg-type]
    assert report.metadata["curvature"] == curvature
    only = replayed(tmp_path / "only", Classifier(), train, 16)
    same = attribute(only, queries=DataLoader(val, 5), model=module, curvature=curvature)  # type: ignore[arg-type]
    torch.testing.assert_close(same.scores, report.scores, rtol=1e-3, atol=1e-7)


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    train, val = split_digits(64, 5)
    module = Classifier()
    log = replayed(tmp_path, module, train, 16)
    module.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    attribute(log, queries=[val.tensors], model=module)
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_hooks for m in module.modules())


def test_a_replay_that_goes_elsewhere_is_an_error(tmp_path: Path) -> None:
    module = Classifier()
    log = replayed(tmp_path, module, digits(64), 16, callback={"store_batches": False})
    queries = DataLoader(digits(4), 4)
    other = digits(128).tensors
    # the last of two segments of two steps is the first to be replayed
    with pytest.raises(ReplayDrift, match=r"step 2.*another batch"):
        attribute(log, queries=queries, model=module, data=torch.utils.data.TensorDataset(other[0].flip(0), other[1]))
    with pytest.raises(ConfigurationError, match="store_batches=True"):
        attribute(log, queries=queries, model=module)
    attribute(log, queries=queries, model=module, data=digits(64))


def test_a_log_of_gradients_cannot_be_replayed(tmp_path: Path) -> None:
    module = Classifier()
    log = replayed(tmp_path, module, digits(64), 16, callback={"record": "gradients"})
    with pytest.raises(CurvatureUnavailable, match="record='replay'"):
        attribute(log, queries=DataLoader(digits(4), 4), model=module, curvature="hessian")


def test_frozen_parameters_are_not_stored(tmp_path: Path) -> None:
    module = Classifier()
    module.net[0].requires_grad_(False)
    log = replayed(tmp_path, module, digits(64), 16)
    with open_trajectory(log, module) as run:
        assert list(run.sizes) == ["net.2.weight", "net.2.bias", "net.4.weight", "net.4.bias"]
        assert set(run.plan.snapshot(0).parameters) == set(run.sizes)
    attribute(log, queries=DataLoader(digits(4), 4), model=module)


def test_a_replay_that_is_closed_holds_nothing(tmp_path: Path) -> None:
    """Autograd's graphs are freed with it: a look-ahead makes one replay after another."""

    def batches() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) and o.shape == (7, 64) for o in gc.get_objects())

    module, data = Classifier(), digits(28)
    fit(module, loader(data, 7), InfluenceCallback(tmp_path / "log", record="replay"))
    before = batches()
    for _ in range(3):
        attribute(tmp_path / "log", queries=[data.tensors], model=module, target="mean", progress=False)
    assert batches() <= before


def test_products_of_many_queries_go_forward_through_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same Hessian products as backwards; where one does not hold against the other, backwards it is."""
    train, _ = split_digits(16, 4)
    net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    module = Classifier(net=net)
    log = replayed(tmp_path, module, train, 8)
    with open_trajectory(log, module) as run:
        vectors = {k: torch.randn(20, d) for k, (d, _) in run.sizes.items()}
        forwards = run.curvature_product(1, "hessian", vectors)
        assert isinstance(run, ReplayTrajectory) and run._forward
        few = run.curvature_product(1, "hessian", {k: v[:3] for k, v in vectors.items()})  # backwards
    for name, product in few.items():
        torch.testing.assert_close(forwards[name][:3], product, rtol=1e-4, atol=1e-5)

    def wrong(*args, **kwargs):  # type: ignore[no-untyped-def]
        return {k: 1.01 * p for k, p in curvature.hessian_product(*args, **kwargs).items()}

    monkeypatch.setattr("lightning_influence.replay.trajectory.hessian_product", wrong)
    with open_trajectory(log, module) as run:
        found = run.curvature_product(1, "hessian", vectors)
        assert isinstance(run, ReplayTrajectory) and run._forward is False
    for name, product in few.items():
        torch.testing.assert_close(found[name][:3], product, rtol=1e-4, atol=1e-5)


class SometimesNaN(Classifier):
    """Its loss divides by something that a replay may find to be zero."""

    wrong = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.net[2].weight.sum() * float("nan") if self.wrong and batch_idx == 2 else loss


def test_a_replay_that_is_not_a_number_says_where(tmp_path: Path) -> None:
    module = SometimesNaN()
    log = replayed(tmp_path, module, digits(64))
    module.wrong = True
    type(module).wrong = True
    try:
        with pytest.raises(ReplayDrift, match=r"step 2: the replayed gradient of net\.2\.weight is not finite"):
            attribute(log, queries=[digits(4).tensors], model=module, data=digits(64), progress=False)
    finally:
        type(module).wrong = False


def test_a_step_that_makes_a_parameter_not_finite_says_so(tmp_path: Path) -> None:
    module = Classifier()
    log = replayed(tmp_path, module, digits(64))
    steps = iter(range(9))

    def forge(place: str, tensors: Any, meta: Any) -> None:
        if place == "step" and next(steps) == 1:
            meta["hyper"][0] |= {"weight_decay": 1e29, "lr": 1e29}

    wrong = forged(log, tmp_path / "forged", forge)
    with pytest.raises(
        ReplayDrift, match=r"step 1: the optimizer's step, replayed with .*makes net\.0\.weight not finite"
    ):
        attribute(wrong, queries=[digits(4).tensors], model=module, data=digits(64), progress=False)


@pytest.mark.parametrize("record", ["gradients", "replay"])
def test_parameters_in_half_precision_give_the_scores_of_double_precision_nearly(record: Any, tmp_path: Path) -> None:
    """A step is often less than their rounding, so a replay drifts, and the report says by how much."""
    train, val = split_digits(48, 8)
    reports = []
    for precision in ("64-true", "bf16-true"):
        module, log = Classifier(), tmp_path / precision
        fit(module, DataLoader(train, 8), InfluenceCallback(log, record=record), precision=precision, max_epochs=2)
        options: dict[str, Any] = {"queries": DataLoader(val, 4), "target": "mean", "progress": False}
        reports.append(attribute(log, model=module, **options))
    exact, half = (r.scores.double() for r in reports)
    assert (half - exact).norm() <= 0.1 * exact.norm()
    if record == "replay":
        assert 1e-3 < max(reports[1].metadata["replay_drift"].values()) < 0.2
