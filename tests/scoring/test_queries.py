"""Queries in the forms in which people hold them, prepared as Lightning prepares batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, digits, fit, loader, split_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_influence import (
    InfluenceCallback,
    SelectionDataModule,
    attribute,
    check_faithfulness,
    clean,
    error_proxy,
)
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.run.data import TrainingData
from lightning_influence.scoring.queries import query_gradients
from lightning_influence.trust.retraining import recorded_run, retrain


class Data(L.LightningDataModule):
    set_up = 0

    def setup(self, stage: str) -> None:
        self.set_up += 1
        self.train, self.val = split_digits(24, 6)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 8)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, 4)


class Shifted(Data):
    """The datamodule prepares batches in a hook of Lightning's."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2 - 1, batch[1]]


def test_every_form_gives_the_same_scores(tmp_path: Path) -> None:
    data, module = Data(), Classifier()
    trainer_options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[InfluenceCallback(tmp_path / "log", record="gradients")],
        **trainer_options,
    ).fit(module, data)
    batches = list(data.val_dataloader())
    expected = attribute(tmp_path / "log", queries=batches, model=module).scores
    for queries in (data, data.val_dataloader, data.val_dataloader(), data.val):
        torch.testing.assert_close(attribute(tmp_path / "log", queries=queries, model=module).scores, expected)


@pytest.mark.parametrize(
    ("queries", "told"),
    [
        ("val", "give a loader, a list of batches, or a datamodule"),
        ((torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64)), r"wrap it in a list: queries=\[batch\]"),
        ({"x": torch.zeros(2, 64)}, r"wrap it in a list: queries=\[batch\]"),
        (3, "queries is a int; give a loader"),
    ],
)
def test_what_is_no_queries_is_named(queries: Any, told: str, tmp_path: Path) -> None:
    module = Classifier()
    fit(module, loader(digits(16), 8), InfluenceCallback(tmp_path / "log", record="gradients"))
    with pytest.raises(ConfigurationError, match=told):
        attribute(tmp_path / "log", queries=queries, model=module)


def test_hooks_of_a_datamodule_prepare_queries_and_retraining(tmp_path: Path) -> None:
    data, module = Shifted(), Classifier()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    callback = InfluenceCallback(tmp_path / "log", record="replay", store_batches=False)
    L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **options).fit(module, data)
    whole = attribute(tmp_path / "log", queries=data, model=module, data=data, target="mean")
    by_hand = [(x * 2 - 1, y) for x, y in DataLoader(data.val, 4)]
    stored = attribute(tmp_path / "log", queries=data.val_dataloader(), model=module, data=data, target="mean")
    module.trainer = None  # whose datamodule would prepare the queries once more
    plain = attribute(tmp_path / "log", queries=by_hand, model=module, data=_Prepared(data), target="mean")
    torch.testing.assert_close(whole.scores, plain.scores)
    torch.testing.assert_close(whole.scores, stored.scores)
    before = data.set_up
    check = check_faithfulness(
        tmp_path / "log", model=module, data=data, queries=data, removals=6, target="mean", dtype=None, progress=False
    )
    assert data.set_up == before  # by fit
    assert max(agreement.spearman.value for agreement in check.single.values()) > 0.9


VERBS: dict[str, Any] = {
    "attribute": attribute,
    "error_proxy": partial(error_proxy, pairs=2),
    "check_faithfulness": partial(check_faithfulness, removals=3, ceiling=False, dtype=None, estimators={"finite": {}}),
    "clean": partial(clean, samples=[1, 2]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_datamodule_is_set_up_once(verb: str, tmp_path: Path) -> None:
    """A split without a seed is another each time; after a fit it is the fit's."""

    class Splits(Data):
        def setup(self, stage: str) -> None:
            self.set_up += 1
            self.train, self.val = random_split(digits(30), [24, 6])

    data, module = Splits(), Classifier()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    callback = InfluenceCallback(tmp_path / "log", record="both")
    L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **options).fit(module, data)
    assert data.set_up == 1
    VERBS[verb](tmp_path / "log", queries=data, model=module, data=data, progress=False)
    assert data.set_up == 1
    another = Splits()
    VERBS[verb](tmp_path / "log", queries=another, model=module, data=another, progress=False)
    assert another.set_up == 1


def test_a_datamodule_that_selects_gives_the_data_that_it_wraps(tmp_path: Path) -> None:
    module, selecting = Classifier(), SelectionDataModule(Data(), keep=0.5)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[InfluenceCallback(tmp_path, record="replay")], **options
    )
    trainer.fit(module, selecting)
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    scores = [
        attribute(tmp_path, queries=digits(4), model=module, data=data, target="mean", progress=False).scores
        for data in (selecting, SelectionDataModule(Data(), keep=0.5), Data())
    ]
    assert torch.equal(scores[0], scores[2]) and torch.equal(scores[1], scores[2])
    assert trainer.callbacks == callbacks  # type: ignore[attr-defined]


