"""What a store consists of on disk: its files and the lines of an index."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_influence.errors import LogCorrupted, LogError
from lightning_influence.log.shard import UNDECODABLE

FORMAT = "lightning-influence-log"
VERSION = 1
MANIFEST = "manifest.json"
FINAL = "final"
"""The artifact of the first rank that says that the run ended: every rank has by then written all of its steps."""

INDEX = "index.jsonl"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
MAX_MANIFEST, MAX_LINE = 2**26, 2**12


@dataclass(frozen=True)
class IndexEntry:
    """A step or an artifact that is whole.

    Attributes:
        file: its shard.
        bytes: of the shard, known once it has been written.
        header: checksum of the shard's header, likewise.
        step: its number; None for an artifact.
        artifact: its name; None for a step.
        after: steps that were appended before an artifact; None for a step.
    """

    file: str
    bytes: int = 0
    header: int = 0
    step: int | None = None
    artifact: str | None = None
    after: int | None = None


def index_line(entry: IndexEntry) -> bytes:
    """An entry as a line of the index, behind its checksum."""
    content = {key: value for key, value in asdict(entry).items() if value is not None}
    text = json.dumps(content, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes, steps: int) -> IndexEntry | None:
    """The entry of an index line that follows ``steps`` steps; None where the line is not what was written."""
    if len(line) < 10 or line[8:9] != b" " or not line.endswith(b"\n"):
        return None
    if line[:8] != b"%08x" % zlib.crc32(line[9:-1]):
        return None
    try:
        content = json.loads(line[9:-1])
    except (ValueError, RecursionError):
        return None
    return _entry_of(content, steps)


def _entry_of(content: Any, steps: int) -> IndexEntry | None:
    """None where the content does not say all that is read of it: a checksum alone does not tell a writer from a stranger."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), int) for key in ("bytes", "header")):
        return None
    if not isinstance(content.get("file"), str) or not NAME.fullmatch(content["file"]):
        return None
    shard = content["file"], content["bytes"], content["header"]
    if "step" in content:
        return IndexEntry(*shard, step=steps) if content["step"] == steps else None
    if not isinstance(content.get("artifact"), str) or not isinstance(content.get("after"), int):
        return None
    return IndexEntry(*shard, artifact=content["artifact"], after=content["after"])


def own_path(path: Path) -> Path:
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


def refuse_undecodable(path: Path) -> None:
    """Refuse a path whose bytes are no text, which other libraries cannot open.

    Raises:
        LogError: it is one.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise LogError(
            f"the path {str(path)!a} is not UTF-8, and the files of a log are opened by libraries that take no other; choose "
            "another directory."
        ) from error


@contextmanager
def decoding(what: Path | str) -> Iterator[None]:
    """Content whose checksum agrees and which still is not what a writer writes, as an error of the log.

    Raises:
        LogCorrupted: in the place of what decoding raised.
    """
    try:
        yield
    except UNDECODABLE as error:
        raise LogCorrupted(
            f"{what} is not what was written: its content makes {error!r:.200}. Restore the log from a copy."
        ) from error


def expect(holds: bool, otherwise: str) -> None:
    """What a writer always writes; to be asked inside of `decoding`."""
    if not holds:
        raise ValueError(otherwise)


@contextmanager
def told_as_log_error(what: str) -> Iterator[None]:
    """What the operating system refuses, as an error of the log."""
    try:
        yield
    except OSError as error:
        raise LogError(f"{what}: {error}") from error


def step_name(step: int) -> str:
    """The file of a step, without its suffix."""
    return f"step-{step:08d}"


def names_of(ranks: int) -> set[str]:
    """Directories that a store of so many ranks has."""
    return {f"rank-{rank}" for rank in range(ranks)}


def read_index(path: Path, called: str | None = None) -> list[IndexEntry]:
    """Entries of an index up to its end or its last whole line.

    Args:
        called: what it is called in a message; its path by default.

    Raises:
        LogCorrupted: a line is not what was written.
        OSError: the file is not there or cannot be read.
    """
    entries: list[IndexEntry] = []
    steps = 0
    with open(own_path(path), "rb") as file:
        while line := file.readline(MAX_LINE):
            entry = _parse(line, steps)
            if entry is None and not line.endswith(b"\n") and len(line) < MAX_LINE:
                break  # torn by a crash while it was written
            if entry is None:
                raise LogCorrupted(
                    f"{called or path}, line {len(entries) + 1}, is not what was written. Restore the log from a copy, or, in a "
                    "log of one process, cut the file before that line to read the steps that precede it."
                )
            steps += entry.step is not None
            entries.append(entry)
    return entries
