"""What one call of a functional loss says of the samples of its batch.

A mean over a batch is ``sum_z total_z / sum_z weight_z`` for every loss here; they differ in what the denominator is. It is
the sum of the class weights of the labels that count for labels given by index (also with label smoothing), the sum of
``weight`` for a weighted ``mse_loss`` or ``l1_loss``, and the number of elements for everything else: weights of a binary
cross-entropy, of soft targets and of a Huber loss change the numerator alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import Signature, signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.errors import ConfigurationError

Reduction = Literal["mean", "sum", "none"]

_OVER_CLASSES = (F.cross_entropy, F.nll_loss)
_BINARY = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
_OF_DIFFERENCES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_DIVIDED_BY_WEIGHT = (F.mse_loss, F.l1_loss)
LOSSES = frozenset((*_OVER_CLASSES, *_BINARY, *_OF_DIFFERENCES))
_SIGNATURES: dict[Callable[..., Any], Signature] = {loss: signature(loss) for loss in LOSSES}  # type: ignore[arg-type, misc]

MAX_CLASSES = 128
"""With more classes, the log-probabilities of a sample are left out."""

_CHUNK = 2**24  # logits that are looked at together, which bounds the memory under a large vocabulary


@dataclass(frozen=True, repr=False)
class Dynamics:
    """What a loss over classes said of each of ``n`` samples, on the CPU: the raw material of training dynamics.

    A sample with several labels (the tokens of a text, the pixels of an image) has their means. What has no meaning for a
    sample, because none of its labels counts, is NaN.

    Attributes:
        losses: ``(n,)`` float32, the sample's own loss.
        margins: ``(n,)`` float32, logit of the label minus the largest other.
        label_log_probabilities: ``(n,)`` float32.
        labels: ``(n,)`` int64; -1 for a sample with several labels, or with none that counts.
        others: ``(n,)`` int64, the most probable class but the label; -1 where there is no label.
        log_probabilities: ``(n, classes)`` float16; ``(n, 0)`` for several labels or more than `MAX_CLASSES` classes.
    """

    losses: Tensor
    margins: Tensor
    label_log_probabilities: Tensor
    labels: Tensor
    others: Tensor
    log_probabilities: Tensor

    def __len__(self) -> int:
        return len(self.losses)

    def __repr__(self) -> str:
        return f"Dynamics({len(self)} visits, {self.log_probabilities.shape[1]} classes)"

    def columns(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def joined(parts: Sequence[Dynamics | None]) -> Dynamics | None:
    """The samples of several batches, one after the other; None where a batch has none or they are over other classes."""
    if len(parts) == 1:
        return parts[0]
    given = [part for part in parts if part is not None]
    if len(given) < len(parts) or len({part.log_probabilities.shape[1] for part in given}) != 1:
        return None
    return Dynamics(**{name: torch.cat([part.columns()[name] for part in given]) for name in given[0].columns()})


@dataclass(frozen=True)
class _Labels:
    """The labels of each row of a loss over classes.

    Attributes:
        counted: ``(rows,)``, how many labels of a row count.
        margins, log_probabilities: ``(rows,)``, summed over those.
        label, other: ``(rows,)``, as of `Dynamics`.
        classes: ``(rows, classes)``, as `Dynamics.log_probabilities`.
    """

    counted: Tensor
    margins: Tensor
    log_probabilities: Tensor
    label: Tensor
    other: Tensor
    classes: Tensor


@dataclass(frozen=True)
class SeenLoss:
    """One call of a loss by rows, the entries of the first dimension of its targets; on the CPU.

    Attributes:
        totals: ``(rows,)`` float64, what each row adds to the numerator of a mean.
        weights: ``(rows,)`` float64, what each row adds to its denominator.
    """

    reduction: Reduction
    totals: Tensor
    weights: Tensor
    labels: _Labels | None

    def sample_weights(self, n_samples: int) -> Tensor | None:
        """What each sample adds to the denominator, ``(n_samples,)``; None where the rows are not those of the samples."""
        return _by_sample(self.weights, n_samples)

    def losses(self, n_samples: int) -> Tensor | None:
        """Each sample's own loss ``(n_samples,)``, the mean over a batch of it alone; None as for the weights."""
        totals, weights = _by_sample(self.totals, n_samples), _by_sample(self.weights, n_samples)
        return None if totals is None or weights is None else totals / weights

    def dynamics(self, n_samples: int) -> Dynamics | None:
        """Of a loss over classes; None for another, or where the rows are not those of the samples."""
        losses, rows = self.losses(n_samples), self.labels
        if losses is None or rows is None:
            return None
        sums = (rows.counted, rows.margins, rows.log_probabilities)
        counted, margins, log_probabilities = (values.view(n_samples, -1).sum(1) for values in sums)
        single = len(rows.label) == n_samples
        none = rows.label.new_full((n_samples,), -1)
        return Dynamics(
            losses.float(),
            margins / counted,
            log_probabilities / counted,
            rows.label if single else none,
            rows.other if single else none,
            rows.classes if single else rows.classes.new_zeros(n_samples, 0),
        )


