"""The questions asked of a run: query losses at its final parameters, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from lightning_influence.core.curvature import GradientGraph, differentiable_attention
from lightning_influence.core.trajectory import Vectors
from lightning_influence.errors import ConfigurationError
from lightning_influence.run.batches import batch_size, example, to_dtype
from lightning_influence.run.data import TrainingData
from lightning_influence.run.lightning_names import is_a
from lightning_influence.run.tap import LossTap
from lightning_influence.run.training_step import parameters_at, prepared, quiet, training_loss

QueryLoss: TypeAlias = Callable[[LightningModule, Any], Tensor]
"""``query_loss(model, batch) -> (batch,)``, one loss per example."""

Target: TypeAlias = "Literal['mean'] | Sequence[float] | Tensor | None"
"""None: one column per query. ``"mean"`` or weights ``(n_queries,)``: one column, at the cost of one."""


_QUERIES_A_BATCH = 32  # of a dataset that is collated here


class Queries:
    """Batches of queries, from any of the forms in which people hold them.

    Args:
        source: a loader or a list of batches, a datamodule (its validation loader), a dataset (collated by default), or a
            method without arguments that gives one of them.
        data: the training data; where it is a datamodule, its hooks prepare the queries, too.
        precision: of the trainer, to which queries are converted as training batches were.

    Raises:
        ConfigurationError: none of these.
    """

    def __init__(self, source: Any, *, data: Any = None, precision: str | None = None) -> None:
        data = data.datamodule if isinstance(data, TrainingData) else data
        self._datamodule = next((d for d in (source, data) if is_a(d, "LightningDataModule")), None)
        self._precision = precision
        self._batches = _batches_of(source)

    @classmethod
    def of(cls, source: Any, *, data: Any = None, precision: str | None = None) -> Queries:
        """From any of those forms, or queries as they are."""
        return source if isinstance(source, Queries) else cls(source, data=data, precision=precision)

    def prepared(self, model: LightningModule) -> Iterator[Any]:
        """Each batch as the module's training step takes it."""
        for batch in self._batches:
            yield prepared(model, batch, datamodule=self._datamodule, precision=self._precision)

    def held(self) -> Queries:
        """The same with its batches in memory, so that they can be read again and are the same each time."""
        self._batches = list(self._batches)
        return self

    def to_dtype(self, dtype: torch.dtype) -> Queries:
        """The same in another precision."""
        other = copy.copy(self)
        other._batches = [to_dtype(batch, dtype) for batch in self._batches]
        return other


def _batches_of(source: Any) -> Iterable[Any]:
    if is_a(source, "LightningDataModule"):
        source.setup("fit")
        return _batches_of(source.val_dataloader())
    if isinstance(source, (str, bytes, Path)):
        raise ConfigurationError(f"queries={str(source)!r:.80}; give a loader, a list of batches, or a datamodule.")
    if isinstance(source, (Tensor, Mapping)) or (isinstance(source, tuple) and source):
        raise ConfigurationError(
            f"queries is a single batch ({_shape(source):.200}); wrap it in a list: queries=[batch]."
        )
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return DataLoader(source, batch_size=_QUERIES_A_BATCH)
    if not isinstance(source, Iterable) and callable(source):
        return _batches_of(source())
    if not isinstance(source, Iterable):
        raise ConfigurationError(
            f"queries is a {type(source).__name__}; give a loader, a list of batches, a dataset or a datamodule."
        )
    return source


def query_losses(
    model: LightningModule, queries: Queries | Iterable[Any], query_loss: QueryLoss | None = None
) -> Tensor:
    """Loss of every query, ``(n_queries,)``.

    The default loss of an example is the module's own: what ``training_step`` returns for a batch that
    holds this example alone, in evaluation mode, with logging off.
    """
    with _asked(model), torch.no_grad():
        return torch.cat([_losses(model, batch, query_loss) for batch in _batches(model, queries)])


