"""The answer as an object that people read: its numbers, its plots, its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_influence.report.scores import Scores
from lightning_influence.report.tables import made

if TYPE_CHECKING:
    from lightning_influence.report.arrays import PageDynamics
    from lightning_influence.report.membership import GroupsOf
    from lightning_influence.report.plots import Plots
    from lightning_influence.report.rendering import Render
    from lightning_influence.report.tokens import TokenScores


class InfluenceReport(Scores):
    """Which training samples helped or hurt each query: `Scores` with plots and a page, loaded when they are asked for.

    Example:
        Sample 7 was in two steps, and helps more in the end than sample 2 harms:

        >>> import torch
        >>> ids, steps, scores = torch.tensor([7, 2, 7]), torch.tensor([0, 0, 1]), torch.tensor([[0.5], [-0.25], [0.5]])
        >>> report = InfluenceReport.from_rows(ids, steps, scores)
        >>> report.top(1)[["sample_id", "score"]]
           sample_id  score
        0          7    1.0
        >>> report.mean
        tensor([-0.2500,  1.0000], dtype=torch.float64)
    """

    @property
    def plot(self) -> Plots:
        """Figures: ``report.plot.histogram()``, ``.over_time()``, ``.samples(dataset)``, ``.groups()``,
        ``.proxy_against_truth(...)``.
        """
        from lightning_influence.report.plots import Plots

        return Plots(self)

    def to_html(
        self,
        path: str | Path,
        *,
        data: Any = None,
        show: Render | None = None,
        tokenizer: Any = None,
        queries: Any = None,
        groups: GroupsOf | Mapping[int, Any] | None = None,
        classes: Sequence[str] | None = None,
        dynamics: PageDynamics | None = None,
        tokens: TokenScores | None = None,
        k: int = 8,
        title: str = "Influence report",
    ) -> Path:
        """Write one self-contained page that a person reads.

        Args:
            data: the training dataset, so that samples can be shown, or the loader or datamodule that holds it.
            show: ``show(sample) -> text | PIL image | image tensor | mapping``, a mapping being shown as a small table;
                see `rendering.default_render` for the default.
            tokenizer: decodes token ids for the default.
            queries: those of the report, in any form that `attribute` takes, or a list of their examples; the example of each
                column is shown.
            groups: as of `attribute`, for totals and to filter by: a label (class, source) per sample of the training dataset,
                None for those of no group, or sample ids by name, which may overlap; also a label by sample id. By default
                the samples' own labels, where the dataset gives them without being read (`rendering.labels_of`) or ``dynamics``
                do.
            classes: names of the labels, which are then indices into it.
            dynamics: of `training_dynamics`, so that labels in doubt and each sample's losses are shown. Where the dataset gives
                no labels without being read, those that were trained on are taken.
            tokens: of `token_scores`, so that texts are shaded by what each of their tokens did.
            k: samples in each list.

        What was measured by retraining is shown beside what the report knows of its own trustworthiness; put it there with
        ``report.metadata |= check.trust``, where ``check`` is of `check_faithfulness`.

        Returns:
            The path.

        Raises:
            ConfigurationError: data, groups, classes, queries or tokens that do not fit the report.
        """
        from lightning_influence.report.page import page

        options: dict[str, Any] = {"data": data, "show": show, "tokenizer": tokenizer, "queries": queries}
        path = made(path)
        text = page(self, **options, groups=groups, classes=classes, dynamics=dynamics, tokens=tokens, k=k, title=title)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a text cut inside a character
        return path

    def _repr_html_(self) -> str:
        from lightning_influence.report.page import cell

        return cell(self)
