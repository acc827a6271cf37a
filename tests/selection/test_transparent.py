"""A wrapped datamodule is the datamodule: without selection, and where everything is kept, the run ends bit for bit alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import digits, hooks_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, default_collate, random_split

from lightning_influence import SelectionDataModule

BATCH = 8


class Plain(L.LightningDataModule):
    num_classes = 10

    def setup(self, stage: str) -> None:
        x, y = digits(60).tensors
        self.train, self.val = TensorDataset(x[:40], y[:40]), TensorDataset(x[40:], y[40:])
        self.generator = torch.Generator().manual_seed(1)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, BATCH)


class BatchHooks(Plain):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2 - 1, batch[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return {"x": batch[0].to(device), "y": batch[1].to(device)}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["x"] + 0.1, batch["y"]


class Augments(Plain):
    """Draws random numbers in a hook."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]


class SharesItsGenerator(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader(self.train, BATCH, shuffle=True, generator=self.generator)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, BATCH, generator=self.generator)


class SplitsWhenAsked(Plain):
    """Draws random numbers where the validation loader is made and read."""

    def val_dataloader(self) -> Any:
        return DataLoader(random_split(self.val, [15, 5])[0], BATCH, shuffle=True)


class SeveralValidationLoaders(Plain):
    def val_dataloader(self) -> Any:
        return [DataLoader(self.val, BATCH), DataLoader(self.train, 20)]


class Workers(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader(self.train, BATCH, shuffle=True, num_workers=1)


class DropsLast(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 12, shuffle=True, drop_last=True)


class Stateful(Plain):
    """Its data depends on its state."""

    epoch = 0

    def train_dataloader(self) -> Any:
        self.epoch += 1
        order = torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch))
        return DataLoader(self.train, BATCH, sampler=order.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch = state_dict["epoch"]


class SetFromOutside(Plain):
    """The module changes how the datamodule loads."""

    size = 4

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, self.size, shuffle=True)


class Noisy(Dataset[Any]):
    """Noise from a generator of its own, which training and validation share, and a count of what was read."""

    def __init__(self, noise: float = 0.1) -> None:
        self.whole, self.noise = digits(60), noise
        self.generator, self.numpy_s = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        x, y = self.whole[i]
        noise = torch.randn(x.shape, generator=self.generator) * self.numpy_s.random()
        return x + self.noise * noise + 1e-3 * self.reads, y


class SharesItsDataset(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.noisy = Noisy()

    def train_dataloader(self) -> Any:
        return DataLoader(Subset(self.noisy, range(40)), BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Subset(self.noisy, range(40, 60)), BATCH)


class Fading:
    """A collate function that counts."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, samples: list[Any]) -> Any:
        self.batches += 1
        x, y = default_collate(samples)
        return x / (1 + 0.01 * self.batches), y


class SharesItsCollateFunction(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.collate = Fading()

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, BATCH, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, BATCH, collate_fn=self.collate)


class ByEpoch(Sampler[int]):
    """Another order every time that it is asked."""

    asked = 0

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        return iter(torch.randperm(40, generator=torch.Generator().manual_seed(self.asked)).tolist())

    def __len__(self) -> int:
        return 40


class SharesItsSampler(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.order = ByEpoch()

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, BATCH, sampler=self.order)

    def val_dataloader(self) -> Any:
        return DataLoader(self.train, BATCH, sampler=self.order)


class Augmented(Dataset[Any]):
    """Draws random numbers where it is read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        x, y = digits(60)[i]
        return x + 0.1 * torch.randn_like(x), y


class WorkersThatAugment(Plain):
    persist = False

    def train_dataloader(self) -> Any:
        return DataLoader(Augmented(), BATCH, shuffle=True, num_workers=2, persistent_workers=self.persist)


class WorkersThatPersist(WorkersThatAugment):
    persist = True


TABLE = [
    Plain,
    BatchHooks,
    Augments,
    SharesItsGenerator,
    SplitsWhenAsked,
    SeveralValidationLoaders,
    Workers,
    DropsLast,
    Stateful,
    SetFromOutside,
    SharesItsDataset,
    SharesItsCollateFunction,
    SharesItsSampler,
    WorkersThatAugment,
    WorkersThatPersist,
]
OPTIONS: dict[str, dict[str, Any]] = {
    "off": {"online_selection": False},
    "inside the step": {"keep": 1.0, "every": 1},
    "rounds": {"keep": 1.0, "every": "epoch"},
    "look-ahead": {"keep": 1.0, "every": 2, "horizon": 1},
}


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.net = nn.Linear(64, 16)

    def setup(self, stage: str) -> None:
        torch.manual_seed(0)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.head = nn.Linear(16, data.num_classes)
        if hasattr(data, "size"):
            data.size = 5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(nn.functional.gelu(self.net(x)), 0.2, self.training))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss))
        self.log(f"val_{dataloader_idx}", loss, add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(data: Any, folder: Path, ckpt_path: Any = None, **options: Any) -> tuple[Net, L.Trainer]:
    torch.manual_seed(1)
    module = Net()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    run = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, save_last=True)],
        **{"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1, **quiet, **options},
    )
    run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, run


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_the_run_is_that_of_the_wrapped_datamodule(kind: type[Plain], tmp_path: Path) -> None:
    options_of_all: dict[str, Any] = {"reload_dataloaders_every_n_epochs": 0} if kind is WorkersThatPersist else {}
    plain, run = train(kind(), tmp_path / "plain", **options_of_all)
    for name, options in OPTIONS.items():
        if name == "look-ahead" and issubclass(kind, WorkersThatAugment):
            continue  # workers are started for each round, and draw other numbers than those that were started once
        wrapped = SelectionDataModule(kind(), **options)
        module, again = train(wrapped, tmp_path / name, **options_of_all)
        for k, p in plain.state_dict().items():
            assert torch.equal(p, module.state_dict()[k]), (name, k)
        assert plain.losses == module.losses, name
        assert run.callback_metrics.keys() == again.callback_metrics.keys()
        assert vars(plain).keys() == vars(module).keys() and hooks_of(module) == 0
        assert len(again.callbacks) == len(run.callbacks)  # type: ignore[attr-defined]
        assert options.get("online_selection", True) == bool(wrapped.selection_report.rows), "it did select"


