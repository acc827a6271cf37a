"""From a layer's input and output gradient to the per-sample gradients of its parameters.

A rule takes ``(layer, inputs, output_gradient)`` and returns one form per parameter of the layer, by local
name. Its "samples" are the items of the first dimension; where several items belong to one sample (tokens
flattened into the batch), the capture adds them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from lightning_influence.core.shares import Form
from lightning_influence.errors import ConfigurationError

Rule: TypeAlias = Callable[[nn.Module, Tensor, Tensor], dict[str, Form]]

_BY_TYPE: dict[type[nn.Module], Rule] = {}
_BY_NAME: dict[str, Rule] = {}


def rule(*kinds: type[nn.Module] | str) -> Callable[[Rule], Rule]:
    """Register a rule for exact types of layers, or for class names of libraries that need not be there."""

    def register(function: Rule) -> Rule:
        for kind in kinds:
            if isinstance(kind, str):
                _BY_NAME[kind] = function
            else:
                _BY_TYPE[kind] = function
        return function

    return register


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of a layer, if there is one."""
    kind = type(layer)
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    names = [suffix for suffix in _BY_NAME if kind.__name__.endswith(suffix)]
    foreign = not kind.__module__.startswith("torch.")
    return _BY_NAME[names[0]] if names and foreign else None


def tokens(values: Tensor, keep: int = 1) -> Tensor:
    """``(n, ..., *features)`` as ``(n, t, *features)`` with the last ``keep`` dimensions as features.

    Raises:
        ConfigurationError: there is no dimension of the samples.
    """
    if values.dim() <= keep:
        raise ConfigurationError(
            f"a layer is given a tensor of shape {tuple(values.shape)}, which has no dimension of the samples: the training step "
            "calls it sample by sample. Give it all samples at once, name its parameters in exclude=, or use record='replay', "
            "which measures what a removal does."
        )
    if values.dim() == keep + 1:
        return values[:, None]
    return values.flatten(1, values.dim() - keep - 1)
