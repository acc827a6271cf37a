"""A report as one safetensors file in which every bit is covered by a checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lightning_influence.core.scores import RowScores
from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.log.shard import UNDECODABLE, Shard, is_sealed, sealed
from lightning_influence.report.groups import PREFIX as OF_GROUPS
from lightning_influence.report.groups import Groups
from lightning_influence.report.tables import made

FORMAT = "lightning-influence-report/2"
_WITHOUT_CHECKSUMS = "lightning-influence-report/1"
_TENSORS = tuple(field.name for field in fields(RowScores))


@dataclass(frozen=True)
class Saved:
    """What a file holds of a report."""

    rows: RowScores
    query_ids: Sequence[int | str] | None
    metadata: Mapping[str, Any]
    groups: Groups | None = None


def write(saved: Saved, path: str | Path) -> None:
    """Write a report.

    Raises:
        ConfigurationError: its metadata or its query ids hold what JSON cannot.
    """
    tensors = {name: getattr(saved.rows, name) for name in _TENSORS}
    body: dict[str, Any] = {"metadata": dict(saved.metadata), "query_ids": saved.query_ids}
    if saved.groups is not None:
        parts, body["groups"] = saved.groups.packed()
        tensors |= parts
    try:
        data = sealed(tensors, body, format=FORMAT)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"metadata or query_ids cannot be written: {error}. Let them hold numbers, texts, lists and mappings."
        ) from error
    made(path).write_bytes(data)


def read(path: str | Path) -> Saved:
    """Read a report; one of the first format, which has no checksums, too.

    Raises:
        InfluenceError: no such file, not a report, or not the bytes that were written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == _WITHOUT_CHECKSUMS:
                return _saved({name: file.get_tensor(name) for name in _TENSORS[:4]}, json.loads(metadata["report"]))
        if metadata.get("format") != FORMAT:
            raise InfluenceError(f"{path} is not a report of this version ({metadata.get('format')}).")
        shard = Shard(Path(path), _fault, lambda reason: _unreadable(path, reason))
        names = [*_TENSORS, *(name for name in shard.sums if name.startswith(OF_GROUPS))]
        return _saved({name: shard.tensor(name) for name in names}, shard.meta)
    except (OSError, *UNDECODABLE) as error:
        raise _unreadable(path, repr(error)) from error


def _saved(tensors: Mapping[str, Any], body: Any) -> Saved:
    if not isinstance(body["metadata"], dict) or not isinstance(body["query_ids"], (list, type(None))):
        raise TypeError("its metadata is no mapping, or its query_ids are no list")
    rows = RowScores(**{name: tensor for name, tensor in tensors.items() if name in _TENSORS})
    groups = None
    if "groups" in body:
        query_ids = body["query_ids"] or range(rows.n_queries)
        groups = Groups.unpacked(tensors, body["groups"], query_ids)
    return Saved(rows, body["query_ids"], body["metadata"], groups)


def _fault(header: bytes, size: int) -> str | None:
    return None if is_sealed(header) else "its header's checksum does not agree"


def _unreadable(path: str | Path, reason: str) -> InfluenceError:
    return InfluenceError(f"{path} cannot be read as a report: {reason}. Give a file that report.save wrote.")
