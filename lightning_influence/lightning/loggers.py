"""A report through the trainer's loggers."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning as L

from lightning_influence.report import InfluenceReport


def log_report(report: InfluenceReport, trainer: L.Trainer, page: Path | None) -> None:
    """A report and its page through every logger, as far as each can take it.

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
    for folder in folders:
        report.to_csv(folder / "influence.csv")
        if page is not None:
            shutil.copy(page, folder / "report.html")


def _table(report: InfluenceReport, k: int = 10) -> str:
    """The extreme samples in Markdown, most helpful on the left and most harmful on the right."""
    ends = zip(report.top(k).itertuples(), report.bottom(k).itertuples(), strict=True)
    rows = [f"| {up.sample_id} | {up.score:+.3g} | {down.sample_id} | {down.score:+.3g} |" for up, down in ends]
    return "\n".join(["| most helpful | score | most harmful | score |", "|--:|--:|--:|--:|", *rows])
