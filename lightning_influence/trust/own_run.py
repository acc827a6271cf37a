"""A user's own run, ready to be trained again: its log, its task and its training data together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset

from lightning_influence.capture import freeze_batch_norm
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.replay.logged_plan import LoggedPlan
from lightning_influence.run.data import TrainingData
from lightning_influence.run.lightning_task import CONVERTED
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
        ConfigurationError: the log does not hold the initialisation, and no ``make_model`` gives it, or data without indices.
    """
    precision = steps.manifest.precision

    def prepare(trained: Task, batch: Any, moment: Moment) -> Any:
        return trained.prepared(batch, moment=moment, datamodule=source.datamodule, precision=precision)

    if (
        source.dataset is None
        or not hasattr(source.dataset, "__getitem__")
        or isinstance(source.dataset, IterableDataset)
    ):
        raise ConfigurationError(
            f"data is {_described(source.dataset)}, whose samples cannot be asked for by their ids, so the run cannot be trained again "
            "without one of them. Give data= as a dataset with indices, or a loader or datamodule of one."
        )
    options["dtype"] = options.get("dtype") or CONVERTED.get(precision)
    make = make_model or _initialisation(steps, task)
    if steps.manifest.frozen_batch_norm:
        make = _with_frozen_norms(make)
    return recorded_run(steps, make, source.dataset, collate=source.collate, task=task.on, prepare=prepare, **options)


def _described(dataset: Any) -> str:
    return "missing" if dataset is None else f"a {type(dataset).__name__}"


def _with_frozen_norms(make: Callable[[], Any]) -> Callable[[], Any]:
    def frozen() -> nn.Module:
        module: nn.Module = make()
        freeze_batch_norm(module)
        return module

    return frozen


def _initialisation(steps: LoggedSteps, task: Task) -> Callable[[], nn.Module]:
    """The module at the run's first snapshot."""
    if steps.manifest.record == "gradients":
        raise ConfigurationError(
            "this log does not hold the run's initialisation; give make_model=, a function that returns the module as it "
            "was before training, or record with InfluenceCallback(record='replay')."
        )
    first = LoggedPlan(steps, task).snapshot(0)

    def make() -> nn.Module:
        try:
            twin = copy.deepcopy(task.module)
        except Exception as error:
            raise ConfigurationError(
                f"{type(task.module).__name__} cannot be copied ({error!s:.200}), so it cannot be trained again; give make_model=, a "
                "function that returns the module as it was before training."
            ) from error
        twin.load_state_dict({**first.parameters, **first.buffers}, strict=False)
        return twin

    return make
