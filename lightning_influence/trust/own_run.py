"""A user's own run, ready to be trained again: its log, its task and its training data together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.replay.logged_plan import LoggedPlan
from lightning_influence.run.data import TrainingData
from lightning_influence.run.moment import Moment
from lightning_influence.run.task import Task
from lightning_influence.trust.retraining import Run, recorded_run


def own_run(
    steps: LoggedSteps, task: Task, source: TrainingData, make_model: Callable[[], Any] | None = None, **options: Any
) -> Run:
    """The run of a log, with batches as the user's hooks prepare them.

    Args:
        task: what was trained.
        source: the training data.
        make_model: gives the module at its initialisation; by default taken from the log's first snapshot.
        options: further fields of `retraining.Run`.

    Raises:
        ConfigurationError: the log does not hold the initialisation, and no ``make_model`` gives it.
    """
    precision = steps.manifest.precision

    def prepare(trained: Task, batch: Any, moment: Moment) -> Any:
        return trained.prepared(batch, moment=moment, datamodule=source.datamodule, precision=precision)

    make = make_model or _initialisation(steps, task)
    return recorded_run(steps, make, source.dataset, collate=source.collate, task=task.on, prepare=prepare, **options)


def _initialisation(steps: LoggedSteps, task: Task) -> Callable[[], nn.Module]:
    """The module at the run's first snapshot."""
    if steps.manifest.record == "gradients":
        raise ConfigurationError(
            "this log does not hold the run's initialisation; give make_model=, a function that returns the module as it "
            "was before training, or record with InfluenceCallback(record='replay')."
        )
    first = LoggedPlan(steps, task).snapshot(0)

    def make() -> nn.Module:
        twin = copy.deepcopy(task.module)
        twin.load_state_dict({**first.parameters, **first.buffers}, strict=False)
        return twin

    return make
