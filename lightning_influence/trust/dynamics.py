"""Wrong labels from what the training step said of every sample at each of its visits; needs no queries.

A network learns what is general before it learns by heart: while a wrong label is not yet memorised, the network contradicts
it. So a sample's log-probabilities are averaged over its visits, and an epoch counts by the share of samples that it has not
yet fitted; the first counts nothing, because the network then knows nothing. What labels are taken for each other is itself
read off the averages: a class that many samples of a label turn out to be is the likelier for all of that label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.errors import ConfigurationError, LogError
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.report.tables import in_notebook
from lightning_influence.run.batches import batch_size
from lightning_influence.run.data import TrainingData
from lightning_influence.run.losses import Dynamics, joined
from lightning_influence.run.tap import LossTap
from lightning_influence.run.task import as_task
from lightning_influence.scoring.queries import query_losses

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BATCH = 256  # samples that are evaluated together
_ROWS = 2**18  # visits that are averaged together
_CONFUSION_STRENGTH = 16.0  # this and the passes were chosen on runs that no published figure is from
_CONFUSION_PASSES = 3


def suspects(log: str | Path, k: int | None = None, *, model: Any = None, data: Any = None) -> pd.DataFrame:
    """The samples of a run that are likely mislabelled, the most suspicious first.

    The log is enough. In a run of few epochs one more look at every sample at the end helps: give model and data for it.

    Args:
        log: directory written by `InfluenceCallback`, in any way of recording.
        k: how many; None for all for which another label is more likely than their own.
        model: as it left training, as of `attribute`.
        data: the training data: a datamodule, a loader or a dataset.

    Returns:
        As of `TrainingDynamics.suspects`.

    Raises:
        LogError: no log, or one without training dynamics.
        ConfigurationError: model without data or data without model, or a training step without a single loss over classes.
    """
    return training_dynamics(log, model=model, data=data).suspects(k)


def training_dynamics(log: str | Path, *, model: Any = None, data: Any = None) -> TrainingDynamics:
    """What a run's loss said of its samples, at every visit.

    Args:
        log: as of `suspects`.
        model: for one more visit of every sample at the end of the run, as of `suspects`.
        data: likewise.

    Raises:
        LogError: no log, or one without training dynamics.
        ConfigurationError: as of `suspects`.
    """
    dynamics = dynamics_of(log)
    if dynamics is None:
        raise LogError(
            f"the log {log} holds no training dynamics: its training step calls no functional loss over classes "
            "(cross_entropy, nll_loss, binary_cross_entropy), or several, or the log is of an older version. Score the samples "
            "with attribute(...) instead, whose report has suspects() too."
        )
    if (model is None) != (data is None):
        given, missing = ("model", "data") if data is None else ("data", "model")
        raise ConfigurationError(f"{given} was given without {missing}; give both for a look at the end, or neither.")
    if model is None:
        return dynamics
    return dynamics.followed_by(evaluated(model, data, dynamics.sample_ids))


def dynamics_of(log: str | Path) -> TrainingDynamics | None:
    """The same; None where the log has none."""
    steps = LoggedSteps(log)
    recorded = [step for step in map(steps.dynamics, range(len(steps))) if step is not None]
    visits = joined([dynamics for _, dynamics in recorded])
    if not recorded or visits is None:
        return None
    ids = torch.cat([ids for ids, _ in recorded])
    return TrainingDynamics.of(ids, visit_numbers(ids), visits)


@dataclass(frozen=True)
class TrainingDynamics:
    """Every visit of every sample.

    Attributes:
        sample_ids: ``(n,)`` int64, ascending.
        owner: ``(v,)`` int64, position in ``sample_ids`` of the sample of each visit, in the order of the run.
        numbers: ``(v,)`` int64, how often the sample had been visited before.
        visits: what was said at each visit.
    """

    sample_ids: Tensor
    owner: Tensor
    numbers: Tensor
    visits: Dynamics

    @classmethod
    def of(cls, ids: Tensor, numbers: Tensor, visits: Dynamics) -> TrainingDynamics:
        """From the sample ids ``(v,)`` of the visits; those without a label that counts are left out."""
        visited = ~visits.margins.isnan()
        sample_ids, owner = torch.unique(ids[visited], return_inverse=True)
        columns = {name: column[visited] for name, column in visits.columns().items()}
        return cls(sample_ids, owner, numbers[visited], Dynamics(**columns))

    def followed_by(self, last: Sequence[Dynamics]) -> TrainingDynamics:
        """With one more visit of every sample, in batches in the order of `sample_ids`."""
        visits = joined([self.visits, *last])
        if visits is None:
            raise ConfigurationError(
                "the model given has other classes than the run; give the module that was trained."
            )
        numbers = torch.cat([self.numbers, torch.full_like(self.sample_ids, int(self.numbers.max()) + 1)])
        return TrainingDynamics.of(torch.cat([self.sample_ids[self.owner], self.sample_ids]), numbers, visits)

    @cached_property
    def _weights(self) -> Tensor:
        """Of the visits ``(v,)``, those of a sample adding up to 1."""
        weights = epoch_weights(self.numbers, self.visits.margins)[self.numbers]
        weights = torch.where((self._summed(weights) > 0)[self.owner], weights, 1.0)  # of a sample seen but once
        return weights / self._summed(weights)[self.owner]

    def _summed(self, values: Tensor) -> Tensor:
        """Sums ``(n, ...)`` over the visits of each sample."""
        return values.new_zeros(len(self.sample_ids), *values.shape[1:]).index_add_(0, self.owner, values)

    def _mean(self, values: Tensor) -> Tensor:
        return self._summed(values.double()) / self._summed(torch.ones_like(values, dtype=torch.float64))

    def _last(self, values: Tensor) -> Tensor:
        """Those ``(n,)`` of each sample's last visit."""
        last = torch.zeros_like(self.sample_ids).scatter_reduce_(0, self.owner, torch.arange(len(self.owner)), "amax")
        return values[last]

    def suspects(self, k: int | None = None) -> pd.DataFrame:
        """The samples by how likely their label is wrong.

        Args:
            k: how many; None for all for which another label is more likely than their own.

        Returns:
            ``sample_id``, ``suspicion`` (log-odds of the suggested label against the sample's own, averaged over the visits),
            ``label``, ``suggested`` (label; -1 where a sample has several labels), ``share`` (of the visits as they count, at
            which the network preferred the suggested label to all others), ``loss`` and ``margin`` (means over the visits; the
            margin is of logits, its mean also known as AUM), ``last_loss`` and ``last_margin``.
        """
        import pandas as pd

        suspicion, suggested = self._contradicted()
        visits = self.visits
        preferred = (visits.others == suggested[self.owner]) & (visits.margins < 0)
        columns = {
            "sample_id": self.sample_ids,
            "suspicion": suspicion,
            "label": self._last(visits.labels),
            "suggested": suggested,
            "share": self._summed(self._weights * preferred),
            "loss": self._mean(visits.losses),
            "margin": self._mean(visits.margins),
            "last_loss": self._last(visits.losses),
            "last_margin": self._last(visits.margins),
        }
        table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        table = table.sort_values("suspicion", ascending=False, kind="stable")
        table = table[table.suspicion > 0] if k is None else table.head(k)
        return table.reset_index(drop=True)

    def _contradicted(self) -> tuple[Tensor, Tensor]:
        """Suspicion and suggested label ``(n,)`` of every sample."""
        visits = self.visits
        if visits.log_probabilities.shape[1]:
            return contradiction(self._averaged(visits.log_probabilities), self._last(visits.labels))
        return -self._summed(self._weights * visits.margins), self._voted(visits.others)

    def _averaged(self, values: Tensor) -> Tensor:
        """Means ``(n, columns)`` over the visits as they count, float64."""
        total = torch.zeros(len(self.sample_ids), values.shape[1], dtype=torch.float64)
        for rows in torch.arange(len(values)).split(_ROWS):
            total.index_add_(0, self.owner[rows], self._weights[rows, None] * values[rows])
        return total

    def _voted(self, classes: Tensor) -> Tensor:
        """The class ``(n,)`` that most of a sample's visits, as they count, say."""
        pairs, where = torch.unique(torch.stack([self.owner, classes]), dim=1, return_inverse=True)
        votes = torch.zeros(pairs.shape[1], dtype=torch.float64).index_add_(0, where, self._weights)
        order = votes.argsort(stable=True)
        return torch.zeros_like(self.sample_ids).scatter_(0, pairs[0, order], pairs[1, order])

    def to_pandas(self) -> pd.DataFrame:
        """Every sample as in dataset cartography (Swayamdipta et al., 2020).

        Returns:
            ``sample_id``, ``label``, ``visits``, ``confidence`` (mean probability of the label), ``variability`` (its standard
            deviation over the visits), ``correctness`` (share of the visits at which the label was the most probable class),
            ``loss`` and ``margin`` (means). With several labels a sample, its probability is their geometric mean.
        """
        import pandas as pd

        visits = self.visits
        probability = visits.label_log_probabilities.double().exp()
        confidence = self._mean(probability)
        columns = {
            "sample_id": self.sample_ids,
            "label": self._last(visits.labels),
            "visits": self._summed(torch.ones_like(self.owner)),
            "confidence": confidence,
            "variability": self._mean((probability - confidence[self.owner]).square()).sqrt(),
            "correctness": self._mean((visits.margins > 0).double()),
            "loss": self._mean(visits.losses),
            "margin": self._mean(visits.margins),
        }
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})

    def plot(self) -> Figure:
        """The map of the samples: confidence over variability, in the colour of correctness."""
        from lightning_influence.report.plots import cartography

        return cartography(self.to_pandas())

    def __repr__(self) -> str:
        return f"TrainingDynamics({len(self.sample_ids)} samples, {len(self.owner)} visits)"

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.to_pandas())


