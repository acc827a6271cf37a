"""The losses of single labels (tokens of a text, pixels of an image) inside a training step, each with a dial of its own."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_influence.core.torch_function import keywords_of
from lightning_influence.errors import ConfigurationError
from lightning_influence.run.losses import label_weights, reduction_of

_LOSSES = (F.cross_entropy, F.nll_loss)


class TokenLosses(TorchFunctionMode):
    """Meanwhile a loss over classes is ``sum_t (1 + dial_t) loss_t``, divided as it was; the dials are zero.

    So the value stays what it was, and the derivative of anything by ``dial_t`` is what the loss of label ``t`` does to it. The
    denominator of a mean has no dials.

    Attributes:
        dials: ``(labels,)``, zeros that require a gradient.
        targets: ``(labels,)`` int64.
        weights: ``(labels,)``, what each label adds to the denominator of a mean; 0 for one that is ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = keywords_of(func, kwargs)
        if func not in _LOSSES:
            return func(*args, **kwargs)
        self._calls += 1
        options = signature(func).bind(*args, **kwargs).arguments
        reduction = reduction_of(options)
        target = options["target"]
        if target.is_floating_point():
            raise ConfigurationError(
                "the training step's labels are probabilities; a token's score needs labels by index."
            )
        elements = func(**options, reduction="none")
        weights = label_weights(target, options).to(elements)
        self.targets, self.weights = target.flatten(), weights.flatten()
        self.dials = torch.zeros_like(elements.detach()).flatten().requires_grad_()
        elements = elements * (1 + self.dials.view_as(elements))
        if reduction == "none":
            return elements
        return elements.sum() / (weights.sum() if reduction == "mean" else 1)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None and self._calls != 1:
            raise ConfigurationError(
                f"the training step calls cross_entropy or nll_loss {self._calls} times; scores of tokens need a training step that "
                "calls one of them once."
            )