def query_gradients(
    model: LightningModule,
    queries: Queries | Iterable[Any],
    names: Sequence[str],
    select: Callable[[str, Tensor], Tensor],
    *,
    target: Target = None,
    query_loss: QueryLoss | None = None,
    progress: bool = True,
) -> Vectors:
    """Gradients of the query losses, ``(n_queries, d)`` each, or of their target, ``(1, d)``.

    Args:
        queries: batches as the module's ``training_step`` takes them, or as ``query_loss`` does.
        names: parameters to differentiate by.
        select: ``(name, values (..., *shape)) -> (..., d)``, the coordinates to keep.
        target: `Target`.

    Raises:
        ConfigurationError: no queries, a batch that the module cannot take, weights of another number.
    """
    with _asked(model):
        parameters = dict(model.named_parameters())
        chosen = {name: parameters[name] for name in names}
        bar = tqdm(_batches(model, queries), desc="query gradients", unit="batch", delay=2, disable=not progress)
        if target is None:
            rows = [row for batch in bar for row in _each_gradient(model, batch, chosen, select, query_loss)]
        else:
            rows = [_target_gradient(model, bar, chosen, select, target, query_loss)]
    if not rows:
        raise ConfigurationError("queries holds no batch; give a loader with at least one example.")
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def query_curvature(
    model: LightningModule,
    queries: Queries | Iterable[Any],
    names: Sequence[str],
    *,
    target: Target = None,
    query_loss: QueryLoss | None = None,
) -> Callable[[Vectors], Tensor]:
    """Second derivatives of the query losses along directions, at the model's present parameters.

    Returns:
        A function from ``(k, d)`` per parameter to ``(k, n_queries)``, or ``(k, 1)`` for ``target="mean"``.

    Raises:
        ConfigurationError: a weighted target.
    """
    if target not in (None, "mean"):
        raise ConfigurationError("the curvature of a weighted target is not offered; use target='mean' or None.")
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}
    batches = list(_batches(model, queries))

    def along(directions: Vectors) -> Tensor:
        columns = []
        with _asked(model), differentiable_attention():
            for graph in _gradient_graphs(model, batches, parameters, query_loss):
                here = {k: directions[k].to(graph.parameters[k]) for k in names}
                products = graph.hessian_product(here)
                columns.append(torch.stack([(products[k] * here[k]).sum(1) for k in names]).sum(0))
        each = torch.stack(columns, 1)
        return each.mean(1, keepdim=True) if target == "mean" else each

    return along


def _gradient_graphs(
    model: LightningModule, batches: Iterable[Any], parameters: dict[str, Tensor], query_loss: QueryLoss | None
) -> Iterator[GradientGraph]:
    own = dict(model.named_parameters())
    leaves: dict[str, Tensor] = {k: own[k] for k in parameters}
    with parameters_at(model, parameters):
        for batch in batches:
            for i in range(batch_size(batch)):
                one = example(batch, i)
                loss = _losses(model, one, query_loss).sum()
                found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
                yield GradientGraph(leaves, dict(zip(leaves, found, strict=True)))


def _each_gradient(
    model: LightningModule,
    batch: Any,
    parameters: Mapping[str, Tensor],
    select: Callable[[str, Tensor], Tensor],
    query_loss: QueryLoss | None,
) -> Iterator[Vectors]:
    if query_loss is None:
        for i in range(batch_size(batch)):
            loss = _module_loss(model, example(batch, i))
            yield _kept(_gradient(loss, parameters), select)
    else:
        losses = _called(query_loss, model, batch)
        for i, loss in enumerate(losses):
            yield _kept(_gradient(loss, parameters, keep_graph=i + 1 < len(losses)), select)


