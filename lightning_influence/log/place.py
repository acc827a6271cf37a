"""Where the files of a log lie: in a directory, or behind a URL that fsspec knows, from which they are fetched as they are read.

A remote log has a directory here, in which files are worked on: what is read is fetched into it, whole and once, and what is written
is uploaded from it once it is closed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeAlias

import fsspec

from lightning_influence.errors import LogError

Log: TypeAlias = "str | Path"
"""A directory, or a URL such as ``s3://bucket/run``."""

_WITHOUT_DIRECTORIES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl")  # object stores, which make none

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

    def names(self, directory: str) -> set[str]:
        """Of the files in a directory of the log."""
        return {path.name for path in (self.root / directory).iterdir()}

    def called(self, path: Path) -> str:
        """What a file is called in a message."""
        return str(path)

    def store(self, name: str) -> None:
        """A file of the log has been written on this machine; it is where it belongs when this returns."""

    def release(self, name: str) -> None:
        """A file that has been stored is no longer needed on this machine."""

    def remove(self, name: str) -> None:
        """Remove a file or a directory, where it is there."""
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
        return {name for name in self.names("") if name.startswith("rank-")}

    def names(self, directory: str) -> set[str]:
        self._files.invalidate_cache()
        try:
            held = self._files.ls(self._remote(directory), detail=False)
        except FileNotFoundError:
            return set()
        return {path.rstrip("/").rpartition("/")[2] for path in held}

    def file(self, name: str) -> Path:
        path = self.root / name
        if not path.exists():
            self._fetch(name, path)
        return path

    def called(self, path: Path) -> str:
        return f"{self._url}/{path.relative_to(self.root).as_posix()}"

    def store(self, name: str) -> None:
        if self._files.protocol[0] not in _WITHOUT_DIRECTORIES:
            self._files.makedirs(self._remote(name).rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(self.root / name), self._remote(name))

    def release(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        super().remove(name)
        self._files.invalidate_cache()
        if self._files.exists(self._remote(name)):
            self._files.rm(self._remote(name), recursive=True)

    def _remote(self, name: str) -> str:
        return f"{self._base}/{name}".rstrip("/")

    def _fetch(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            self._files.get_file(self._remote(name), str(part))
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
