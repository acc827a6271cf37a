"""What a Lightning trainer says of a run: its optimizer, clipping, loss scaling, schedules, processes and present moment.

Beside `LightningTask` the only module below `selection` that knows Lightning.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_influence.core.trajectory import Clip
from lightning_influence.errors import ConfigurationError
from lightning_influence.run.lightning_names import is_a
from lightning_influence.run.moment import Moment
from lightning_influence.run.ranks import Ranks

if TYPE_CHECKING:
    import lightning as L


def only_optimizer(trainer: L.Trainer) -> torch.optim.Optimizer:
    """The run's optimizer.

    Raises:
        ConfigurationError: there are several.
    """
    if len(trainer.optimizers) != 1:
        raise ConfigurationError(
            f"configure_optimizers gave {len(trainer.optimizers)} optimizers; influence follows one. Put all parameters "
            "into groups of a single optimizer."
        )
    return trainer.optimizers[0]


def clip_of(trainer: L.Trainer) -> Clip:
    """Rule and bound of the trainer's gradient clipping."""
    if not trainer.gradient_clip_val:
        return Clip()
    by_value = trainer.gradient_clip_algorithm == "value"
    return Clip("value" if by_value else "norm", float(trainer.gradient_clip_val))


def loss_scaler(trainer: L.Trainer) -> Any:
    """The gradient scaler of half-precision training, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def moment_of(trainer: L.Trainer, module: nn.Module, batch_idx: int = 0) -> Moment:
    """What a training step reads now besides its batch."""
    rates = tuple(float(group["lr"]) for group in only_optimizer(trainer).param_groups)
    return replace(Moment.of(module, batch_idx, trainer.current_epoch, trainer.global_step), rates=rates)


_NUMBERS = ("max_epochs", "max_steps", "num_training_batches", "estimated_stepping_batches", "accumulate_grad_batches")


def numbers_of(trainer: L.Trainer) -> dict[str, float]:
    """The plain numbers by which training steps make schedules of their own, by the names of a trainer's attributes."""
    values = {name: getattr(trainer, name) for name in _NUMBERS}
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def ranks_of(trainer: L.Trainer, *, sharded: bool = False) -> Ranks:
    """The processes of a trainer.

    Args:
        sharded: whether each may hold a part of every parameter alone.

    Raises:
        ConfigurationError: a strategy under which a process does not hold whole parameters and gradients, or not even that part.
    """
    strategy: Any = trainer.strategy
    if is_a(strategy, "SingleDeviceStrategy", "DDPStrategy"):
        return Ranks(trainer.global_rank, trainer.world_size, strategy.root_device)
    name = type(strategy).__name__
    if not is_a(strategy, "ModelParallelStrategy"):
        raise ConfigurationError(
            f"the trainer uses {name}, which shards parameters or steps: no process holds whole parameters, gradients and moments, or "
            "says which part of each it holds. Use strategy='ddp' or one device; recording with record='replay' also takes "
            "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with fully_shard in configure_model."
        )
    if not sharded:
        raise ConfigurationError(
            f"the trainer uses {name}, which shards parameters: no process holds the whole gradients that per-sample ones are part "
            "of, as record='gradients', record='both' and selection need. Use strategy='ddp' or one device, or record with record='replay'."
        )
    parallel = strategy.device_mesh["tensor_parallel"].size()
    if parallel > 1:
        raise ConfigurationError(
            f"{name}(tensor_parallel_size={parallel}) lets {parallel} processes see the same samples, of which a log would hold each "
            f"several times. Use {name}(data_parallel_size={trainer.world_size}, tensor_parallel_size=1) with fully_shard."
        )
    return Ranks(trainer.global_rank, trainer.world_size, strategy.root_device, sharded=True)


def steps_left(trainer: L.Trainer) -> float:
    """Optimizer steps that a run has still to take; infinite where nobody knows when it ends."""
    planned = trainer.estimated_stepping_batches
    return planned - trainer.global_step if planned >= 0 else math.inf


@dataclass(frozen=True)
class Schedules:
    """The schedulers that step with the optimizer.

    Attributes:
        schedulers, frequencies: batches between the steps of each.
    """

    schedulers: Sequence[Any]
    frequencies: Sequence[int]

    def step(self, batch_idx: int) -> None:
        """As Lightning steps them after the optimizer's step on a batch of that index."""
        for scheduler, frequency in zip(self.schedulers, self.frequencies, strict=True):
            if (batch_idx + 1) % frequency == 0:
                scheduler.step()


@contextmanager
def schedules_as_they_were(trainer: L.Trainer) -> Iterator[Schedules]:
    """The schedulers that step with the optimizer; they and what they set are as before afterwards."""
    optimizer = only_optimizer(trainer)
    configs = [c for c in trainer.lr_scheduler_configs if c.interval == "step" and not c.reduce_on_plateau]
    stepped = [c.scheduler for c in configs]
    states = [copy.deepcopy(scheduler.state_dict()) for scheduler in stepped]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    # a scheduler counts the optimizer's steps to warn of a wrong order, and here it steps alone
    counted = optimizer.__dict__.get("_opt_called")
    object.__setattr__(optimizer, "_opt_called", True)
    try:
        yield Schedules(stepped, [c.frequency for c in configs])
    finally:
        for scheduler, state in zip(stepped, states, strict=True):
            scheduler.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        if counted is None:
            object.__delattr__(optimizer, "_opt_called")
        else:
            object.__setattr__(optimizer, "_opt_called", counted)
