"""Look-ahead scores: the run is rolled out for some steps, scored by the sweep, and put back.

The mathematics is in docs/method.md, "Look-ahead selection".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_influence.capture import refuse_batch_norm
from lightning_influence.capture.step import Samples, StepOptions
from lightning_influence.core.optimizers import UPDATES
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.core.trajectory import Hyper, Shares, StepRecord, Trajectory, Vectors
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.replay.plan import PlannedMicroBatch, PlannedStep, State
from lightning_influence.replay.removals import RemovalCheck
from lightning_influence.replay.trajectory import ReplayTrajectory
from lightning_influence.run.batches import batch_size
from lightning_influence.run.moment import set_modes
from lightning_influence.run.optimizer import read_hypers, read_moments, update_name
from lightning_influence.run.random_state import random_state, read_random_state, write_random_state
from lightning_influence.run.sample_weights import sample_weights
from lightning_influence.run.tap import LossTap
from lightning_influence.run.task import as_task
from lightning_influence.run.trainer import clip_of, moment_of, only_optimizer, schedules_as_they_were, steps_left
from lightning_influence.selection.target import target_gradient


@dataclass(frozen=True)
class Candidates:
    """A batch that training is about to see.

    Attributes:
        sample_ids: ``(n,)``, as drawn.
        rows: ``(n,)``, the same in the order of the batch's rows; None where that is the order of drawing.
    """

    batch: Any
    sample_ids: Tensor
    rows: Tensor | None = None


class Rollout:
    """Optimizer steps to come, from the trainer's present state, as a `replay.Plan`.

    Args:
        candidates: the micro-batches of each step.
        options: of the steps.
    """

    def __init__(
        self, trainer: L.Trainer, candidates: Sequence[Sequence[Candidates]], options: StepOptions | None = None
    ) -> None:
        self._trainer, self._options = trainer, options or StepOptions()
        module, optimizer = trainer.lightning_module, only_optimizer(trainer)
        self.optimizer = update_name(optimizer)
        self.snapshots = [0]
        trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
        parameters = {k: p.detach().clone() for k, p in trained.items()}
        moments = {
            k: tuple(m.clone() for m in read_moments(optimizer.state.get(p, {}), UPDATES[self.optimizer], p))
            for k, p in trained.items()
        }
        self._state = State(parameters, moments, {k: b.detach().clone() for k, b in module.named_buffers()})
        for c in (c for parts in candidates for c in parts):
            _check_batch(c)
        first = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # index of the batch that comes next
        hypers, self._moment = _hypers(trainer, trained, first, candidates), moment_of(trainer, module)
        self._steps, random = list[PlannedStep](), _random_states()
        for ahead, (parts, hyper) in enumerate(zip(candidates, hypers, strict=True)):
            self._steps.append(self._planned(parts, hyper, first, trainer.global_step + ahead, random))
            first += len(parts)

    def _planned(
        self,
        parts: Sequence[Candidates],
        hyper: dict[str, Hyper],
        first: int,
        global_step: int,
        random: Iterator[dict[str, Tensor]],
    ) -> PlannedStep:
        accumulated = self._trainer.accumulate_grad_batches  # also where an epoch ends with fewer
        micro_batches = [
            PlannedMicroBatch(
                c.batch,
                replace(self._moment, batch_idx=first + i, global_step=global_step),
                1 / accumulated,
                len(c.sample_ids),
                next(random),
            )
            for i, c in enumerate(parts)
        ]
        samples = [
            Samples.weighted(
                c.sample_ids if c.rows is None else c.rows,
                sample_weights(c.batch, len(c.sample_ids), self._options.sample_weights),
                accumulated,
                averaged=self._options.averaged,
            )
            for c in parts
        ]
        averaged = self._options.averaged
        return PlannedStep(micro_batches, *Samples.columns(samples), hyper, clip_of(self._trainer), averaged)

    def weigh(self) -> None:
        """Take the weights of the samples from the losses that the training step calls, where it tells them.

        To be called while the module is quiet and will be put back.
        """
        self._steps = [self._weighed(step) for step in self._steps]

    def _weighed(self, step: PlannedStep) -> PlannedStep:
        module, samples = self._trainer.lightning_module, []
        task = as_task(module)
        for number, micro_batch in enumerate(step.micro_batches):
            in_micro_batch = step.micro_batch_numbers == number
            own = Samples(step.sample_ids[in_micro_batch], step.loss_weights[in_micro_batch])
            set_modes(module, micro_batch.moment.in_eval)
            with random_state(None), self._trainer.precision_plugin.forward_context(), LossTap(labels=False) as losses:
                assert micro_batch.random is not None
                write_random_state(micro_batch.random)
                task.loss(micro_batch.batch, micro_batch.moment)
            weights = losses.sample_weights(micro_batch.n_samples)
            if weights is not None:
                own = Samples.weighted(own.ids, weights, round(1 / micro_batch.factor), averaged=True)
            samples.append(own)
        return replace(step, loss_weights=Samples.columns(samples)[1])

    def __len__(self) -> int:
        return len(self._steps)

    def sample_ids(self, index: int) -> Tensor:
        return self._steps[index].sample_ids

    def step(self, index: int) -> PlannedStep:
        return self._steps[index]

    def snapshot(self, index: int) -> State:
        return self._state

    def parameters(self, index: int) -> dict[str, Tensor]:
        return self._state.parameters


def look_ahead(
    trainer: L.Trainer,
    candidates: Sequence[Sequence[Candidates]],
    queries: Any,
    horizon: int,
    method: Method,
    scored: int,
    options: StepOptions | None = None,
    removals: RemovalCheck | None = None,
) -> list[Tensor]:
    """Scores of the samples of the next steps, each against the mean query loss ``horizon`` steps after its own step.

    Everything about the run is afterwards as it was, bit for bit. What a removal does to the gradient is verified by the
    roll-out, and measured where per-sample gradients do not say it.

    Args:
        candidates: the micro-batches of the steps to come, up to ``scored + horizon``; where there are fewer,
            the last steps are read sooner.
        queries: batches, or a `target.TargetLoss`.
        scored: the number of steps to score.
        options: of the steps.
        removals: what an earlier roll-out of the run has verified.

    Returns:
        ``(n,)`` for each scored step, in the order in which its samples were drawn.

    Raises:
        InfluenceError: a gradient of the roll-out or of the target that is not finite.
    """
    options, module = options or StepOptions(), trainer.lightning_module
    if not options.frozen_batch_norm:
        refuse_batch_norm(module)
    plan = Rollout(trainer, candidates, options)
    scores = []
    with ReplayTrajectory(
        module,
        plan,
        exclude=options.exclude,
        frozen_batch_norm=options.frozen_batch_norm,
        autocast=trainer.precision_plugin.forward_context,
        exact=method.hessian.differentiated,
        progress=False,
        removals=removals,
    ) as run:
        if options.reads_the_loss:
            plan.weigh()
        for start in range(scored):
            stop = min(start + 1 + horizon, len(run))
            run.place(stop)
            _refuse_not_finite(run, range(start, stop))
            gradients = target_gradient(module, queries, list(run.sizes), run.select)
            window = TrajectorySlice(run, start, stop)
            rows = sweep(window, gradients, method, scored=range(1), progress=False)
            scores.append(rows.of(torch.cat([c.sample_ids for c in candidates[start]]))[:, 0])
    return scores


def _refuse_not_finite(run: Trajectory, steps: range) -> None:
    for index in steps:
        record = run.record(index)
        if not math.isfinite(record.clip.raw_norm):
            raise InfluenceError(
                f"the gradient of a batch to come, of the samples {record.sample_ids.tolist()[:10]}, is not finite, so nothing "
                "can be selected by it. Look for the loss that is not finite with Trainer(detect_anomaly=True), or lower the "
                "learning rate."
            )


class TrajectorySlice:
    """Some consecutive steps of a trajectory, as a trajectory of their own."""

    def __init__(self, trajectory: Trajectory, start: int, stop: int) -> None:
        self._trajectory, self._start, self._stop = trajectory, start, stop
        self.optimizer, self.sizes = trajectory.optimizer, trajectory.sizes
        self.starts = (0,)

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


def _hypers(
    trainer: L.Trainer, trained: Mapping[str, Tensor], first: int, steps: Sequence[Sequence[Candidates]]
) -> list[dict[str, Hyper]]:
    """Hyperparameters of the steps to come, the first batch of which has the index ``first``: schedulers are moved ahead as
    Lightning would, but not beyond the end of the run, which some refuse, and back.
    """
    hypers, left = list[dict[str, Hyper]](), steps_left(trainer)
    with schedules_as_they_were(trainer) as schedules:
        for ahead, parts in enumerate(steps):
            now = read_hypers(only_optimizer(trainer), trained)
            hypers.append({k: {**hyper, "step": hyper["step"] + ahead} for k, hyper in now.items()})
            first += len(parts)
            if ahead + 1 < min(len(steps), left):
                schedules.step(first - 1)
    return hypers


def _random_states() -> Iterator[dict[str, Tensor]]:
    """The present random state, which the next training step begins in, and then others."""
    yield read_random_state()
    generator = torch.Generator().manual_seed(int(torch.get_rng_state().sum()))
    while True:
        with random_state(None):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            state = read_random_state()
        yield state


def _check_batch(candidates: Candidates) -> None:
    """Refuse a batch that does not hold the samples that were drawn for it."""
    drawn, rows = len(candidates.sample_ids), batch_size(candidates.batch)
    if rows != drawn:
        raise ConfigurationError(
            f"a batch of {rows} samples came where {drawn} were drawn; selection needs a collate function that keeps every "
            "sample."
        )
