"""Queries: held-out data, their losses at the parameters of a module, and the gradients of these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from lightning_influence.core.curvature import GradientGraph, differentiable_attention
from lightning_influence.core.trajectory import Vectors
from lightning_influence.errors import ConfigurationError
from lightning_influence.run.batches import OneExample, batch_size, example, samples_of, to_dtype
from lightning_influence.run.data import TrainingData, set_up
from lightning_influence.run.lightning_names import is_a
from lightning_influence.run.lightning_task import CONVERTED, default_dtype
from lightning_influence.run.parameters import parameters_at
from lightning_influence.run.rows import relates_samples
from lightning_influence.run.sample_ids import is_map_style
from lightning_influence.run.task import Task, as_task
from lightning_influence.scoring.query_loss import LossOfQueries, QueryLoss, Traits, shape_of

Target: TypeAlias = "Literal['mean'] | Sequence[float] | Tensor | None"
"""What is asked of the queries. None: the loss of each, a column per query. ``"mean"`` or weights ``(n_queries,)``: the mean or
weighted sum of their losses, one column at the cost of one query."""


_QUERIES_A_BATCH = 32  # of a dataset that is collated here
_NO_BATCH = "queries holds no batch; give a loader with at least one example."
_LOOKED_AT = 8  # queries whose losses are held against that of their batch


class Queries:
    """Batches of queries, from any of the forms in which people hold them.

    Args:
        source: a loader or a list of batches, a datamodule (its validation loader), a dataset (collated by default), or a
            method without arguments that gives one of them.
        data: the training data; where it is a datamodule, its hooks prepare the queries, too.
        precision: of the trainer, to which queries are converted as training batches were.

    Attributes:
        only_gradients: whether nothing but their gradients is asked for: who measures what becomes of their losses needs no look at
            whether a group's score can be read as a size.

    Raises:
        ConfigurationError: none of these.
    """

    only_gradients = False

    def __init__(self, source: Any, *, data: Any = None, precision: str | None = None) -> None:
        if isinstance(data, TrainingData):
            data = data.datamodule
            source = source.val_dataloader() if source is data and data is not None else source  # it is set up
        self._datamodule = next((d for d in (source, data) if is_a(d, "LightningDataModule")), None)
        self.precision = precision
        self._batches = batches_of(source)

    @classmethod
    def of(cls, source: Any, *, data: Any = None, precision: str | None = None) -> Queries:
        """From any of those forms, or queries as they are."""
        return source if isinstance(source, Queries) else cls(source, data=data, precision=precision)

    def prepared(self, task: Task) -> Iterator[Any]:
        """Each batch as the task's loss takes it."""
        for batch in self._batches:
            alone = isinstance(batch, OneExample)
            inside = batch.batch if isinstance(batch, OneExample) else batch
            prepared = task.prepared(inside, datamodule=self._datamodule, precision=self.precision)
            yield OneExample(prepared) if alone else prepared

    def held(self) -> Queries:
        """The same with its batches in memory, so that they can be read again and are the same each time."""
        self._batches = list(self._batches)
        return self

    def for_gradients(self) -> Queries:
        """The same, of which only gradients are asked."""
        other = copy.copy(self)
        other.only_gradients = True
        return other

    def to_dtype(self, dtype: torch.dtype) -> Queries:
        """The same in another precision."""
        other = copy.copy(self)
        other._batches = [to_dtype(batch, dtype) for batch in self._batches]
        other.precision = next((name for name, own in CONVERTED.items() if own == dtype), self.precision)
        return other


