"""A live run as the step collector sees it: which samples a batch holds, with which weights, and what is verified of its steps.

Recording and selection inside the step both follow a run this way, whatever makes its loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import GradientCapture, freeze_batch_norm, refuse_batch_norm, refuse_compiled
from lightning_influence.capture.step import Samples, StepCollector, StepOptions
from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.plan import PlannedMicroBatch
from lightning_influence.replay.witness import Trial, evaluated, rehearse, witness
from lightning_influence.run.batches import copied
from lightning_influence.run.losses import Dynamics
from lightning_influence.run.moment import Moment
from lightning_influence.run.optimizer import update_name
from lightning_influence.run.random_state import read_random_state
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.refusals import REENTRANT, is_reentrant, refuse_parameters
from lightning_influence.run.rows import RowOrder, row_order
from lightning_influence.run.sample_ids import SampleIds
from lightning_influence.run.sample_weights import sample_weights
from lightning_influence.run.tap import LossTap
from lightning_influence.run.task import Task

_REHEARSALS = 2  # the second sees state that the first left behind


class LiveSteps:
    """Feeds a collector, and leaves the run as it was when closed.

    Args:
        task: what is trained.
        optimizer: the one that moves the task's parameters.
        options: of the steps.
        sample_ids: tells which samples a batch holds.
        captures: whether per-sample gradients are collected; they are verified at the first batch.
        rehearses: whether the first steps are run again on a copy of the module, as a replay will.
        ranks: the processes whose gradients are averaged.
        autocast: makes the context of the run's mixed precision.
        watches: whether something may change gradients between the backward pass and the step.
        otherwise: what a user can do where per-sample gradients do not say what a removal does, for the errors' texts.
        guard: makes the context of what is done inside the training step, where an error would tear the run.

    Attributes:
        collector: is fed.
        drawn: samples of the present batch, in the order in which they were drawn.
        ids: the same in the order of the batch's rows.
        dynamics: of the present batch.

    Raises:
        ConfigurationError: a module that cannot be followed.
        UnsupportedOptimizer: the optimizer's step is not a known function.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        options: StepOptions,
        sample_ids: SampleIds,
        *,
        captures: bool,
        rehearses: bool = False,
        ranks: Ranks | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        watches: bool = False,
        otherwise: str = "use record='replay'",
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.task, self.options, self.sample_ids, self._guard = task, options, sample_ids, guard
        self._autocast, self._watches, self._otherwise = autocast, watches, otherwise
        module = task.module
        update_name(optimizer)
        refuse_parameters(module, optimizer)
        refuse_compiled(module)
        options.check(module)
        if not options.frozen_batch_norm:
            refuse_batch_norm(module)
        capture = None
        if captures:
            optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
            trained = {name for name, p in module.named_parameters() if p.requires_grad and id(p) in optimized}
            capture = GradientCapture(
                module, exclude=options.exclude, frozen_batch_norm=options.frozen_batch_norm, trained=trained
            )
        self.collector = StepCollector(
            module,
            optimizer,
            capture=capture,
            averaged=options.averaged,
            ranks=ranks,
            otherwise=otherwise,
            verify=options.verify,
        )
        self.drawn: Tensor | None = None
        self.dynamics: Dynamics | None = None
        # the trained parameters, until the first batch has been verified
        self._unverified = sorted(capture.parameters) if capture is not None and options.verify else None
        # steps that are still to be run again
        self._rehearsals = _REHEARSALS if rehearses and options.verify and self.collector.ranks.size == 1 else 0
        self._twin: Task | None = None  # on which steps are tried
        self._trial: Trial | None = None
        self._n: int | None = None  # samples of the present batch
        self._first_backward, self._replayed = True, rehearses
        self._row_order: RowOrder | None = None
        self._undo, self._thaw = ExitStack(), ExitStack()
        self._undo.callback(self.collector.close)

    def attach(self, loader: Any) -> None:
        """Training is about to begin.

        Args:
            loader: that the training batches come from.

        Raises:
            ConfigurationError: a loader whose samples cannot be known.
        """
        self.take_from(loader)
        capture = self.collector.capture
        if capture is not None:
            self._undo.callback(capture.detach)
            capture.attach()
        if self.options.frozen_batch_norm:  # also after nothing is captured any more
            for handle in freeze_batch_norm(self.task.module):
                self._thaw.callback(handle.remove)

    def take_from(self, loader: Any) -> None:
        """The training batches come from a loader from now on."""
        self.sample_ids.start(loader)
        self._row_order = row_order(loader, self.task) if self.sample_ids.source is None else None

    @property
    def trying(self) -> bool:
        """Whether the first steps are still being tried."""
        return self._unverified is not None or self._rehearsals > 0

    def close(self, *, trains: bool = False) -> None:
        """Nothing of this is left in the run; may be called again.

        Args:
            trains: the run goes on, with batch normalisation as frozen as it was.
        """
        self.sample_ids.stop()
        self._undo.close()
        if not trains:
            self._thaw.close()
        self._twin = self._trial = None

    # -- one micro-batch --------------------------------------------------------------------------------

    def start_batch(self, batch: Any, moment: Moment, accumulated: int) -> None:
        """A batch is about to be run.

        Args:
            batch: as the training step gets it.
            moment: what the training step reads besides.
            accumulated: micro-batches by whose number its loss is divided.
        """
        self.drawn, self.dynamics = self.sample_ids.next(batch), None
        self.ids = self.drawn if self._row_order is None else self._row_order(batch, self.drawn)
        weights = sample_weights(batch, len(self.ids), self.options.sample_weights)
        self._n = len(self.ids)
        if self._unverified is not None or self._rehearsals:
            self._twin = self._twin or self.task.twin()
            less = self.recollated()
            rest = None if less is None else partial(_without_one, less)
            micro_batch = PlannedMicroBatch(copied(batch), moment, 1.0, self._n, read_random_state(), rest)
            buffers = {name: b.detach().clone() for name, b in self.task.module.named_buffers()}
            self._trial = Trial(micro_batch, self.ids, buffers)
        self._accumulated = accumulated
        self.collector.begin(self.ids, weights, accumulated)

    def noted(self, moment: Moment) -> dict[str, Any]:
        """What the present batch's moment and order are, as a log notes them."""
        assert self.drawn is not None
        return asdict(moment) | ({} if torch.equal(self.ids, self.drawn) else {"drawn": self.drawn.tolist()})

    def recollated(self) -> dict[int, Any] | None:
        """The present batch collated anew without each of its samples, where only the collate function can leave one out."""
        order = self._row_order
        return order.less(self.drawn) if order is not None and order.recollates and self.drawn is not None else None

    def read_loss(self, losses: LossTap) -> None:
        """What the loss that was called says of the batch's samples: their weights in it, and their training dynamics."""
        if self._n is None:
            return
        with self._guard():
            weights = losses.sample_weights(self._n)
            if weights is not None and self.options.reads_the_loss:
                self.collector.weigh(weights)
            self.dynamics = losses.dynamics(self._n)

    def before_backward(self, loss: Tensor, index: int) -> None:
        """The backward pass of a step is about to begin.

        Raises:
            ConfigurationError: gradients that were not cleared, or a checkpointing that a replay cannot follow.
        """
        if self._first_backward:
            self._first_backward = False
            if is_reentrant(loss) and (self._replayed or not self._asks_plainly()):
                raise ConfigurationError(REENTRANT)
        self.collector.before_backward(index)

    def after_backward(self, loss_scale: float = 1.0) -> None:
        """The backward pass has run.

        Args:
            loss_scale: what the loss was multiplied with.

        Raises:
            ConfigurationError: at the first batch, where per-sample gradients do not say what a removal does, or where the
                step, run again, gives another gradient.
        """
        samples = self.collector.after_backward(loss_scale, watch=self._watches)
        if self._unverified is not None and samples is not None:
            with self.task.unchanged():  # a copy may share with the module what a hook closes over
                self._verify(samples)
        if self._rehearsals and samples is not None and self.collector.first_of_step:
            with self.task.unchanged():
                self._rehearse(loss_scale)
        elif not self._rehearsals:
            self._twin = None

    def _asks_plainly(self) -> bool:
        """Whether the training step uses no reentrant checkpointing in eval mode, the mode in which query losses are computed."""
        return (
            self._twin is not None and self._trial is not None and not is_reentrant(evaluated(self._twin, self._trial))
        )

    def _verify(self, samples: Samples) -> None:
        """At the first batch: do per-sample gradients say what a removal does?"""
        trained, self._unverified = self._unverified, None
        assert trained is not None and self._trial is not None
        if self._twin is None:
            warnings.warn(
                f"{type(self.task.module).__name__} cannot be copied, so it is not verified what removing a sample does.",
                stacklevel=2,
            )
            return
        whole = samples.loss_weights.sum() if self.options.averaged else samples.loss_weights[0]
        removals = witness(
            self._twin,
            self._trial,
            samples.loss_weights / whole,
            trained=trained,
            averaged=self.options.averaged,
            exclude=self.options.exclude,
            frozen_batch_norm=self.options.frozen_batch_norm,
            autocast=self._autocast,
        )
        if (
            removals.measuring and removals.not_summed is None
        ):  # otherwise the collector names the parameter at the step
            raise ConfigurationError(
                f"per-sample gradients do not say what removing a sample from this training step does: {removals.reason}. "
                "Samples see each other, rows are not in the order of the samples, or the loss weighs them by hand. "
                f"{self._otherwise[0].upper()}{self._otherwise[1:]}, which measures removals where it has to."
            )

    def _rehearse(self, loss_scale: float) -> None:
        """At the first steps: does a step that is run again give the gradient of the run?"""
        self._rehearsals -= 1
        if self._twin is None or self._trial is None:
            return
        optimized = {id(p) for p in self.collector.parameters()}
        factor = self._accumulated / loss_scale
        named = self._twin.module.named_parameters()  # which it shares with the module
        gradients = {k: p.grad.detach() * factor for k, p in named if p.grad is not None and id(p) in optimized}
        rehearse(
            self._twin,
            self._trial,
            gradients,
            frozen_batch_norm=self.options.frozen_batch_norm,
            autocast=self._autocast,
        )
        if not self._rehearsals:
            self._twin = None


def _without_one(batches: Mapping[int, Any], gone: frozenset[int]) -> Any:
    """The batch without the one sample that is gone; the witness removes no others."""
    (z,) = gone
    return batches[z]
