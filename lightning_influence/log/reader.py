"""Reading a store: one tensor at a time, each held against its checksum."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_influence.errors import LogCorrupted, LogError
from lightning_influence.log.format import (
    FINAL,
    FORMAT,
    INDEX,
    MANIFEST,
    MAX_MANIFEST,
    VERSION,
    IndexEntry,
    names_of,
    own_path,
    read_index,
    refuse_undecodable,
    told_as_log_error,
)
from lightning_influence.log.missing import MISSING, read_missing
from lightning_influence.log.place import Log, Place, place_of
from lightning_influence.log.shard import Shard


def _read_whole(path: Path) -> bytes:
    """A small file's bytes.

    Raises:
        ValueError: it is not small.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_MANIFEST + 1)
    if len(data) > MAX_MANIFEST:
        raise ValueError(f"it has more than {MAX_MANIFEST} bytes")
    return data


class _Manifest(dict[str, Any]):
    """What the log is of; a key that it lacks is a fault of the file, whoever asks for it."""

    def __init__(self, content: dict[str, Any], path: str) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise LogCorrupted(f"{self._path} does not say {key!r}, as a manifest does; restore it from a copy.")


class StoreReader:
    """Random access to a store, one tensor at a time.

    Args:
        log: its directory, or a URL that fsspec knows.

    Attributes:
        path: of its directory, or its URL.
        manifest: what was written of the store; `Manifest.of` says what it means.
        ranks: number of processes that wrote it.
        missing: what the run was to write and did not, and why.

    Raises:
        LogError: no directory, not a store, one of a newer format, or one that cannot be read.
        LogCorrupted: bytes that differ from those written; also raised by every method that reads.
    """

    def __init__(self, log: Log) -> None:
        refuse_undecodable(Path(log))
        with told_as_log_error(f"the log {log} cannot be read"):
            self._root = place_of(log)
            self.path = str(self._root)
            self.manifest: dict[str, Any] = self._read_manifest()
            self.ranks = self._count_ranks()
            self._ranks = [_Part(self._root, f"rank-{rank}") for rank in range(self.ranks)]
            self.missing = {k: v for rank in self._ranks for k, v in rank.missing.items()}
        self._refuse_short_ranks()

    def _read_manifest(self) -> _Manifest:
        if not self._root.is_there():
            raise LogError(f"{self._root}: no such directory; give the directory that an InfluenceCallback wrote.")
        path = own_path(self._root.file(MANIFEST))
        if not path.exists():
            raise LogError(
                f"{self._root} is not a log (it has no {MANIFEST}); give the directory that an InfluenceCallback wrote."
            )
        try:
            body = json.loads(_read_whole(path))
            claimed = body.pop("crc32")
            if body["format"] != FORMAT or claimed != zlib.crc32(json.dumps(body, sort_keys=True).encode()):
                raise ValueError("its checksum does not agree")
            if not isinstance(body["version"], int) or not isinstance(body["content"], dict):
                raise ValueError("its version or its content is of another type")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LogCorrupted(
                f"{self._root.called(path)} is not what was written ({error}); restore it from a copy."
            ) from error
        if body["version"] > VERSION:
            raise LogError(
                f"{self._root} has format version {body['version']}; upgrade lightning_influence to read it."
            )
        return _Manifest(body["content"], self._root.called(path))

    def _count_ranks(self) -> int:
        """The number of ranks according to the manifest; the directories of all of them exist, and no other."""
        ranks, names = self.manifest["ranks"], self._root.rank_names()
        if ranks != len(names) or names != names_of(len(names)):
            raise LogCorrupted(
                f"{self._root} holds {', '.join(sorted(names)) or 'no ranks'}, but its manifest says ranks={ranks!r:.20}, counted "
                "from rank-0. Restore a missing directory from a copy, and move any other elsewhere."
            )
        return len(names)

    def _refuse_short_ranks(self) -> None:
        """A run that was killed leaves ranks of different lengths; one that ended leaves them whole."""
        end = self._ranks[0].artifacts[FINAL].after or 0 if self.ranks and FINAL in self._ranks[0].artifacts else 0
        for rank, part in enumerate(self._ranks):
            if len(part.steps) < end:
                raise LogCorrupted(
                    f"{self._root}/rank-{rank}/{INDEX} holds {len(part.steps)} steps, but the run ended after {end}. "
                    "Restore the log from a copy."
                )

    def __len__(self) -> int:
        """Steps complete on all ranks."""
        return min((len(part.steps) for part in self._ranks), default=0)

    @property
    def nbytes(self) -> int:
        """Of all steps and artifacts."""
        return sum(entry.bytes for part in self._ranks for entry in [*part.steps, *part.artifacts.values()])

    def meta(self, step: int, rank: int = 0) -> dict[str, Any]:
        """JSON metadata of a step."""
        return self._ranks[rank].open(self._step(step, rank)).meta

    def names(self, step: int, rank: int = 0) -> list[str]:
        """Names of a step's tensors."""
        return list(self._ranks[rank].open(self._step(step, rank)).sums)

    def tensor(self, step: int, name: str, rank: int = 0) -> Tensor:
        """One tensor of a step, verified."""
        return self._ranks[rank].open(self._step(step, rank)).tensor(name)

    def artifacts(self, rank: int = 0) -> list[str]:
        """Names of the artifacts."""
        return list(self._ranks[rank].artifacts) if self._ranks else []

    def artifact_meta(self, name: str, rank: int = 0) -> dict[str, Any]:
        """JSON metadata of an artifact."""
        return self._ranks[rank].open(self._artifact(name, rank)).meta

    def artifact_names(self, name: str, rank: int = 0) -> list[str]:
        """Names of an artifact's tensors."""
        return list(self._ranks[rank].open(self._artifact(name, rank)).sums)

    def artifact(self, name: str, tensor: str, rank: int = 0) -> Tensor:
        """One tensor of an artifact, verified."""
        return self._ranks[rank].open(self._artifact(name, rank)).tensor(tensor)

    def _step(self, step: int, rank: int) -> IndexEntry:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a log of {len(self)} steps")
        return self._ranks[rank].steps[step]

    def _artifact(self, name: str, rank: int) -> IndexEntry:
        if name not in self._ranks[rank].artifacts:
            raise LogError(
                f"{self._root} holds no artifact {name!r}; it holds {', '.join(self.artifacts(rank)) or 'none'}."
            )
        return self._ranks[rank].artifacts[name]


