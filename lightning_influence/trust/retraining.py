"""The same run again without some of its samples: the ground truth of attribution (docs/method.md, "Training again").

A plain loop over the recorded batches, hyperparameters and clipping, with the task's own loss and optimizer. It shares no formula with the estimators it judges.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from lightning_influence.core.trajectory import Clip, Hyper
from lightning_influence.errors import ConfigurationError, InfluenceError, check_choice
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.run.batches import leaves, to_dtype
from lightning_influence.run.data import TrainingData, kept
from lightning_influence.run.lightning_task import CONVERTED, default_dtype
from lightning_influence.run.moment import Moment, eval_modes, set_modes
from lightning_influence.run.random_state import random_state
from lightning_influence.run.task import Task, as_task

_CHECKPOINT_BYTES = 2**28
_BATCH_BYTES = 2**29  # of collated batches kept from one rerun to the next

Counterfactual: TypeAlias = Literal["drop", "zero"]

Removal: TypeAlias = "int | tuple[int, int] | frozenset[int]"
"""A sample, removed wherever it was used; (sample, step), removed from that step only; a set of samples."""

Losses: TypeAlias = Callable[[Any], Tensor]
"""``module -> (n_queries,)``."""


@dataclass(frozen=True)
class RetrainedMicroBatch:
    """One forward and backward pass of a run.

    Attributes:
        sample_ids: indices into the training dataset, one for each row.
        weights: of the samples in the mean over the micro-batch; they sum to ``factor``.
        factor: of the micro-batch's loss in the step, 1 over the number of accumulated ones.
        moment: what the training step read besides the batch; None where the log does not say.
        drawn: what the collate function was given, where that is not one sample for each row.
    """

    sample_ids: tuple[int, ...]
    weights: tuple[float, ...]
    factor: float
    moment: Moment | None = None
    drawn: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RetrainedStep:
    """One optimizer step: its micro-batches, clipping, and the hyperparameters of every parameter."""

    micro_batches: tuple[RetrainedMicroBatch, ...]
    clip: Clip
    hyper: Mapping[str, Hyper]

    def holds(self, samples: Collection[int]) -> bool:
        """Whether any of the samples is in the step."""
        return any(not set(samples).isdisjoint(m.sample_ids) for m in self.micro_batches)


@dataclass(frozen=True)
class Run:
    """Everything that decides a training run; the same `Run` always ends at the same parameters.

    Of the module's hooks only those of batch transfer take part; a run whose other hooks change the
    training is not reproduced (`faithfulness.check_faithfulness` measures whether it is).

    Attributes:
        make_module: the module at its initialisation, new at every call, on the device to train on.
        dataset: indexable by sample id.
        steps: in order.
        collate: samples to a batch.
        dtype: None for the module's own; ``torch.float64`` where effects come near float32 resolution.
        seed: reseeds the random numbers of every training step, for modules with dropout.
        averaged: whether the training loss is a mean over its samples.
        task: a module as a `Task`.
        prepare: a collated batch as the task's loss takes it.
    """

    make_module: Callable[[], Any]
    dataset: Dataset[Any]
    steps: Sequence[RetrainedStep]
    collate: Callable[[list[Any]], Any] = default_collate
    dtype: torch.dtype | None = None
    seed: int | None = None
    averaged: bool = True
    task: Callable[[Any], Task] = as_task
    prepare: Callable[[Task, Any, Moment], Any] = lambda task, batch, moment: task.prepared(batch, moment=moment)


def recorded_run(
    log: str | Path | LoggedSteps, make_module: Callable[[], Any], dataset: Dataset[Any], **options: Any
) -> Run:
    """The run that a log recorded: its batches, learning rates and clipping.

    Args:
        options: further fields of `Run`.
    """
    trajectory = LoggedSteps.of(log)
    steps = [_recorded_step(trajectory, index) for index in range(len(trajectory))]
    return Run(make_module, dataset, steps, averaged=trajectory.record(0).averaged, **options)


def _recorded_step(trajectory: LoggedSteps, index: int) -> RetrainedStep:
    record = trajectory.record(index)
    micro_batches = []
    noted = zip(trajectory.moments_of(index), trajectory.drawn(index), strict=True)
    for number, (moment, drawn) in zip(record.micro_batch_numbers.unique(), noted, strict=True):
        own = record.micro_batch_numbers == number
        weights = record.loss_weights[own]
        factor = float(weights.sum()) if record.averaged else float(weights[0])
        ids = tuple(record.sample_ids[own].tolist())
        micro_batches.append(RetrainedMicroBatch(ids, tuple(weights.tolist()), factor, moment, drawn))
    return RetrainedStep(tuple(micro_batches), record.clip, record.hyper)


def retrain(
    run: Run,
    without: Collection[int] = (),
    *,
    at_step: int | None = None,
    counterfactual: Counterfactual = "drop",
) -> Any:
    """Train again without some samples, and return the module at its last parameters.

    Args:
        without: sample ids to remove.
        at_step: the only step they are removed from; None for every batch that holds them.
        counterfactual: ``"drop"`` averages over the remaining samples, ``"zero"`` keeps the denominator. A
            micro-batch left empty has no gradient, and the optimizer steps nonetheless.
    """
    return _Retraining(run, counterfactual).without(frozenset(without), at_step)


def leave_one_out(
    run: Run,
    removals: Sequence[Removal],
    query_losses: Losses,
    *,
    counterfactual: Counterfactual = "drop",
    workers: int = 0,
    progress: bool = True,
) -> Tensor:
    """What really happens to the queries at each removal, ``f(without z) - f``: ``(n_removals, n_queries)``, float64.

    Args and errors as of `each_effect`.
    """
    losses: dict[int, Tensor] = {}
    each = each_effect(run, removals, query_losses, counterfactual=counterfactual, workers=workers)
    for number, effect in tqdm(each, "retraining", len(removals), unit="run", delay=2, disable=not progress):
        losses[number] = effect
    return torch.stack([losses[number] for number in range(len(removals))])


def each_effect(
    run: Run,
    removals: Sequence[Removal],
    query_losses: Losses,
    *,
    counterfactual: Counterfactual = "drop",
    workers: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """The number of each removal and its effect ``(n_queries,)``, as they are ready.

    Each removal starts from the baseline run just before the sample is first seen; the result is bitwise
    that of a whole `retrain`.

    Args:
        query_losses: such as `queries.query_losses` with a loader.
        workers: processes of one thread each, besides this one; 0 to retrain in this process. They are forked, so
            nothing has to be picklable.

    Raises:
        ConfigurationError: workers where processes cannot be forked safely.
        InfluenceError: a worker died.
    """
    if workers == 0:
        retraining = _Retraining(run, counterfactual, checkpoints=True)
        baseline = query_losses(retraining.baseline).double().cpu()
        for number, removal in enumerate(removals):
            yield number, query_losses(retraining.removing(removal)).double().cpu() - baseline
        return
    _check_fork()
    with _one_thread():  # as the workers have, so that they differ from the baseline by the removal alone
        retraining = _Retraining(run, counterfactual, checkpoints=True)
        baseline = query_losses(retraining.baseline).double().cpu()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_worker, (retraining, removals, query_losses)) as pool:
        numbers = {pool.submit(_work, number): number for number in range(len(removals))}
        try:
            for future in as_completed(numbers):
                yield numbers[future], torch.tensor(future.result(), dtype=torch.float64) - baseline
        except BrokenProcessPool as error:
            raise InfluenceError(
                f"one of {workers} retraining workers died, most likely out of memory; use fewer."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def moved_initialisation(run: Run, scale: float = 1e-3, seed: int = 0) -> Run:
    """The same run from an initialisation moved by ``scale`` times each parameter's root mean square: how well
    the truth it gives agrees with that of the run itself is the ceiling (docs/method.md, "Training again").
    """

    def make_module() -> Any:
        module = run.make_module()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in module.parameters():
                size = p.square().mean().sqrt()
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                p.add_(scale * size * noise)
        return module

    return replace(run, make_module=make_module)


class _Retraining:
    """Reruns of one run, started from checkpoints of its baseline where asked for."""

    def __init__(self, run: Run, counterfactual: Counterfactual, *, checkpoints: bool = False) -> None:
        check_choice("counterfactual", counterfactual, ("drop", "zero"))
        self.run, self.counterfactual = run, counterfactual
        self._batches: dict[tuple[int, ...], Any] = {}
        self._batch_bytes = 0
        self._checkpoints: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._trained = {name for step in run.steps for name in step.hyper}
        if checkpoints:
            task, optimizer = self._start()
            size = sum(t.numel() * t.element_size() for t in task.module.state_dict().values()) * 3
            stride = max(1, len(run.steps) * size // _CHECKPOINT_BYTES)
            self.baseline = self._go(task, optimizer, checkpoint_every=stride)

    def removing(self, removal: Removal) -> nn.Module:
        if isinstance(removal, tuple):
            sample, step = removal
            consumed = 0 <= step < len(self.run.steps) and self.run.steps[step].holds({sample})
            if not consumed:
                raise ConfigurationError(
                    f"step {step} of {len(self.run.steps)} did not consume sample {sample}, so it cannot be removed there; "
                    "choose pairs from a report's rows."
                )
            return self.without(frozenset({sample}), step)
        return self.without(frozenset({removal} if isinstance(removal, int) else removal), None)

    def without(self, removed: frozenset[int], at_step: int | None) -> nn.Module:
        steps = self.run.steps
        first = next((i for i, step in enumerate(steps) if step.holds(removed)), len(steps))
        first = first if at_step is None else at_step
        start = max((step for step in self._checkpoints if step <= first), default=0)
        task, optimizer = self._start()
        if start in self._checkpoints:
            state, optimizer_state = copy.deepcopy(self._checkpoints[start])
            for step in steps[:start]:
                self._thaw(task.module, optimizer, step)
            task.module.load_state_dict(state)
            optimizer.load_state_dict(optimizer_state)
        return self._go(task, optimizer, start, removed, at_step)

    def _start(self) -> tuple[Task, torch.optim.Optimizer]:
        module = self.run.make_module()
        if self.run.dtype is not None:
            module.to(self.run.dtype)
        module.train()
        task = self.run.task(module)
        return task, task.optimizer()

    def _go(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        start: int = 0,
        removed: frozenset[int] = frozenset(),
        at_step: int | None = None,
        checkpoint_every: int | None = None,
    ) -> nn.Module:
        module = task.module
        names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        generators = [task.device] if task.device.type == "cuda" else []
        precision = next((name for name, dtype in CONVERTED.items() if dtype == self.run.dtype), "32-true")
        with (
            task.quiet(),
            torch.random.fork_rng(generators),
            torch.enable_grad(),
            default_dtype(module, precision),
        ):
            for index in range(start, len(self.run.steps)):
                if checkpoint_every is not None and index % checkpoint_every == 0:
                    self._checkpoints[index] = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
                step = self.run.steps[index]
                gone = removed if at_step in (None, index) else frozenset[int]()
                optimizer.zero_grad()
                self._thaw(module, optimizer, step)
                for number, micro_batch in enumerate(step.micro_batches):
                    if self.run.seed is not None:
                        torch.manual_seed(hash((self.run.seed, index, number)) % 2**63)
                    self._backward(task, micro_batch, gone, number)
                _finish_step(optimizer, step, names)
        optimizer.zero_grad()
        return module

    def _thaw(self, module: nn.Module, optimizer: torch.optim.Optimizer, step: RetrainedStep) -> None:
        """Let those parameters train that did at a step; one that the optimizer was given while training is in a group of its own."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in module.named_parameters():
            if name in self._trained:
                p.requires_grad_(name in step.hyper)
            if name in step.hyper and id(p) not in held:
                optimizer.add_param_group({"params": [p]})

    def _backward(self, task: Task, micro_batch: RetrainedMicroBatch, gone: frozenset[int], number: int) -> None:
        drawn = micro_batch.drawn or micro_batch.sample_ids
        left = kept(drawn, gone)
        if not left:
            for p in task.module.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
            return
        factor = micro_batch.factor
        if self.run.averaged and self.counterfactual == "zero" and len(left) < len(drawn):
            factor = sum(w for z, w in zip(micro_batch.sample_ids, micro_batch.weights, strict=True) if z not in gone)
        moment = micro_batch.moment or Moment(number, in_eval=eval_modes(task.module))
        set_modes(task.module, moment.in_eval)
        loss = task.loss(self._batch(task, drawn, gone, moment), moment)
        (loss / (1 / factor)).backward()  # Lightning divides by the number of micro-batches: bitwise the same

    def _batch(self, task: Task, drawn: tuple[int, ...], gone: frozenset[int], moment: Moment) -> Any:
        """The batch as the task takes it; the training step's random numbers are the same whatever making it draws."""
        with random_state(None):
            batch = self.run.prepare(task, self._collated(drawn, gone), moment)
        return batch if self.run.dtype is None else to_dtype(batch, self.run.dtype)

    def _collated(self, drawn: tuple[int, ...], gone: frozenset[int]) -> Any:
        """The collated batch without those that are gone; a whole one is collated once, while they fit."""
        whole = gone.isdisjoint(drawn)
        if whole and drawn in self._batches:
            return self._batches[drawn]
        batch = TrainingData(self.run.dataset, self.run.collate).batch(drawn, gone)
        if whole and self._batch_bytes <= _BATCH_BYTES:
            self._batches[drawn] = batch
            self._batch_bytes += sum(t.numel() * t.element_size() for t in leaves(batch))
        return batch


