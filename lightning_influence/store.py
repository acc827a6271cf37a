"""An append-only store of named tensors that survives being killed at any moment.

    manifest.json                       readable; what the store is of
    rank-0/index.jsonl                  one line per complete entry, with its checksum
    rank-0/step-00000000.safetensors    the tensors of a step
    rank-0/NAME.safetensors             a named artifact

An entry is first written under another name, renamed, and then gets its line in the index: what has no
whole line is not there. A line holds the checksum of its file's header, and the header those of its
tensors, so one tensor is read, and verified, without reading another. Nothing is ever unpickled, and
neither reader nor writer follows a link, so a store from a stranger reaches nothing outside itself.
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
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_influence.errors import LogCorrupted, LogError

FORMAT = "lightning-influence-log"
VERSION = 1
MANIFEST = "manifest.json"
FINAL = "final"
"""The artifact of the first rank that says that the run ended: every rank has by then written all of its steps."""

_INDEX, _LOCK = "index.jsonl", "lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MAX_HEADER, _MAX_MANIFEST, _MAX_LINE = 2**27, 2**26, 2**12
_META, _CRC = "meta", "crc32"
_STOP = object()
_UNDECODABLE = (  # what JSON, safetensors and torch say of content that a writer never wrote
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    SafetensorError,
    TypeError,
    ValueError,
)
_LOST = (
    f"its {_INDEX} was deleted, replaced or cut while the run wrote to it, so steps are lost. Keep everything else out of "
    "the directory while a run writes there, and run again."
)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes, steps: int) -> dict[str, Any] | None:
    """The entry of an index line that follows ``steps`` steps; None where the line is not what was written."""
    if len(line) < 10 or line[8:9] != b" " or not line.endswith(b"\n"):
        return None
    if line[:8] != b"%08x" % zlib.crc32(line[9:-1]):
        return None
    try:
        entry = json.loads(line[9:-1])
    except (ValueError, RecursionError):
        return None
    return entry if _is_entry(entry, steps) else None


def _is_entry(entry: Any, steps: int) -> bool:
    """Whether it says all that is read of it: a checksum alone does not tell a writer from a stranger."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), int) for key in ("bytes", "header")):
        return False
    if not isinstance(entry.get("file"), str) or not _NAME.fullmatch(entry["file"]):
        return False
    if "step" in entry:
        return bool(entry["step"] == steps)
    return isinstance(entry.get("artifact"), str) and isinstance(entry.get("after"), int)


def _own(path: Path) -> Path:
    """A path in a store, which nothing but a file or a directory of its own may be at.

    Raises:
        LogCorrupted: a link, a device or a pipe is there.
    """
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        raise LogCorrupted(
            f"{path} is a link or a device, and a log holds files and directories of its own. Put what it leads to in its "
            "place, if you trust where it came from."
        )
    return path


