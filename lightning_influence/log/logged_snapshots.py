"""The snapshots of a log as they are read: whole, also where every process wrote the shards that it held."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_influence.log.format import decoding, expect
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.snapshots import SNAPSHOT, read_chunk, snapshot_name
from lightning_influence.run.sharding import Chunk


class LoggedSnapshots:
    """The snapshots of a log.

    Attributes:
        steps: before which there is one, ascending; the number of steps may be the last. Of processes that each wrote shards, what
            some of them did not write is left out.
    """

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
        held = [_steps_in(reader, rank) for rank in range(reader.ranks)]
        first = min(held[0], default=None)
        sharded = first is not None and "chunks" in reader.artifact_meta(snapshot_name(first))
        self._ranks = range(reader.ranks if sharded else 1)
        every = set.intersection(*(held[rank] for rank in self._ranks))
        # a process that was killed may have come further than the others
        self.steps = sorted(step for step in every if step <= len(reader))

    def names(self, step: int) -> list[str]:
        """Names of a snapshot's tensors, as of `snapshots.pack_snapshot`."""
        return self._reader.artifact_names(snapshot_name(step))

    def tensor(self, step: int, name: str) -> Tensor:
        """One tensor of a snapshot."""
        with decoding(f"{name} in the snapshot before step {step}"):
            chunk = self._chunk(step, name, rank=0)
            if chunk is None:
                return self._reader.artifact(snapshot_name(step), name)
            parts = [self._reader.artifact(snapshot_name(step), name, rank) for rank in self._ranks]
            return _joined(parts, [self._chunk(step, name, rank) for rank in self._ranks])

    def _chunk(self, step: int, name: str, rank: int) -> Chunk | None:
        return read_chunk(self._reader.artifact_meta(snapshot_name(step), rank), name)


def _steps_in(reader: StoreReader, rank: int) -> set[int]:
    with decoding("the name of a snapshot"):
        return {int(name.removeprefix(SNAPSHOT)) for name in reader.artifacts(rank) if name.startswith(SNAPSHOT)}


def _joined(parts: Sequence[Tensor], chunks: Sequence[Chunk | None]) -> Tensor:
    """The tensor that its parts make up along one of its dimensions.

    Raises:
        ValueError: they do not.
    """
    placed = [(chunk, part) for chunk, part in zip(chunks, parts, strict=True) if chunk is not None]
    (shape,) = {chunk.shape for chunk, _ in placed}
    sharded = [d for d in range(len(shape)) if any(chunk.size[d] != shape[d] for chunk, _ in placed)]
    (dim,) = sharded or [0]
    placed.sort(key=lambda piece: piece[0].offset)
    ends = [*itertools.accumulate(chunk.size[dim] for chunk, _ in placed)]
    expect([chunk.offset[dim] for chunk, _ in placed] == [0, *ends[:-1]], "shards that do not follow one on another")
    expect(all(part.shape == chunk.size for chunk, part in placed), "a shard of another shape")
    expect(len({part.dtype for part in parts}) == 1, "shards of several types")
    whole = torch.cat([part for _, part in placed], dim)
    expect(whole.shape == shape, "shards that are not all there")
    return whole
