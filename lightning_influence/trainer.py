"""What a Lightning trainer says of a run: its optimizer, clipping, loss scaling and schedules."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_influence.errors import ConfigurationError
from lightning_influence.report import InfluenceReport
from lightning_influence.trajectory import Clip


def only_optimizer(trainer: L.Trainer) -> torch.optim.Optimizer:
    """The run's optimizer.

    Raises:
        ConfigurationError: there are several.
    """
    if len(trainer.optimizers) != 1:
        raise ConfigurationError(
            f"configure_optimizers gave {len(trainer.optimizers)} optimizers; influence follows one. Put all parameters "
            "into groups of a single optimizer."
        )
    return trainer.optimizers[0]


def clip_of(trainer: L.Trainer) -> Clip:
    """Rule and bound of the trainer's gradient clipping."""
    if not trainer.gradient_clip_val:
        return Clip()
    by_value = trainer.gradient_clip_algorithm == "value"
    return Clip("value" if by_value else "norm", float(trainer.gradient_clip_val))


def loss_scaler(trainer: L.Trainer) -> Any:
    """The gradient scaler of half-precision training, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


@contextmanager
def schedules_as_they_were(trainer: L.Trainer) -> Iterator[list[Any]]:
    """The schedulers that step with the optimizer; they and what they set are as before afterwards."""
    optimizer = only_optimizer(trainer)
    stepped = [c.scheduler for c in trainer.lr_scheduler_configs if c.interval == "step" and not c.reduce_on_plateau]
    states = [copy.deepcopy(scheduler.state_dict()) for scheduler in stepped]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    # a scheduler counts the optimizer's steps to warn of a wrong order, and here it steps alone
    counted = optimizer.__dict__.get("_opt_called")
    object.__setattr__(optimizer, "_opt_called", True)
    try:
        yield stepped
    finally:
        for scheduler, state in zip(stepped, states, strict=True):
            scheduler.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        if counted is None:
            object.__delattr__(optimizer, "_opt_called")
        else:
            object.__setattr__(optimizer, "_opt_called", counted)


def log_report(report: InfluenceReport, trainer: L.Trainer) -> None:
    """A report through every logger, as far as each can take it.

    Numbers go to all of them, figures and a table to those that have TensorBoard's methods, and the page and all scores,
    ``report.html`` and ``influence.csv``, into the directories of those that have one.
    """
    numbers = {
        "influence/harmful_fraction": float((report.mean < 0).float().mean()),
        "influence/most_helpful": float(report.mean.max()),
        "influence/most_harmful": float(report.mean.min()),
    }
    folders = dict[Path, None]()  # each once, in order: loggers may share one
    for logger in trainer.loggers:
        logger.log_metrics(numbers, trainer.global_step)
        experiment = getattr(logger, "experiment", None)
        if add_figure := getattr(experiment, "add_figure", None):
            add_figure("influence/histogram", report.plot.histogram(), trainer.global_step)
            add_figure("influence/over_time", report.plot.over_time(), trainer.global_step)
        if add_text := getattr(experiment, "add_text", None):
            add_text("influence/samples", _table(report), trainer.global_step)
        logger.save()
        folder = getattr(logger, "log_dir", None)
        if folder is not None and Path(folder).is_dir():  # rather than a bucket
            folders[Path(folder)] = None
    page = None
    for folder in folders:
        report.to_csv(folder / "influence.csv")
        if page is None:
            page = report.to_html(folder / "report.html", data=getattr(trainer.train_dataloader, "dataset", None))
        else:
            shutil.copy(page, folder)


def _table(report: InfluenceReport, k: int = 10) -> str:
    """The extreme samples in Markdown, most helpful on the left and most harmful on the right."""
    ends = zip(report.top(k).itertuples(), report.bottom(k).itertuples(), strict=True)
    rows = [f"| {up.sample_id} | {up.score:+.3g} | {down.sample_id} | {down.score:+.3g} |" for up, down in ends]
    return "\n".join(["| most helpful | score | most harmful | score |", "|--:|--:|--:|--:|", *rows])
