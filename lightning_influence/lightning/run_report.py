"""The report that a run ends with: its training samples scored against its validation loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import rank_zero_info
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, DistributedSampler

from lightning_influence.errors import ConfigurationError
from lightning_influence.lightning.failures import tell_missing
from lightning_influence.lightning.loggers import log_report
from lightning_influence.log.place import Place
from lightning_influence.report import InfluenceReport
from lightning_influence.run.random_state import random_state
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.sample_ids import is_map_style
from lightning_influence.run.task import as_task
from lightning_influence.run.trainer import ranks_of
from lightning_influence.run.unchanged import Apart
from lightning_influence.scoring.attribution import attribute
from lightning_influence.selection.loader import SelectingLoader
from lightning_influence.trust.dynamics import dynamics_of

SAVED, PAGE = "report.safetensors", "report.html"


class RunReport:
    """Written when a run ends, and read where it was written by another process.

    Args:
        log: of the run, in which the report lies.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._report: InfluenceReport | None = None
        self._earlier = _identity(log / SAVED)  # the report of an earlier run

    def write(self, trainer: L.Trainer, module: L.LightningModule, whole: bool) -> None:
        """To be called by every process; what fails is told, and noted in the log.

        Args:
            whole: whether the log is.
        """
        place_and_rank = Place(self._log), trainer.global_rank
        ranks_of(trainer).wait()  # until the whole log is written
        try:
            if whole:
                self._report = report_run(trainer, module, self._log)
            elif trainer.is_global_zero:
                tell_missing(*place_and_rank, PAGE, "the log is not whole", "Training is not affected.")
        except Exception as error:
            tell_missing(
                *place_and_rank, PAGE, error, "Training is not affected; attribute(...) makes a report of the log."
            )

    def read(self) -> InfluenceReport | None:
        """The report of the last run; None where there is none."""
        if self._report is None and _identity(self._log / SAVED) not in (None, self._earlier):
            self._report = InfluenceReport.load(self._log / SAVED)
        return self._report


def _identity(path: Path) -> tuple[int, int] | None:
    """By which a file is told from an earlier one of its name."""
    return (path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None


def refuse_sharded_report(trainer: L.Trainer) -> None:
    """Refuse to attribute inside of a run whose parameters are sharded.

    Raises:
        ConfigurationError: they are.
    """
    if ranks_of(trainer, sharded=True).sharded:
        raise ConfigurationError(
            f"report=True attributes inside of the run, and under {type(trainer.strategy).__name__} no process holds the whole model. "
            "Leave it out, and call attribute(...) after the run in one process, with the module made without the strategy."
        )


def refuse_no_queries(trainer: L.Trainer) -> None:
    """What a report would miss at the end of the run is said at its start.

    Raises:
        ConfigurationError: there is no validation batch, or there are several loaders.
    """
    if not trainer.enable_validation:
        raise ConfigurationError(
            "report=True scores against the validation loss; give fit a validation loader and the module a validation_step, "
            f"and keep limit_val_batches={trainer.limit_val_batches} above 0."
        )
    made = trainer.val_dataloaders
    if made is None:  # the run will ask for them later, and draw the random numbers then that they are made with
        with random_state(None), as_task(trainer.lightning_module).unchanged():
            made = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    loaders, _ = tree_flatten(getattr(made, "iterables", made))
    if len(loaders) > 1:
        raise ConfigurationError(
            f"report=True scores against one validation loader, and this run has {len(loaders)}; join their datasets "
            "(torch.utils.data.ConcatDataset), or call attribute(...) with each of them after the run."
        )
    if not loaders or sized_len(loaders[0]) == 0:
        raise ConfigurationError(
            "report=True scores against the validation loss; the validation loader has no batch, give it at least one."
        )


def report_run(trainer: L.Trainer, module: L.LightningModule, log: Path) -> InfluenceReport | None:
    """Score the run's samples against its mean validation loss, write what a person reads into the log and to the loggers.

    To be called by every process, after the log is whole; the first one has the report. What cannot be made is told.
    """
    if trainer.val_dataloaders is None:  # of a run that ended before a validation
        with random_state(None):
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    (loader,), _ = tree_flatten(trainer.val_dataloaders)
    training = _training_loader(trainer)
    with random_state(None), Apart(loader)(), Apart(training)():  # another fit may follow
        queries = whole_validation(loader, ranks_of(trainer))
        if not trainer.is_global_zero:
            return None
        return _made(trainer, module, log, queries)


def _training_loader(trainer: L.Trainer) -> Any:
    """The loader that reads the training samples, also where selection in rounds chooses among them."""
    loader = trainer.train_dataloader
    return loader.loader if isinstance(loader, SelectingLoader) else loader


def whole_validation(loader: Any, ranks: Ranks) -> Any:
    """All validation data, of which each of several processes holds a part."""
    if ranks.size == 1:
        return loader
    sampler = getattr(loader, "sampler", None)
    if is_map_style(loader) and isinstance(sampler, DistributedSampler):
        parts = ranks.gather(list(sampler))
        dealt = [part[i] for i in range(len(parts[0])) for part in parts]
        once = dealt[: len(sampler.dataset)]  # type: ignore[arg-type]  # the last are there twice, so that parts are equal
        return DataLoader(loader.dataset, loader.batch_size, sampler=once, collate_fn=loader.collate_fn)
    return [batch for part in ranks.gather(list(loader)) for batch in part]


def _made(trainer: L.Trainer, module: L.LightningModule, log: Path, queries: Any) -> InfluenceReport | None:
    training = _training_loader(trainer)

    def tried(what: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:
            tell_missing(
                Place(log), 0, what, error, "Training is not affected; attribute(...) makes a report of the log."
            )
            (log / what).unlink(missing_ok=True)  # a part of it

    for path in (log / SAVED, log / PAGE):
        path.unlink(missing_ok=True)  # it may be a link, which must not be written through
    made = tried(PAGE, lambda: attribute(log, queries=queries, model=module, target="mean", data=training))
    if made is None:
        return None
    tried(SAVED, lambda: made.save(log / SAVED))
    data = getattr(training, "dataset", None)
    page = tried(PAGE, lambda: made.to_html(log / PAGE, data=data, dynamics=dynamics_of(log)))
    if page is not None:
        rank_zero_info(f"The influence report is {page.resolve()}; open it in a browser: {page.resolve().as_uri()}")
    tried("the report in the loggers", lambda: log_report(made, trainer, page))
    return made