def _target_gradient(
    model: LightningModule,
    batches: Iterable[Any],
    parameters: Mapping[str, Tensor],
    select: Callable[[str, Tensor], Tensor],
    target: Target,
    query_loss: QueryLoss | None,
) -> Vectors:
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    weights = None if isinstance(target, str) else torch.as_tensor(target, dtype=torch.float64)
    seen = 0
    alike: bool | None = None  # whether the loss of a batch is the mean of its examples' own losses
    for batch in batches:
        n = batch_size(batch)
        together = weights is None and query_loss is None and alike is not False
        if together:
            mean, equal = _mean_loss(model, batch)
            if alike is None:
                alike = _same_mean(mean, _losses(model, batch, None).mean())
            together = alike and equal
        if together:
            loss = n * mean
        else:
            losses = _losses(model, batch, query_loss)
            here = torch.ones(n) if weights is None else weights[seen : seen + n]
            if len(here) != len(losses):
                raise ConfigurationError(
                    f"target has {0 if weights is None else len(weights)} weights, but queries holds more examples."
                )
            loss = (here.to(losses) * losses).sum()
        for name, gradient in _gradient(loss, parameters).items():
            total[name] += gradient
        seen += n
    if seen == 0:
        raise ConfigurationError("queries holds no batch; give a loader with at least one example.")
    if weights is not None and seen != len(weights):
        raise ConfigurationError(f"target has {len(weights)} weights, but queries holds {seen} examples.")
    scale = 1 / seen if weights is None else 1.0
    return _kept({name: scale * gradient for name, gradient in total.items()}, select)


def _mean_loss(model: LightningModule, batch: Any) -> tuple[Tensor, bool]:
    """Loss of a batch, and whether its examples are known to count alike in it."""
    with LossTap() as tap:
        loss = _module_loss(model, batch)
    weights = tap.sample_weights(batch_size(batch))
    return loss, weights is not None and bool((weights == weights[0]).all())


def _same_mean(mean: Tensor, of_examples: Tensor) -> bool:
    tolerance = 1e-4 if mean.dtype != torch.float64 else 1e-9
    return bool((mean - of_examples).abs() <= tolerance * of_examples.abs().clamp(min=1e-12))


def _losses(model: LightningModule, batch: Any, query_loss: QueryLoss | None) -> Tensor:
    if query_loss is not None:
        return _called(query_loss, model, batch)
    return torch.stack([_module_loss(model, example(batch, i)) for i in range(batch_size(batch))])


def _module_loss(model: LightningModule, batch: Any) -> Tensor:
    try:
        return training_loss(model, batch, 0)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigurationError(
            f"{type(model).__name__}.training_step cannot take a batch of the queries ({_shape(batch)}): {error}. Give "
            "queries whose batches look like the training batches, or query_loss(model, batch) -> (batch,)."
        ) from error


def _called(query_loss: QueryLoss, model: LightningModule, batch: Any) -> Tensor:
    losses = query_loss(model, batch)
    n = batch_size(batch)
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigurationError(f"query_loss returned {shape}; it has to return one loss per example, ({n},).")
    return losses


def _gradient(loss: Tensor, parameters: Mapping[str, Tensor], *, keep_graph: bool = False) -> Vectors:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=keep_graph)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


def _kept(gradients: Vectors, select: Callable[[str, Tensor], Tensor]) -> Vectors:
    return {name: select(name, g if g.dtype == torch.float64 else g.float()) for name, g in gradients.items()}


def _batches(model: LightningModule, queries: Queries | Iterable[Any]) -> Iterator[Any]:
    return Queries.of(queries).prepared(model)


@contextmanager
def _asked(model: LightningModule) -> Iterator[None]:
    """Evaluation mode, gradients on, logging off; everything as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    trained = {p: p.requires_grad for p in model.parameters()}
    model.eval()
    model.requires_grad_(True)
    try:
        with quiet(model), torch.enable_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for p, flag in trained.items():
            p.requires_grad_(flag)


def _shape(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {_shape(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return "(" + ", ".join(_shape(v) for v in batch) + ")"
    return type(batch).__name__
