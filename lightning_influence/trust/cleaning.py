"""From suspects to a better data set: leave samples out, train again, and say what changed beside what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.report.tables import in_notebook
from lightning_influence.run.batches import batch_size
from lightning_influence.run.data import TrainingData
from lightning_influence.run.tap import LossTap
from lightning_influence.run.task import Task, as_task
from lightning_influence.scoring.attribution import attribute
from lightning_influence.scoring.queries import Queries, asking
from lightning_influence.scoring.query_loss import LossOfQueries, QueryLoss
from lightning_influence.trust.dynamics import suspects
from lightning_influence.trust.own_run import own_run
from lightning_influence.trust.retraining import retrain

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Cleaning:
    """What leaving samples out did.

    Attributes:
        removed: sample ids.
        predicted: ``(n_queries,)``, the predicted change of every query's loss.
        before, after: ``(n_queries,)``, losses of the queries after training with and without the samples; None after a dry run.
        accuracy: share of the queries whose label is the most probable class, before and after; None where the loss is not one
            over classes.
        model: trained without the samples.

    Example:
        >>> cleaning = Cleaning([3, 8], torch.tensor([-0.25]), before=torch.tensor([1.0]), after=torch.tensor([0.5]))
        >>> cleaning
        Cleaning(2 samples removed; predicted_change -0.25, change -0.5, loss_before 1, loss_after 0.5)
    """

    removed: Sequence[int]
    predicted: Tensor
    before: Tensor | None = None
    after: Tensor | None = None
    accuracy: tuple[float, float] | None = None
    model: nn.Module | None = None

    def to_pandas(self) -> pd.DataFrame:
        """One row: samples removed, mean loss and accuracy before and after, measured and predicted change of the loss."""
        import pandas as pd

        row: dict[str, Any] = {"removed": len(self.removed), "predicted_change": float(self.predicted.mean())}
        if self.before is not None and self.after is not None:
            before, after = float(self.before.mean()), float(self.after.mean())
            row |= {"change": after - before, "loss_before": before, "loss_after": after}
        if self.accuracy is not None:
            row |= {"accuracy_before": self.accuracy[0], "accuracy_after": self.accuracy[1]}
        return pd.DataFrame([row])

    def __repr__(self) -> str:
        row = self.to_pandas().iloc[0].to_dict()
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "removed")
        return f"Cleaning({len(self.removed)} samples removed; {numbers})"

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.to_pandas())


def clean(
    log: str | Path,
    *,
    queries: Any,
    model: Any,
    data: Any,
    samples: Sequence[int] | None = None,
    k: int | None = None,
    dry_run: bool = False,
    query_loss: QueryLoss | None = None,
    make_model: Callable[[], nn.Module] | None = None,
    progress: bool = True,
) -> Cleaning:
    """Train a recorded run again without some of its samples.

    The predicted change is that of the whole set, by the optimizer's joint response to its removal.

    Args:
        log: directory written by `InfluenceCallback`, of a run that can be replayed.
        queries: held-out data on which the two runs are compared, as of `attribute`.
        model: as it left ``fit``; a `LightningModule` or a task.
        data: the training data of the run: a datamodule, a loader or a dataset.
        samples: ids to leave out (``report.select()``, say); None for the `suspects` of the log.
        k: the number of suspects; None for all.
        dry_run: say what would be left out and what is predicted of it, and train nothing.
        query_loss: as of `attribute`.
        make_model: gives the module at its initialisation; by default taken from the log's first snapshot.

    Raises:
        ConfigurationError: nothing to leave out, or samples that the run did not consume.
    """
    task, steps, source = as_task(model), LoggedSteps.of(log), TrainingData.of(data)
    held = Queries.of(queries, data=source, precision=steps.manifest.precision).held()
    removed = suspects(log, k).sample_id.tolist() if samples is None else list(samples)
    if not removed:
        raise ConfigurationError(
            "there is no sample to leave out; give samples=, the ids, or k=, a number of suspects."
        )
    report = attribute(
        steps, queries=held.for_gradients(), model=task, data=source, query_loss=query_loss,
        samples=(), groups={"removed": removed}, progress=progress,
    )  # fmt: skip
    assert report.groups is not None
    predicted = report.groups.scores[0]
    if dry_run:
        return Cleaning(removed, predicted)
    run = own_run(steps, task, source, make_model, seed=0)
    whole, rest = retrain(run), retrain(run, removed)
    (before, right_before), (after, right_after) = (_asked(task.on(m), held, query_loss) for m in (whole, rest))
    accuracy = None if right_before is None or right_after is None else (right_before, right_after)
    return Cleaning(removed, predicted, before, after, accuracy, rest)


def _asked(task: Task, queries: Queries, query_loss: QueryLoss | None) -> tuple[Tensor, float | None]:
    """Losses of the queries ``(n_queries,)``, and the share of them whose label is the most probable class; None for the share
    where the loss is not one over classes.
    """
    asked, each, right = LossOfQueries(task, query_loss), list[Tensor](), list[Tensor | None]()
    with asking(task, queries), torch.no_grad():
        for batch in queries.prepared(task):
            n = batch_size(batch)
            with LossTap() as tap:
                each.append(asked.each(batch))
            rows = 1 if query_loss is None else n  # of each call: the task's own loss is asked for each example alone
            right.append(_margins(tap, rows) if len(tap.seen) * rows == n else None)
    losses = torch.cat(each)
    known = [margins for margins in right if margins is not None]
    if not known or len(known) < len(right):
        return losses, None
    return losses, float((torch.cat(known) > 0).float().mean())


def _margins(tap: LossTap, rows: int) -> Tensor | None:
    """Those of all samples, ``rows`` in each loss that was called; None where one is not a loss over classes."""
    dynamics_of = [None if seen is None else seen.dynamics(rows) for seen in tap.seen]
    margins = [dynamics.margins for dynamics in dynamics_of if dynamics is not None]
    return torch.cat(margins) if len(margins) == len(dynamics_of) else None