def visit_numbers(sample_ids: Tensor) -> Tensor:
    """How often the sample of each visit ``(v,)`` had been visited before."""
    order = sample_ids.argsort(stable=True)
    _, counts = torch.unique_consecutive(sample_ids[order], return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) - starts)


def epoch_weights(numbers: Tensor, margins: Tensor) -> Tensor:
    """How much the first, second, ... visits count ``(n_visits,)``: the share of samples that are not yet fitted.

    The share is estimated with one success and one failure more, so that it is never zero; the first visits count nothing.

    Args:
        numbers: ``(v,)`` int64, of the visits.
        margins: ``(v,)``, negative where the label was not the most probable class.
    """
    unfitted = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64)
    unfitted = unfitted.index_add_(0, numbers, (margins < 0).double())
    shares = (unfitted + 1) / (numbers.bincount() + 2)
    shares[0] = 0
    return shares


def contradiction(log_probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest other class of every sample, and its log-odds against the label.

    Args:
        log_probabilities: ``(n, classes)``, averaged over the visits.
        labels: ``(n,)`` int64.

    Returns:
        Log-odds ``(n,)``, and classes ``(n,)`` int64.
    """
    confused = torch.zeros(log_probabilities.shape[1], log_probabilities.shape[1], dtype=torch.float64)
    for _ in range(_CONFUSION_PASSES):
        confused = confusion(labels, (log_probabilities + confused[labels]).argmax(1), log_probabilities.shape[1])
    odds = log_probabilities + confused[labels] - log_probabilities.gather(1, labels[:, None])
    strongest = odds.scatter(1, labels[:, None], -torch.inf).max(1)
    return strongest.values, strongest.indices


def confusion(labels: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """How much more often than usual samples of one label turn out to be of another class, as log-odds.

    The counts of the pairs of different classes are those of Poisson variables, whose rates are spread around what the number
    of samples of each label lets expect by a gamma distribution of mean 1. Its shape is estimated by moments, and the rates by
    their posterior means: where the pairs differ by no more than chance, nothing remains.

    Args:
        labels, classes: ``(n,)`` int64, the label of each sample and the class that it seems to be of.

    Returns:
        ``(n_classes, n_classes)`` by label and class, 0 on the diagonal.
    """
    counts = torch.zeros(n_classes, n_classes, dtype=torch.float64)
    counts.index_put_((labels, classes), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    others = 1 - torch.eye(n_classes, dtype=torch.float64)
    sizes = labels.bincount(minlength=n_classes)[:, None] * others
    expected = sizes * (counts * others).sum() / sizes.sum()
    excess = float(((counts - expected).square() - expected).mul(others).sum())
    if excess <= 0:
        return torch.zeros_like(counts)
    shape = _CONFUSION_STRENGTH * float(expected.square().sum()) / excess
    return ((counts + shape) / (expected + shape)).log() * others


def evaluated(model: Any, data: Any, sample_ids: Tensor) -> list[Dynamics]:
    """One look at samples of the training data, in evaluation mode and with their labels.

    Raises:
        ConfigurationError: the training step has no single loss over classes.
    """
    task, parts = as_task(model), list[Dynamics]()

    def look(_: Any, batch: Any) -> Tensor:
        n = batch_size(batch)
        with LossTap() as tap:
            task.loss(batch)
        dynamics = tap.dynamics(n)
        if dynamics is None:
            raise ConfigurationError(
                f"{task.step_name} calls no single functional loss over classes in evaluation mode; "
                "leave model and data out."
            )
        parts.append(dynamics)
        return dynamics.losses

    query_losses(task, _batches(data, sample_ids), look)
    return parts


def _batches(data: Any, sample_ids: Tensor) -> Iterator[Any]:
    training = TrainingData.of(data)
    dataset, collate = training.dataset, training.collate
    for ids in sample_ids.split(_BATCH):
        yield collate([dataset[int(z)] for z in ids])