class EachAlone:
    """The samples of a map-style loader, in its order, each collated alone."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[OneExample]:
        assert self.loader.batch_sampler is not None
        alone = [[i] for batch in self.loader.batch_sampler for i in batch]
        loader = DataLoader(self.loader.dataset, batch_sampler=alone, collate_fn=self.loader.collate_fn)
        return map(OneExample, loader)


def batches_of(source: Any) -> Iterable[Any]:
    """The batches of queries in any of the forms that `Queries` takes, as they are before the module prepares them.

    Raises:
        ConfigurationError: none of these forms.
    """
    if is_a(source, "LightningDataModule"):
        set_up(source)
        return batches_of(source.val_dataloader())
    if isinstance(source, (str, bytes, Path)):
        raise ConfigurationError(f"queries={str(source)!r:.80}; give a loader, a list of batches, or a datamodule.")
    if isinstance(source, (Tensor, Mapping)) or (isinstance(source, tuple) and source):
        raise ConfigurationError(
            f"queries is a single batch ({shape_of(source):.200}); wrap it in a list: queries=[batch]."
        )
    if isinstance(source, (list, tuple)) and any(isinstance(part, DataLoader) for part in source):
        raise ConfigurationError(
            f"queries holds {len(source)} loaders; join their datasets (torch.utils.data.ConcatDataset) into one, or ask by each of "
            "them in turn."
        )
    if is_map_style(source) and relates_samples(source.dataset, source.collate_fn):  # each query is collated alone
        return EachAlone(source)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return DataLoader(source, batch_size=_QUERIES_A_BATCH)
    if not isinstance(source, Iterable) and callable(source):
        return batches_of(source())
    if not isinstance(source, Iterable):
        raise ConfigurationError(
            f"queries is a {type(source).__name__}; give a loader, a list of batches, a dataset or a datamodule."
        )
    return source


def check_target(target: Target) -> None:
    """Refuse a word that is no target.

    Raises:
        ConfigurationError: another word than ``"mean"``.
    """
    if isinstance(target, str) and target != "mean":
        raise ConfigurationError(f"target={target!r}; give 'mean', weights (n_queries,), or None for each query.")


def asked_of(each: Tensor, target: Target) -> Tensor:
    """A quantity ``(..., n_queries)`` that is linear in the query losses, for the target: ``(..., 1)``, or as it is.

    Example:
        >>> asked_of(torch.tensor([1.0, 3.0]), "mean"), asked_of(torch.tensor([1.0, 3.0]), [0.0, 2.0])
        (tensor([2.]), tensor([6.]))
    """
    if target is None:
        return each
    if isinstance(target, str):
        return each.mean(-1, keepdim=True)
    return (each @ torch.as_tensor(target).to(each))[..., None]


def query_losses(model: Any, queries: Queries | Iterable[Any], query_loss: QueryLoss | None = None) -> Tensor:
    """Loss of every query, ``(n_queries,)``.

    The default loss of an example is the training loss of a batch that holds this example alone, in evaluation mode, with
    logging off.

    Args:
        model: a `LightningModule` or a `Task`.
    """
    task = as_task(model)
    with asking(task, queries), torch.no_grad():
        losses = LossOfQueries(task, query_loss)
        return torch.cat([losses.each(batch) for batch in _batches(task, queries)])


def target_losses(
    model: Any, queries: Queries | Iterable[Any], target: Target, query_loss: QueryLoss | None = None
) -> Tensor:
    """What the target says of the losses of the queries, ``(1,)``; the loss of each, ``(n_queries,)``, where it is None.

    A mean of losses that a batch gives as a whole is asked for as a whole. Arguments and errors as of `query_gradients`.
    """
    if target is None:
        return query_losses(model, queries, query_loss)
    task = as_task(model)
    with asking(task), torch.no_grad():
        terms = list(_terms(LossOfQueries(task, query_loss), _batches(task, queries), target, Traits()))
        total = torch.stack([loss for loss, _ in terms]).sum()[None]
        return total / sum(n for _, n in terms) if isinstance(target, str) else total


def query_gradients(
    model: Any,
    queries: Queries | Iterable[Any],
    names: Sequence[str],
    select: Callable[[str, Tensor], Tensor],
    *,
    target: Target = None,
    query_loss: QueryLoss | None = None,
    only: range | None = None,
    traits: Traits | None = None,
    progress: bool = True,
) -> Vectors:
    """Gradients of the query losses, ``(n_queries, d)`` each, or of their target, ``(1, d)``.

    Args:
        model: a `LightningModule` or a `Task`.
        queries: batches as the training loss takes them, or as ``query_loss`` does.
        names: parameters to differentiate by.
        select: ``(name, values (..., *shape)) -> (..., d)``, the coordinates to keep.
        target: `Target`.
        only: of which queries, by their position, where there is no target; of all by default.
        traits: what is known of the loss, to which is added what is found out now.

    Raises:
        ConfigurationError: no queries, a batch that the module cannot take, weights of another number.
    """
    task = as_task(model)
    with asking(task, queries):
        parameters = dict(task.module.named_parameters())
        chosen = {name: parameters[name] for name in names}
        batches = _batches(task, queries)
        first = next(batches, None)
        if first is None:
            raise ConfigurationError(_NO_BATCH)
        known = Traits() if traits is None else traits
        losses = LossOfQueries(task, query_loss).opened_where_needed(first, chosen, known)
        bar = tqdm(chain([first], batches), desc="query gradients", unit="batch", delay=2, disable=not progress)
        if target is None:
            rows, seen = list[Vectors](), 0
            for batch in bar:
                n = batch_size(batch)
                chosen_examples = [i for i in range(n) if only is None or seen + i in only]
                rows += _each_gradient(losses, batch, chosen_examples, chosen, select) if chosen_examples else ()
                seen += n
        else:
            rows = [_target_gradient(losses, bar, chosen, select, target, Traits())]
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def mean_gradients(
    model: Any,
    queries: Iterable[Any],
    names: Sequence[str],
    select: Callable[[str, Tensor], Tensor],
    places: Sequence[Mapping[str, Tensor]],
    traits: Traits,
) -> list[Vectors]:
    """Gradients of the mean query loss, ``(1, d)`` each, at several places, for who asks again and again.

    Args:
        model, queries, names, select: as of `query_gradients`.
        places: parameters, by name; those that are missing stay as they are.
        traits: what is known of the loss, to which is added what is found out now.

    Raises:
        ConfigurationError: as of `query_gradients`.
    """
    task, gradients = as_task(model), list[Vectors]()
    with asking(task, queries):
        parameters = dict(task.module.named_parameters())
        chosen = {name: parameters[name] for name in names}
        for place in places:
            with parameters_at(task.module, place):
                batches = _batches(task, queries)
                if traits.open is None:
                    first = next(batches, None)
                    if first is None:
                        raise ConfigurationError(_NO_BATCH)
                    LossOfQueries(task).opened_where_needed(first, chosen, traits)
                    batches = chain([first], batches)
                losses = LossOfQueries(task, open=bool(traits.open))
                one = _target_gradient(losses, batches, chosen, select, "mean", traits)
                gradients.append({name: gradient[None] for name, gradient in one.items()})
    return gradients


def count_queries(task: Task, queries: Queries | Iterable[Any]) -> int:
    """The number of examples that there are in all batches."""
    with asking(task, queries):
        return sum(batch_size(batch) for batch in _batches(task, queries))


def query_curvature(
    model: Any,
    queries: Queries | Iterable[Any],
    names: Sequence[str],
    *,
    target: Target = None,
    query_loss: QueryLoss | None = None,
) -> Callable[[Vectors], Tensor]:
    """Second derivatives of the query losses along directions, at the model's present parameters.

    Returns:
        A function from ``(k, d)`` per parameter to ``(k, n_queries)``, or ``(k, 1)`` for a target that is not None.
    """
    task = as_task(model)
    parameters = {name: p.detach().clone() for name, p in task.module.named_parameters() if name in names}
    batches = list(_batches(task, queries))

    def along(directions: Vectors) -> Tensor:
        columns = []
        with asking(task, queries), differentiable_attention():
            for graph in _gradient_graphs(LossOfQueries(task, query_loss), batches, parameters):
                placed = {k: directions[k].to(graph.parameters[k]) for k in names}
                products = graph.hessian_product(placed)
                columns.append(torch.stack([(products[k] * placed[k]).sum(1) for k in names]).sum(0))
        return asked_of(torch.stack(columns, 1), target)

    return along


def _gradient_graphs(
    losses: LossOfQueries, batches: Iterable[Any], parameters: dict[str, Tensor]
) -> Iterator[GradientGraph]:
    module = losses.task.module
    own = dict(module.named_parameters())
    leaves: dict[str, Tensor] = {k: own[k] for k in parameters}
    with parameters_at(module, parameters):
        for number, batch in enumerate(batches):
            if number == 0:
                losses = losses.opened_where_needed(batch, leaves)
            for i in range(batch_size(batch)):
                one = example(batch, i)
                loss = losses.each(one).sum()
                gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
                yield GradientGraph(leaves, dict(zip(leaves, gradients, strict=True)))


def _each_gradient(
    losses: LossOfQueries,
    batch: Any,
    examples: Sequence[int],
    parameters: Mapping[str, Tensor],
    select: Callable[[str, Tensor], Tensor],
) -> Iterator[Vectors]:
    if losses.query_loss is None:
        for i in examples:
            loss = losses.own_loss(example(batch, i))
            yield _kept(_gradient(loss, parameters), select)
    else:
        each = losses.each(batch)
        for i in examples:
            yield _kept(_gradient(each[i], parameters, keep_graph=i != examples[-1]), select)


def _target_gradient(
    losses: LossOfQueries,
    batches: Iterable[Any],
    parameters: Mapping[str, Tensor],
    select: Callable[[str, Tensor], Tensor],
    target: Target,
    traits: Traits,
) -> Vectors:
    total, seen = {name: torch.zeros_like(p) for name, p in parameters.items()}, 0
    for loss, n in _terms(losses, batches, target, traits):
        for name, gradient in _gradient(loss, parameters).items():
            total[name] += gradient
        seen += n
    scale = 1 / seen if isinstance(target, str) else 1.0
    return _kept({name: scale * gradient for name, gradient in total.items()}, select)


def _terms(
    losses: LossOfQueries, batches: Iterable[Any], target: Target, traits: Traits
) -> Iterator[tuple[Tensor, int]]:
    """The sum of the queries' losses, weighted as the target says, and their number, batch by batch."""
    weights = None if isinstance(target, str) else torch.as_tensor(target, dtype=torch.float64)
    seen = 0
    for batch in batches:
        n = batch_size(batch)
        together = weights is None and losses.query_loss is None and traits.is_mean is not False
        if together:
            mean, equal = losses.mean(batch)
            if traits.is_mean is None and n > 1:  # a single example says nothing
                few = samples_of(batch, slice(_LOOKED_AT))
                of_few = mean if n <= _LOOKED_AT else losses.mean(few)[0]
                traits.is_mean = _same_mean(of_few, losses.each(few).mean())
            together = traits.is_mean is not False and equal
        if together:
            yield n * mean, n
        else:
            each = losses.each(batch)
            own_weights = torch.ones(n) if weights is None else weights[seen : seen + n]
            if len(own_weights) != len(each):
                raise ConfigurationError(
                    f"target has {0 if weights is None else len(weights)} weights, but queries holds more examples."
                )
            yield (own_weights.to(each) * each).sum(), n
        seen += n
    if seen == 0:
        raise ConfigurationError(_NO_BATCH)
    if weights is not None and seen != len(weights):
        raise ConfigurationError(f"target has {len(weights)} weights, but queries holds {seen} examples.")


def _same_mean(mean: Tensor, of_examples: Tensor) -> bool:
    tolerance = 1e-4 if mean.dtype != torch.float64 else 1e-9
    return bool((mean - of_examples).abs() <= tolerance * of_examples.abs().clamp(min=1e-12))


def _gradient(loss: Tensor, parameters: Mapping[str, Tensor], *, keep_graph: bool = False) -> Vectors:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=keep_graph)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


def _kept(gradients: Vectors, select: Callable[[str, Tensor], Tensor]) -> Vectors:
    return {name: select(name, g if g.dtype == torch.float64 else g.float()) for name, g in gradients.items()}


def _batches(task: Task, queries: Queries | Iterable[Any]) -> Iterator[Any]:
    return Queries.of(queries).prepared(task)


@contextmanager
def asking(task: Task, queries: Any = None) -> Iterator[None]:
    """Evaluation mode, gradients on, logging off, in the precision of the queries; everything as it was afterwards."""
    precision = queries.precision if isinstance(queries, Queries) else None
    with task.unchanged(), task.quiet(), torch.enable_grad(), default_dtype(task.module, precision):
        task.module.eval()
        task.module.requires_grad_(True)
        yield
