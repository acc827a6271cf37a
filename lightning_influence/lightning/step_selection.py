"""The callbacks of selection; `SelectionDataModule` adds one of them to the trainer, and takes it away at the end.

Immediate scores (horizon 0) need no roll-out: samples leave the gradient that the backward pass has already produced. The
shares of the step's gradient come from the training backward, and the whole target is read only every so often
(`target.LiveTarget`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch

from lightning_influence.capture import freeze_batch_norm, refuse_batch_norm
from lightning_influence.capture.step import StepCollector, StepOptions
from lightning_influence.core.optimizers import UPDATES
from lightning_influence.core.optimizers import step as take_step
from lightning_influence.core.removal import consumed_gradients
from lightning_influence.core.sweep import sweep
from lightning_influence.core.trajectory import Vectors
from lightning_influence.lightning.live_run import LiveRun
from lightning_influence.run.optimizer import update_name
from lightning_influence.run.parameters import parameters_at
from lightning_influence.run.sample_ids import SampleIds
from lightning_influence.run.trainer import clip_of, loss_scaler, only_optimizer
from lightning_influence.selection.live_step import LiveStep
from lightning_influence.selection.selector import Selector
from lightning_influence.selection.target import LiveTarget


class StepSelection(L.Callback):
    """Takes samples out of a run's gradients.

    Args:
        selector: decides.
        live_target: the gradient of the target at every step.
        queries: gives the queries, as ``live_target`` takes them.
    """

    def __init__(self, selector: Selector, live_target: LiveTarget, queries: Callable[[], Any]) -> None:
        self.selector, self.live_target, self.queries = selector, live_target, queries
        otherwise = "select in rounds (every='epoch', or a horizon of 1 or more)"
        self._live = LiveRun(selector.settings.options, SampleIds(), self, otherwise=otherwise)
        self._collector: StepCollector | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._live.listen(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._collector = self._live.start(trainer, pl_module, captures=True, lasting=False)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._live.start_epoch(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._live.start_batch(trainer, pl_module, batch, batch_idx)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._collector is not None:
            self._live.before_zero_grad()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self._live.before_backward(trainer, loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._live.after_backward(trainer)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self._collector is not None
        skips = loss_scaler(trainer) is not None
        collected = self._collector.before_step(trainer.global_step, clip_of(trainer), may_skip=skips)
        if collected is None:
            return
        step = LiveStep.of(collected, pl_module, self._collector.update_name, self._collector.ranks)
        scores = torch.zeros(len(step.weights))
        for portion, policy in enumerate(self.selector.settings.portions):
            left = step.weights > 0
            target = self._target_after(trainer, step, again=portion > 0)
            part = step.part(self.selector.settings.coordinates, trainer.global_step)
            rows = sweep(part, part.extrapolated(target), self.selector.settings.method, progress=False)
            scores[left] = rows.of(step.full.sample_ids[left])[:, 0].to(scores)
            weights = self.selector.decide(policy, scores, step.full.sample_ids, step.full.micro_batch_numbers, left)
            step = step.weighted(weights)
        step.write(pl_module)
        self.selector.removals = self._live.steps.removals
        self.selector.note(trainer, step.full.sample_ids, scores, step.weights)

    def _target_after(self, trainer: L.Trainer, step: LiveStep, *, again: bool) -> Vectors:
        """The target gradient where the step leads: that is where the removal of a sample is felt."""
        module, record, update = trainer.lightning_module, step.record(0), UPDATES[step.optimizer]
        parameters = {k: p.detach() for k, p in module.named_parameters() if k in record.gradients}
        moved = {
            k: take_step(update, parameters[k].flatten(), record.moments[k], gradient, record.hyper[k])[0]
            for k, gradient in consumed_gradients(record).items()
        }
        with parameters_at(module, moved):
            target = self.live_target.gradient(module, self.queries(), step.select, trainer.global_step, again=again)
        return {k: target[k] for k in step.sizes}  # without what is excluded

    def leave(self, trainer: L.Trainer) -> None:
        """Nothing of this is left in the run, or in the module."""
        self._live.stop(trainer)


class RoundSelection(L.Callback):
    """Refuses at the start of a run what the roll-outs of selection in rounds would refuse later, and trains batch
    normalisation as they do.
    """

    def __init__(self, options: StepOptions) -> None:
        self.options, self._undo = options, ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        update_name(only_optimizer(trainer))
        self.options.check(pl_module)
        if not self.options.frozen_batch_norm:
            refuse_batch_norm(pl_module)
            return
        for handle in freeze_batch_norm(pl_module):
            self._undo.callback(handle.remove)

    def leave(self, trainer: L.Trainer) -> None:
        """Nothing of this is left in the module."""
        self._undo.close()
