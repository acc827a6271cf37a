"""A Lightning run as the step collector sees it: which samples a batch holds, with which weights, and where a step ends.

Recording and selection inside the step both follow a run this way.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from torch import Tensor

from lightning_influence.capture import GradientCapture, freeze_batch_norm, refuse_batch_norm
from lightning_influence.capture.step import Samples, StepCollector, StepOptions
from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.plan import ReplayMicroBatch
from lightning_influence.replay.witness import witness
from lightning_influence.run.lightning_names import overrides
from lightning_influence.run.random_state import read_random_state
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.rows import Order, as_drawn, row_order
from lightning_influence.run.sample_ids import SampleIds
from lightning_influence.run.sample_weights import sample_weights
from lightning_influence.run.tap import LossTap, tapped
from lightning_influence.run.trainer import loss_scaler, only_optimizer
from lightning_influence.run.training_step import eval_modes


class LiveRun:
    """Feeds a collector from the hooks of a callback, and leaves the run as it was at the end.

    Args:
        options: of the steps.
        sample_ids: tells which samples a batch holds.
        follower: the callback, whose own hooks are no reason to watch the gradients.
        otherwise: what a user can do where per-sample gradients do not say what a removal does, for the errors' texts.
    """

    def __init__(self, options: StepOptions, sample_ids: SampleIds, follower: L.Callback, *, otherwise: str) -> None:
        self.options, self.sample_ids = options, sample_ids
        self._follower, self._otherwise = follower, otherwise
        self._undo = ExitStack()
        self._unverified: list[str] | None = None  # the trained parameters, until the first batch has been verified
        self._first: tuple[ReplayMicroBatch, Tensor] | None = None
        self._n: int | None = None  # samples of the present batch
        self._watches = False
        self._row_order: Order = as_drawn

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

    def start(self, trainer: L.Trainer, module: L.LightningModule, *, captures: bool) -> StepCollector:
        """To be called in ``on_train_start``.

        Args:
            captures: whether per-sample gradients are collected; they are verified at the first batch.

        Raises:
            ConfigurationError: a module or loader that cannot be followed.
        """
        optimizer, options = only_optimizer(trainer), self.options
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
            self._unverified = sorted(capture.parameters)
        self._collector = StepCollector(
            module,
            optimizer,
            capture=capture,
            averaged=options.averaged,
            ranks=Ranks.of(trainer),
            otherwise=self._otherwise,
        )
        self.sample_ids.start(trainer.train_dataloader)
        if self.sample_ids.source is None:
            self._row_order = row_order(trainer.train_dataloader, module)
        if capture is not None:
            self._undo.callback(capture.detach)
            capture.attach()
        elif options.frozen_batch_norm:
            for handle in freeze_batch_norm(module):
                self._undo.callback(handle.remove)
        if options.reads_the_loss:
            self._undo.enter_context(tapped(module, self._weigh))
        self._watches = self._changes_gradients(trainer, module)
        return self._collector

    def start_epoch(self, trainer: L.Trainer) -> None:
        """The loader may have been made anew."""
        self.sample_ids.start(trainer.train_dataloader)

    def stop(self, trainer: L.Trainer) -> None:
        """Nothing of this is left in the run; may be called again."""
        trainer.strategy.__dict__.pop("process_dataloader", None)
        self.sample_ids.stop()
        self._undo.close()

    def _changes_gradients(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Whether something may change gradients between the backward pass and the step."""
        hook = "on_after_backward"
        others = [c for c in trainer.callbacks if not isinstance(c, type(self._follower))]  # type: ignore[attr-defined]
        return overrides(module, hook) or any(overrides(callback, hook) for callback in others)

    # -- one micro-batch --------------------------------------------------------------------------------

    def start_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> dict[str, Any]:
        """To be called in ``on_train_batch_start``.

        Returns:
            What the training step reads besides its batch, as of `snapshots.pack_micro_batch`.
        """
        ids = self._row_order(batch, self.sample_ids.next(batch))
        weights = sample_weights(batch, len(ids), self.options.sample_weights)
        self._n = len(ids)
        moment: dict[str, Any] = {
            "batch_idx": batch_idx,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "in_eval": eval_modes(module),
        }
        if self._unverified is not None:
            self._first = (
                ReplayMicroBatch(batch, factor=1.0, n_samples=len(ids), random=read_random_state(), **moment),
                ids,
            )
        self._collector.begin(ids, weights, trainer.accumulate_grad_batches)
        return moment

    def after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """To be called in ``on_after_backward``.

        Raises:
            ConfigurationError: at the first batch, where per-sample gradients do not say what a removal does.
        """
        scaler = loss_scaler(trainer)
        scale = scaler.get_scale() if scaler is not None else 1.0
        samples = self._collector.after_backward(scale, watch=self._watches)
        if self._unverified is not None and samples is not None:
            self._verify(trainer, module, samples)

    def _weigh(self, losses: LossTap) -> None:
        """The weights of the batch's samples, as the loss that was called has them."""
        if self._n is not None:
            weights = losses.sample_weights(self._n)
            if weights is not None:
                self._collector.weigh(weights)

    def _verify(self, trainer: L.Trainer, module: L.LightningModule, samples: Samples) -> None:
        trained, self._unverified = self._unverified, None
        assert trained is not None and self._first is not None
        (micro_batch, ids), self._first = self._first, None
        whole = samples.loss_weights.sum() if self.options.averaged else samples.loss_weights[0]
        removals = witness(
            module,
            micro_batch,
            ids,
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
                f"Samples see each other, rows are not in the order of the samples, or the loss weighs them by hand. "
                f"{self._otherwise[0].upper()}{self._otherwise[1:]}, which measures removals where it has to."
            )
