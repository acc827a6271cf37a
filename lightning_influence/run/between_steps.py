"""Whether a module changes between its training steps, where neither a log of gradients nor a replay would follow it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError
from lightning_influence.run.sharding import is_sharded, local

_LOOKED_AT = 16  # coordinates of a tensor


class BetweenSteps:
    """Notes a few coordinates of every parameter and buffer when a step has left them, and looks again before the next.

    Args:
        module: whose they are.
    """

    def __init__(self, module: nn.Module) -> None:
        # walking a module for its parameters takes longer than looking at them; these are its own dicts, which stay
        self._held = [(f"{path}." if path else "", m._parameters, m._buffers) for path, m in module.named_modules()]
        # while the module runs, the whole parameters may stand there in the place of the shards
        self._shards = {k: p for k, p in module.named_parameters(remove_duplicate=False) if is_sharded(p)}
        self._left: dict[str, Tensor] = {}

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        named = ((f"{path}{k}", p) for path, own, _ in self._held for k, p in own.items() if p is not None)
        return ((name, self._shards.get(name, p)) for name, p in named)

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        return ((f"{path}{k}", b) for path, _, own in self._held for k, b in own.items() if b is not None)

    def note_step(self) -> None:
        """The optimizer has moved parameters."""
        self._left |= _looked_at(self._parameters())

    def note_training_step(self) -> None:
        """A training step has run, which may write to buffers, and to parameters that do not train."""
        frozen = ((k, p) for k, p in self._parameters() if not p.requires_grad)
        self._left |= _looked_at(chain(frozen, self._buffers()))

    def check(self) -> None:
        """Look again.

        Raises:
            ConfigurationError: something has changed.
        """
        if not self._left:
            return
        fingerprints = _looked_at(chain(self._parameters(), self._buffers()))
        present = {k: fingerprints[k] for k in self._left if k in fingerprints}
        if not _same(present, {k: self._left[k] for k in present}):
            changed = next(k for k in present if not _same({k: present[k]}, {k: self._left[k]}))
            raise ConfigurationError(
                f"{changed} has changed since the last step, outside training_step and the optimizer's step: a hook or a callback "
                "sets it (an average of the weights that the loss looks at, weights that are clamped, a schedule kept in a "
                "buffer). Influence would not follow what it depends on. Compute it inside training_step (a schedule from "
                "self.global_step, say), or train without that hook."
            )


def _looked_at(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    kinds: dict[Any, dict[str, Tensor]] = {}
    for name, tensor in named:
        flat = local(tensor).reshape(-1)
        few = flat[:: max(1, len(flat) // _LOOKED_AT)]
        kinds.setdefault((tensor.dtype, tensor.device), {})[name] = few
    values = dict[str, Tensor]()
    for parts in kinds.values():  # one copy of all
        copied = torch.cat([*parts.values()]).double().split([len(few) for few in parts.values()])
        values |= zip(parts, copied, strict=True)
    return values


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two notes say the same, asked of the device once."""
    if not a:
        return True
    one, other = (torch.cat([t.to(next(iter(x.values())).device) for t in x.values()]) for x in (a, b))
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
