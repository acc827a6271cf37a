"""Selection from modules as people write them, against really stepping on without the samples, in float64."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence import SelectionDataModule
from lightning_influence.capture.step import StepOptions
from lightning_influence.core.sweep import Method
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.replay.removals import RemovalCheck
from lightning_influence.selection.lookahead import Candidates, look_ahead
from lightning_influence.selection.policies import Fraction, decide

N, BATCH = 24, 6


def data(n: int = N, seed: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


TARGET = data(10, seed=9)


def target_loss(module: Any) -> Tensor:
    x, y = TARGET.tensors
    return F.cross_entropy(module(x), y)


class Base(L.LightningModule):
    optimizer: Any = staticmethod(lambda p: torch.optim.AdamW(p, lr=1e-2))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.build()
        self.double()

    def build(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Sum(Base):
    """A sum over the batch; the size of a plain gradient step shows it."""

    optimizer = staticmethod(lambda p: torch.optim.SGD(p, lr=1e-3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


class ClassWeights(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
        return F.cross_entropy(self(batch[0]), batch[1], weight=weight)


def by_hand(batch: Any) -> Tensor:
    return 1.0 + batch[0][:, 0].abs()


class HandWeighted(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = by_hand(batch)
        return (weights * F.cross_entropy(self(batch[0]), batch[1], reduction="none")).sum() / weights.sum()


class FrozenNorm(Base):
    """Batch normalisation whose statistics are not those of the batch."""

    def build(self) -> None:
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean += 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.body(x))))


class ByBatchIndex(Base):
    """A term that only some batches have."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + batch_idx)