class _Prepared(TrainingData):
    """The training data whose hooks prepare it, without a datamodule that would prepare the queries, too."""

    def __new__(cls, data: Shifted) -> Any:
        x, y = data.train.tensors
        return TrainingData(TensorDataset(x * 2 - 1, y))


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_queries_are_converted_as_the_trainer_converts_batches(precision: Any, tmp_path: Path) -> None:
    """Float32 loaders under double precision."""
    train, val = split_digits(16, 4)
    module = Classifier()
    fit(module, loader(train, 8), InfluenceCallback(tmp_path / "log", record="replay"), precision=precision)
    report = attribute(tmp_path / "log", queries=DataLoader(val, 4), model=module, data=train, target="mean")
    assert report.scores.isfinite().all()


class Weighted(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], weight=torch.arange(1.0, 11.0).to(batch[0]))


class Summed(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


class Ignoring(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens = torch.stack([batch[1], torch.where(batch[1] % 2 == 0, -100, batch[1])], 1)
        return F.cross_entropy(self.net(batch[0])[:, :, None].expand(-1, -1, 2), tokens)


class Coupled(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        return F.cross_entropy(out, batch[1]) + out.mean(0).square().sum()


@pytest.mark.parametrize("kind", [Classifier, Weighted, Summed, Ignoring, Coupled])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_mean_target_is_the_mean_of_the_columns(kind: type[Classifier], size: int) -> None:
    """Whatever the reduction, the weights of the classes, the number of labels and the size of the batches."""
    module = kind().double()
    data = digits(14, torch.float64)
    names = [k for k, _ in module.named_parameters()]
    select = lambda name, values: values.flatten(values.dim() - module.get_parameter(name).dim())
    each = query_gradients(module, DataLoader(data, size), names, select, progress=False)
    mean = query_gradients(module, DataLoader(data, size), names, select, target="mean", progress=False)
    for k in names:
        torch.testing.assert_close(mean[k][0], each[k].mean(0), rtol=1e-9, atol=1e-12)


def test_a_first_batch_of_one_example_says_nothing_of_the_others() -> None:
    module, (x, y) = Coupled().double(), digits(9, torch.float64).tensors
    batches: list[Any] = [(x[:1], y[:1]), (x[1:5], y[1:5]), (x[5:], y[5:])]
    names = [k for k, _ in module.named_parameters()]
    select = lambda name, values: values.flatten(values.dim() - module.get_parameter(name).dim())
    each = query_gradients(module, batches, names, select, progress=False)
    mean = query_gradients(module, batches, names, select, target="mean", progress=False)
    for k in names:
        torch.testing.assert_close(mean[k][0], each[k].mean(0), rtol=1e-9, atol=1e-12)


class ByEpoch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scale = 1 + self.current_epoch + 0.1 * self.global_step + 0.01 * batch_idx
        return super().training_step(batch, batch_idx) * scale


def test_retraining_gives_the_epoch_the_step_and_the_batch_as_the_run_had_them(tmp_path: Path) -> None:
    module = ByEpoch()
    train = digits(24)
    fit(module, DataLoader(train, 8), InfluenceCallback(tmp_path / "log", record="replay"), max_epochs=2)
    assert LoggedSteps(tmp_path / "log").moments_of(4)[0].epoch == 1  # type: ignore[union-attr]
    again = retrain(recorded_run(tmp_path / "log", ByEpoch, train))
    for p, q in zip(module.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_training_data_of_another_length_is_named(tmp_path: Path) -> None:
    module = Classifier()
    callback = InfluenceCallback(tmp_path / "log", record="replay", store_batches=False)
    fit(module, DataLoader(digits(24), 8), callback)
    with pytest.raises(ConfigurationError, match="the training data has 10 samples, and the log has sample"):
        attribute(tmp_path / "log", queries=DataLoader(digits(4), 4), model=module, data=digits(10))
