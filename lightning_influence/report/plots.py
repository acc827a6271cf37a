"""Figures of a report for notebooks and loggers, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from lightning_influence.core.scores import mean_score
from lightning_influence.errors import ConfigurationError
from lightning_influence.report.rendering import Render, Shown, as_image, default_render, label_of, training_samples
from lightning_influence.report.scores import Scores

if TYPE_CHECKING:
    import pandas as pd

_HELP, _HARM = "#0b7a5e", "#bf3b2b"


class Plots:
    """``report.plot``: each method returns a matplotlib figure."""

    def __init__(self, report: Scores) -> None:
        self._report = report

    def histogram(self, bins: int = 60) -> Figure:
        """How the samples' scores, averaged over the queries, are distributed."""
        figure, axes = _figure()
        scores = self._report.mean
        _, edges, patches = axes.hist(scores.numpy(), bins=bins)
        for patch, left in zip(patches, edges, strict=False):
            patch.set_color(_HELP if left >= 0 else _HARM)
        axes.set(xlabel="score", ylabel="samples", yscale="log")
        return figure

    def over_time(self, bins: int = 200) -> Figure:
        """Helpful and harmful influence of the samples of each step; the mean of neighbours beyond ``bins`` steps."""
        figure, axes = _figure()
        rows = self._report.rows
        first, helped, harmed = rows.over_time(bins)
        width = torch.diff(first, append=torch.tensor([rows.n_steps]))
        for part, colour, name in ((helped, _HELP, "helped"), (harmed, _HARM, "harmed")):
            axes.bar(first.numpy(), part.numpy(), 0.85 * width.numpy(), align="edge", color=colour, label=name)
        axes.axhline(0, color="0.6", lw=0.8)
        axes.set(xlabel="optimizer step", ylabel="score per step")
        axes.legend(frameon=False)
        return figure

    def samples(self, data: Any, k: int = 8, query: int | str | None = None, show: Render | None = None) -> Figure:
        """The most helpful images of a dataset above the most harmful ones; ``show`` as of `InfluenceReport.to_html`.

        Raises:
            ConfigurationError: the samples are not images, or not those of the report.
        """
        if k < 1:
            raise ConfigurationError(f"k={k}; give 1 or more samples of each end.")
        render, samples = show or default_render(), training_samples(data, self._report.sample_ids)
        if samples is None:
            raise ConfigurationError(
                f"{type(data).__name__} has no indices; give a dataset that gives sample i as [i]."
            )
        figure = Figure(figsize=(1.3 * k, 3.6), layout="constrained")
        axes = figure.subplots(2, k, squeeze=False)
        tables = ((self._report.top(k, query), _HELP), (self._report.bottom(k, query), _HARM))
        for line, (table, colour) in zip(axes, tables, strict=True):
            for place in line:
                place.axis("off")
            for place, row in zip(line, table.itertuples(), strict=False):
                sample = samples[row.sample_id]
                place.imshow(_picture(row.sample_id, render(sample)), cmap="gray")
                label = label_of(sample)
                title = f"sample {row.sample_id}" + (f", label {label}" if label else "")
                place.set_title(f"{title}\n{row.score:+.2g}", fontsize=7, color=colour)
        return figure

    def groups(self, k: int = 30) -> Figure:
        """What removing each group as a whole does, on average over the queries: the ``k`` largest effects. Bars that are
        hatched are to be read as a rank at most (`Groups.readings`).

        Raises:
            ConfigurationError: a report without groups, or fewer than one bar.
        """
        groups = self._report.groups
        if groups is None:
            raise ConfigurationError("the report has no groups; give attribute(..., groups=...) a label per sample.")
        if k < 1:
            raise ConfigurationError(f"k={k}; give 1 or more groups.")
        effects = mean_score(groups.scores)
        largest = effects.abs().argsort(descending=True, stable=True)[:k]
        shown = largest[effects[largest].argsort(stable=True)].tolist()  # the most helpful at the top
        figure = Figure(figsize=(6, 1 + 0.25 * len(shown)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(range(len(shown)), effects[shown].numpy())
        for bar, group in zip(bars, shown, strict=True):
            bar.set_color(_HELP if effects[group] > 0 else _HARM)
            if not groups.as_sizes[group]:
                bar.set(hatch="///", facecolor="none")
        axes.set_yticks(range(len(shown)), [groups.names[group] for group in shown], parse_math=False)
        axes.axvline(0, color="0.6", lw=0.8)
        axes.set(xlabel="score of the group, removed as a whole")
        if not all(groups.as_sizes[group] for group in shown):
            axes.legend(
                handles=[Patch(facecolor="none", edgecolor="0.4", hatch="///", label="rank at most")], frameon=False
            )
        return figure

    @staticmethod
    def proxy_against_truth(predicted: Tensor, measured: Tensor) -> Figure:
        """The errors that `error_proxy` predicted over those that retraining measured; see `plots.proxy_against_truth`."""
        return proxy_against_truth(predicted, measured)


def _picture(sample_id: int, shown: Shown) -> Image.Image:
    if isinstance(shown, (Tensor, np.ndarray)):
        shown = as_image(shown)
    if not isinstance(shown, Image.Image):
        raise ConfigurationError(
            f"sample {sample_id} is shown as {type(shown).__name__}, but a figure shows images; give show=, a function of "
            "the sample that returns an image, or read the samples with to_html."
        )
    return shown


def heat_map(values: Sequence[Sequence[float]], rows: Sequence[Any], columns: Sequence[Any], **labels: str) -> Figure:
    """A table as colours, such as losses over horizon and learning rate; labels ``xlabel``, ``ylabel``, ``title``."""
    figure, axes = _figure()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), [str(c) for c in columns])
    axes.set_yticks(range(len(rows)), [str(r) for r in rows])
    axes.set(**labels)
    figure.colorbar(image)
    return figure


