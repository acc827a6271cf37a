"""From a layer's input and output gradient to the per-sample gradients of its parameters.

A rule takes ``(module, inputs, output_gradient)``, both with the samples in the first dimension, and
returns one form per parameter of the module, by its local name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from lightning_influence.compression import Form

Rule: TypeAlias = Callable[[nn.Module, Tensor, Tensor], dict[str, Form]]

RULES: dict[type[nn.Module], Rule] = {}
"""Rules by exact type of layer."""


def rule(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for types of layers."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def tokens(values: Tensor, keep: int = 1) -> Tensor:
    """``(n, ..., *features)`` as ``(n, t, *features)`` with the last ``keep`` dimensions as features."""
    if values.dim() == keep + 1:
        return values[:, None]
    return values.flatten(1, values.dim() - keep - 1)
