"""A Lightning run as the step collector sees it: which samples a batch holds, with which weights, and where a step ends.

Recording and selection inside the step both follow a run this way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor

from lightning_influence.capture import GradientCapture, freeze_batch_norm, refuse_batch_norm, refuse_compiled
from lightning_influence.capture.step import Samples, StepCollector, StepOptions
from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.plan import PlannedMicroBatch
from lightning_influence.replay.witness import Trial, evaluated, rehearse, twin_of, witness
from lightning_influence.run.batches import copied
from lightning_influence.run.lightning_names import overrides
from lightning_influence.run.losses import Dynamics
from lightning_influence.run.optimizer import update_name
from lightning_influence.run.random_state import read_random_state
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.refusals import REENTRANT, is_reentrant, refuse_parameters
from lightning_influence.run.rows import RowOrder, row_order
from lightning_influence.run.sample_ids import SampleIds
from lightning_influence.run.sample_weights import sample_weights
from lightning_influence.run.tap import LossTap, tapped
from lightning_influence.run.trainer import loss_scaler, only_optimizer
from lightning_influence.run.training_step import Moment
from lightning_influence.run.unchanged import unchanged

_REHEARSALS = 2  # the second sees state that the first left behind


class LiveRun:
    """Feeds a collector from the hooks of a callback, and leaves the run as it was at the end.

    Args:
        options: of the steps.
        sample_ids: tells which samples a batch holds.
        follower: the callback, whose own hooks are no reason to watch the gradients.
        otherwise: what a user can do where per-sample gradients do not say what a removal does, for the errors' texts.
        guard: makes the context of what is done inside the training step, where an error would tear the run.
    """

    def __init__(
        self,
        options: StepOptions,
        sample_ids: SampleIds,
        follower: L.Callback,
        *,
        otherwise: str,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.options, self.sample_ids = options, sample_ids
        self._follower, self._otherwise = follower, otherwise
        self._guard = guard
        self._undo, self._thaw = ExitStack(), ExitStack()
        self.drawn: Tensor | None = None  # samples of the present batch, in the order in which they were drawn
        self.dynamics: Dynamics | None = None  # of the present batch
        self._unverified: list[str] | None = None  # the trained parameters, until the first batch has been verified
        self._rehearsals = 0  # steps that are still to be run again
        self._twin: L.LightningModule | None = None  # of the module, on which steps are tried
        self._trial: Trial | None = None
        self._n: int | None = None  # samples of the present batch
        self._watches = False
        self._first_backward = True
        self._replayed = False
        self._row_order: RowOrder | None = None

    # -- start and end of fit ---------------------------------------------------------------------------

    def listen(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """To be called in ``setup``: before configure_optimizers, which may have the loader made.

        Raises:
            ConfigurationError: a run whose steps cannot be followed.
        """
        Ranks.of(trainer)
        if not module.automatic_optimization:
            raise ConfigurationError(
                f"{type(module).__name__} uses manual optimization, whose steps the trainer does not see; "
                f"{type(self._follower).__name__} needs automatic_optimization=True."
            )
        self.sample_ids.listen_to(trainer.strategy)

    def start(
        self, trainer: L.Trainer, module: L.LightningModule, *, captures: bool, rehearses: bool = False
    ) -> StepCollector:
        """To be called in ``on_train_start``.

        Args:
            captures: whether per-sample gradients are collected; they are verified at the first batch.
            rehearses: whether the first steps are run again on a copy of the module, as a replay will.

        Raises:
            ConfigurationError: a module or loader that cannot be followed.
        """
        optimizer, options = only_optimizer(trainer), self.options
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
            self._unverified = sorted(capture.parameters) if options.verify else None
        self._collector = StepCollector(
            module,
            optimizer,
            capture=capture,
            averaged=options.averaged,
            ranks=Ranks.of(trainer),
            otherwise=self._otherwise,
            verify=options.verify,
        )
        self._undo.callback(self._collector.close)
        self.sample_ids.start(trainer.train_dataloader)
        self._row_order = row_order(trainer.train_dataloader, module) if self.sample_ids.source is None else None
        if capture is not None:
            self._undo.callback(capture.detach)
            capture.attach()
        if options.frozen_batch_norm:  # also after nothing is captured any more
            for handle in freeze_batch_norm(module):
                self._thaw.callback(handle.remove)
        self._undo.enter_context(tapped(module, self._read_loss))
        self._first_backward, self._replayed = True, rehearses
        self._rehearsals = _REHEARSALS if rehearses and options.verify and self._collector.ranks.size == 1 else 0
        self._watches = self._changes_gradients(trainer, module)
        return self._collector

    def start_epoch(self, trainer: L.Trainer) -> None:
        """The loader may have been made anew."""
        self.sample_ids.start(trainer.train_dataloader)

    @property
    def trying(self) -> bool:
        """Whether the first steps are still being tried."""
        return self._unverified is not None or self._rehearsals > 0

    def stop(self, trainer: L.Trainer, *, trains: bool = False) -> None:
        """Nothing of this is left in the run; may be called again.

        Args:
            trains: the run goes on, with batch normalisation as frozen as it was.
        """
        trainer.strategy.__dict__.pop("process_dataloader", None)
        self.sample_ids.stop()
        self._undo.close()
        if not trains:
            self._thaw.close()
        self._twin = self._trial = None

    def _changes_gradients(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Whether something may change gradients between the backward pass and the step."""
        hook = "on_after_backward"
        others = [c for c in trainer.callbacks if not isinstance(c, type(self._follower))]  # type: ignore[attr-defined]
        return overrides(module, hook) or any(overrides(callback, hook) for callback in others)

    # -- one micro-batch --------------------------------------------------------------------------------

    def start_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> Moment:
        """To be called in ``on_train_batch_start``.

        Returns:
            What the training step reads besides its batch.
        """
        self.drawn, self.dynamics = self.sample_ids.next(batch), None
        self.ids = self.drawn if self._row_order is None else self._row_order(batch, self.drawn)
        weights = sample_weights(batch, len(self.ids), self.options.sample_weights)
        self._n = len(self.ids)
        moment = Moment.now(trainer, module, batch_idx)
        if self._unverified is not None or self._rehearsals:
            self._twin = self._twin or twin_of(module)
            less = self.recollated()
            rest = None if less is None else partial(_without_one, less)
            micro_batch = PlannedMicroBatch(copied(batch), moment, 1.0, self._n, read_random_state(), rest)
            buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
            self._trial = Trial(micro_batch, self.ids, buffers)
        self._collector.begin(self.ids, weights, trainer.accumulate_grad_batches)
        return moment

    def recollated(self) -> dict[int, Any] | None:
        """The present batch collated anew without each of its samples, where only the collate function can leave one out."""
        order = self._row_order
        return order.less(self.drawn) if order is not None and order.recollates and self.drawn is not None else None

    def before_zero_grad(self) -> None:
        """To be called in ``on_before_zero_grad``."""
        self._collector.before_zero_grad()

    def before_backward(self, trainer: L.Trainer, loss: Tensor) -> None:
        """To be called in ``on_before_backward``.

        Raises:
            ConfigurationError: gradients that were not cleared, or a checkpointing that a replay cannot follow.
        """
        if self._first_backward:
            self._first_backward = False
            if is_reentrant(loss) and (self._replayed or not self._asks_plainly()):
                raise ConfigurationError(REENTRANT)
        self._collector.before_backward(trainer.global_step)

    def _asks_plainly(self) -> bool:
        """Whether the training step uses no reentrant checkpointing in eval mode, the mode in which query losses are computed."""
        return (
            self._twin is not None and self._trial is not None and not is_reentrant(evaluated(self._twin, self._trial))
        )

    def after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """To be called in ``on_after_backward``.

        Raises:
            ConfigurationError: at the first batch, where per-sample gradients do not say what a removal does, or where the
                step, run again, gives another gradient.
        """
        scaler = loss_scaler(trainer)
        scale = scaler.get_scale() if scaler is not None else 1.0
        samples = self._collector.after_backward(scale, watch=self._watches)
        if self._unverified is not None and samples is not None:
            with unchanged(module):  # a copy may share with the module what a hook closes over
                self._verify(trainer, module, samples)
        if self._rehearsals and samples is not None and self._collector.first_of_step:
            with unchanged(module):
                self._rehearse(trainer, scale)
        elif not self._rehearsals:
            self._twin = None

    def _read_loss(self, losses: LossTap) -> None:
        """What the loss that was called says of the batch's samples: their weights in it, and their training dynamics."""
        if self._n is None:
            return
        with self._guard():
            weights = losses.sample_weights(self._n)
            if weights is not None and self.options.reads_the_loss:
                self._collector.weigh(weights)
            self.dynamics = losses.dynamics(self._n)

    def _verify(self, trainer: L.Trainer, module: L.LightningModule, samples: Samples) -> None:
        """At the first batch: do per-sample gradients say what a removal does?"""
        trained, self._unverified = self._unverified, None
        assert trained is not None and self._trial is not None
        if self._twin is None:
            warnings.warn(
                f"{type(module).__name__} cannot be copied, so it is not verified what removing a sample does.",
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
            autocast=trainer.precision_plugin.forward_context,
        )
        if (
            removals.measuring and removals.not_summed is None
        ):  # otherwise the collector names the parameter at the step
            raise ConfigurationError(
                f"per-sample gradients do not say what removing a sample from this training step does: {removals.reason}. "
                "Samples see each other, rows are not in the order of the samples, or the loss weighs them by hand. "
                f"{self._otherwise[0].upper()}{self._otherwise[1:]}, which measures removals where it has to."
            )

    def _rehearse(self, trainer: L.Trainer, scale: float) -> None:
        """At the first steps: does a step that is run again give the gradient of the run?"""
        self._rehearsals -= 1
        if self._twin is None or self._trial is None:
            return
        optimized = {id(p) for p in self._collector.parameters()}
        factor = trainer.accumulate_grad_batches / scale
        named = self._twin.named_parameters()  # which it shares with the module
        gradients = {k: p.grad.detach() * factor for k, p in named if p.grad is not None and id(p) in optimized}
        rehearse(
            self._twin,
            self._trial,
            gradients,
            frozen_batch_norm=self.options.frozen_batch_norm,
            autocast=trainer.precision_plugin.forward_context,
        )
        if not self._rehearsals:
            self._twin = None


def _without_one(batches: Mapping[int, Any], gone: frozenset[int]) -> Any:
    """The batch without the one sample that is gone; the witness removes no others."""
    (z,) = gone
    return batches[z]