def _by_sample(values: Tensor, n_samples: int) -> Tensor | None:
    """Sums ``(n_samples,)`` over the rows of each sample, which lie together; None where they do not divide evenly."""
    return None if len(values) % n_samples else values.view(n_samples, -1).sum(1)


@torch.no_grad()
def seen(
    loss: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any], *, labels: bool = True
) -> SeenLoss | None:
    """What a call of one of `LOSSES` says of its rows; None where its rows cannot be told apart.

    Args:
        labels: also of the labels, where they are those of classes.
    """
    options = _SIGNATURES[loss].bind(*args, **kwargs).arguments
    input, target = options.pop("input").detach(), options.pop("target").detach()
    reduction = reduction_of(options)
    if target.dim() == 0 or len(target) == 0 or len(input) != len(target):
        return None
    if loss in _OVER_CLASSES:
        if input.dim() < 2:  # a single sample without a batch
            return None
        step = max(1, _CHUNK * len(input) // input.numel())
        chunks = zip(input.split(step), target.split(step), strict=True)
        return _stacked([_over_classes(reduction, loss, *chunk, options, with_labels=labels) for chunk in chunks])
    if input.shape != target.shape:  # broadcast: a row of the loss is no row of the targets
        return None
    elements = loss(input, target, **options, reduction="none")
    weight = options.get("weight") if loss in _DIVIDED_BY_WEIGHT else None
    weights = torch.ones_like(elements) if weight is None else weight.detach()
    return SeenLoss(reduction, _rows(elements), _rows(weights), _binary(loss, input, target) if labels else None)


def reduction_of(options: dict[str, Any]) -> Reduction:
    """Taken out of the options of a loss, with the two flags that once stood for it."""
    size_average, reduce = options.pop("size_average", None), options.pop("reduce", None)
    reduction: Reduction = options.pop("reduction", "mean")
    if size_average is None and reduce is None:
        return reduction
    return "none" if reduce is False else "sum" if size_average is False else "mean"


def label_weights(target: Tensor, options: Mapping[str, Any]) -> Tensor:
    """What each label, given by index, adds to the denominator of a mean: its class's weight, or 0 where it is ignored."""
    counted, weight = target != options.get("ignore_index", -100), options.get("weight")
    return counted if weight is None else counted * weight.detach()[torch.where(counted, target, 0)]


def _over_classes(
    reduction: Reduction,
    loss: Callable[..., Tensor],
    logits: Tensor,
    target: Tensor,
    options: dict[str, Any],
    *,
    with_labels: bool,
) -> SeenLoss:
    """A cross-entropy of labels given by index ``(n, ...)`` or as probabilities ``(n, classes, ...)``."""
    log_probabilities = logits.to(_wide(logits)).log_softmax(1)
    if loss is F.cross_entropy and not target.is_floating_point() and not options.get("label_smoothing"):
        loss, logits = F.nll_loss, log_probabilities  # the same, without another pass over a large vocabulary
        options = {k: v.to(logits) if k == "weight" and v is not None else v for k, v in options.items()}
        options.pop("label_smoothing", None)
    elements = loss(logits, target, **options, reduction="none")
    if target.is_floating_point():
        labels, counted = target.argmax(1), torch.ones_like(elements, dtype=torch.bool)
        weights = counted
    else:
        counted = target != options.get("ignore_index", -100)
        labels, weights = torch.where(counted, target, 0), label_weights(target, options)
    of_labels = _labels(log_probabilities.movedim(1, -1), labels, counted) if with_labels else None
    return SeenLoss(reduction, _rows(elements), _rows(weights), of_labels)


def _binary(loss: Callable[..., Tensor], input: Tensor, target: Tensor) -> _Labels | None:
    """Labels 0 and 1 as two classes."""
    if loss not in _BINARY or not bool(((target == 0) | (target == 1)).all()):
        return None
    value = input.to(_wide(input))
    if loss is F.binary_cross_entropy_with_logits:
        classes = torch.stack([torch.zeros_like(value), value], -1).log_softmax(-1)
    else:
        classes = torch.stack([(-value).log1p(), value.log()], -1).clamp(min=-100)  # as torch does
    return _labels(classes, target.long(), torch.ones_like(target, dtype=torch.bool))


def _labels(classes: Tensor, labels: Tensor, counted: Tensor) -> _Labels | None:
    """From log-probabilities ``(rows, ..., classes)``, which are used up, labels ``(rows, ...)`` and which of them count."""
    n, rows = classes.shape[-1], len(labels)
    if n < 2:
        return None
    own = classes.gather(-1, labels[..., None])[..., 0]
    single, nothing = labels.numel() == rows, labels.new_full((rows,), -1)
    logits = classes.reshape(rows, -1).half() if single and n <= MAX_CLASSES else classes.new_zeros(rows, 0).half()
    best, other = classes.scatter_(-1, labels[..., None], -torch.inf).max(-1)
    return _Labels(
        _rows(counted).float(),
        _rows(torch.where(counted, own - best, 0)).float(),
        _rows(torch.where(counted, own, 0)).float(),
        (torch.where(counted, labels, -1).view(rows) if single else nothing).cpu(),
        (torch.where(counted, other, -1).view(rows) if single else nothing).cpu(),
        logits.cpu(),
    )


def _stacked(parts: Sequence[SeenLoss]) -> SeenLoss:
    """The chunks of one call."""
    first = parts[0]
    if len(parts) == 1:
        return first
    labels = [[getattr(part.labels, field.name) for part in parts] for field in fields(_Labels)]
    return SeenLoss(
        first.reduction,
        torch.cat([part.totals for part in parts]),
        torch.cat([part.weights for part in parts]),
        None if first.labels is None else _Labels(*map(torch.cat, labels)),
    )


def _rows(elements: Tensor) -> Tensor:
    """Sums ``(rows,)`` over all but the first dimension, float64."""
    return (
        elements.flatten(1).sum(1, dtype=_wide(elements)).cpu().double()
        if elements.dim() > 1
        else elements.cpu().double()
    )


def _wide(values: Tensor) -> torch.dtype:
    """At least single precision."""
    return torch.promote_types(values.dtype, torch.float32)


def scalar_loss(value: Any, source: str) -> Tensor:
    """A training loss.

    Args:
        source: what returned it.

    Raises:
        ConfigurationError: it is not one number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigurationError(
            f"{source} returned {what}; influence needs a scalar loss, or, of a training_step, a dict with one under 'loss'."
        )
    return value.squeeze()
