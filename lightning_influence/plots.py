"""Figures of a report for notebooks and loggers, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from lightning_influence.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_influence.report import InfluenceReport

_HELP, _HARM = "#0f7b62", "#b3382c"


class Plots:
    """``report.plot``: each method returns a matplotlib figure."""

    def __init__(self, report: InfluenceReport) -> None:
        self._report = report

    def histogram(self, bins: int = 60) -> Figure:
        """How the samples' scores, averaged over the queries, are distributed."""
        figure, axes = _figure()
        scores = self._report.scores.double().mean(1)
        _, edges, patches = axes.hist(scores.numpy(), bins=bins)
        for patch, left in zip(patches, edges, strict=False):
            patch.set_color(_HELP if left >= 0 else _HARM)
        axes.set(xlabel="score", ylabel="samples", yscale="log")
        return figure

    def over_time(self) -> Figure:
        """Summed helpful and harmful influence of the samples of each step."""
        figure, axes = _figure()
        rows = self._report.rows
        values, n = rows.scores.double().mean(1), int(rows.steps.max()) + 1
        for part, colour, name in ((values.clamp(min=0), _HELP, "helped"), (values.clamp(max=0), _HARM, "harmed")):
            axes.bar(
                range(n), torch.zeros(n).double().index_add_(0, rows.steps, part).numpy(), color=colour, label=name
            )
        axes.set(xlabel="optimizer step", ylabel="summed score")
        axes.legend(frameon=False)
        return figure

    def samples(self, data: Any, k: int = 8, query: int | str | None = None) -> Figure:
        """The most helpful and most harmful images of a dataset side by side.

        Raises:
            ConfigurationError: the samples are not images.
        """
        figure = Figure(figsize=(1.2 * k, 3.2), layout="constrained")
        axes = figure.subplots(2, k, squeeze=False)
        for line, table, colour in (
            (axes[0], self._report.top(k, query), _HELP),
            (axes[1], self._report.bottom(k, query), _HARM),
        ):
            for place in line:
                place.axis("off")
            for place, row in zip(line, table.itertuples(), strict=False):
                sample = data[row.sample_id]
                image = torch.as_tensor(sample[0] if isinstance(sample, (tuple, list)) else sample)
                if image.dim() not in (2, 3):
                    raise ConfigurationError(
                        f"sample {row.sample_id} has shape {tuple(image.shape)}; an image has 2 or 3."
                    )
                place.imshow(image.permute(1, 2, 0) if image.dim() == 3 else image, cmap="gray")
                place.set_title(f"{row.sample_id}\n{row.score:+.1e}", fontsize=7, color=colour)
        return figure


def heat_map(values: Sequence[Sequence[float]], rows: Sequence[Any], columns: Sequence[Any], **labels: str) -> Figure:
    """A table as colours, such as losses over horizon and learning rate; labels ``xlabel``, ``ylabel``, ``title``."""
    figure, axes = _figure()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), [str(c) for c in columns])
    axes.set_yticks(range(len(rows)), [str(r) for r in rows])
    axes.set(**labels)
    figure.colorbar(image)
    return figure


def proxy_against_truth(proxy: torch.Tensor, truth: torch.Tensor) -> Figure:
    """Predicted errors of first-order scores against the true ones, ``(n,)`` each."""
    figure, axes = _figure()
    axes.axline((0, 0), slope=1, color="0.7", lw=1)
    axes.scatter(truth.flatten().numpy(), proxy.flatten().numpy(), s=12, color=_HELP)
    axes.set(xlabel="true error (truth minus first-order score)", ylabel="error proxy")
    return figure


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    return figure, figure.subplots()
