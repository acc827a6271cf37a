"""Selection in rounds sees the batches that Lightning would train on, and steps no schedule further than the run will."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import SelectionDataModule

BATCH, SAMPLES = 8, 64


def loader(**options: Any) -> DataLoader[Any]:
    x, y = digits(SAMPLES).tensors
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=True, generator=generator, **options)


def target() -> DataLoader[Any]:
    x, y = digits(SAMPLES + 16).tensors
    return DataLoader(TensorDataset(x[SAMPLES:], y[SAMPLES:]), 16)


def fit(module: L.LightningModule, data: Any, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = L.Trainer(accelerator="cpu", **quiet, **options)  # type: ignore[arg-type]
    run.fit(module, data)
    return run


ROUNDS: dict[str, dict[str, Any]] = {"rounds": {"every": "epoch"}, "look-ahead": {"every": 2, "horizon": 1}}


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5},
        {"limit_train_batches": 3, "accumulate_grad_batches": 2},
        {"overfit_batches": 2},
        {"overfit_batches": 0.25},
        {"max_steps": 11},
        {"fast_dev_run": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("workers", [0, 1])
def test_the_batches_are_those_that_lightning_takes(options: dict[str, Any], workers: int) -> None:
    if workers and "limit_train_batches" not in options:
        pytest.skip("workers draw ahead of a limit only")
    plain = Classifier()
    fit(plain, loader(num_workers=workers), **{"max_epochs": 3, **options})
    for name, how in ROUNDS.items():
        module, data = Classifier(), SelectionDataModule(loader(num_workers=workers), target(), keep=1.0, **how)
        run = fit(module, data, **{"max_epochs": 3, **options})
        for k, p in plain.state_dict().items():
            assert torch.equal(p, module.state_dict()[k]), name
        if "max_steps" not in options:  # which ends the run in the middle of a round
            trained = run.global_step * options.get("accumulate_grad_batches", 1) * BATCH
            assert len(data.selection_report.to_pandas()) in (trained, 3 * 3 * BATCH), "decided on what is trained on"


@pytest.mark.parametrize("rebatch", [False, True])
def test_overfitting_stays_with_its_batches(rebatch: bool) -> None:
    data = SelectionDataModule(loader(), target(), keep=0.5, rebatch=rebatch)
    run = fit(Classifier(), data, max_epochs=2, overfit_batches=2)
    assert set(data.selection_report.to_pandas().sample_id) == set(range(2 * BATCH))
    assert run.global_step == 4


class Strict(torch.optim.lr_scheduler.OneCycleLR):
    """Notes how far it was stepped; like its parent it refuses to go beyond its end."""

    furthest = 0

    def step(self, epoch: Any = None) -> None:
        super().step(epoch)
        type(self).furthest = max(self.furthest, self.last_epoch)


def one_cycle(frequency: int = 1) -> Any:
    def make(module: L.LightningModule) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        total = int(module.trainer.estimated_stepping_batches) // frequency
        scheduler = Strict(optimizer, max_lr=1e-2, total_steps=total)
        Strict.furthest = 0
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": frequency},
        }

    return make


@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_steps": 12, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    "how",
    [
        {"every": "epoch", "rebatch": True},
        {"every": 3, "horizon": 4, "rebatch": True},
        {"every": 2, "horizon": 6},
        {"every": "epoch"},
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_schedule_is_stepped_further_than_the_run(how: dict[str, Any], end: dict[str, Any], accumulate: int) -> None:
    data = SelectionDataModule(loader(), target(), keep=0.5, **how)
    run = fit(Classifier(one_cycle()), data, accumulate_grad_batches=accumulate, **end)
    assert run.global_step == (12 if "max_steps" in end else 16 // accumulate)
    assert Strict.furthest == run.global_step


@pytest.mark.parametrize("frequency", [2, 3])
def test_schedules_of_another_frequency_are_rolled_out_as_lightning_steps_them(frequency: int) -> None:
    from lightning_influence.selection.lookahead import Candidates, Rollout

    seen: list[tuple[int, list[float]]] = []

    class Looks(L.Callback):
        def on_train_batch_end(self, run: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            plan = Rollout(run, [[Candidates(batch, torch.arange(BATCH))]] * 4)
            seen.append((run.global_step, [plan.step(i).hyper["net.0.weight"]["lr"] for i in range(4)]))

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[Looks()], **quiet).fit(  # type: ignore[arg-type]
        Classifier(one_cycle(frequency)), loader()
    )
    actual = [lrs[0] for _, lrs in seen]
    for step, ahead in seen:
        expected = actual[step - 1 : step + 3][: SAMPLES // BATCH - step]  # up to the end of the run
        assert ahead[: len(expected)] == pytest.approx(expected, rel=1e-12)