class Contrastive(Base):
    """Every sample is told from the others of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z, other = F.normalize(self(batch[0]), dim=1), F.normalize(self(batch[0] + 0.1), dim=1)
        return F.cross_entropy(z @ other.T / 0.5, torch.arange(len(z))) + super().training_step(batch, batch_idx)


KINDS: list[tuple[type[Base], dict[str, Any]]] = [
    (Base, {}),
    (Sum, {"reduction": "sum"}),
    (ClassWeights, {}),
    (HandWeighted, {"sample_weights": by_hand}),
    (FrozenNorm, {"frozen_batch_norm": True}),
    (ByBatchIndex, {}),
]
NAMES = [kind.__name__ for kind, _ in KINDS]


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"max_epochs": 1, "accelerator": "cpu"} | quiet | options
    return L.Trainer(callbacks=list(callbacks), **settings)  # type: ignore[arg-type]


def stepped(module: Base, batches: list[Any], first: int = 0, state: Any = None, accumulate: int = 1) -> Base:
    """A copy of the module after optimizer steps of its own, by plain torch."""
    twin = copy.deepcopy(module)
    twin._trainer = None
    if hasattr(twin, "norm"):
        twin.norm.eval()
    optimizer = twin.configure_optimizers()
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for i, batch in enumerate(batches[start : start + accumulate]):
            (twin.training_step(batch, first + start + i) / accumulate).backward()
        optimizer.step()
    return twin


def rows(ids: list[int]) -> Any:
    x, y = data().tensors
    return x[ids], y[ids]


def change(start: Base, batches: list[Any], without: list[Any], **options: Any) -> float:
    """How the target loss changes where the first batches are the others."""
    whole, less = (stepped(start, chosen, **options) for chosen in (batches, without))
    return float(target_loss(less) - target_loss(whole))


def selecting(options: dict[str, Any], *, keep: Any = 0.5, every: Any = 1, **more: Any) -> SelectionDataModule:
    loader = DataLoader(data(), BATCH, collate_fn=more.pop("collate", default_collate))
    return SelectionDataModule(
        loader, more.pop("target", target_loss), keep=keep, every=every, refresh_target_every=1, **options, **more
    )


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=NAMES)
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_inside_the_step_training_goes_on_as_if_the_removed_were_not_there(
    kind: type[Base], options: dict[str, Any], accumulate: int
) -> None:
    module, selected = kind(), selecting(options)
    start = copy.deepcopy(module)
    trainer(accumulate_grad_batches=accumulate, precision="64-true").fit(module, selected)
    table = selected.selection_report.to_pandas()
    batches = [table[i : i + BATCH] for i in range(0, N, BATCH)]
    kept = [rows(b.sample_id[b.weight > 0].tolist()) for b in batches]
    assert [len(y) for _, y in kept] == [BATCH // 2] * (N // BATCH)
    expected = stepped(start, kept, accumulate=accumulate)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=NAMES)
def test_scores_inside_the_step_are_those_of_stepping_without_the_sample(
    kind: type[Base], options: dict[str, Any]
) -> None:
    module, selected = kind(), selecting(options, response="finite")
    start = copy.deepcopy(module)
    trainer(limit_train_batches=1, precision="64-true").fit(module, selected)
    table = selected.selection_report.to_pandas()
    ids = table.sample_id.tolist()
    truth = torch.tensor([change(start, [rows(ids)], [rows([i for i in ids if i != z])]) for z in ids])
    scores = torch.tensor(table.score.to_numpy(copy=True))
    assert (scores - truth).norm() < 0.1 * truth.norm()


class LooksAhead(L.Callback):
    """In the middle of a run, scores steps to come by look-ahead and by stepping on without each of their samples.

    Args:
        windows: micro-batches of each step.
    """

    def __init__(self, options: dict[str, Any], windows: list[int]) -> None:
        self.options, self.windows, self.removals = StepOptions(**options), windows, RemovalCheck()

    def on_train_batch_end(self, run: L.Trainer, module: Any, *args: Any) -> None:
        batch_idx, accumulate = args[-1], run.accumulate_grad_batches
        if batch_idx != 1:
            return
        ids = [list(range(i * BATCH, (i + 1) * BATCH)) for i in range(sum(self.windows))]
        candidates = iter([Candidates(rows(z), torch.tensor(z)) for z in ids])
        steps = [[next(candidates) for _ in range(n)] for n in self.windows]
        horizon, method = len(steps) - 1, Method("hessian", "finite", memory_window=2)
        (self.scores,) = look_ahead(run, steps, target_loss, horizon, method, 1, self.options, self.removals)
        state, whole = run.optimizers[0].state_dict(), [rows(z) for z in ids]
        self.truth = torch.tensor(
            [
                change(
                    module,
                    whole,
                    [rows([i for i in batch if i != z]) for batch in ids],
                    first=batch_idx + 1,
                    state=state,
                    accumulate=accumulate,
                )
                for z in range(BATCH * self.windows[0])
            ]
        )


class Equal:
    reads_batches = True

    def __call__(self, trainer: L.Trainer, candidates: Any, scored: int) -> list[Tensor]:
        return [torch.zeros(sum(len(c.sample_ids) for c in step)) for step in candidates[:scored]]


@pytest.mark.parametrize(("kind", "options"), [*KINDS, (Contrastive, {}), (HandWeighted, {})])
@pytest.mark.parametrize("windows", [[1, 1], [2, 2], [2]], ids=str)
def test_look_ahead_is_stepping_on_without_the_sample(
    kind: type[Base], options: dict[str, Any], windows: list[int]
) -> None:
    check = LooksAhead(options, windows)
    selected = selecting({"frozen_batch_norm": options.get("frozen_batch_norm", False)}, every="epoch", keep=1.0)
    selected.selector.scorer = Equal()
    trainer(check, precision="64-true", accumulate_grad_batches=windows[0]).fit(kind(), selected)
    assert (check.scores - check.truth).norm() < 0.1 * check.truth.norm()
    measured = kind is Contrastive or (kind is HandWeighted and not options)
    assert check.removals.measuring == measured, "shares where they are right, without an evaluation for each sample"


def test_look_ahead_divides_the_last_short_window_of_an_epoch_as_lightning_does() -> None:
    check = LooksAhead({"reduction": "sum"}, [1])
    run = trainer(check, precision="64-true", accumulate_grad_batches=3)
    run.fit(Sum(), DataLoader(data(), BATCH))
    assert (check.scores - check.truth).norm() < 0.1 * check.truth.norm()


class Noisy(Base):
    """Draws random numbers, which the other samples keep where one leaves."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.gelu(self.body(x)), 0.5, self.training))


