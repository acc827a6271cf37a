"""Whether a module changes between its training steps, where neither a log of gradients nor a replay would follow it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError

_LOOKED_AT = 16  # coordinates of a tensor


class BetweenSteps:
    """Notes a few coordinates of every parameter and buffer when a step has left them, and looks again before the next.

    Args:
        module: whose they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._left: dict[str, Tensor] = {}

    def note_step(self) -> None:
        """The optimizer has moved parameters."""
        self._left |= _looked_at(self._module.named_parameters())

    def note_training_step(self) -> None:
        """A training step has run, which may write to buffers, and to parameters that do not train."""
        self._left |= _looked_at(self._module.named_buffers())
        self._left |= _looked_at((k, p) for k, p in self._module.named_parameters() if not p.requires_grad)

    def check(self) -> None:
        """Look again.

        Raises:
            ConfigurationError: something has changed.
        """
        if not self._left:
            return
        now = _looked_at([*self._module.named_parameters(), *self._module.named_buffers()])
        present = {k: now[k] for k in self._left if k in now}
        if not _same(present, {k: self._left[k] for k in present}):
            changed = next(k for k in present if not _same({k: present[k]}, {k: self._left[k]}))
            raise ConfigurationError(
                f"{changed} has changed since the last step, outside training_step and the optimizer's step: a hook or a callback "
                "sets it (an average of the weights that the loss looks at, weights that are clamped, a schedule kept in a "
                "buffer). Influence would not follow what it depends on. Compute it inside training_step (a schedule from "
                "self.global_step, say), or train without that hook."
            )


def _looked_at(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    values = {}
    for name, tensor in named:
        flat = tensor.detach().reshape(-1)
        values[name] = flat[:: max(1, len(flat) // _LOOKED_AT)].double()  # a copy, unless it is double
        if values[name].dtype == tensor.dtype:
            values[name] = values[name].clone()
    return values


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two notes say the same, asked of the device once."""
    if not a:
        return True
    one, other = (torch.cat([t.to(next(iter(x.values())).device) for t in x.values()]) for x in (a, b))
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
