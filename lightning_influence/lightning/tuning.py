"""Horizon and learning rate belong together: both are swept on short runs (docs/method.md, "Look-ahead selection")."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import lightning as L
from tqdm.auto import tqdm

from lightning_influence.errors import ConfigurationError
from lightning_influence.lightning.callback import InfluenceCallback
from lightning_influence.lightning.datamodule import SelectionDataModule
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.report.tables import in_notebook
from lightning_influence.run.lightning_names import is_a, trainer_of
from lightning_influence.scoring.queries import Queries, query_losses
from lightning_influence.trust.error_proxy import error_proxy
from lightning_influence.words import renamed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


@contextmanager
def _without_banners() -> Iterator[None]:
    """Lightning says of every Trainer what hardware there is; of short runs nobody wants to read it."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, repr=False)
class Tuning:
    """Target losses after short runs.

    Attributes:
        table: one row per run: ``horizon``, ``lr``, ``loss`` on the held-out examples, ``kept``, and where it was asked
            for ``proxy``, the predicted error of first-order scores over that horizon relative to the scores.

    Example:
        >>> import pandas as pd
        >>> Tuning(pd.DataFrame({"horizon": [0, 2], "lr": [1e-3, 1e-3], "loss": [0.7, 0.5], "kept": [0.5, 0.5]})).best
        (2, 0.001)
    """

    table: pd.DataFrame

    @property
    def best(self) -> tuple[int, float]:
        """The horizon and learning rate of the lowest loss."""
        row = self.table.loc[self.table.loss.idxmin()]
        return int(row.horizon), float(row.lr)

    def plot(self) -> Figure:
        """Losses over horizon and learning rate."""
        from lightning_influence.report.plots import heat_map

        grid = self.table.pivot(index="horizon", columns="lr", values="loss")
        labels = {"xlabel": "learning rate", "ylabel": "horizon", "title": "held-out loss"}
        return heat_map(grid.values.tolist(), list(grid.index), list(grid.columns), **labels)

    def __repr__(self) -> str:
        horizon, lr = self.best
        return (
            f"Tuning({len(self.table)} runs; lowest loss {self.table.loss.min():.4g} at horizon {horizon}, lr {lr:g})"
        )

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.table)


def tune_horizon(
    make_model: Callable[[float], L.LightningModule],
    data: Any,
    queries: Any = None,
    held_out: Any = None,
    *,
    horizons: Sequence[int] = (0, 1, 4),
    learning_rates: Sequence[float] = (1e-4, 1e-3),
    max_steps: int = 100,
    proxies: int = 0,
    trainer: dict[str, Any] | None = None,
    progress: bool = True,
    target: Any = None,
    **selection: Any,
) -> Tuning:
    """Short runs with online selection for every pair of horizon and learning rate.

    Args:
        make_model: gives the module at its initialisation, given a learning rate; the same initialisation each time.
        data: as of `SelectionDataModule`.
        queries: as of `SelectionDataModule`.
        held_out: on what the runs are compared, in any form that `attribute` takes queries in; other data than ``queries``,
            which selection has seen.
        max_steps: optimizer steps of each run.
        proxies: samples whose `error_proxy` is averaged for each pair, from one more run per learning rate without
            selection; 0 for none.
        trainer: further arguments of ``lightning.Trainer``.
        target: the old word for ``queries``.
        selection: further arguments of `SelectionDataModule`; ``every=1`` unless given.

    Raises:
        ConfigurationError: nothing to compare by or on, runs shorter than a horizon, numbers below zero, or a ``make_model``
            that takes no learning rate, or ignores it.
    """
    queries = renamed("queries", queries, "target", target)
    if held_out is None:
        raise ConfigurationError("held_out is missing; give the batches on which the runs are compared.")
    if not horizons or not learning_rates:
        raise ConfigurationError("horizons and learning_rates need at least one value each.")
    if max(horizons) >= max_steps:
        raise ConfigurationError(f"horizon {max(horizons)} does not fit into runs of max_steps={max_steps}.")
    if min(learning_rates) <= 0 or proxies < 0:
        raise ConfigurationError(
            f"learning_rates={list(learning_rates)}, proxies={proxies}; learning rates lie above 0, and proxies is 0 or more."
        )
    import pandas as pd

    settings = {**_QUIET, "max_steps": max_steps, "max_epochs": -1, **(trainer or {})}
    compared, rows = Queries.of(held_out).held(), []
    pairs = [(lr, horizon) for lr in learning_rates for horizon in horizons]
    short = _ShortRuns(make_model, settings, several=len(set(learning_rates)) > 1)
    errors = {lr: _errors(short, lr, data, queries, horizons, proxies) for lr in learning_rates if proxies}
    for lr, horizon in tqdm(pairs, desc="short runs", unit="run", delay=2, disable=not progress):
        selected = SelectionDataModule(data, queries, horizon=horizon, **{"every": 1, **selection})
        module = short.run(lr, selected)
        loss = float(query_losses(module, compared).mean())
        row = {"horizon": horizon, "lr": lr, "loss": loss, "kept": selected.selection_report.kept}
        rows.append(row | ({"proxy": errors[lr][horizon]} if proxies else {}))
    return Tuning(pd.DataFrame(rows))


