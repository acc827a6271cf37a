"""A plain module with a loss function, and a LightningModule, as tasks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_influence import FunctionTask
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
