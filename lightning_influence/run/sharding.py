"""Parameters that FSDP2 shards over processes: each holds a part of every one, as a ``DTensor``.

The optimizer steps on the parts. The module has them as its parameters too, but for the time in which it runs: then the whole
parameters are gathered and stand in their place, layer by layer. Nothing here makes processes wait for each other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.errors import ConfigurationError

MARKS = frozenset({"_is_fsdp_managed_module", "_fsdp_use_orig_params"})
"""Attributes that FSDP2 gives to the modules that it shards."""


@dataclass(frozen=True)
class Chunk:
    """Which part of a tensor a process holds.

    Attributes:
        shape: of the whole.
        offset: where the part begins, by dimension.
        size: of the part, by dimension.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """A view of this part."""
        return whole[tuple(slice(start, start + n) for start, n in zip(self.offset, self.size, strict=True))]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a part of one that several processes hold."""
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, detached: a part where it is sharded, and all of it where it is not."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return part


def chunk_of(tensor: Any) -> Chunk | None:
    """Which part of a tensor this process holds; None where it is not sharded."""
    if not is_sharded(tensor):
        return None
    (part,) = tensor.__create_chunk_list__()  # as torch.distributed.checkpoint asks
    return Chunk(tuple(tensor.shape), tuple(part.offsets), tuple(part.sizes))


def let_go(module: nn.Module) -> None:
    """Parameters that are gathered, as validation leaves those of the outermost module, are sharded again."""
    for m in module.modules():
        if _is_wrapped(m):
            m.reshard()  # type: ignore[operator]


def class_of(module: nn.Module) -> type:
    """The class that a module was made from; FSDP2 gives it another, made of that and its own."""
    wrapper = _loaded("torch.distributed.fsdp", "FSDPModule")
    if wrapper is None or not isinstance(module, wrapper):
        return type(module)
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, wrapper))


def refuse_other_shards(module: nn.Module, trained: Mapping[str, Tensor], processes: int) -> None:
    """Refuse parameters that are not sharded once over all processes, or computed with in another precision than their own.

    Args:
        trained: the parameters that the optimizer moves, by name.

    Raises:
        ConfigurationError: there are such.
    """
    for name, p in trained.items():
        if not is_sharded(p):
            if processes > 1:
                raise ConfigurationError(
                    f"{name} is not sharded, so each of the {processes} processes would train one of its own. Call fully_shard in "
                    "configure_model also on the module that holds it, or freeze it."
                )
            continue
        mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
        if mesh.size() != processes or len(placements) != 1 or not placements[0].is_shard():
            raise ConfigurationError(
                f"{name} is placed as {placements} on {mesh.size()} of {processes} processes, and a log holds parameters that are "
                "sharded once over all of them. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with "
                "fully_shard(module, mesh=self.device_mesh['data_parallel'])."
            )
    for path, m in module.named_modules():
        if _is_wrapped(m):
            _refuse_other_precision(path, m)


def _refuse_other_precision(path: str, module: Any) -> None:
    policy = module._get_fsdp_state()._mp_policy  # torch tells it nowhere else
    own = {p.dtype for p in module.parameters()}
    for setting in ("param_dtype", "reduce_dtype"):
        dtype = getattr(policy, setting)
        if dtype is not None and any(torch.promote_types(dtype, p) != dtype for p in own):
            raise ConfigurationError(
                f"fully_shard computes {path or 'the module'} with MixedPrecisionPolicy({setting}={dtype}), in which a replay in one "
                "process does not. Leave the policy out, and use Trainer(precision='bf16-mixed' or 'bf16-true') instead."
            )


def _is_wrapped(module: nn.Module) -> bool:
    wrapper = _loaded("torch.distributed.fsdp", "FSDPModule")
    return wrapper is not None and isinstance(module, wrapper)


def _loaded(module: str, name: str) -> Any:
    """A class of a module that somebody has imported, which takes seconds; None where nobody has, so that nothing is of it."""
    return getattr(sys.modules.get(module), name, None)
