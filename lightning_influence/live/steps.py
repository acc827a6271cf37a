"""A live run as the step collector sees it: which samples a batch holds, with which weights, and what is verified of its steps.

Recording and selection inside the step both follow a run this way, whatever makes its loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_influence.capture import GradientCapture, freeze_batch_norm, refuse_batch_norm, refuse_compiled
from lightning_influence.capture.step import Samples, StepCollector, StepOptions
from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.lasting import Tries
from lightning_influence.replay.plan import PlannedMicroBatch
from lightning_influence.replay.removals import RemovalCheck
from lightning_influence.replay.witness import Rerun, Trial, evaluated, rehearse, witness
from lightning_influence.run.batches import copied, objects
from lightning_influence.run.losses import Dynamics
from lightning_influence.run.moment import Moment
from lightning_influence.run.optimizer import trained_by, update_name
from lightning_influence.run.random_state import read_random_state
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.refusals import REENTRANT, is_reentrant, left_out, recommending, refuse_parameters
from lightning_influence.run.rows import RowOrder, row_order
from lightning_influence.run.sample_ids import SampleIds
from lightning_influence.run.sample_weights import sample_weights
from lightning_influence.run.tap import LossTap
from lightning_influence.run.task import Task

_VERIFIED = 2  # samples of the first batch, each of which costs a step
_REHEARSALS = 2  # the second sees state that the first left behind


class LiveSteps:
    """Feeds a collector, and leaves the run as it was when closed.

    Args:
        task: what is trained.
        optimizer: the one that moves the task's parameters.
        options: of the steps.
        sample_ids: tells which samples a batch holds.
        captures: whether per-sample gradients are collected; they are verified at the first batch, and ever more rarely later.
        rehearses: whether the first steps are run again on a copy of the module, as a replay will.
        lasting: whether what a sample does to later steps is followed.
        ranks: the processes whose gradients are averaged.
        autocast: makes the context of the run's mixed precision.
        watches: whether something may change gradients between the backward pass and the step.
        otherwise: what a user can do where per-sample gradients do not say what a removal does, for the errors' texts.
        guard: makes the context of what is done inside the training step, where an error would tear the run.
        give_up: told which of ``"gradients"`` and ``"replay"`` is impossible, and why, where the other goes on without it; raises
            the reason where it does not. None for a run that needs what it asks for.

    Attributes:
        collector: is fed.
        drawn: samples of the present batch, in the order in which they were drawn.
        ids: the same in the order of the batch's rows.
        dynamics: of the present batch.
        removals: what was verified of the run's removals so far.

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
        lasting: bool = True,
        ranks: Ranks | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        watches: bool = False,
        otherwise: str = "use record='replay'",
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        give_up: Callable[[str, ConfigurationError], None] | None = None,
    ) -> None:
        self._give_up = give_up
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
            capture = self._capture(set(trained_by(optimizer, module)))
        self.collector = StepCollector(
            module,
            optimizer,
            capture=capture,
            averaged=options.averaged,
            ranks=ranks,
            otherwise=otherwise,
            verify=options.verify,
            give_up=None if give_up is None else partial(give_up, "gradients"),
        )
        self.drawn: Tensor | None = None
        self.dynamics: Dynamics | None = None
        self.removals = RemovalCheck(unverifiable=None if options.verify else "verify=False", few=_VERIFIED)
        self._to_verify = capture is not None and options.verify  # the next batch
        # steps that are still to be run again
        alone = self.collector.ranks.size == 1 and not self.collector.ranks.sharded
        self._rehearsals = _REHEARSALS if rehearses and options.verify and alone else 0
        self._twin: Task | None = None  # on which steps are tried
        self._trial: Trial | None = None
        self._rerun: Rerun | None = None  # of the trial
        self._n: int | None = None  # samples of the present batch
        self._first_backward, self._replayed, self._lasting = True, rehearses, lasting
        self._row_order: RowOrder | None = None
        self._undo, self._thaw = ExitStack(), ExitStack()
        self._undo.callback(self.collector.close)

    def _capture(self, trained: set[str]) -> GradientCapture | None:
        """Hooks for per-sample gradients; None where they are given up."""
        options = self.options
        with left_out("gradients", self._give_up), recommending(self._otherwise):
            with warnings.catch_warnings():
                if self._give_up is not None:
                    warnings.simplefilter("ignore")  # of slow modules, for which they are given up
                capture = GradientCapture(
                    self.task.module,
                    exclude=options.exclude,
                    frozen_batch_norm=options.frozen_batch_norm,
                    trained=trained,
                )
            if self._give_up is not None and capture.slow:
                raise ConfigurationError(
                    f"there is no rule for {', '.join(capture.slow)}, and without one they are slow"
                )
            return capture
        return None

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
        first = self._to_verify and not self.removals.verified and self.removals.unverifiable is None
        return first or self._rehearsals > 0

    @property
    def verified(self) -> dict[str, Any] | None:
        """What is known of the run's removals so far, as reports tell it; None where per-sample gradients do not say them."""
        return None if self.collector.capture is None else self.removals.to_metadata()

    def start_epoch(self, epoch: int) -> None:
        """The loss may be another from now on; it is looked at again in epochs 1, 2, 4, 8 and so on."""
        if self.collector.capture is not None and epoch > 0 and epoch & (epoch - 1) == 0:
            self._to_verify = self.options.verify

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
        self.ids = (
            self.drawn if self._row_order is None else self._row_order(batch, self.drawn, self.sample_ids.fetched)
        )
        parts = objects(batch)
        if parts and (self._row_order is None or not self._row_order.recollates):
            raise ConfigurationError(
                f"a batch is a {type(parts[0]).__name__}, or holds one, whose samples cannot be taken apart, and collating it anew without "
                "a sample needs a dataset that gives the same samples twice. Collate into dicts, lists and tuples of tensors, or move "
                "what is drawn at random into the training step."
            )
        weights = sample_weights(batch, len(self.ids), self.options.sample_weights)
        self._n = len(self.ids)
        if self._to_verify or self._rehearsals:
            self._twin = self._twin or self.task.twin()
            less = self.recollated()
            rest = None if less is None else partial(_without_one, less)
            micro_batch = PlannedMicroBatch(copied(batch), moment, 1.0, self._n, read_random_state(), rest)
            buffers = {name: b.detach().clone() for name, b in self.task.module.named_buffers()}
            self._trial, self._rerun = Trial(micro_batch, self.ids, buffers), None
            if less is None and self._minds_padding():
                rest = partial(_without_one, self.recollated() or {})
                self._trial = replace(self._trial, micro_batch=replace(micro_batch, less=rest))
        self._accumulated = accumulated
        self.collector.begin(self.ids, weights, accumulated)

    def noted(self, moment: Moment) -> dict[str, Any]:
        """What the present batch's moment and order are, as a log notes them."""
        assert self.drawn is not None
        order = {} if torch.equal(self.ids, self.drawn) else {"drawn": self.drawn.tolist()}
        assumed = {"rows": "assumed"} if self._row_order is not None and self._row_order.assumed else {}
        return vars(moment) | order | assumed

    def recollated(self) -> dict[int, Any] | None:
        """The present batch collated anew without each of its samples, where only the collate function can leave one out."""
        order = self._row_order
        if order is None or not order.recollates or self.drawn is None:
            return None
        return order.less(self.drawn, self.sample_ids.fetched)

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
                error = ConfigurationError(REENTRANT)
                if self._give_up is None or not self._asks_plainly():
                    raise error
                self._give_up("replay", error)
        self.collector.before_backward(index)

    def after_backward(self, loss_scale: float = 1.0) -> None:
        """The backward pass has run.

        Args:
            loss_scale: what the loss was multiplied with.

        Raises:
            ConfigurationError: at the first batch, where per-sample gradients do not say what a removal does, or where the
                step, run again, gives another gradient.
        """
        with recommending(self._otherwise):
            samples = self.collector.after_backward(loss_scale, watch=self._watches)
        if samples is not None and (self._to_verify or self._rehearsals):
            with self.task.unchanged():  # a copy may share with the module what a hook closes over
                self._refuse_memory()
        if samples is not None and self._to_verify:
            with self.task.unchanged():
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
        """Do per-sample gradients say what a removal does?"""
        self._to_verify, removals, capture = False, self.removals, self.collector.capture
        name = type(self.task.module).__name__
        if capture is None:  # given up in this very backward pass
            return
        assert self._trial is not None
        if self._twin is None:
            removals.unverifiable = f"{name} cannot be copied"
            warnings.warn(f"{removals.unverifiable}, so it is not verified what removing a sample does.", stacklevel=2)
            return
        whole = samples.loss_weights.sum() if self.options.averaged else samples.loss_weights[0]
        self._rerun = witness(
            self._twin,
            self._trial,
            samples.loss_weights / whole,
            trained=sorted(capture.parameters),
            averaged=self.options.averaged,
            removals=removals,
            exclude=self.options.exclude,
            frozen_batch_norm=self.options.frozen_batch_norm,
            autocast=self._autocast,
        )
        if (
            removals.not_summed is not None
        ):  # the collector names the parameter at the step, if it is so in the run itself
            self.removals = RemovalCheck(unverifiable=f"of a copy of {name}, {removals.reason}")
        elif removals.measuring:
            error = ConfigurationError(
                f"step {self._trial.micro_batch.moment.global_step}: per-sample gradients do not say what removing a sample from "
                f"this training step does: {removals.reason}. Samples see each other, rows are not in the order of the samples, or "
                f"the loss weighs them by hand. {self._otherwise[0].upper()}{self._otherwise[1:]}, which measures removals where it "
                "has to."
            )
            self.collector.give_up(error)

    def _minds_padding(self) -> bool:
        """Whether the step gives another loss, or none, where a batch is padded further than its longest sample; then only the
        collate function can leave a sample out.

        Raises:
            ConfigurationError: it does, and per-sample gradients are to say what a removal does.
        """
        order = self._row_order
        if order is None or order.padded is None or self._twin is None or self._trial is None:
            return False
        padded, order.padded = order.padded, None
        tries = Tries(self._twin, self._autocast)
        if tries.same_loss(self._trial.micro_batch, *padded, self._trial.buffers):
            return False
        if self.collector.capture is not None:
            error = ConfigurationError(
                "the training step gives another loss, or fails, where the same samples are padded further, so that a batch without its "
                "longest sample is another for all the others, which per-sample gradients do not say. Let the step pass over "
                f"padding (a mask; pad_packed_sequence(total_length=...)), or {self._otherwise}."
            )
            self.collector.give_up(error)
        order.recollates = True
        return True

    def _refuse_memory(self) -> None:
        """Refuse a step that leaves something of its samples in a buffer that its loss reads."""
        trial = self._trial
        if trial is None or self._twin is None or not self._lasting:
            return
        buffers = dict(self.task.module.named_buffers())
        if all(torch.equal(trial.buffers[k], b) for k, b in buffers.items() if k in trial.buffers):
            return
        name = Tries(self._twin, self._autocast).remembered(trial.micro_batch, trial.buffers)
        if name is not None:
            raise ConfigurationError(
                f"the buffer {name} keeps something of the samples of a step, and the loss of later steps reads it: without a "
                "sample they would find another one, which influence does not follow. Compute it from the batch at hand, or "
                "leave its term out of the loss while recording."
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
        with left_out("replay", self._give_up):
            rehearse(
                self._twin,
                self._trial,
                gradients,
                self._rerun,
                frozen_batch_norm=self.options.frozen_batch_norm,
                autocast=self._autocast,
            )
        if not self._rehearsals:
            self._twin = None

    def rehearse_no_more(self) -> None:
        """The run is not to be replayed after all."""
        self._rehearsals, self._replayed = 0, False


def _without_one(batches: Mapping[int, Any], gone: frozenset[int]) -> Any:
    """The batch without the one sample that is gone; the witness removes no others."""
    (z,) = gone
    return batches[z]