class _Part:
    """One rank's entries; keeps the shard that was read last open."""

    def __init__(self, place: Place, name: str) -> None:
        self._place, self._name = place, name
        own_path(place.root / name)
        missing, index = (place.file(f"{name}/{file}") for file in (MISSING, INDEX))
        self.missing = read_missing(missing.parent, place.called(missing))
        try:
            entries = read_index(index, place.called(index))
        except FileNotFoundError as error:
            raise LogCorrupted(f"{place}/{name} has no {INDEX}; restore the log from a copy.") from error
        self.steps = [entry for entry in entries if entry.step is not None]
        self.artifacts = {entry.artifact: entry for entry in entries if entry.artifact is not None}
        self._last: _Shard | None = None

    def open(self, entry: IndexEntry) -> _Shard:
        if self._last is None or self._last.entry is not entry:
            with told_as_log_error(f"the log {self._place} cannot be read"):
                path = self._place.file(f"{self._name}/{entry.file}")
            self._last = _Shard(path, entry, self._place.called(path))
        return self._last


class _Shard(Shard):
    """The shard of an entry of the index."""

    def __init__(self, path: Path, entry: IndexEntry, called: str) -> None:
        self.path, self.entry = called, entry
        try:
            super().__init__(own_path(path), self._fault, self._error)
        except FileNotFoundError as error:
            raise self._error("it is not there") from error
        except OSError as error:
            raise LogError(f"{called} cannot be read: {error}") from error

    def _fault(self, header: bytes, size: int) -> str | None:
        if size != self.entry.bytes:
            return f"it has {size} bytes instead of {self.entry.bytes}"
        return None if zlib.crc32(header) == self.entry.header else "its header's checksum does not agree"

    def tensor(self, name: str) -> Tensor:
        if name not in self.sums:
            raise LogError(f"{self.path} holds no tensor {name!r}.")
        return super().tensor(name)

    def _error(self, reason: str) -> LogCorrupted:
        return LogCorrupted(f"{self.path} is not what was written: {reason}. Restore the log from a copy.")