def test_look_ahead_does_not_take_random_numbers_for_an_effect() -> None:
    check = LooksAhead({}, [1, 1])
    trainer(check, precision="64-true").fit(Noisy(), DataLoader(data(), BATCH))
    assert not check.removals.measuring and check.removals.verified == 3 and check.removals.largest_error < 1e-8


class ContrastiveLater(Contrastive):
    """Samples see each other from the second epoch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (super() if self.current_epoch > 0 else super(Contrastive, self)).training_step(batch, batch_idx)


@pytest.mark.parametrize("options", [{"every": 1}, {"every": "epoch"}, {"every": 2, "horizon": 1}], ids=str)
def test_what_begins_later_is_seen_later(options: dict[str, Any]) -> None:
    selected, run = selecting({}, **options), trainer(precision="64-true", max_epochs=2)
    if options == {"every": 1}:
        with pytest.raises(ConfigurationError, match="step 4: per-sample gradients do not say"):
            run.fit(ContrastiveLater(), selected)
    else:
        run.fit(ContrastiveLater(), selected)
        assert "removals measured by evaluating each step without the sample" in repr(selected.selection_report)


@pytest.mark.parametrize("options", [{"every": 1}, {"every": "epoch"}, {"every": 2, "horizon": 1}], ids=str)
def test_what_was_verified_is_told(options: dict[str, Any]) -> None:
    for verify, told in ((True, "removal verified on [23] of [23] samples"), (False, "not verified: verify=False")):
        selected = selecting({"verify": verify}, **options)
        trainer(precision="64-true").fit(Base(), selected)
        assert re.search(told, repr(selected.selection_report))


class ChangesGradients(Base):
    def on_after_backward(self) -> None:
        for p in self.parameters():
            p.grad.mul_(2.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Contrastive, {}, "do not say what removing a sample.*Select in rounds"),
        (HandWeighted, {}, "do not say what removing a sample.*Select in rounds"),
        (Sum, {}, "do not say what removing a sample.*Select in rounds"),
        (ChangesGradients, {}, "on_after_backward"),
        (FrozenNorm, {}, "frozen_batch_norm=True"),
        (Base, {"exclude": "haed.*"}, "exclude='haed"),
    ],
)
def test_what_disagrees_is_refused_at_the_first_step_and_leaves_no_trace(
    kind: type[Base], options: dict[str, Any], message: str
) -> None:
    module = kind()
    before = copy.deepcopy(module.state_dict())
    run = trainer(precision="64-true")
    with pytest.raises(ConfigurationError, match=message) as error:
        run.fit(module, selecting(options))
    assert "record=" not in str(error.value), "selection has no such option"
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert "training_step" not in module.__dict__
    assert not any("Selection" in type(c).__name__ for c in run.callbacks)  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{"every": 1}, {"every": "epoch"}, {"every": 2, "horizon": 1}], ids=str)
def test_rows_that_the_collate_function_sorts_are_known_by_content(options: dict[str, Any]) -> None:
    def collate(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        order = x[:, 0].argsort()
        return x[order], y[order]

    tables = []
    for function in (default_collate, collate):
        selected = selecting({}, collate=function, **options)
        trainer(precision="64-true").fit(Base(), selected)
        table = selected.selection_report.to_pandas()
        tables.append(table.sort_values(["step", "sample_id"]).reset_index(drop=True))
    torch.testing.assert_close(*(torch.tensor(t.score.to_numpy(copy=True)) for t in tables))
    assert tables[0].weight.equals(tables[1].weight)


@pytest.mark.parametrize("every", [1, "epoch"])
def test_excluded_parameters_train_and_tell_nothing(every: Any) -> None:
    tables, modules = [], []
    for options in ({}, {"exclude": "body.*"}):
        module, selected = Base(), selecting(options, every=every)
        start = copy.deepcopy(module)
        trainer(limit_train_batches=1, precision="64-true").fit(module, selected)
        tables.append(selected.selection_report.to_pandas())
        modules.append(module)
    assert not tables[0].score.equals(tables[1].score)
    assert not torch.equal(start.body.weight, modules[1].body.weight)
    if every == 1:  # with the gradient of the whole batch
        expected = stepped(start, [rows(list(range(BATCH)))])
        torch.testing.assert_close(modules[1].body.weight, expected.body.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{"every": 1}, {"every": "epoch"}, {"every": 2, "horizon": 1}], ids=str)
def test_a_target_that_is_not_finite_is_an_error_that_names_the_example(options: dict[str, Any]) -> None:
    x, y = data(10, seed=9).tensors
    x[7, 0] = torch.nan
    asked = DataLoader(TensorDataset(x, y), 4)
    with pytest.raises(InfluenceError, match="example 3 of its batch 1 has a loss of nan; leave such examples out"):
        trainer(precision="64-true").fit(Base(), selecting({}, target=asked, **options))


@pytest.mark.parametrize(
    "options",
    [{"every": 1}, {"every": 1, "refresh_target_every": 3}, {"every": "epoch"}, {"every": 2, "horizon": 1}],
    ids=str,
)
def test_queries_that_are_not_finite_are_left_out_and_logged(options: dict[str, Any], tmp_path: Path) -> None:
    x, y = data(10, seed=9).tensors
    without = [(x[:4], y[:4]), (x[4:7], y[4:7]), (x[8:], y[8:])]
    broken = x.clone()
    broken[7, 0] = torch.nan
    chosen = []
    for queries in (without, DataLoader(TensorDataset(broken, y), 4)):
        every_step = {"keep": 0.5, "refresh_target_every": 1}
        selected = SelectionDataModule(DataLoader(data(), BATCH), queries, not_finite="skip", **every_step | options)
        run = trainer(max_epochs=2, precision="64-true", logger=CSVLogger(tmp_path))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run.fit(Base(), selected)
        warned = [str(w.message) for w in said if "are left out of it" in str(w.message)]
        assert [text[:24] for text in warned] == ([] if queries is without else ["1 examples of the target"])
        chosen.append(selected.selection_report.to_pandas())
    assert len(chosen[0]) and chosen[0].equals(chosen[1])
    assert isinstance(run.logger, CSVLogger)
    logged = pd.read_csv(run.logger.experiment.metrics_file_path)
    assert logged["influence/target_left_out"].dropna().tolist() == [1]


def test_a_target_of_which_nothing_is_finite_is_an_error() -> None:
    x, y = data(10, seed=9).tensors
    asked = [(torch.full_like(x, torch.nan), y)]
    with pytest.raises(InfluenceError, match="none of the 10 examples of the target that were read has a finite loss"):
        trainer(precision="64-true").fit(Base(), selecting({}, target=asked, every=1, not_finite="skip"))


def test_a_candidate_that_is_not_finite_is_an_error() -> None:
    x, y = data().tensors
    x[8, 0] = torch.nan
    for every in (1, "epoch"):
        asked: Callable[[Any], Tensor] = target_loss
        selected = SelectionDataModule(DataLoader(TensorDataset(x, y), BATCH), asked, every=every)  # type: ignore[arg-type]
        with pytest.raises(InfluenceError, match="gradient"):
            trainer(precision="64-true").fit(Base(), selected)


def test_nothing_is_ranked_by_scores_that_are_not_a_number() -> None:
    scores = torch.tensor([1.0, torch.nan, 2.0])
    with pytest.raises(InfluenceError, match="1 of 3 scores are NaN, the first that of sample 11"):
        decide(Fraction(0.5), scores, torch.tensor([10, 11, 12]), torch.zeros(3), floor=0.1)
