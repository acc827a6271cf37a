"""Look-ahead scores: the run goes on for some steps, is scored by the sweep, and was never gone (method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor

from lightning_influence.capture import refuse_batch_norm
from lightning_influence.core.optimizers import UPDATES
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.core.trajectory import Hyper, Shares, StepRecord, Trajectory, Vectors
from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.plan import ReplayMicroBatch, ReplayStep, State
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.run.batches import batch_size
from lightning_influence.run.optimizer import read_hyper, read_moments, update_name
from lightning_influence.run.sample_weights import sample_weights
from lightning_influence.run.trainer import clip_of, only_optimizer, schedules_as_they_were
from lightning_influence.run.training_step import Moment
from lightning_influence.scoring.queries import query_gradients

TargetLoss: TypeAlias = Callable[[L.LightningModule], Tensor]
"""``module -> scalar loss`` at the module's present parameters."""


@dataclass(frozen=True)
class Candidates:
    """A batch that training is about to see."""

    batch: Any
    sample_ids: Tensor


class Rollout:
    """Optimizer steps to come, from the trainer's present state, as a `replay.Plan`.

    Args:
        candidates: the micro-batches of each step.
    """

    def __init__(self, trainer: L.Trainer, candidates: Sequence[Sequence[Candidates]]) -> None:
        module, optimizer = trainer.lightning_module, only_optimizer(trainer)
        self.optimizer = update_name(optimizer)
        self.snapshots = [0]
        names: dict[Tensor, str] = {p: k for k, p in module.named_parameters() if p.requires_grad}
        parameters = {k: p.detach().clone() for p, k in names.items()}
        moments = {
            k: tuple(m.clone() for m in read_moments(optimizer.state.get(p, {}), UPDATES[self.optimizer], p))
            for p, k in names.items()
        }
        self._state = State(parameters, moments, {k: b.detach().clone() for k, b in module.named_buffers()})
        for c in (c for parts in candidates for c in parts):
            _check_batch(c)
        hypers = _hypers(trainer, names, len(candidates))
        clip, moment = clip_of(trainer), Moment.now(trainer, module)
        self._steps = [
            ReplayStep(
                [ReplayMicroBatch(c.batch, moment, 1 / len(parts), len(c.sample_ids)) for c in parts],
                torch.cat([c.sample_ids for c in parts]),
                torch.cat([_weights(c) / len(parts) for c in parts]),
                torch.cat([torch.full_like(c.sample_ids, i) for i, c in enumerate(parts)]),
                hyper,
                clip,
                averaged=True,
            )
            for parts, hyper in zip(candidates, hypers, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._steps)

    def sample_ids(self, index: int) -> Tensor:
        return self._steps[index].sample_ids

    def step(self, index: int) -> ReplayStep:
        return self._steps[index]

    def snapshot(self, index: int) -> State:
        return self._state


def look_ahead(
    trainer: L.Trainer,
    candidates: Sequence[Sequence[Candidates]],
    target: Any,
    horizon: int,
    method: Method,
    scored: int,
) -> list[Tensor]:
    """Scores of the samples of the next steps, each against the target ``horizon`` steps after its own step.

    Everything about the run is afterwards as it was, bit for bit.

    Args:
        candidates: the micro-batches of the steps to come, up to ``scored + horizon``; where there are fewer,
            the last steps are read sooner.
        target: batches of target examples, or a `TargetLoss`.
        scored: the number of steps to score.

    Returns:
        ``(n,)`` for each scored step.
    """
    module = trainer.lightning_module
    refuse_batch_norm(module)
    plan = Rollout(trainer, candidates)
    autocast = trainer.precision_plugin.forward_context
    found = []
    with ReplayTrajectory(module, plan, autocast=autocast, exact=method.curvature == "hessian", progress=False) as run:
        for start in range(scored):
            stop = min(start + 1 + horizon, len(run))
            run.place(stop)
            gradients = target_gradient(module, target, list(run.sizes), run.select)
            window = Window(run, start, stop)
            rows = sweep(window, gradients, method, scored=range(1), progress=False)
            found.append(rows.of(run.record(start).sample_ids)[:, 0])
    return found


def target_gradient(
    module: L.LightningModule, target: Any, names: Sequence[str], select: Callable[[str, Tensor], Tensor]
) -> Vectors:
    """Gradient of the mean target loss at the module's parameters, ``(1, d)`` each.

    Args:
        names, select: as of `queries.query_gradients`.
    """
    if callable(target):
        parameters = dict(module.named_parameters())
        chosen = [parameters[name] for name in names]
        with torch.enable_grad():
            loss = target(module)
        gradients = torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)
        return {k: select(k, g)[None] for k, g in zip(names, gradients, strict=True)}
    return query_gradients(module, target, names, select, target="mean", progress=False)


class Window:
    """Some consecutive steps of a trajectory, as a trajectory of their own."""

    def __init__(self, trajectory: Trajectory, start: int, stop: int) -> None:
        self._trajectory, self._start, self._stop = trajectory, start, stop
        self.optimizer, self.sizes = trajectory.optimizer, trajectory.sizes

    def __len__(self) -> int:
        return self._stop - self._start

    def record(self, index: int) -> StepRecord:
        return replace(self._trajectory.record(self._start + index), index=index)

    def sample_ids(self, index: int) -> Tensor:
        return self._trajectory.sample_ids(self._start + index)

    def shares(self, index: int) -> Mapping[str, Shares]:
        return self._trajectory.shares(self._start + index)

    def select(self, name: str, values: Tensor) -> Tensor:
        return self._trajectory.select(name, values)

    def curvature_product(self, index: int, kind: str, vectors: Vectors) -> Vectors:
        return self._trajectory.curvature_product(self._start + index, kind, vectors)


def _weights(candidates: Candidates) -> Tensor:
    weights = sample_weights(candidates.batch, len(candidates.sample_ids)).double().cpu()
    return weights / weights.sum()


def _hypers(trainer: L.Trainer, names: Mapping[Tensor, str], n_steps: int) -> list[dict[str, Hyper]]:
    """Hyperparameters of the steps to come: schedulers are moved ahead, and back."""
    optimizer = only_optimizer(trainer)
    found = []
    with schedules_as_they_were(trainer) as schedulers:
        for ahead in range(n_steps):
            hyper: dict[str, Hyper] = {}
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p in names:
                        now = read_hyper(group, optimizer.state.get(p, {}), type(optimizer))
                        hyper[names[p]] = {**now, "step": now["step"] + ahead}
            found.append(hyper)
            for scheduler in schedulers:
                scheduler.step()
    return found


def _check_batch(candidates: Candidates) -> None:
    """Refuse a batch that does not hold the samples that were drawn for it."""
    drawn, found = len(candidates.sample_ids), batch_size(candidates.batch)
    if found != drawn:
        raise ConfigurationError(
            f"a batch of {found} samples came where {drawn} were drawn; selection needs a collate function that keeps every "
            "sample, in order."
        )
