"""The same run again without some of its samples: the ground truth of attribution (method.md section 10).

A plain loop over the recorded batches, learning rates and clipping, with the module's own training step
and optimizer. It shares no formula with the estimators it judges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from lightning_influence.batches import to_dtype
from lightning_influence.errors import ConfigurationError
from lightning_influence.log import LoggedTrajectory
from lightning_influence.training_step import loss_of, quiet
from lightning_influence.trajectory import Clip

_CHECKPOINT_BYTES = 2**28


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of a run.

    Attributes:
        sample_ids: indices into the training dataset.
        weights: of the samples in the mean over the micro-batch; they sum to ``factor``.
        factor: of the micro-batch's loss in the step, 1 over the number of accumulated ones.
    """

    sample_ids: tuple[int, ...]
    weights: tuple[float, ...]
    factor: float


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches, clipping, and the learning rate of every parameter."""

    micro_batches: tuple[MicroBatch, ...]
    clip: Clip
    learning_rates: dict[str, float]


@dataclass(frozen=True)
class Run:
    """Everything that decides a training run; the same `Run` always ends at the same parameters.

    Attributes:
        make_module: the module at its initialisation, new at every call.
        dataset: indexable by sample id.
        steps: in order.
        collate: samples to a batch.
        dtype: None for the module's own; ``torch.float64`` where effects come near float32 resolution.
        seed: reseeds the random numbers of every training step, for modules with dropout.
        averaged: whether the training loss is a mean over its samples.
    """

    make_module: Callable[[], LightningModule]
    dataset: Dataset[Any]
    steps: Sequence[Step]
    collate: Callable[[list[Any]], Any] = default_collate
    dtype: torch.dtype | None = None
    seed: int | None = None
    averaged: bool = True


def recorded_run(
    log: str | Path, make_module: Callable[[], LightningModule], dataset: Dataset[Any], **options: Any
) -> Run:
    """The run that a log recorded: its batches, learning rates and clipping.

    Args:
        options: further fields of `Run`.
    """
    trajectory = LoggedTrajectory(log)
    steps = [_recorded_step(trajectory, index) for index in range(len(trajectory))]
    return Run(make_module, dataset, steps, averaged=trajectory.record(0).averaged, **options)


def _recorded_step(trajectory: LoggedTrajectory, index: int) -> Step:
    record = trajectory.record(index)
    micro_batches = []
    for number in record.micro_batches.unique():
        here = record.micro_batches == number
        weights = record.loss_weights[here]
        factor = float(weights.sum()) if record.averaged else float(weights[0])
        micro_batches.append(MicroBatch(tuple(record.sample_ids[here].tolist()), tuple(weights.tolist()), factor))
    rates = {name: hyper["lr"] for name, hyper in record.hyper.items()}
    return Step(tuple(micro_batches), record.clip, rates)


def retrain(
    run: Run,
    without: Collection[int] = (),
    *,
    at_step: int | None = None,
    counterfactual: Literal["drop", "zero"] = "drop",
) -> LightningModule:
    """Train again without some samples, and return the module at its last parameters.

    Args:
        without: sample ids to remove.
        at_step: the only step they are removed from; None for every batch that holds them.
        counterfactual: ``"drop"`` averages over the remaining samples, ``"zero"`` keeps the denominator. A
            micro-batch left empty has no gradient, and the optimizer steps nonetheless.
    """
    return _Retraining(run, checkpoints=False).without(without, at_step, counterfactual)


def leave_one_out(
    run: Run,
    removals: Sequence[int] | Sequence[tuple[int, int]],
    query_losses: Callable[[LightningModule], Tensor],
    *,
    counterfactual: Literal["drop", "zero"] = "drop",
    progress: bool = True,
) -> Tensor:
    """What really happens to the queries when a sample is removed: ``f(without z) - f``.

    Each removal starts from the baseline run just before the sample is first seen, so its result is bitwise
    that of a whole `retrain`.

    Args:
        removals: sample ids, removed from the whole run, or (sample id, step) pairs, removed from one step.
        query_losses: ``module -> (n_queries,)``, such as `queries.query_losses` with a loader.

    Returns:
        ``(n_removals, n_queries)``, float64.
    """
    retraining = _Retraining(run, checkpoints=True)
    baseline = query_losses(retraining.baseline).double()
    effects = []
    for removal in tqdm(removals, desc="leave-one-out retraining", unit="run", delay=2, disable=not progress):
        sample, step = removal if isinstance(removal, tuple) else (removal, None)
        module = retraining.without([sample], step, counterfactual)
        effects.append(query_losses(module).double() - baseline)
    return torch.stack(effects)


def moved_initialisation(run: Run, scale: float = 1e-3, seed: int = 0) -> Run:
    """The same run from an initialisation moved by ``scale`` times each parameter's root mean square: the
    truth it gives is the ceiling of what any estimator can agree with (method.md section 9).
    """

    def make_module() -> LightningModule:
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

    def __init__(self, run: Run, *, checkpoints: bool) -> None:
        self.run = run
        self._batches: dict[tuple[int, ...], Any] = {}
        self._checkpoints: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        if checkpoints:
            module, optimizer = self._start()
            size = sum(t.numel() * t.element_size() for t in module.state_dict().values()) * 3
            stride = max(1, len(run.steps) * size // _CHECKPOINT_BYTES)
            self.baseline = self._go(module, optimizer, 0, frozenset(), None, "drop", stride)

    def without(
        self, samples: Collection[int], at_step: int | None, counterfactual: Literal["drop", "zero"]
    ) -> LightningModule:
        removed = frozenset(samples)
        first = self._first_affected(removed) if at_step is None else at_step
        known = [step for step in self._checkpoints if step <= first]
        module, optimizer = self._start()
        if known:
            state, optimizer_state = copy.deepcopy(self._checkpoints[max(known)])
            module.load_state_dict(state)
            optimizer.load_state_dict(optimizer_state)
        return self._go(module, optimizer, max(known, default=0), removed, at_step, counterfactual)

    def _first_affected(self, removed: frozenset[int]) -> int:
        for index, step in enumerate(self.run.steps):
            if any(removed.intersection(m.sample_ids) for m in step.micro_batches):
                return index
        return len(self.run.steps)

    def _start(self) -> tuple[LightningModule, torch.optim.Optimizer]:
        module = self.run.make_module()
        if self.run.dtype is not None:
            module.to(self.run.dtype)
        module.train()
        return module, _only_optimizer(module.configure_optimizers())

    def _go(
        self,
        module: LightningModule,
        optimizer: torch.optim.Optimizer,
        start: int,
        removed: frozenset[int],
        at_step: int | None,
        counterfactual: str,
        checkpoint_every: int | None = None,
    ) -> LightningModule:
        names = {id(p): name for name, p in module.named_parameters()}
        with quiet(module), torch.random.fork_rng(devices=[]):
            for index in range(start, len(self.run.steps)):
                if checkpoint_every is not None and index % checkpoint_every == 0:
                    self._checkpoints[index] = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
                step = self.run.steps[index]
                gone = removed if at_step in (None, index) else frozenset[int]()
                optimizer.zero_grad()
                for number, micro_batch in enumerate(step.micro_batches):
                    self._backward(module, micro_batch, gone, counterfactual, index, number)
                _finish_step(optimizer, step, names)
        return module

    def _backward(
        self,
        module: LightningModule,
        micro_batch: MicroBatch,
        gone: frozenset[int],
        counterfactual: str,
        index: int,
        number: int,
    ) -> None:
        if self.run.seed is not None:
            torch.manual_seed(hash((self.run.seed, index, number)) % 2**63)
        kept = tuple(z for z in micro_batch.sample_ids if z not in gone)
        if not kept:
            for p in module.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
            return
        factor = micro_batch.factor
        if self.run.averaged and counterfactual == "zero" and len(kept) < len(micro_batch.sample_ids):
            factor = sum(w for z, w in zip(micro_batch.sample_ids, micro_batch.weights, strict=True) if z not in gone)
        loss = loss_of(module.training_step(self._batch(micro_batch, kept), number))
        (loss * factor if factor != 1.0 else loss).backward()

    def _batch(self, micro_batch: MicroBatch, kept: tuple[int, ...]) -> Any:
        """The collated batch; those that are whole are collated once."""
        if kept == micro_batch.sample_ids:
            if kept not in self._batches:
                self._batches[kept] = self._collated(kept)
            return self._batches[kept]
        return self._collated(kept)

    def _collated(self, ids: tuple[int, ...]) -> Any:
        batch = self.run.collate([self.run.dataset[z] for z in ids])
        return batch if self.run.dtype is None else to_dtype(batch, self.run.dtype)


def _finish_step(optimizer: torch.optim.Optimizer, step: Step, names: dict[int, str]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if step.clip.rule == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, step.clip.bound)
    elif step.clip.rule == "value":
        torch.nn.utils.clip_grad_value_(parameters, step.clip.bound)
    for group in optimizer.param_groups:
        rates = [step.learning_rates[names[id(p)]] for p in group["params"] if names[id(p)] in step.learning_rates]
        if rates:
            group["lr"] = rates[0]
    optimizer.step()


def _only_optimizer(configured: Any) -> torch.optim.Optimizer:
    """The optimizer in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(configured, torch.optim.Optimizer):
        return configured
    if isinstance(configured, dict):
        return _only_optimizer(configured["optimizer"])
    if isinstance(configured, (list, tuple)) and configured:
        first = configured[0]
        inner = first if isinstance(first, (list, tuple)) else [first]
        if len(inner) == 1:
            return _only_optimizer(inner[0])
    raise ConfigurationError(f"configure_optimizers returned {configured!r}; retraining follows a single optimizer.")