@contextmanager
def decoding(what: Path | str) -> Iterator[None]:
    """Content whose checksum agrees and which still is not what a writer writes, as an error of the log.

    Raises:
        LogCorrupted: in the place of what decoding raised.
    """
    try:
        yield
    except _UNDECODABLE as error:
        raise LogCorrupted(
            f"{what} is not what was written: its content makes {error!r:.200}. Restore the log from a copy."
        ) from error


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What the operating system refuses, as an error of the log."""
    try:
        yield
    except OSError as error:
        raise LogError(f"{what}: {error}") from error


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


def _read_whole(path: Path) -> bytes:
    """A small file's bytes.

    Raises:
        ValueError: it is not small.
    """
    with open(path, "rb") as file:
        data = file.read(_MAX_MANIFEST + 1)
    if len(data) > _MAX_MANIFEST:
        raise ValueError(f"it has more than {_MAX_MANIFEST} bytes")
    return data


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
        with ExitStack() as undo, self._told():
            self._refuse_existing(existing)
            _own(self._dir).mkdir(parents=True, exist_ok=True)
            self._lock = undo.enter_context(self._locked())
            if existing == "overwrite":
                self._clear()
            self._refuse_other_ranks()
            index = self._dir / _INDEX
            self._entries = _read_index(index) if existing == "resume" and index.exists() else []
            self._steps = sum("step" in entry for entry in self._entries)
            self._index = self._begin_index()
            undo.pop_all()
        self._limit, self._pending = max_pending_bytes, 0
        self._room = threading.Condition()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: LogError | None = None
        self._thread = threading.Thread(target=self._work, name="influence-log", daemon=True)
        self._thread.start()

    def _told(self) -> AbstractContextManager[None]:
        return _told(f"cannot write a log to {self._root}")

    def _refuse_existing(self, existing: str) -> None:
        if existing == "error" and (self._root / MANIFEST).exists():
            raise LogError(
                f"{self._root} already holds a log of {len(StoreReader(self._root))} steps; choose another directory, or "
                "say existing='overwrite' or existing='resume'."
            )

    def _locked(self) -> IO[bytes]:
        """The file that is locked while a run writes here."""
        file = open(_own(self._dir / _LOCK), "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise LogError(f"{self._root} is being written by another run; choose another directory.") from error
        return file

    def _clear(self) -> None:
        if self._rank == 0:
            (self._root / MANIFEST).unlink(missing_ok=True)
            for name in _rank_names(self._root) - _names_of(self._ranks):  # of a run on more processes
                _remove(self._root / name)
        for path in self._dir.iterdir():
            if path.name != _LOCK:
                _remove(path)

    def _refuse_other_ranks(self) -> None:
        others = _rank_names(self._root) - _names_of(self._ranks)
        if others and self._rank == 0:  # which has removed those that are overwritten; the others do not wait for it
            raise LogError(
                f"{self._root} holds {', '.join(sorted(others))}, which a log of {self._ranks} processes does not; "
                "remove it, or choose another directory."
            )

    @property
    def dirpath(self) -> Path:
        """The store's directory."""
        return self._root

    def __len__(self) -> int:
        """Steps appended so far."""
        return self._steps

    def write_manifest(self, content: dict[str, Any]) -> None:
        """Write or replace the readable manifest, which also says of how many ranks the store is.

        Raises:
            LogError: it cannot be written.
        """
        body = {"format": FORMAT, "version": VERSION, "content": content | {"ranks": self._ranks}}
        body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        with self._told():
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
        if not _NAME.fullmatch(f"{name}.safetensors") or name.startswith("step-"):
            raise LogError(f"{name!r} cannot name an artifact; use letters, digits, '.', '_' and '-'.")
        self._submit({"artifact": name, "file": name, "after": self._steps}, tensors, meta)

    def truncate(self, steps: int) -> None:
        """Drop the steps from number ``steps`` on, the artifacts that were written after them, and `FINAL`: a store
        that is cut goes on.

        Raises:
            LogError: the store holds fewer steps, or cannot be written.
        """
        if steps > self._steps:
            raise LogError(
                f"the checkpoint was taken after step {steps}, but the log {self._root} holds only {self._steps} steps; "
                "resume with the log that belongs to the checkpoint."
            )
        self.flush()
        self._entries = [
            e
            for e in self._entries
            if e.get("step", -1) < steps and e.get("after", -1) <= steps and e.get("artifact") != FINAL
        ]
        self._steps = steps
        self._index.close()
        with self._told():
            self._index = self._begin_index()

    def flush(self) -> None:
        """Wait until everything appended so far is on disk."""
        with self._room:
            self._room.wait_for(lambda: self._pending == 0 or self._error is not None)
        self._raise()

    def close(self) -> None:
        """Write what is pending and end the thread.

        Raises:
            LogError: an entry could not be written, or is no longer there.
        """
        if self._thread.is_alive():
            self._queue.put(_STOP)
            self._thread.join()
        if not self._index.closed:
            self._end_index()
        if not self._lock.closed:
            fcntl.flock(
                self._lock, fcntl.LOCK_UN
            )  # a worker that was forked meanwhile may hold the file open for longer
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
            raise self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not _STOP:
            entry, tensors, meta, size = item
            try:
                if self._error is None:
                    self._write(entry, tensors, meta)
            except BaseException as error:
                self._fail(error)
            finally:
                with self._room:
                    self._pending -= size
                    self._room.notify_all()

    def _write(self, entry: dict[str, Any], tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        self._refuse_lost()
        data = _serialise(tensors, meta)
        header = data[: _header_size(data)]
        entry |= {"file": f"{entry['file']}.safetensors", "bytes": len(data), "header": zlib.crc32(header)}
        _replace(self._dir / entry["file"], data)
        self._written += self._index.write(_line(entry))
        self._index.flush()
        self._entries.append(entry)

    def _fail(self, error: BaseException) -> None:
        """Keep the first error for whoever calls next."""
        if self._error is None:
            why = f"{error}. It can be read up to its last complete step." if self._is_kept() else _LOST
            self._error = LogError(f"the log {self._root} could not be written: {why}")
            self._error.__cause__ = error

    def _begin_index(self) -> IO[bytes]:
        """The index, written anew from the entries and open for more."""
        data = b"".join(map(_line, self._entries))
        _replace(self._dir / _INDEX, data)
        self._written = len(data)
        return open(self._dir / _INDEX, "ab")

    def _end_index(self) -> None:
        try:
            self._refuse_lost()
            self._index.flush()
        except OSError as error:
            self._fail(error)
        with suppress(OSError):  # of the same flush
            self._index.close()

    def _refuse_lost(self) -> None:
        if not self._is_kept():
            raise FileNotFoundError(self._dir / _INDEX)

    def _is_kept(self) -> bool:
        """Whether the index on disk is still the one that is being written: an open file can be written after it was
        deleted, and nobody would notice.
        """
        try:
            found = os.lstat(self._dir / _INDEX)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._index.fileno())) and found.st_size >= self._written


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed; or a link, which must not be written through
    with open(temporary, "xb") as file:
        file.write(data)
    os.replace(temporary, path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _rank_names(root: Path) -> set[str]:
    return {path.name for path in root.glob("rank-*")}


def _names_of(ranks: int) -> set[str]:
    return {f"rank-{rank}" for rank in range(ranks)}


def _read_index(path: Path) -> list[dict[str, Any]]:
    """Entries of an index up to its end or its last whole line.

    Raises:
        LogCorrupted: a line is not what was written.
        OSError: the file is not there or cannot be read.
    """
    entries: list[dict[str, Any]] = []
    steps = 0
    with open(_own(path), "rb") as file:
        while line := file.readline(_MAX_LINE):
            entry = _parse(line, steps)
            if entry is None and not line.endswith(b"\n") and len(line) < _MAX_LINE:
                break  # torn by a crash while it was written
            if entry is None:
                raise LogCorrupted(
                    f"{path}, line {len(entries) + 1}, is not what was written. Restore the log from a copy, or, in a "
                    "log of one process, cut the file before that line to read the steps that precede it."
                )
            steps += "step" in entry
            entries.append(entry)
    return entries


class _Manifest(dict[str, Any]):
    """What the log is of; a key that it lacks is a fault of the file, whoever asks for it."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise LogCorrupted(f"{self._path} does not say {key!r}, as a manifest does; restore it from a copy.")


class StoreReader:
    """Random access to a store, one tensor at a time.

    Raises:
        LogError: no directory, not a store, one of a newer format, or one that cannot be read.
        LogCorrupted: bytes that differ from those written; also raised by every method that reads.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self._root = Path(dirpath)
        with _told(f"the log {self._root} cannot be read"):
            self.manifest: dict[str, Any] = self._read_manifest()
            self.ranks = self._count_ranks()
            self._ranks = [_Part(self._root / f"rank-{rank}") for rank in range(self.ranks)]
        self._refuse_short_ranks()

    def _read_manifest(self) -> _Manifest:
        if not self._root.is_dir():
            raise LogError(f"{self._root}: no such directory; give the dirpath of an InfluenceCallback.")
        path = _own(self._root / MANIFEST)
        if not path.exists():
            raise LogError(
                f"{self._root} is not a log (it has no {MANIFEST}); give the dirpath of an InfluenceCallback."
            )
        try:
            body = json.loads(_read_whole(path))
            claimed = body.pop("crc32")
            if body["format"] != FORMAT or claimed != zlib.crc32(json.dumps(body, sort_keys=True).encode()):
                raise ValueError("its checksum does not agree")
            if not isinstance(body["version"], int) or not isinstance(body["content"], dict):
                raise ValueError("its version or its content is of another type")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LogCorrupted(f"{path} is not what was written ({error}); restore it from a copy.") from error
        if body["version"] > VERSION:
            raise LogError(
                f"{self._root} has format version {body['version']}; upgrade lightning_influence to read it."
            )
        return _Manifest(body["content"], path)

    def _count_ranks(self) -> int:
        """The number of ranks that the manifest says, all of which are there and no other."""
        ranks, found = self.manifest["ranks"], _rank_names(self._root)
        if ranks != len(found) or found != _names_of(len(found)):
            raise LogCorrupted(
                f"{self._root} holds {', '.join(sorted(found)) or 'no ranks'}, but its manifest says ranks={ranks!r:.20}, counted "
                "from rank-0. Restore a missing directory from a copy, and move any other elsewhere."
            )
        return len(found)

    def _refuse_short_ranks(self) -> None:
        """A run that was killed leaves ranks of different lengths; one that ended leaves them whole."""
        end = self._ranks[0].artifacts[FINAL]["after"] if self.ranks and FINAL in self._ranks[0].artifacts else 0
        for rank, part in enumerate(self._ranks):
            if len(part.steps) < end:
                raise LogCorrupted(
                    f"{self._root / f'rank-{rank}' / _INDEX} holds {len(part.steps)} steps, but the run ended after {end}. "
                    "Restore the log from a copy."
                )

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
        try:
            entries = _read_index(_own(directory) / _INDEX)
        except FileNotFoundError as error:
            raise LogCorrupted(f"{directory} has no {_INDEX}; restore the log from a copy.") from error
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
            header = self._header()
        except FileNotFoundError as error:
            raise self._corrupted("it is not there") from error
        except OSError as error:
            raise LogError(f"{path} cannot be read: {error}") from error
        with decoding(path):
            metadata = json.loads(header[8:])["__metadata__"]
            self.meta: dict[str, Any] = json.loads(metadata[_META])
            self.sums: dict[str, int] = json.loads(metadata[_CRC])
            self._file = safe_open(path, framework="pt")
        if not isinstance(self.meta, dict) or not isinstance(self.sums, dict):
            raise self._corrupted("its header does not say what a step's does")

    def _header(self) -> bytes:
        """The header's bytes, verified."""
        with open(_own(self.path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != self.entry["bytes"]:
                raise self._corrupted(f"it has {size} bytes instead of {self.entry['bytes']}")
            start = file.read(8)
            length = _header_size(start) if len(start) == 8 else 0
            if not 8 < length <= min(_MAX_HEADER, size):
                raise self._corrupted("its header has an impossible length")
            header = start + file.read(length - 8)
        if zlib.crc32(header) != self.entry["header"]:
            raise self._corrupted("its header's checksum does not agree")
        return header

    def tensor(self, name: str) -> Tensor:
        if name not in self.sums:
            raise LogError(f"{self.path} holds no tensor {name!r}.")
        with decoding(self.path):
            tensor: Tensor = self._file.get_tensor(name)
            found = zlib.crc32(_bytes_of(tensor))
        if found != self.sums[name]:
            raise self._corrupted(f"the checksum of {name!r} does not agree")
        return tensor

    def _corrupted(self, reason: str) -> LogCorrupted:
        return LogCorrupted(f"{self.path} is not what was written: {reason}. Restore the log from a copy.")
