"""Selection: decisions against really training without the samples, and runs that are put back bit for bit."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Classifier, digits
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceReport, SelectionDataModule, attribute
from lightning_influence.core.sweep import Method
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedTrajectory
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.run.random_state import read_random_state
from lightning_influence.selection.lookahead import Candidates, Rollout, look_ahead
from lightning_influence.selection.policies import Fraction, Soft, Threshold, decide, stepwise

BATCH = 8


def scheduled(module: Any) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(n: int = 48, dtype: torch.dtype = torch.float32, **options: Any) -> DataLoader[Any]:
    x, y = digits(n).tensors
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(x.to(dtype), y), BATCH, shuffle=True, generator=generator, **options)


def target(dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    x, y = digits(80).tensors
    return DataLoader(TensorDataset(x[60:].to(dtype), y[60:]), 20)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    return L.Trainer(callbacks=list(callbacks), **settings)


def target_loss(module: Any, batches: DataLoader[Any]) -> float:
    (x, y), *_ = list(batches)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module.net(x), y))


def state_of(run: L.Trainer) -> dict[str, Any]:
    """Everything that a selection round must leave as it is."""
    module = run.lightning_module
    return copy.deepcopy(
        {
            "module": module.state_dict(),
            "optimizer": run.optimizers[0].state_dict(),
            "schedulers": [c.scheduler.state_dict() for c in run.lr_scheduler_configs],
            "random": read_random_state(),
            "training": [m.training for m in module.modules()],
            "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
            "required": [p.requires_grad for p in module.parameters()],
        }
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class LooksAhead(L.Callback):
    """In the middle of a run, compares look-ahead scores with stepping on without each sample."""

    def __init__(self, horizon: int, batches: list[Any], at: int = 3, curvature: str = "hessian") -> None:
        self.horizon, self.batches, self.at, self.curvature = horizon, batches, at, curvature

    def on_train_batch_start(self, run: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.at:
            return
        before = state_of(run)
        candidates = [[Candidates(b, torch.arange(i * BATCH, (i + 1) * BATCH))] for i, b in enumerate(self.batches)]
        asked = target(torch.float64)
        method = Method(self.curvature if self.horizon else "none", "finite", min(8, self.horizon))  # type: ignore[arg-type]
        self.scores = torch.cat(look_ahead(run, candidates, asked, self.horizon, method, 2))
        assert same(before, state_of(run)), "the round left a trace"
        self.truth = torch.tensor(
            [self._effect(run, module, asked, step, row) for step in range(2) for row in range(BATCH)]
        )

    def _effect(self, run: L.Trainer, module: Any, asked: Any, step: int, row: int) -> float:
        losses = []
        for removed in (None, row):
            twin = copy.deepcopy(module)
            configured = scheduled(twin)
            optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
            optimizer.load_state_dict(copy.deepcopy(run.optimizers[0].state_dict()))
            scheduler.load_state_dict(copy.deepcopy(run.lr_scheduler_configs[0].scheduler.state_dict()))
            for group, now in zip(optimizer.param_groups, run.optimizers[0].param_groups, strict=True):
                group["lr"] = now["lr"]
            for i, (x, y) in enumerate(self.batches[: step + 1 + self.horizon]):
                keep = [j for j in range(len(y)) if not (i == step and j == removed)]
                optimizer.zero_grad()
                nn.functional.cross_entropy(twin.net(x[keep]), y[keep]).backward()
                optimizer.step()
                scheduler.step()
            losses.append(target_loss(twin, asked))
        return losses[1] - losses[0]


class RollsOut(L.Callback):
    """At every step, compares where the roll-out says that the next steps lead with torch's optimizer stepping on."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.steps = batches, 0

    def on_train_batch_start(self, run: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if run.global_step >= 4:
            return
        candidates = [[Candidates(b, torch.arange(BATCH))] for b in self.batches]
        twin = copy.deepcopy(module)
        configured = scheduled(twin)
        optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        optimizer.load_state_dict(copy.deepcopy(run.optimizers[0].state_dict()))
        scheduler.load_state_dict(copy.deepcopy(run.lr_scheduler_configs[0].scheduler.state_dict()))
        plan = Rollout(run, candidates)
        with ReplayTrajectory(module, plan, exact=False, progress=False) as ahead:
            for i, (x, y) in enumerate(self.batches):
                optimizer.zero_grad()
                nn.functional.cross_entropy(twin.net(x), y).backward()
                optimizer.step()
                scheduler.step()
                ahead.place(i + 1)
                for mine, real in zip(module.parameters(), twin.parameters(), strict=True):
                    torch.testing.assert_close(mine, real, rtol=1e-9, atol=1e-11)
                self.steps += 1


def test_a_roll_out_goes_where_the_optimizer_would() -> None:
    """From the first step on, where Adam's step count decides most about the size of a step."""
    check = RollsOut(list(loader(32, torch.float64)))
    trainer(check, precision="64-true", max_epochs=2).fit(Classifier(scheduled), loader(32, torch.float64))
    assert check.steps == 4 * 4


@pytest.mark.parametrize("horizon", [0, 3])
def test_scores_are_what_stepping_on_without_a_sample_does(horizon: int) -> None:
    batches = list(loader(48, torch.float64))
    check = LooksAhead(horizon, batches)
    module = Classifier(scheduled)
    trainer(check, precision="64-true").fit(module, loader(48, torch.float64))
    assert spearmanr(check.scores, check.truth).statistic > 0.98
    assert float((check.scores - check.truth).norm() / check.truth.norm()) < 0.1


def test_validation_is_that_of_the_wrapped_data_and_absent_without_one(recwarn: pytest.WarningsRecorder) -> None:
    class Training(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    class Both(Training):
        def val_dataloader(self) -> Any:
            return target()

    for data, validated in ((loader(), False), (Training(), False), (Both(), True)):
        run = trainer(enable_checkpointing=False)
        run.fit(Classifier(), SelectionDataModule(data, target()))
        assert ("val_loss" in run.callback_metrics) == validated
    assert not [w for w in recwarn if "Total length of" in str(w.message)]
    with pytest.raises(ConfigurationError, match="needs a target"):
        trainer().fit(Classifier(), SelectionDataModule(Training()))


def test_off_is_the_wrapped_run_bit_for_bit() -> None:
    plain, wrapped = Classifier(scheduled), Classifier(scheduled)
    trainer(max_epochs=2).fit(plain, loader())
    trainer(max_epochs=2).fit(wrapped, SelectionDataModule(loader(), target(), online_selection=False))
    assert same(plain.state_dict(), wrapped.state_dict())


@pytest.mark.parametrize("options", [{"every": 1}, {"every": 1, "rescore": 2}, {"every": "epoch"}, {"every": 2}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_keeping_everything_is_the_wrapped_run(options: dict[str, Any], accumulate: int) -> None:
    plain, selected = Classifier(scheduled), Classifier(scheduled)
    trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(plain, loader())
    data = SelectionDataModule(loader(), target(), keep=1.0, **options)
    trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(selected, data)
    torch.testing.assert_close(plain.state_dict(), selected.state_dict(), rtol=0, atol=0)
    assert len(data.selection_report.to_pandas()) == 96


@pytest.mark.parametrize(
    "options", [{"every": 1}, {"every": 1, "rescore": 3}, {"every": "epoch"}, {"every": 2, "horizon": 1}]
)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_training_goes_on_as_if_the_removed_were_never_there(options: dict[str, Any], clip: float | None) -> None:
    module = Classifier(scheduled)
    start = copy.deepcopy(module).double()
    asked = target(torch.float64)
    data = SelectionDataModule(loader(48, torch.float64), asked, keep=0.6, refresh_target_every=1, **options)
    trainer(gradient_clip_val=clip, precision="64-true").fit(module, data)
    table = data.selection_report.to_pandas()
    kept = table[table.weight > 0].sample_id.tolist()
    x, y = loader(48, torch.float64).dataset.tensors
    configured = scheduled(start)
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for i in range(6):
        ids = [z for z in table.sample_id[i * BATCH : (i + 1) * BATCH] if z in kept]
        assert len(ids) == 5
        optimizer.zero_grad()
        nn.functional.cross_entropy(start.net(x[ids]), y[ids]).backward()
        if clip:
            nn.utils.clip_grad_norm_(start.parameters(), clip)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(module.state_dict(), start.state_dict(), rtol=1e-9, atol=1e-11)


def test_full_batches_of_kept_samples_at_an_equal_number_of_steps() -> None:
    seen: list[int] = []

    class Sizes(L.Callback):
        def on_train_batch_start(self, run: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(len(batch[1]))

    data = SelectionDataModule(loader(), target(), keep=0.5, rebatch=True)
    run = trainer(Sizes(), max_epochs=2)
    run.fit(Classifier(scheduled), data)
    assert seen == [BATCH] * 12
    assert run.global_step == 12


def test_a_report_selects_offline(tmp_path: Path) -> None:
    scores = torch.arange(48.0)[:, None]
    report = InfluenceReport.from_rows(torch.arange(48), torch.zeros(48, dtype=torch.int64), scores)
    data = SelectionDataModule.from_report(loader(), report, keep=0.5, per="round")
    run = trainer(default_root_dir=tmp_path, logger=L.pytorch.loggers.CSVLogger(tmp_path))
    run.fit(Classifier(scheduled), data)
    table = data.selection_report.to_pandas()
    batches = table.groupby(table.index // BATCH)
    assert set(table[table.weight > 0].sample_id) - set(range(24, 48)) <= {
        int(b.sample_id[b.score.idxmax()]) for _, b in batches
    }, "only the floor keeps others"
    assert "selection/kept" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_workers_make_the_same_decisions() -> None:
    found = []
    for workers in (0, 2):
        data = SelectionDataModule(loader(num_workers=workers), target(), keep=0.5, every=2, horizon=1)
        module = Classifier(scheduled)
        trainer().fit(module, data)
        found.append((data.selection_report.to_pandas(), module.state_dict()))
    assert found[0][0].equals(found[1][0])
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("every", [1, "epoch"])
def test_a_resumed_run_makes_the_same_decisions(tmp_path: Path, every: Any) -> None:
    def fresh(**options: Any) -> tuple[Any, SelectionDataModule, L.Trainer]:
        x, y = digits(48).tensors
        ordered = DataLoader(TensorDataset(x, y), BATCH)
        data = SelectionDataModule(ordered, target(), keep=0.5, every=every, refresh_target_every=4)
        return Classifier(scheduled), data, trainer(**options)

    whole, data, run = fresh(max_epochs=3)
    run.fit(whole, data)
    first, part, run = fresh(max_epochs=1)
    run.fit(first, part)
    run.save_checkpoint(tmp_path / "one.ckpt")
    resumed, rest, run = fresh(max_epochs=3)
    run.fit(resumed, rest, ckpt_path=tmp_path / "one.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert rest.selection_report.to_pandas().equals(data.selection_report.to_pandas())


@pytest.mark.parametrize(
    "options", [{"every": "epoch"}, {"every": 2, "horizon": 1}, {"every": "epoch", "rebatch": True}]
)
@pytest.mark.parametrize("at", [2, 6, 9])
def test_a_run_resumed_inside_an_epoch_makes_the_same_decisions(
    tmp_path: Path, options: dict[str, Any], at: int
) -> None:
    def train(folder: Path, **fit: Any) -> tuple[Any, Any]:
        module, data = Classifier(scheduled), SelectionDataModule(loader(), target(), keep=0.5, **options)
        saves = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer(saves, max_epochs=2, enable_checkpointing=True).fit(module, data, **fit)
        return module.state_dict(), data.selection_report.to_pandas()

    whole, decided = train(tmp_path)
    resumed, again = train(tmp_path / "resumed", ckpt_path=tmp_path / f"step={at}.ckpt")
    assert same(whole, resumed)
    assert again.equals(decided)


def test_a_run_resumed_between_epochs_draws_the_next_one(tmp_path: Path) -> None:
    def train(folder: Path, **fit: Any) -> tuple[Any, Any]:
        module, data = Classifier(scheduled), SelectionDataModule(loader(), target(), keep=0.5, every="epoch")
        saves = ModelCheckpoint(folder, save_on_train_epoch_end=True, save_top_k=-1, filename="{epoch}")
        trainer(saves, max_epochs=3, enable_checkpointing=True).fit(module, data, **fit)
        return module.state_dict(), data.selection_report.to_pandas()

    whole, decided = train(tmp_path)
    resumed, again = train(tmp_path / "resumed", ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(whole, resumed)
    assert again.equals(decided)


@pytest.mark.parametrize(("options", "workers"), [({"every": "epoch"}, 0), ({"every": 2, "horizon": 1}, 2)])
def test_what_selection_lets_through_is_recorded(tmp_path: Path, options: dict[str, Any], workers: int) -> None:
    module = Classifier(scheduled)
    data = SelectionDataModule(loader(num_workers=workers), target(), keep=0.5, **options)
    trainer(InfluenceCallback(tmp_path, record="both"), max_epochs=2).fit(module, data)
    table, log = data.selection_report.to_pandas(), LoggedTrajectory(tmp_path)
    recorded = [z for t in range(len(log)) for z in log.record(t).sample_ids.tolist()]
    assert recorded == table[table.weight > 0].sample_id.tolist() and len(recorded) == 48
    exact = attribute(tmp_path, queries=target(), model=module, data=loader(), target="mean", progress=False)
    logged = attribute(tmp_path, queries=target(), model=module, target="mean", curvature="fisher", progress=False)
    assert exact.metadata["curvature"] == "hessian"
    assert exact.sample_ids.tolist() == logged.sample_ids.tolist() == sorted(set(recorded))


def test_a_run_selected_in_rounds_ends_with_a_report(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return target()

    module, data = Classifier(scheduled), SelectionDataModule(Data(), keep=0.5, every="epoch")
    callback = InfluenceCallback(tmp_path, record="both", report=True)
    trainer(callback, max_epochs=2).fit(module, data)
    expected = attribute(tmp_path, queries=target(), model=module, data=loader(), target="mean", progress=False)
    assert callback.report is not None
    assert torch.equal(callback.report.sample_ids, expected.sample_ids)
    assert torch.equal(callback.report.scores, expected.scores)
    assert (tmp_path / "report.html").exists()


def test_a_target_may_be_a_function() -> None:
    (x, y), *_ = list(target())

    def loss(module: Any) -> Tensor:
        return nn.functional.cross_entropy(module.net(x), y)

    tables = []
    for asked in (target(), loss):
        data = SelectionDataModule(loader(), asked, keep=0.5)
        trainer().fit(Classifier(scheduled), data)
        tables.append(data.selection_report.to_pandas())
    torch.testing.assert_close(torch.tensor(tables[0].score), torch.tensor(tables[1].score))


def test_what_does_not_go_together_is_refused() -> None:
    for options, message in (
        ({"horizon": -1}, "horizon=-1"),
        ({"every": 0}, "every=0"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": "best"}, "keep='best'"),
        ({"keep": Soft()}, "Soft weighs gradients"),
        ({"every": 1, "rebatch": True}, "rebatch=True"),
        ({"keep": "positive", "rescore": 2}, "rescore=2"),
        ({"refresh_target_every": 0}, "refresh_target_every=0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            SelectionDataModule(loader(), target(), **options)
    with pytest.raises(ConfigurationError, match="needs a target"):
        trainer().fit(Classifier(scheduled), SelectionDataModule(loader()))


@given(st.integers(1, 40), st.floats(0.05, 1.0), st.integers(1, 5), st.integers(0, 2**16))
def test_fractions(n: int, fraction: float, n_batches: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, batches = torch.randn(n, generator=generator), torch.randint(n_batches, (n,), generator=generator)
    for per in ("batch", "round"):
        weights = Fraction(fraction, per)(scores, torch.arange(n), batches)
        for group in batches.unique() if per == "batch" else [None]:
            members = torch.ones(n, dtype=torch.bool) if group is None else batches == group
            kept, gone = scores[members & (weights > 0)], scores[members & (weights == 0)]
            assert len(kept) == round(fraction * int(members.sum()))
            assert not len(kept) or not len(gone) or kept.min() >= gone.max()
    portions = math.prod(p.fraction for p in stepwise(Fraction(fraction), 4))  # type: ignore[attr-defined]
    assert portions == pytest.approx(fraction)


def test_a_floor_keeps_training_alive() -> None:
    scores, batches = -torch.arange(1.0, 21.0), torch.arange(20) // 10
    with pytest.warns(UserWarning, match="floor=0.2"):
        weights = decide(Threshold(), scores, torch.arange(20), batches, floor=0.2)
    assert weights.nonzero()[:, 0].tolist() == [0, 1, 10, 11]
    with pytest.raises(ConfigurationError, match="20 weights"):
        decide(lambda s, i, b: s, scores, torch.arange(20), batches, floor=0.2)


def test_soft_weights_weigh_the_gradient() -> None:
    module = Classifier(scheduled)
    start = copy.deepcopy(module)
    data = SelectionDataModule(loader(16), target(), keep=Soft(), every=1)
    trainer(max_steps=1).fit(module, data)
    table = data.selection_report.to_pandas()
    ids, weights = table.sample_id.tolist(), torch.tensor(table.weight)
    assert 0.05 < float(weights.min()) < float(weights.max()) < 0.95
    x, y = digits(16).tensors
    optimizer = scheduled(start)["optimizer"]
    (
        nn.functional.cross_entropy(start.net(x[ids]), y[ids], reduction="none") * weights / weights.sum()
    ).sum().backward()
    optimizer.step()
    torch.testing.assert_close(module.state_dict(), start.state_dict(), rtol=1e-4, atol=1e-6)
