"""The loss of queries, one by one or of a batch together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.errors import ConfigurationError
from lightning_influence.replay.stopped_paths import OpenPaths, StopWatch
from lightning_influence.run.batches import OneExample, batch_size, example
from lightning_influence.run.random_state import random_state
from lightning_influence.run.tap import LossTap
from lightning_influence.run.task import Task
from lightning_influence.scoring.slopes import Gradient

QueryLoss: TypeAlias = Callable[[Any, Any], Tensor]
"""``query_loss(model, batch) -> (batch,)``, one loss per example."""

_SAME = 1e-4  # relative difference of two gradients that say the same
_BENT = 0.05  # relative, of the change of a loss that its gradient may miss


@dataclass
class Traits:
    """What was found out of the loss of queries, so that who reads them again and again need not ask again.

    Attributes:
        open: as of `LossOfQueries`; None where it is not known.
        is_mean: whether the loss of a batch is the mean of its examples' own losses; None where it is not known.
        wrong: what is wrong with its gradient, in words, or empty; None where it is not known.
    """

    open: bool | None = None
    is_mean: bool | None = None
    wrong: str | None = None


@dataclass(frozen=True)
class LossOfQueries:
    """The loss of queries at a model's present parameters.

    Attributes:
        query_loss: None for the task's own: the training loss of a batch that holds the example alone.
        open: whether paths that the loss stops (by ``detach``, say) count in its gradient: what is asked is how its value
            changes, by whatever path.
    """

    task: Task
    query_loss: QueryLoss | None = None
    open: bool = False

    def each(self, batch: Any) -> Tensor:
        """Loss of every example, ``(n,)``."""
        if self.query_loss is not None:
            with self._paths():
                losses = self.query_loss(self.task.module, _inside(batch))
            return _one_each(losses, batch_size(batch))
        return torch.stack([self.own_loss(example(batch, i)) for i in range(batch_size(batch))])

    def mean(self, batch: Any) -> tuple[Tensor, bool]:
        """The module's own loss of a batch, and whether its examples are known to count alike in it."""
        with LossTap(labels=False) as tap:
            loss = self.own_loss(batch)
        weights = tap.sample_weights(batch_size(batch))
        return loss, weights is not None and bool((weights == weights[0]).all())

    def own_loss(self, batch: Any) -> Tensor:
        """The training loss of a batch.

        Raises:
            ConfigurationError: a batch that it cannot take.
        """
        try:
            with self._paths():
                return self.task.loss(_inside(batch))
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            single = (
                " If queries is one batch, wrap it in a list: queries=[batch]." if isinstance(batch, Tensor) else ""
            )
            raise ConfigurationError(
                f"{self.task.step_name} cannot take a batch of the queries ({shape_of(_inside(batch))}): {error}. "
                f"Give queries whose batches look like the training batches, or query_loss(model, batch) -> (batch,).{single}"
            ) from error

    def opened_where_needed(
        self, batch: Any, parameters: Mapping[str, Tensor], traits: Traits | None = None
    ) -> LossOfQueries:
        """The same with its stopped paths open, if the loss stops any that matter for its value.

        Args:
            traits: of which what is found out is noted, and also what is wrong with the gradient of the loss, unless it is known;
                a warning says it, too.
        """
        one, module = example(batch, 0), self.task.module
        chosen, (gradient, stops) = self, self._gradient(one, parameters)
        if stops:
            opened = replace(self, open=True)
            whole, _ = opened._gradient(one, parameters)
            if gradient.differs_from(whole, _SAME) and whole.is_of(lambda: self._value(one), module, parameters, _BENT):
                chosen, gradient = opened, whole
        if traits is not None:
            traits.open = chosen.open
            if traits.wrong is None:
                traits.wrong = gradient.error(lambda: self._value(one), module, parameters) or ""
                if traits.wrong:
                    warnings.warn(
                        f"{traits.wrong}. Scores, which rest on it, may be wrong. Give query_loss(model, batch) -> (batch,), a loss "
                        "without that part, such as that of the classifier alone.",
                        stacklevel=5,
                    )
        return chosen

    def _gradient(self, batch: Any, parameters: Mapping[str, Tensor]) -> tuple[Gradient, bool]:
        """Of the loss of a batch, and whether a path stops in it."""
        with self._alone():
            with StopWatch() as watch:
                loss = self.each(batch).sum()
            return Gradient.of(loss, parameters), watch.seen

    def _value(self, batch: Any) -> float:
        with self._alone():
            return float(self.each(batch).detach().sum())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What is drawn and counted meanwhile is drawn and counted alike the next time."""
        with random_state(None), self.task.unchanged():
            yield

    def _paths(self) -> AbstractContextManager[Any]:
        return OpenPaths() if self.open else nullcontext()


def _inside(batch: Any) -> Any:
    """As the task's loss and a user's function take it."""
    return batch.batch if isinstance(batch, OneExample) else batch


def _one_each(losses: Any, n: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigurationError(f"query_loss returned {shape}; it has to return one loss per example, ({n},).")
    return losses


def shape_of(batch: Any) -> str:
    """Types and shapes of a batch, for a message."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {shape_of(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return "(" + ", ".join(shape_of(v) for v in batch) + ")"
    return type(batch).__name__