def _finish_step(optimizer: torch.optim.Optimizer, step: RetrainedStep, names: Mapping[Tensor, str]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if step.clip.rule == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, step.clip.bound)
    elif step.clip.rule == "value":
        torch.nn.utils.clip_grad_value_(parameters, step.clip.bound)
    for group in optimizer.param_groups:
        recorded = next((step.hyper[names[p]] for p in group["params"] if names[p] in step.hyper), None)
        if recorded is not None:
            _schedule(group, recorded)
    optimizer.step()


def _schedule(group: dict[str, Any], hyper: Hyper) -> None:
    """Give a parameter group the hyperparameters that the run's schedulers and callbacks had set."""
    group["lr"], group["weight_decay"] = hyper["lr"], hyper["weight_decay"]
    if "betas" in group:
        group["betas"] = (hyper["beta1"], hyper["beta2"])
    if "momentum" in group:
        group["momentum"] = hyper["momentum"]


# -- worker processes ----------------------------------------------------------------------------------------

_job: tuple[_Retraining, Sequence[Removal], Losses]
"""In a worker process: its own copy of what to retrain."""


def _start_worker(retraining: _Retraining, removals: Sequence[Removal], query_losses: Losses) -> None:
    global _job
    torch.set_num_threads(1)
    _job = retraining, removals, query_losses


def _work(number: int) -> list[float]:
    retraining, removals, query_losses = _job
    return query_losses(retraining.removing(removals[number])).double().tolist()


def _check_fork() -> None:
    if sys.platform != "linux" or torch.cuda.is_available():
        why = "a GPU is in use" if torch.cuda.is_available() else f"this is {sys.platform}"
        raise ConfigurationError(
            f"workers fork this process, which is not safe because {why}; retrain with workers=0"
            + (", or hide the GPU with CUDA_VISIBLE_DEVICES=''." if torch.cuda.is_available() else ".")
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