class _ShortRuns(L.Callback):
    """Runs at learning rates, of which it makes sure.

    Args:
        make_model: as of `tune_horizon`.
        settings: of the trainers.
        several: whether more than one learning rate is asked for; an optimizer may then begin at others, if they differ.
    """

    def __init__(
        self, make_model: Callable[[float], L.LightningModule], settings: dict[str, Any], *, several: bool
    ) -> None:
        self._make_model, self._settings, self._several = make_model, settings, several
        self._asked = 0.0
        self._begun: dict[float, list[float]] = {}  # learning rates of the optimizer at its first step

    def run(self, lr: float, data: L.LightningDataModule, *callbacks: L.Callback) -> L.LightningModule:
        """A run's module at its end.

        Raises:
            ConfigurationError: ``make_model`` is not called with a learning rate, gives no module, or ignores the learning rate.
        """
        try:
            inspect.signature(self._make_model).bind(lr)
        except TypeError as error:
            raise ConfigurationError(
                f"make_model is called with a learning rate, make_model({lr:g}), and {error}; give a function of one number "
                "that returns the module at its initialisation."
            ) from None
        module = self._make_model(lr)
        if not is_a(module, "LightningModule"):
            raise ConfigurationError(
                f"make_model returned a {type(module).__name__}; it has to return a LightningModule."
            )
        self._asked = lr
        own = self._settings.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        with _without_banners():
            trainer_of(module)(**{**self._settings, "callbacks": [*own, self, *callbacks]}).fit(module, data)
        return module

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        begun = [float(group.get("max_lr", group.get("initial_lr", group["lr"]))) for group in groups]
        others = [rates for asked, rates in self._begun.items() if asked != self._asked]
        self._begun[self._asked] = begun
        follows = any(math.isclose(rate, self._asked, rel_tol=1e-6) for rate in begun)
        if not follows and (begun in others or not self._several):
            rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(begun))
            raise ConfigurationError(
                f"make_model was asked for a learning rate of {self._asked:g}, and the optimizer begins at {rates}; let "
                "configure_optimizers take the learning rate that make_model is given."
            )


def _errors(short: _ShortRuns, lr: float, data: Any, queries: Any, horizons: Sequence[int], n: int) -> dict[int, float]:
    """Predicted relative error by horizon, at the end of a run without selection."""
    with TemporaryDirectory() as log:
        callback = InfluenceCallback(log, record="replay", store_batches=True, existing="overwrite")
        module = short.run(lr, SelectionDataModule(data, online_selection=False), callback)
        steps = LoggedSteps(log)
        pairs = [(int(z), t) for h in horizons for t in [len(steps) - 1 - h] for z in steps.record(t).sample_ids[:n]]
        asked = data if queries is None else queries
        predicted = error_proxy(steps, queries=asked, model=module, target="mean", pairs=pairs, progress=False)
    return dict(predicted.curve()[1.0])
