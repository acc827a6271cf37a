"""What a log holds so that its run can be run again: written during training, read as a `replay.Plan`.

In a step's shard: ``random/<m>/<generator>`` before each micro-batch's training step, and either the batch,
``batch/<m>/<leaf>``, or ``fetch/<m>/<generator>``, the random state when its samples were fetched, and
``fingerprint/<m>`` of what came; ``less/<m>/<sample>/<leaf>``, the batch without a sample, where the collate function relates
samples. Every few steps an artifact ``snapshot-<step>``: ``parameter/<name>``, ``moment/<k>/<name>``, ``buffer/<name>``. Where
parameters are sharded over processes, each writes its own parts and says in the metadata which they are; the first also writes buffers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_influence.core.optimizers import UPDATES
from lightning_influence.errors import ConfigurationError
from lightning_influence.run.batches import fingerprint, leaves, pack_batch
from lightning_influence.run.optimizer import read_moments
from lightning_influence.run.random_state import read_random_state
from lightning_influence.run.sharding import Chunk, chunk_of, local

SNAPSHOT = "snapshot-"
SnapshotMoments: TypeAlias = Literal["full", "bfloat16"]
SNAPSHOT_MOMENTS: dict[str, torch.dtype | None] = {"full": None, "bfloat16": torch.bfloat16}
"""The types that moments in snapshots may be rounded to, by their names; None for their own."""

_SMALL = 2**20  # bytes of a batch that is stored unasked
Packed = tuple[dict[str, Tensor], dict[str, Any]]


# -- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplaySettings:
    """What is written for replay.

    Attributes:
        snapshot_every: steps between snapshots.
        store_batches: None stores batches that are small.
        thinned: whether snapshots become rarer as a run goes on whose number of steps nobody knows: there are then between
            one and two times the square root of the steps so far.
        moments: the type that the optimizer's moments are rounded to; None for their own.
    """

    snapshot_every: int
    store_batches: bool | None = None
    thinned: bool = False
    moments: torch.dtype | None = None

    def spacing(self, steps: int) -> int:
        """Steps between snapshots after so many steps.

        Example:
            >>> settings = ReplaySettings(8, thinned=True)
            >>> [settings.spacing(steps) for steps in (0, 255, 256, 10_000)]
            [8, 8, 16, 64]
        """
        every = self.snapshot_every
        while self.thinned and steps >= (2 * every) ** 2:
            every *= 2
        return every


def pack_micro_batch(
    batch: Any,
    moment: Mapping[str, Any],
    fetched: Mapping[str, Tensor] | None,
    settings: ReplaySettings,
    less: Mapping[int, Any] | None = None,
) -> Packed:
    """What a micro-batch needs to be run again, read just before its training step; `numbered` gives it its place in the step.

    Args:
        moment: what the training step reads besides its batch, as JSON: ``batch_idx``, ``epoch``, ``global_step`` and the
            names of the modules that are ``in_eval`` mode.
        fetched: random state when its samples were fetched in this process; None if it is not known.
        less: the batch without each of its samples, where that is not the batch without their rows.

    Raises:
        ConfigurationError: a batch that has to be stored and cannot be.
    """
    tensors = {f"random/{k}": v for k, v in read_random_state().items()}
    meta: dict[str, Any] = dict(moment)
    less = less or {}
    size = sum(t.numel() * t.element_size() for one in (batch, *less.values()) for t in leaves(one))
    wanted = settings.store_batches or (settings.store_batches is None and (size <= _SMALL or fetched is None))
    needed = settings.store_batches or moment.get("rows") == "assumed"
    stored = _stored(batch, less, needed=bool(needed)) if wanted else None
    if stored is not None:
        (parts, meta["structure"]), rest = stored
        tensors |= {f"batch/{key}": t.to("cpu", copy=True) for key, t in parts.items()}
        meta["less"] = {z: structure for z, (_, structure) in rest.items()}
        tensors |= {f"less/{z}/{key}": t.to("cpu", copy=True) for z, (own, _) in rest.items() for key, t in own.items()}
    elif wanted or fetched is not None:
        tensors["fingerprint"] = fingerprint(batch)
        tensors |= {f"fetch/{k}": v for k, v in (fetched or {}).items()}
        meta["recollated"] = bool(less)
    return tensors, meta


def _stored(batch: Any, less: Mapping[int, Any], *, needed: bool) -> tuple[Packed, dict[str, Packed]] | None:
    """A batch, and the same without each of its samples; None where it cannot be written and need not, since the data gives it again.

    Raises:
        ConfigurationError: it cannot be written and has to be.
    """
    try:
        return pack_batch(batch), {str(z): pack_batch(one) for z, one in less.items()}
    except TypeError as error:
        if not needed:
            return None
        raise ConfigurationError(
            f"{error} cannot be stored for replay; collate into dicts, lists and tuples of tensors, or say "
            "store_batches=False and give attribute(..., data=...)."
        ) from error


def numbered(packed: Packed, number: int) -> dict[str, Tensor]:
    """The tensors of a step's ``number``-th micro-batch under their names in the step: ``batch/<number>/0`` of ``batch/0``."""
    parts = ((name.partition("/"), tensor) for name, tensor in packed[0].items())
    return {"/".join(filter(None, (kind, str(number), rest))): tensor for (kind, _, rest), tensor in parts}


def pack_snapshot(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    update_name: str,
    trained: Collection[str],
    buffers: Mapping[str, Tensor],
    moments: torch.dtype | None = None,
) -> Packed:
    """Trained parameters, by their names, their moments, and buffers, before a step: what this process holds of them.

    Args:
        moments: as of `ReplaySettings`.
    """
    tensors, chunks = dict[str, Tensor](), dict[str, Any]()
    for name, tensor in _state_of(module, optimizer, update_name, trained, buffers):
        tensors[name] = local(tensor).to("cpu", moments if name.startswith("moment/") else None, copy=True)
        if (chunk := chunk_of(tensor)) is not None:
            chunks[name] = asdict(chunk)
    return tensors, {"chunks": chunks} if chunks else {}


def _state_of(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    update_name: str,
    trained: Collection[str],
    buffers: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    for name, p in module.named_parameters():
        if name in trained:
            yield f"parameter/{name}", p
            for i, moment in enumerate(read_moments(optimizer.state.get(p, {}), UPDATES[update_name], p)):
                yield f"moment/{i}/{name}", moment
    for name, buffer in buffers.items():
        yield f"buffer/{name}", buffer


def read_chunk(meta: Mapping[str, Any], name: str) -> Chunk | None:
    """Which part of a tensor an artifact is about; None where that is the whole. To be read inside of `format.decoding`."""
    fields = meta.get("chunks", {}).get(name)
    return None if fields is None else Chunk(*(tuple(map(int, fields[key])) for key in ("shape", "offset", "size")))


def snapshot_name(step: int) -> str:
    """Name of the artifact that holds the state before a step."""
    return f"{SNAPSHOT}{step:08d}"