def lines(table: pd.DataFrame, **labels: str) -> Figure:
    """A line per column of a table over its index; ``labels`` as of ``matplotlib.axes.Axes.set``."""
    figure, axes = _figure()
    for column, values in table.items():
        axes.plot(table.index, values, marker="o", ms=3, label=f"{table.columns.name} {column}")
    axes.set(**labels)
    axes.legend(frameon=False)
    return figure


def proxy_against_truth(predicted: Tensor, measured: Tensor) -> Figure:
    """Errors of scores as the error proxy predicts them, over those that retraining measured; equal on the line.

    Args:
        predicted: such as the column ``error`` of `PredictedErrors.to_pandas`.
        measured: truth minus score, in the same shape and order.

    Raises:
        ConfigurationError: other shapes.
    """
    if predicted.shape != measured.shape:
        raise ConfigurationError(
            f"errors of shapes {tuple(predicted.shape)} predicted and {tuple(measured.shape)} measured; give one of each for "
            "every removal and query."
        )
    figure, axes = _figure()
    axes.axline((0, 0), slope=1, color="0.7", lw=1)
    axes.scatter(measured.flatten().numpy(), predicted.flatten().numpy(), s=12, color=_HELP)
    axes.set(xlabel="measured error (truth minus score)", ylabel="predicted error")
    return figure


def cartography(table: pd.DataFrame) -> Figure:
    """The map of a dataset (Swayamdipta et al., 2020): what is easy above, what is hard or wrong below, ambiguous to the right.

    Args:
        table: with columns ``confidence``, ``variability`` and ``correctness``, a row per sample.
    """
    figure, axes = _figure()
    colours = axes.scatter(
        table.variability, table.confidence, c=table.correctness, s=6, cmap="coolwarm_r", vmin=0, vmax=1
    )
    axes.set(xlabel="variability", ylabel="confidence", ylim=(-0.02, 1.02))
    figure.colorbar(colours, label="correctness")
    return figure


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    return figure, figure.subplots()
