"""Per-sample gradients that stop adding up to the gradient in the middle of a run are refused at that step, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, fit, loader, split_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, SelectionDataModule
from lightning_influence.errors import ConfigurationError

TRAIN, VAL = split_digits(64, 8)
STEPS = 4  # of an epoch


class HookLater(Classifier):
    """A hook on a parameter changes its gradient from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].weight.register_hook(lambda g: 0.5 * g)


class GateLater(Classifier):
    """A weight is used by a functional call from the second epoch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = F.linear(batch[0], self.net[0].weight) if self.current_epoch > 0 else 0.0
        return super().training_step(batch, batch_idx) + torch.as_tensor(hidden).mean()


def record(module: L.LightningModule, path: Path, **options: Any) -> None:
    fit(module, loader(TRAIN), InfluenceCallback(path / "log", on_error="raise"), max_epochs=2, **options)


def select(module: L.LightningModule, path: Path, **options: Any) -> None:
    fit(module, SelectionDataModule(loader(TRAIN), DataLoader(VAL, 8), every=1), max_epochs=2, **options)


@pytest.mark.parametrize("run", [record, select])
@pytest.mark.parametrize("kind", [HookLater, GateLater])
@pytest.mark.parametrize(("accumulated", "step"), [(1, STEPS), (3, 2)])
def test_what_changes_at_the_second_epoch_is_seen_there(
    run: Callable[..., None], kind: type[Classifier], accumulated: int, step: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"step {step}: the per-sample gradient shares of net.0.weight sum"):
        run(kind(), tmp_path, accumulate_grad_batches=accumulated)


def test_each_process_looks_at_its_own_gradients(tmp_path: Path) -> None:
    options = {"strategy": "ddp_fork", "devices": 2}
    with pytest.raises(Exception, match=r"step 2: the per-sample gradient shares of net.0.weight sum"):
        record(HookLater(), tmp_path, **options)
    record(Classifier(), tmp_path / "right", accumulate_grad_batches=2, **options)


def test_what_is_not_verified_is_not_refused(tmp_path: Path) -> None:
    fit(GateLater(), loader(TRAIN), InfluenceCallback(tmp_path, verify=False), max_epochs=2)


def test_a_gradient_that_is_rounding_noise_is_no_disagreement(tmp_path: Path) -> None:
    """The bias of the keys of an attention has no gradient but for rounding."""

    class Attends(Classifier):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
            self.out = nn.Linear(64, 10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].view(-1, 8, 8)
            mixed = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
            return F.cross_entropy(self.out(mixed.flatten(1)), batch[1])

    record(Attends(), tmp_path)