@pytest.mark.parametrize("options", [{"every": 1}, {"every": "epoch"}, {"every": 2, "horizon": 1}], ids=str)
def test_nothing_is_left_in_a_module_whose_run_ended_or_failed(options: dict[str, Any], tmp_path: Path) -> None:
    class Fails(Net):
        def __init__(self) -> None:
            super().__init__()
            self.normal = nn.BatchNorm1d(64)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.normal(x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if fails and batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    for fails in (False, True):
        module = Fails()
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        run = L.Trainer(accelerator="cpu", max_epochs=1, **quiet)  # type: ignore[arg-type]
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            run.fit(module, SelectionDataModule(Plain(), keep=1.0, frozen_batch_norm=True, **options))
        assert hooks_of(module) == 0 and "training_step" not in vars(module)


@pytest.mark.parametrize("options", [{"every": 1}, {"every": "epoch"}], ids=str)
def test_a_trainer_that_logs_nothing_selects(options: dict[str, Any]) -> None:
    data = SelectionDataModule(Plain(), keep=0.5, **options)
    L.Trainer(accelerator="cpu", max_epochs=1, barebones=True).fit(Net(), data)
    assert data.selection_report.kept == pytest.approx(0.5)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_goes_on_with_the_state_of_the_wrapped_datamodule(name: str, tmp_path: Path) -> None:
    ends = []
    for folder, wrap in (
        ("plain", lambda data: data),
        ("wrapped", lambda data: SelectionDataModule(data, **OPTIONS[name])),
    ):
        train(wrap(Stateful()), tmp_path / folder, max_epochs=1)
        data = Stateful()
        checkpoint = tmp_path / folder / "last.ckpt"
        module, _ = train(wrap(data), tmp_path / f"{folder} resumed", checkpoint, max_epochs=3)
        ends.append((data.epoch, module.losses))
    assert ends[0] == ends[1] and ends[0][0] > 2


def test_attributes_hyperparameters_and_trainer_are_those_of_the_wrapped_datamodule() -> None:
    class Configured(Plain):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.prepare_data_per_node = False
            self.size = size

    data = Configured(3)
    wrapped: Any = SelectionDataModule(data)
    assert wrapped.hparams == data.hparams == {"size": 3} and wrapped._log_hyperparams
    assert wrapped.prepare_data_per_node is False
    wrapped.size = 7
    assert data.size == wrapped.size == 7
    wrapped.mine = 1
    assert wrapped.mine == 1 and not hasattr(data, "mine")
    wrapped.trainer = run = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert data.trainer is run
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        wrapped.nothing  # noqa: B018


def test_all_validation_loaders_are_the_target(tmp_path: Path) -> None:
    class Both(Plain):
        def val_dataloader(self) -> Any:
            first, second = random_split(self.val, [12, 8], torch.Generator().manual_seed(0))
            return {"first": DataLoader(first, 12), "second": DataLoader(second, 8)}

    tables = []
    for kind in (Plain, Both):
        data = SelectionDataModule(kind(), every=1, keep=0.5, refresh_target_every=1)
        train(data, tmp_path, max_steps=3, limit_val_batches=0)
        tables.append(data.selection_report.to_pandas())
    torch.testing.assert_close(*(torch.tensor(t.score.to_numpy(copy=True)) for t in tables), rtol=1e-4, atol=1e-7)
