"""An append-only store of named tensors that survives being killed at any moment.

    manifest.json                       readable; what the store is of
    rank-0/index.jsonl                  one line per complete entry, with its checksum
    rank-0/step-00000000.safetensors    the tensors of a step
    rank-0/NAME.safetensors             a named artifact

An entry is first written under another name, renamed, and then gets its line in the index: what has no
whole line is not there. A line holds the checksum of its file's header, and the header those of its
tensors, so one tensor is read, and verified, without reading another. Nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import re
import shutil
import struct
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_influence.errors import LogCorrupted, LogError

FORMAT = "lightning-influence-log"
VERSION = 1
MANIFEST = "manifest.json"

_INDEX, _LOCK = "index.jsonl", "lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MAX_HEADER = 2**27
_META, _CRC = "meta", "crc32"
_STOP = object()


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of an index line; None where the line is not what was written."""
    if len(line) < 10 or line[8:9] != b" " or not line.endswith(b"\n"):
        return None
    if line[:8] != b"%08x" % zlib.crc32(line[9:-1]):
        return None
    entry: dict[str, Any] = json.loads(line[9:-1])
    return entry


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _serialise(tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> bytes:
    tensors = _unshared(tensors)
    sums = {name: zlib.crc32(_bytes_of(tensor)) for name, tensor in tensors.items()}
    metadata = {_META: json.dumps(meta), _CRC: json.dumps(sums)}
    return save(tensors, metadata)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, no two in one storage, which safetensors refuses: layers that read the same input share it."""
    own: dict[str, Tensor] = {}
    storages = set[int]()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        where = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if where in storages else tensor
        storages.add(where)
    return own


def _header_size(data: bytes) -> int:
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + int(length)


class StoreWriter:
    """Appends to a store from a background thread whose backlog is bounded.

    Args:
        dirpath: the store's directory, created where needed.
        rank, ranks: whose part of the store this is, and of how many; every process writes its own.
        existing: what to do where the directory already holds a store.
        max_pending_bytes: backlog at which `append` waits for the disk.

    Raises:
        LogError: the directory holds a store and ``existing="error"``, cannot be written, or is being
            written by another run.
    """

    def __init__(
        self,
        dirpath: str | Path,
        *,
        rank: int = 0,
        ranks: int = 1,
        existing: Literal["error", "overwrite", "resume"] = "error",
        max_pending_bytes: int = 2**28,
    ) -> None:
        self._root, self._rank, self._ranks = Path(dirpath), rank, ranks
        self._dir = self._root / f"rank-{rank}"
        self._prepare(existing)
        self._entries = list(_read_index(self._dir)) if existing == "resume" else []
        self._steps = sum("step" in entry for entry in self._entries)
        self._rewrite_index()
        self._index: IO[bytes] = open(self._dir / _INDEX, "ab")
        self._limit, self._pending = max_pending_bytes, 0
        self._room = threading.Condition()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="influence-log", daemon=True)
        self._thread.start()

    def _prepare(self, existing: str) -> None:
        try:
            held = len(StoreReader(self._root)) if (self._root / MANIFEST).exists() and existing == "error" else None
            if held is not None:
                raise LogError(
                    f"{self._root} already holds a log of {held} steps; choose another directory, or say "
                    "existing='overwrite' or existing='resume'."
                )
            self._dir.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._dir / _LOCK, "wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if existing == "overwrite":
                self._clear()
        except BlockingIOError as error:
            raise LogError(f"{self._root} is being written by another run; choose another directory.") from error
        except OSError as error:
            raise LogError(f"cannot write a log to {self._root}: {error}") from error

    def _clear(self) -> None:
        if self._rank == 0:
            (self._root / MANIFEST).unlink(missing_ok=True)
            for path in self._root.glob("rank-*"):  # of a run on more processes
                if path.name not in {f"rank-{rank}" for rank in range(self._ranks)}:
                    shutil.rmtree(path)
        for path in self._dir.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def dirpath(self) -> Path:
        """The store's directory."""
        return self._root

    def __len__(self) -> int:
        """Steps appended so far."""
        return self._steps

    def write_manifest(self, content: dict[str, Any]) -> None:
        """Write or replace the readable manifest."""
        body = {"format": FORMAT, "version": VERSION, "content": content}
        body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        _replace(self._root / MANIFEST, json.dumps(body, indent=2).encode())

    def append(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Append the next step. The tensors belong to the writer from here on.

        Raises:
            LogError: not the next step, or an earlier entry could not be written.
        """
        if step != self._steps:
            raise LogError(f"step {step} cannot be appended; the next step of {self._root} is {self._steps}.")
        self._steps += 1
        self._submit({"step": step, "file": _step_name(step)}, tensors, meta)

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Write a named artifact, replacing one of that name."""
        if not _NAME.fullmatch(name) or name.startswith("step-"):
            raise LogError(f"{name!r} cannot name an artifact; use letters, digits, '.', '_' and '-'.")
        self._submit({"artifact": name, "file": name, "after": self._steps}, tensors, meta)

    def truncate(self, steps: int) -> None:
        """Drop the steps from number ``steps`` on, and the artifacts that were written after them."""
        if steps > self._steps:
            raise LogError(
                f"the checkpoint was taken after step {steps}, but the log {self._root} holds only {self._steps} steps; "
                "resume with the log that belongs to the checkpoint."
            )
        self.flush()
        self._entries = [e for e in self._entries if e.get("step", -1) < steps and e.get("after", -1) <= steps]
        self._steps = steps
        self._index.close()
        self._rewrite_index()
        self._index = open(self._dir / _INDEX, "ab")

    def flush(self) -> None:
        """Wait until everything appended so far is on disk."""
        with self._room:
            self._room.wait_for(lambda: self._pending == 0 or self._error is not None)
        self._raise()

    def close(self) -> None:
        """Write what is pending and end the thread.

        Raises:
            LogError: an entry could not be written.
        """
        if self._thread.is_alive():
            self._queue.put(_STOP)
            self._thread.join()
        if not self._index.closed:
            self._index.close()
        self._lock.close()
        self._raise()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, entry: dict[str, Any], tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        self._raise()
        size = sum(t.numel() * t.element_size() for t in tensors.values()) + 1
        with self._room:
            self._room.wait_for(lambda: self._pending == 0 or self._pending + size <= self._limit or self._error)
            self._pending += size
        self._raise()
        self._queue.put((entry, tensors, meta, size))

    def _raise(self) -> None:
        if self._error is not None:
            raise LogError(
                f"the log {self._root} could not be written: {self._error}. It can be read up to its last complete step."
            ) from self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not _STOP:
            entry, tensors, meta, size = item
            try:
                if self._error is None:
                    self._write(entry, tensors, meta)
            except BaseException as error:
                self._error = error
            finally:
                with self._room:
                    self._pending -= size
                    self._room.notify_all()

    def _write(self, entry: dict[str, Any], tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        data = _serialise(tensors, meta)
        header = data[: _header_size(data)]
        entry |= {"file": f"{entry['file']}.safetensors", "bytes": len(data), "header": zlib.crc32(header)}
        _replace(self._dir / entry["file"], data)
        self._index.write(_line(entry))
        self._index.flush()
        self._entries.append(entry)

    def _rewrite_index(self) -> None:
        _replace(self._dir / _INDEX, b"".join(map(_line, self._entries)))


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _read_index(directory: Path) -> list[dict[str, Any]]:
    """Entries of an index up to its end or its last whole line.

    Raises:
        LogCorrupted: a line in the middle is not what was written.
    """
    path = directory / _INDEX
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    entries: list[dict[str, Any]] = []
    steps = 0
    for number, line in enumerate(lines):
        entry = _parse(line)
        if entry is None and number == len(lines) - 1:
            break  # torn by a crash while it was written
        if entry is None or not _NAME.fullmatch(str(entry.get("file"))) or entry.get("step", steps) != steps:
            raise LogCorrupted(
                f"{path}, line {number + 1}, is not what was written. Restore the log from a copy, or cut the file before "
                "that line to read the steps that precede it."
            )
        steps += "step" in entry
        entries.append(entry)
    return entries


class StoreReader:
    """Random access to a store, one tensor at a time.

    Raises:
        LogError: no directory, not a store, or one of a newer format.
        LogCorrupted: bytes that differ from those written; also raised by every method that reads.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self._root = Path(dirpath)
        self.manifest: dict[str, Any] = self._read_manifest()
        directories = sorted(self._root.glob("rank-*"), key=lambda p: int(p.name[5:]) if p.name[5:].isdigit() else -1)
        self._ranks = [_Part(d) for d in directories]
        self.ranks = len(self._ranks)

    def _read_manifest(self) -> dict[str, Any]:
        if not self._root.is_dir():
            raise LogError(f"{self._root}: no such directory; give the dirpath of an InfluenceCallback.")
        path = self._root / MANIFEST
        if not path.exists():
            raise LogError(
                f"{self._root} is not a log (it has no {MANIFEST}); give the dirpath of an InfluenceCallback."
            )
        try:
            body = json.loads(path.read_bytes())
            claimed = body.pop("crc32")
            if body["format"] != FORMAT or claimed != zlib.crc32(json.dumps(body, sort_keys=True).encode()):
                raise ValueError("its checksum does not agree")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LogCorrupted(f"{path} is not what was written ({error}); restore it from a copy.") from error
        if body["version"] > VERSION:
            raise LogError(
                f"{self._root} has format version {body['version']}; upgrade lightning_influence to read it."
            )
        content: dict[str, Any] = body["content"]
        return content

    def __len__(self) -> int:
        """Steps complete on all ranks."""
        return min((len(part.steps) for part in self._ranks), default=0)

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

    def _step(self, step: int, rank: int) -> dict[str, Any]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a log of {len(self)} steps")
        return self._ranks[rank].steps[step]

    def _artifact(self, name: str, rank: int) -> dict[str, Any]:
        if name not in self._ranks[rank].artifacts:
            raise LogError(
                f"{self._root} holds no artifact {name!r}; it holds {', '.join(self.artifacts(rank)) or 'none'}."
            )
        return self._ranks[rank].artifacts[name]


class _Part:
    """One rank's entries; keeps the shard that was read last open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        entries = _read_index(directory)
        self.steps = [entry for entry in entries if "step" in entry]
        self.artifacts = {entry["artifact"]: entry for entry in entries if "artifact" in entry}
        self._last: _Shard | None = None

    def open(self, entry: dict[str, Any]) -> _Shard:
        if self._last is None or self._last.entry is not entry:
            self._last = _Shard(self._directory / entry["file"], entry)
        return self._last


class _Shard:
    """One safetensors file whose header has been verified."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.path, self.entry = path, entry
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size != entry["bytes"]:
                    raise self._corrupted(f"it has {os.fstat(file.fileno()).st_size} bytes instead of {entry['bytes']}")
                start = file.read(8)
                size = _header_size(start) if len(start) == 8 else 0
                if not 8 < size <= min(_MAX_HEADER, entry["bytes"]):
                    raise self._corrupted("its header has an impossible length")
                header = start + file.read(size - 8)
        except OSError as error:
            raise self._corrupted(str(error)) from error
        if zlib.crc32(header) != entry["header"]:
            raise self._corrupted("its header's checksum does not agree")
        metadata = json.loads(header[8:])["__metadata__"]
        self.meta: dict[str, Any] = json.loads(metadata[_META])
        self.sums: dict[str, int] = json.loads(metadata[_CRC])
        self._file = safe_open(path, framework="pt")

    def tensor(self, name: str) -> Tensor:
        if name not in self.sums:
            raise LogError(f"{self.path} holds no tensor {name!r}.")
        tensor: Tensor = self._file.get_tensor(name)
        if zlib.crc32(_bytes_of(tensor)) != self.sums[name]:
            raise self._corrupted(f"the checksum of {name!r} does not agree")
        return tensor

    def _corrupted(self, reason: str) -> LogCorrupted:
        return LogCorrupted(f"{self.path} is not what was written: {reason}. Restore the log from a copy.")
