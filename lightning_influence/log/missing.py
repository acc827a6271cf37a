"""What a log lacks that its run was to write, and why: noted beside the steps, for whoever reads the log."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_influence.errors import LogCorrupted
from lightning_influence.log.format import own_path
from lightning_influence.log.place import Place

MISSING = "missing.json"
_MOST = 2**20  # bytes


def note_missing(part: Path, what: str, why: str) -> None:
    """Say in a rank's part of a log what it lacks.

    Raises:
        OSError: it cannot be written.
    """
    path = own_path(part / MISSING)
    missing = read_missing(part) | {what: why[: _MOST // 64]}
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(missing, indent=2), encoding="utf-8", errors="backslashreplace")


def tell_place(place: Place, rank: int, what: str, why: str) -> None:
    """`note_missing` in a rank's part of a log, on this machine or in remote storage.

    Raises:
        OSError: it cannot be written.
    """
    note_missing(place.root / f"rank-{rank}", what, why)
    place.store(f"rank-{rank}/{MISSING}")


def read_missing(part: Path, called: str | None = None) -> dict[str, str]:
    """What a rank's part of a log lacks, and why; nothing where nothing was noted.

    Args:
        called: what its file is called in a message; its path by default.

    Raises:
        LogCorrupted: the file is not what was written.
        OSError: it cannot be read.
    """
    path = own_path(part / MISSING)
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        data = file.read(_MOST + 1)
    try:
        missing = json.loads(data)
        if len(data) > _MOST or not all(isinstance(why, str) for why in missing.values()):
            raise ValueError("it does not say what is missing")
    except (ValueError, AttributeError, RecursionError) as error:
        raise LogCorrupted(f"{called or path} is not what was written ({error}); it can be removed.") from error
    return dict(missing)
