"""Horizon and learning rate belong together: both are swept on short runs (method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import pandas as pd
from matplotlib.figure import Figure

from lightning_influence.datamodule import SelectionDataModule
from lightning_influence.errors import ConfigurationError
from lightning_influence.plots import heat_map
from lightning_influence.queries import query_losses


@dataclass(frozen=True)
class Tuning:
    """Target losses after short runs.

    Attributes:
        table: one row per run: ``horizon``, ``lr``, ``loss`` on the held-out examples, ``kept``.
    """

    table: pd.DataFrame

    @property
    def best(self) -> tuple[int, float]:
        """The horizon and learning rate of the lowest loss."""
        row = self.table.loc[self.table.loss.idxmin()]
        return int(row.horizon), float(row.lr)

    def plot(self) -> Figure:
        """Losses over horizon and learning rate."""
        grid = self.table.pivot(index="horizon", columns="lr", values="loss")
        labels = {"xlabel": "learning rate", "ylabel": "horizon", "title": "held-out loss"}
        return heat_map(grid.values.tolist(), list(grid.index), list(grid.columns), **labels)


def tune_horizon(
    make_model: Callable[[float], L.LightningModule],
    data: Any,
    target: Any,
    held_out: Iterable[Any],
    *,
    horizons: Sequence[int] = (0, 1, 4),
    learning_rates: Sequence[float] = (1e-4, 1e-3),
    max_steps: int = 100,
    trainer: dict[str, Any] | None = None,
    **selection: Any,
) -> Tuning:
    """Short runs with online selection for every pair of horizon and learning rate.

    Args:
        make_model: the module at its initialisation, given a learning rate; the same initialisation each time.
        data, target: as of `SelectionDataModule`.
        held_out: batches on which the runs are compared; not those of the target, which selection has seen.
        max_steps: optimizer steps of each run.
        trainer: further arguments of ``lightning.Trainer``.
        selection: further arguments of `SelectionDataModule`; ``every=1`` unless given.

    Raises:
        ConfigurationError: nothing to compare.
    """
    if not horizons or not learning_rates:
        raise ConfigurationError("horizons and learning_rates need at least one value each.")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    batches, rows = list(held_out), []
    for horizon in horizons:
        for lr in learning_rates:
            module = make_model(lr)
            selected = SelectionDataModule(data, target, horizon=horizon, **{"every": 1, **selection})
            run = L.Trainer(max_steps=max_steps, max_epochs=-1, **{**quiet, **(trainer or {})})
            run.fit(module, selected)
            loss = float(query_losses(module, batches).mean())
            rows.append({"horizon": horizon, "lr": lr, "loss": loss, "kept": selected.selection_report.kept})
    return Tuning(pd.DataFrame(rows))
