"""The hooks of a Lightning callback as calls of `LiveSteps`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import lightning as L
from torch import Tensor

from lightning_influence.capture.step import StepCollector, StepOptions
from lightning_influence.errors import ConfigurationError
from lightning_influence.live.steps import LiveSteps
from lightning_influence.run.lightning_names import overrides
from lightning_influence.run.lightning_task import LightningTask, tapped
from lightning_influence.run.moment import Moment
from lightning_influence.run.optimizer import trained_by
from lightning_influence.run.refusals import left_out, recommending, refuse_thawing
from lightning_influence.run.sample_ids import SampleIds
from lightning_influence.run.sharding import let_go, refuse_other_shards
from lightning_influence.run.trainer import loss_scaler, moment_of, numbers_of, only_optimizer, ranks_of

_MAY_CHANGE_GRADIENTS = ("on_after_backward", "on_before_optimizer_step")


class LiveRun:
    """Follows a trainer's run from the hooks of a callback, and leaves it as it was at the end.

    Args:
        options: of the steps.
        sample_ids: tells which samples a batch holds.
        follower: the callback, whose own hooks are no reason to watch the gradients.
        otherwise: what a user can do where per-sample gradients do not say what a removal does, for the errors' texts.
        sharded: whether the run may be one whose parameters are sharded over processes, without per-sample gradients.
        guard, give_up: as of `LiveSteps`.

    Attributes:
        steps: of the run, from its start on.
    """

    steps: LiveSteps

    def __init__(
        self,
        options: StepOptions,
        sample_ids: SampleIds,
        follower: L.Callback,
        *,
        otherwise: str,
        sharded: bool = False,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        give_up: Callable[[str, ConfigurationError], None] | None = None,
    ) -> None:
        self._give_up, self._sharded = give_up, sharded
        self.options, self.sample_ids = options, sample_ids
        self._follower, self._otherwise, self._guard = follower, otherwise, guard
        self._undo = ExitStack()

    # -- start and end of fit ---------------------------------------------------------------------------

    def listen(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """To be called in ``setup``: before configure_optimizers, which may have the loader made.

        Raises:
            ConfigurationError: a run whose steps cannot be followed.
        """
        ranks_of(trainer, sharded=self._sharded)
        if not module.automatic_optimization:
            raise ConfigurationError(
                f"{type(module).__name__} uses manual optimization, whose steps the trainer does not see; "
                f"{type(self._follower).__name__} needs automatic_optimization=True."
            )
        # the iterator of the training loader is made before on_train_start, so its batches are listened to from here on
        strategy, listen = trainer.strategy, self.sample_ids.listen
        process = strategy.process_dataloader
        strategy.process_dataloader = lambda loader: listen(process(loader))  # type: ignore[method-assign, assignment]

    def start(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        *,
        captures: bool,
        rehearses: bool = False,
        lasting: bool = True,
    ) -> StepCollector:
        """To be called in ``on_train_start``.

        Args:
            captures, rehearses, lasting: as of `LiveSteps`.

        Raises:
            ConfigurationError: a module or loader that cannot be followed.
        """
        if overrides(module, "configure_gradient_clipping"):
            raise ConfigurationError(
                f"{type(module).__name__} overrides configure_gradient_clipping, so how its gradients are clipped is not known. Leave "
                "it to Trainer(gradient_clip_val=..., gradient_clip_algorithm=...)."
            )
        ranks, optimizer = ranks_of(trainer, sharded=self._sharded), only_optimizer(trainer)
        if ranks.sharded:
            let_go(module)  # which sanity checking has gathered
            refuse_other_shards(module, trained_by(optimizer, module), ranks.size)
        self.steps = LiveSteps(
            LightningTask(module),
            optimizer,
            self.options,
            self.sample_ids,
            captures=captures and self._may_capture(trainer, module),
            rehearses=rehearses,
            lasting=lasting,
            ranks=ranks,
            autocast=trainer.precision_plugin.forward_context,
            watches=self._changes_gradients(trainer, module),
            otherwise=self._otherwise,
            guard=self._guard,
            give_up=self._give_up,
        )
        self._numbers = numbers_of(trainer)
        self.steps.attach(trainer.train_dataloader)
        self._undo.enter_context(tapped(module, self.steps.read_loss))
        return self.steps.collector

    def _may_capture(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Whether per-sample gradients can be collected throughout the run."""
        with left_out("gradients", self._give_up), recommending(self._otherwise):
            ranks_of(trainer)
            refuse_thawing(trainer, module, self.options.exclude)
            return True
        return False

    def start_epoch(self, trainer: L.Trainer) -> None:
        """The loader may have been made anew, and the loss may be another from now on."""
        self.sample_ids.start(trainer.train_dataloader)
        self.steps.start_epoch(trainer.current_epoch)

    @property
    def trying(self) -> bool:
        """Whether the first steps are still being tried."""
        return self.steps.trying

    def stop(self, trainer: L.Trainer, *, trains: bool = False) -> None:
        """Nothing of this is left in the run; may be called again.

        Args:
            trains: as of `LiveSteps.close`.
        """
        trainer.strategy.__dict__.pop("process_dataloader", None)
        self.sample_ids.stop()
        self._undo.close()
        if hasattr(self, "steps"):
            self.steps.close(trains=trains)

    def _changes_gradients(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Whether something may change gradients between the backward pass and the step."""
        others = [c for c in trainer.callbacks if not isinstance(c, type(self._follower))]  # type: ignore[attr-defined]
        return any(overrides(one, hook) for one in (module, *others) for hook in _MAY_CHANGE_GRADIENTS)

    # -- one micro-batch --------------------------------------------------------------------------------

    def start_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> Moment:
        """To be called in ``on_train_batch_start``.

        Returns:
            What the training step reads besides its batch.
        """
        moment = replace(moment_of(trainer, module, batch_idx), trainer=self._numbers)
        self.steps.start_batch(batch, moment, trainer.accumulate_grad_batches)
        return moment

    def before_zero_grad(self) -> None:
        """To be called in ``on_before_zero_grad``."""
        self.steps.collector.before_zero_grad()

    def before_backward(self, trainer: L.Trainer, loss: Tensor) -> None:
        """To be called in ``on_before_backward``; errors as of `LiveSteps.before_backward`."""
        self.steps.before_backward(loss, trainer.global_step)

    def after_backward(self, trainer: L.Trainer) -> None:
        """To be called in ``on_after_backward``; errors as of `LiveSteps.after_backward`."""
        scaler = loss_scaler(trainer)
        self.steps.after_backward(scaler.get_scale() if scaler is not None else 1.0)
