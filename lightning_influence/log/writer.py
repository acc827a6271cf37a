"""Writing a store: by a thread of its own, so that training waits for no disk."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import IO, Any, Literal

from torch import Tensor

from lightning_influence.errors import LogError
from lightning_influence.log.format import (
    FINAL,
    FORMAT,
    INDEX,
    MANIFEST,
    NAME,
    VERSION,
    IndexEntry,
    index_line,
    names_of,
    own_path,
    read_index,
    refuse_undecodable,
    step_name,
    told_as_log_error,
)
from lightning_influence.log.missing import MISSING
from lightning_influence.log.place import Log, is_remote, place_of
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.shard import serialise

_LOCK = "lock"
_STOP = object()
_SMALL = 2**16  # bytes of a tensor that is copied before it is written


class StoreWriter:
    """Appends to a store from a background thread whose backlog is bounded.

    Args:
        log: the log's directory, created where needed, or a URL that fsspec knows, to which files are uploaded once they are
            closed. A directory is locked while a run writes to it, a URL is not.
        rank, ranks: whose part of the store this is, and of how many; every process writes its own.
        existing: what to do where the directory already holds a store.
        max_pending_bytes: backlog at which `append` waits for the disk; besides it, one entry that alone is larger may wait.

    Attributes:
        log: as given.
        place: where it lies.

    Raises:
        LogError: the directory holds a store and ``existing="error"``, cannot be written, or is being
            written by another run.
    """

    def __init__(
        self,
        log: Log,
        *,
        rank: int = 0,
        ranks: int = 1,
        existing: Literal["error", "overwrite", "resume"] = "error",
        max_pending_bytes: int = 2**28,
    ) -> None:
        self.log = log if is_remote(log) else Path(log)
        self._rank, self._ranks, self._part = rank, ranks, f"rank-{rank}"
        self._manifest_written = False
        refuse_undecodable(Path(log))
        with ExitStack() as undo, self._as_log_error():
            self.place = place_of(log)
            self._root = self.place.root
            self._dir = self._root / self._part
            if existing == "error":
                self._refuse_existing()
            own_path(self._dir).mkdir(parents=True, exist_ok=True)
            self._lock = undo.enter_context(self._locked())
            if existing == "overwrite":
                self._clear()
            elif existing == "error" and rank == 0:
                self._clear_unbegun()
            self._refuse_other_ranks()
            index = self.place.file(f"{self._part}/{INDEX}")
            self._entries = read_index(index) if existing == "resume" and index.exists() else []
            self._steps = self.complete
            self.place.remove(f"{self._part}/{MISSING}")
            self._index = self._begin_index()
            undo.pop_all()
        self._limit, self._pending = max_pending_bytes, 0
        self._large = 0  # bytes of the entry that is larger than the limit
        self._room = threading.Condition()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: LogError | None = None
        self._thread = threading.Thread(target=self._work, name="influence-log", daemon=True)
        self._thread.start()

    def _as_log_error(self) -> AbstractContextManager[None]:
        return told_as_log_error(f"cannot write a log to {self.log}")

    def _refuse_existing(self) -> None:
        """Refuse a directory that holds steps, or a log that cannot be read."""
        manifest = self.place.file(MANIFEST).exists()
        if manifest:
            held = len(StoreReader(self.log))
        else:
            indices = [self.place.file(f"{name}/{INDEX}") for name in self.place.rank_names()]
            held = max((_steps_in(index) for index in indices if index.exists()), default=0)
        if held:
            without = "" if manifest else f", without its {MANIFEST}"
            raise LogError(
                f"{self.log} already holds a log of {held} steps{without}; choose another directory, or "
                "say existing='overwrite' or existing='resume'."
            )

    def _locked(self) -> IO[bytes]:
        """The file that is locked while a run writes here."""
        file = open(own_path(self._dir / _LOCK), "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise LogError(f"{self.log} is being written by another run; choose another directory.") from error
        return file

    def _clear(self) -> None:
        if self._rank == 0:
            self.place.remove(MANIFEST)
            for name in self.place.rank_names() - names_of(self._ranks):  # of a run on more processes
                self.place.remove(name)
        for name in self.place.names(self._part) - {_LOCK}:
            self.place.remove(f"{self._part}/{name}")

    def _clear_unbegun(self) -> None:
        """Remove the parts of more processes of a run that could not begin."""
        for name in self.place.rank_names() - names_of(self._ranks):
            if self.place.names(name) <= {_LOCK, INDEX, MISSING}:
                self.place.remove(name)

    def _refuse_other_ranks(self) -> None:
        others = self.place.rank_names() - names_of(self._ranks)
        if others and self._rank == 0:  # which has removed those that are overwritten; the others do not wait for it
            raise LogError(
                f"{self.log} holds {', '.join(sorted(others))}, which a log of {self._ranks} processes does not; "
                "remove it, or choose another directory."
            )

    @property
    def complete(self) -> int:
        """Steps that are on disk."""
        return _steps_among(self._entries)

    def __len__(self) -> int:
        """Steps appended so far."""
        return self._steps

    def first_bytes(self, prefix: str) -> tuple[int, int]:
        """Bytes of the first step that is on disk, and of the first artifact whose name begins so; 0 where there is none."""
        steps = (entry.bytes for entry in self._entries if entry.step is not None)
        artifacts = (e.bytes for e in self._entries if e.artifact is not None and e.artifact.startswith(prefix))
        return next(steps, 0), next(artifacts, 0)

    def write_manifest(self, content: dict[str, Any]) -> None:
        """Write or replace the readable manifest, which also says of how many ranks the store is.

        Raises:
            LogError: it cannot be written.
        """
        body = {"format": FORMAT, "version": VERSION, "content": content | {"ranks": self._ranks}}
        body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        with self._as_log_error():
            _replace(self._root / MANIFEST, [json.dumps(body, indent=2).encode()])
            self.place.store(MANIFEST)
        self._manifest_written = True

    def append(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Append the next step. The tensors belong to the writer from here on.

        Raises:
            LogError: not the next step, or an earlier entry could not be written.
        """
        if step != self._steps:
            raise LogError(f"step {step} cannot be appended; the next step of {self.log} is {self._steps}.")
        self._steps += 1
        self._submit(
            partial(self._write, IndexEntry(f"{step_name(step)}.safetensors", step=step), tensors, meta), tensors
        )

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Write a named artifact, replacing one of that name."""
        if not NAME.fullmatch(f"{name}.safetensors") or name.startswith("step-"):
            raise LogError(f"{name!r} cannot name an artifact; use letters, digits, '.', '_' and '-'.")
        entry = IndexEntry(f"{name}.safetensors", artifact=name, after=self._steps)
        self._submit(partial(self._write, entry, tensors, meta), tensors)

    def drop(self, names: Collection[str]) -> None:
        """Remove artifacts, after what was appended before."""
        self._submit(partial(self._drop, set(names)), {})

    def truncate(self, steps: int) -> None:
        """Drop the steps from number ``steps`` on, the artifacts that were written after them, and `FINAL`: a store
        that is cut goes on.

        Raises:
            LogError: the store holds fewer steps, or cannot be written.
        """
        if steps > self._steps:
            raise LogError(
                f"the checkpoint was taken after step {steps}, but the log {self.log} holds only {self._steps} steps; "
                "resume with the log that belongs to the checkpoint."
            )
        self.flush()
        self._entries = [
            e
            for e in self._entries
            if (e.step is None or e.step < steps) and (e.after is None or e.after <= steps) and e.artifact != FINAL
        ]
        self._steps = steps
        self._index.close()
        with self._as_log_error():
            self._index = self._begin_index()

    def flush(self) -> None:
        """Wait until everything appended so far is on disk."""
        with self._room:
            self._room.wait_for(lambda: self._pending + self._large == 0 or self._error is not None)
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
            # closing alone would not do: a worker that was forked meanwhile may hold the file open for longer
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
        self._raise()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, work: Callable[[], None], tensors: Mapping[str, Tensor]) -> None:
        """Let the thread do some work, which holds tensors."""
        self._raise()
        size = sum(t.numel() * t.element_size() for t in tensors.values()) + 1
        large = size > self._limit
        with self._room:
            self._room.wait_for(
                lambda: self._error or (not self._large if large else self._pending + size <= self._limit)
            )
            if large:
                self._large = size
            else:
                self._pending += size
        self._raise()
        self._queue.put((work, size))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not _STOP:
            work, size = item
            try:
                if self._error is None:
                    self._refuse_lost()
                    work()
            except BaseException as error:
                self._fail(error)
            finally:
                with self._room:
                    if size > self._limit:
                        self._large = 0
                    else:
                        self._pending -= size
                    self._room.notify_all()

    def _write(self, entry: IndexEntry, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        header, *parts = serialise(tensors, meta)
        size = len(header) + sum(map(len, parts))
        entry = replace(entry, bytes=size, header=zlib.crc32(header))
        name = f"{self._part}/{entry.file}"
        _replace(self._root / name, [header, *parts])
        self.place.store(name)
        self._written += self._index.write(index_line(entry))
        self._index.flush()
        self.place.store(f"{self._part}/{INDEX}")  # after the shard that it tells of
        self.place.release(name)
        self._entries.append(entry)

    def _drop(self, names: Collection[str]) -> None:
        gone = [entry for entry in self._entries if entry.artifact in names]
        self._entries = [entry for entry in self._entries if entry not in gone]
        self._index.close()
        self._index = self._begin_index()  # without them, before their files go
        for entry in gone:
            self.place.remove(f"{self._part}/{entry.file}")

    def _fail(self, error: BaseException) -> None:
        """Keep the first error for whoever calls next."""
        if self._error is None:
            lost = self._lost()
            why = f"{error}. It can be read up to its last complete step."
            if lost is not None:
                why = (
                    f"its {lost} was deleted, replaced or cut while the run wrote to it, so steps are lost. Keep everything else "
                    "out of the directory while a run writes there, and run again."
                )
            self._error = LogError(f"the log {self.log} could not be written: {why}")
            self._error.__cause__ = error

    def _begin_index(self) -> IO[bytes]:
        """The index, written anew from the entries and open for more."""
        data = b"".join(map(index_line, self._entries))
        _replace(self._dir / INDEX, [data])
        self.place.store(f"{self._part}/{INDEX}")
        self._written = len(data)
        return open(self._dir / INDEX, "ab")

    def _end_index(self) -> None:
        try:
            self._refuse_lost()
            self._index.flush()
        except OSError as error:
            self._fail(error)
        with suppress(OSError):  # of the same flush
            self._index.close()

    def _refuse_lost(self) -> None:
        if lost := self._lost():
            raise FileNotFoundError(lost)

    def _lost(self) -> str | None:
        """What on disk is no longer what is being written: an open index can be written after it was deleted, and nobody would
        notice, and without the manifest nothing can be read.
        """
        if self._manifest_written and not (self._root / MANIFEST).exists():
            return MANIFEST
        try:
            on_disk = os.lstat(self._dir / INDEX)
        except OSError:
            return INDEX
        ours = os.path.samestat(on_disk, os.fstat(self._index.fileno())) and on_disk.st_size >= self._written
        return None if ours else INDEX


def _replace(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed; or a link, which must not be written through
    try:
        with open(temporary, "xb", buffering=0) as file:
            for part in _joined(parts):
                _write_whole(file, part)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a disk that is full, it leaves room to say so
        raise


def _joined(parts: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Small parts in one piece, and large ones as they are."""
    small: list[bytes | memoryview] = []
    for part in parts:
        if len(part) > _SMALL:
            yield b"".join(small)
            yield part
            small = []
        else:
            small.append(part)
    yield b"".join(small)


def _write_whole(file: RawIOBase, part: bytes | memoryview) -> None:
    """An unbuffered file may take less than it is given."""
    rest = memoryview(part)
    while len(rest):
        rest = rest[file.write(rest) :]


def _steps_in(index: Path) -> int:
    return _steps_among(read_index(index))


def _steps_among(entries: Sequence[IndexEntry]) -> int:
    return sum(entry.step is not None for entry in entries)
