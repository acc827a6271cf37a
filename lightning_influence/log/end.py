"""How a run ended, noted in its log when every process has written its steps: by it a log tells whether a model is what the run
ended with.

Of processes that hold shards, each notes checksums of its own, and which part of every parameter they are of.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.log.format import FINAL, expect
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.snapshots import read_chunk
from lightning_influence.run.sharding import Chunk, chunk_of, local

Packed = tuple[dict[str, Tensor], dict[str, Any]]

MOVED: Packed = ({}, {"moved": True})
"""Of a run whose last step did not leave the parameters that it ended with."""


def pack_end(parameters: Mapping[str, Tensor]) -> Packed:
    """What this process notes of the parameters that a run ended with, by name."""
    checksums = {name: checksum(local(p)) for name, p in parameters.items()}
    chunks = {name: asdict(chunk) for name, p in parameters.items() if (chunk := chunk_of(p)) is not None}
    return {}, {"checksums": checksums} | ({"chunks": chunks} if chunks else {})


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        moved: whether something moved the parameters after the last step.
        noted: of each process, by parameter, a checksum and the part that it is of; None for the whole.
    """

    moved: bool
    noted: Sequence[Mapping[str, tuple[int, Chunk | None]]] = ()

    @classmethod
    def of(cls, reader: StoreReader, names: Collection[str]) -> End | None:
        """What a log says; None of a run that did not end. To be read inside of `format.decoding`.

        Args:
            names: of the run's parameters.

        Raises:
            ValueError: it says it of others.
        """
        if FINAL not in reader.artifacts():
            return None
        metas = [reader.artifact_meta(FINAL, rank) for rank in range(reader.ranks) if FINAL in reader.artifacts(rank)]
        if any(meta.get("moved") for meta in metas):
            return cls(moved=True)
        expect(all(meta["checksums"].keys() <= set(names) for meta in metas), "an unknown parameter")
        return cls(
            moved=False,
            noted=[{k: (crc, read_chunk(meta, k)) for k, crc in meta["checksums"].items()} for meta in metas],
        )

    def differing(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Which of some whole parameters are not those that the run ended with."""
        return [name for name, p in parameters.items() if not all(self._agreeing(name, p))]

    def _agreeing(self, name: str, p: Tensor) -> Iterator[bool]:
        """Whether a parameter has the checksums that were noted of it."""
        for crc, chunk in (noted[name] for noted in self.noted if name in noted):
            yield checksum(p if chunk is None else chunk.of(p)) == crc


def checksum(tensor: Tensor) -> int:
    """CRC32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
