"""Where the files of a log lie: in a directory, or behind a URL that fsspec knows, from which they are fetched as they are read.

A remote log has a directory here, in which files are worked on: what is read is fetched into it, whole and once, and what is written
is uploaded from it once it is closed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TypeAlias

import fsspec

from lightning_influence.errors import LogError

Log: TypeAlias = "str | Path"
"""A directory, or a URL such as ``s3://bucket/run``."""

KEPT = 32  # shards of a remote log that are kept here at a time


class Place:
    """A directory of this machine.

    Attributes:
        root: the directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def is_there(self) -> bool:
        """Whether there is such a directory."""
        return self.root.is_dir()

    def rank_names(self) -> set[str]:
        """Directories that look like those of ranks."""
        return {path.name for path in self.root.glob("rank-*")}

    def file(self, name: str) -> Path:
        """Where a file of the log lies on this machine; nothing is there, if the log has no such file.

        Args:
            name: below the root, with slashes.
        """
        return self.root / name

    def told(self, path: Path) -> str:
        """What a file is called in a message."""
        return str(path)


class RemotePlace(Place):
    """A directory of another file system, mirrored in a temporary one.

    Raises:
        OSError: it cannot be reached.
        ImportError: the package that its protocol needs is not installed.
        ValueError: no protocol that fsspec knows.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._files, self._base = fsspec.core.url_to_fs(self._url)
        self._temporary = tempfile.TemporaryDirectory(prefix="influence-log-")
        super().__init__(Path(self._temporary.name))
        self._kept: list[Path] = []

    def __str__(self) -> str:
        return self._url

    def is_there(self) -> bool:
        return bool(self._files.isdir(self._base))

    def rank_names(self) -> set[str]:
        self._files.invalidate_cache()
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in self._files.ls(self._base, detail=True))
        return {name for name in names if name.startswith("rank-")}

    def file(self, name: str) -> Path:
        path = self.root / name
        if not path.exists():
            self._fetch(name, path)
        return path

    def told(self, path: Path) -> str:
        return f"{self._url}/{path.relative_to(self.root).as_posix()}"

    def _fetch(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            self._files.get_file(f"{self._base}/{name}", str(part))
        except FileNotFoundError:
            part.unlink(missing_ok=True)
            return
        os.replace(part, path)
        if path.suffix == ".safetensors":
            self._kept.append(path)
            for old in self._kept[:-KEPT]:
                old.unlink(missing_ok=True)  # what is open stays readable
            self._kept = self._kept[-KEPT:]


def is_remote(log: Log) -> bool:
    """Whether a log is behind a URL."""
    return isinstance(log, str) and "://" in log


def place_of(log: Log) -> Place:
    """Where a log lies.

    Raises:
        LogError: no URL that fsspec can open.
        OSError: it cannot be reached.
    """
    if not is_remote(log):
        return Place(Path(log))
    try:
        return RemotePlace(str(log))
    except (ImportError, ValueError) as error:  # a protocol of no package, or of one that is not installed
        raise LogError(f"the log {log} cannot be opened: {error}") from error
