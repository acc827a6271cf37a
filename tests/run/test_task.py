"""A plain module with a loss function, and a LightningModule, as tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import FunctionTask, InfluenceCallback, attribute
from lightning_influence.errors import ConfigurationError
from lightning_influence.run.moment import Moment
from lightning_influence.run.task import Task, as_task


class Counting(nn.Module):
    """Its loss reads a plain number and moves a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.weight = 1.0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.weight * self.layer(x).square().mean()


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.weight = Counting(), 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        return (self.weight + batch_idx + 10 * self.current_epoch) * self.net(batch)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1)]


def plain() -> FunctionTask:
    return FunctionTask(Counting(), lambda module, batch: module(batch))


BATCH = torch.ones(3, 2)


def test_a_loss_at_a_moment_reads_its_numbers_and_leaves_the_module_as_it_was() -> None:
    task = plain()
    now = task.loss(BATCH)
    then = task.loss(BATCH, Moment(numbers={":weight": 3.0}))
    assert then.item() == pytest.approx(3 * now.item())
    assert task.module.weight == 1.0


def test_a_lightning_module_at_a_moment() -> None:
    module = Lit()
    task = as_task(module)
    with task.quiet():
        now = task.loss(BATCH)
        then = task.loss(BATCH, Moment(batch_idx=2, epoch=1, numbers={":weight": 3.0}))
    assert then.item() == pytest.approx(15 * now.item())
    assert (module.weight, module.current_epoch) == (1.0, 0)
    assert isinstance(task.optimizer(), torch.optim.SGD)


class AsksItsTrainer(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rate = self.optimizers().param_groups[1]["lr"] + self.lr_schedulers().get_last_lr()[0]
        self.logger.experiment.add_scalar("rate", rate, self.global_step)
        return (rate + self.trainer.max_epochs) * self.net(batch)


def test_what_a_step_reads_of_its_trainer_is_that_of_the_run_also_without_one() -> None:
    task = as_task(AsksItsTrainer())
    then = task.loss(BATCH, Moment(rates=(0.5, 2.0), trainer={"max_epochs": 7}))
    torch.testing.assert_close(then, 9.5 * task.module.net(BATCH))
    with pytest.raises(AttributeError, match="no trainer whose 'max_epochs' could be read; attach it to a trainer"):
        task.loss(BATCH, Moment(rates=(0.5, 2.0)))


class Writes(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.logger.experiment.append(self.global_step)
        return super().training_step(batch, batch_idx)


def test_steps_beside_the_run_write_to_no_logger(tmp_path: Path) -> None:
    class Lists(DummyLogger):
        written: ClassVar[list[int]] = []

        @property
        def experiment(self) -> Any:
            return self.written

    module, written = Writes(), Lists()
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=written, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False,
                        callbacks=[InfluenceCallback(tmp_path, record="both")])  # fmt: skip
    trainer.fit(
        module, DataLoader(TensorDataset(torch.randn(6, 2)), 3, collate_fn=lambda s: torch.stack([x for (x,) in s]))
    )
    assert written.written == [0, 1]
    report = attribute(tmp_path, queries=[torch.randn(2, 2)], model=module, progress=False)
    assert written.written == [0, 1] and report.scores.isfinite().all()
    assert module.trainer is trainer and module.logger is written


@pytest.mark.parametrize("task", [plain(), as_task(Lit())], ids=["function", "lightning"])
def test_a_twin_shares_parameters_and_nothing_else(task: Task) -> None:
    assert as_task(task) is task
    twin = task.twin()
    assert twin is not None
    own, other = dict(task.module.named_parameters()), dict(twin.module.named_parameters())
    assert own.keys() == other.keys() and all(own[k] is other[k] for k in own)
    before = [b.clone() for b in task.module.buffers()]
    with twin.quiet():
        twin.loss(BATCH)
    assert all(torch.equal(b, a) for b, a in zip(task.module.buffers(), before, strict=True))
    assert not any(torch.equal(b, a) for b, a in zip(twin.module.buffers(), before, strict=True))


def test_a_module_that_cannot_be_copied_has_no_twin() -> None:
    task = plain()
    task.module.stream = (i for i in range(3))  # type: ignore[assignment]
    assert task.twin() is None


@pytest.mark.parametrize("model", [nn.Linear(2, 1), None, {"loss": 1}])
def test_what_is_no_task_is_refused(model: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"model is a {type(model).__name__}"):
        as_task(model)


def test_a_loss_that_is_no_number_is_refused() -> None:
    def each(module: nn.Module, batch: Tensor) -> Tensor:
        return batch

    with pytest.raises(ConfigurationError, match="the loss function each returned a tensor of shape"):
        FunctionTask(nn.Linear(2, 1), each).loss(BATCH)
