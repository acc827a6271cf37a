"""Per-sample gradients out of the training backward pass: no second forward, no second backward.

A forward hook keeps a layer's input, a hook on its output gives the output gradient, and the layer's
rule turns both into the shares of its parameters (method.md section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.capture import linear  # noqa: F401 (registers its rules)
from lightning_influence.capture.rules import RULES
from lightning_influence.compression import Form, Rows, add
from lightning_influence.errors import ConfigurationError, UncoveredParameter

__all__ = ["GradientCapture"]


class GradientCapture:
    """Collects the per-sample gradient shares of a module's trainable parameters.

    Args:
        exclude: patterns (`fnmatch`) of parameter names to leave out.

    Raises:
        UncoveredParameter: a trainable parameter that no rule covers.
    """

    def __init__(self, module: nn.Module, *, exclude: Sequence[str] = (), frozen_batch_norm: bool = False) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        excluded = {name for name in trained if any(fnmatchcase(name, pattern) for pattern in exclude)}
        self.parameters = {name: p for name, p in trained.items() if name not in excluded}
        self.excluded_ids = {id(trained[name]) for name in excluded}
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._layers = [m for m in module.modules() if any(id(p) in self._names for p in m._parameters.values())]
        self.table = [row for path, m in module.named_modules() for row in self._rows(path, m)]
        self._refuse_uncovered()
        self._hooks: list[Any] = []
        self._n: int | None = None
        self._forms: dict[str, Form] = {}

    def _rows(self, path: str, layer: nn.Module) -> list[dict[str, Any]]:
        return [
            {
                "parameter": self._names[id(p)],
                "module": f"{path} ({type(layer).__name__})",
                "rule": RULES[type(layer)].__name__ if type(layer) in RULES else None,
                "shape": list(p.shape),
            }
            for p in layer._parameters.values()
            if p is not None and id(p) in self._names
        ]

    def _refuse_uncovered(self) -> None:
        uncovered = [f"{row['parameter']} of {row['module']}" for row in self.table if row["rule"] is None]
        if uncovered:
            raise UncoveredParameter(
                f"no rule gives the per-sample gradient of {', '.join(uncovered)}. Freeze what need not train "
                "(requires_grad=False), or leave it out of the scores with exclude=[...]; the report then says so."
            )

    def attach(self) -> None:
        """Hook the layers; does nothing where they are hooked."""
        if not self._hooks:
            self._hooks = [layer.register_forward_hook(self._after_forward) for layer in self._layers]

    def detach(self) -> None:
        """Remove all hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        self._n, self._forms = None, {}

    def begin(self, n_samples: int) -> None:
        """A micro-batch of ``n_samples`` is about to go forward."""
        self._n, self._forms = n_samples, {}

    def take(self, scale: float = 1.0) -> dict[str, Form]:
        """The shares of the micro-batch whose backward has run, times ``scale``; zero where none came."""
        assert self._n is not None, "begin() comes first"
        forms, n, self._forms, self._n = self._forms, self._n, {}, None
        missing = {name: p for name, p in self.parameters.items() if name not in forms}
        forms |= {name: _nothing(n, p) for name, p in missing.items()}
        return {name: forms[name].scaled(scale) if scale != 1.0 else forms[name] for name in self.parameters}

    def _after_forward(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._n is None or not torch.is_grad_enabled() or not output.requires_grad:
            return
        inputs = args[0].detach()
        output.register_hook(lambda gradient: self._collect(layer, inputs, gradient.detach()))

    def _collect(self, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        shares = RULES[type(layer)](layer, self._per_sample(inputs, layer), self._per_sample(gradient, layer))
        for local, form in shares.items():
            name = self._names.get(id(layer._parameters.get(local)))
            if name is not None:
                self._forms[name] = add(self._forms[name], form) if name in self._forms else form

    def _per_sample(self, values: Tensor, layer: nn.Module) -> Tensor:
        """Samples in the first dimension, in at least single precision; samples that were flattened together
        with their tokens are parted again.
        """
        n = self._n
        assert n is not None
        values = values if values.dtype == torch.float64 else values.float()
        if values.shape[0] == n:
            return values
        if values.shape[0] % n:
            raise ConfigurationError(
                f"a {type(layer).__name__} saw an input of shape {tuple(values.shape)} in a batch of {n} samples, so its "
                "first dimension is not the samples'. Let the batch come first, or exclude its parameters."
            )
        return values.unflatten(0, (n, -1))


def _nothing(n: int, parameter: Tensor) -> Form:
    return Rows(
        torch.zeros(n, 0, dtype=torch.int64, device=parameter.device),
        torch.zeros(n, 0, 1, dtype=parameter.dtype, device=parameter.device),
        parameter.numel(),
    )
