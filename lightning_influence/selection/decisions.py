"""What selection decided, in the order of the decisions: the last ones in memory, those before them in a file."""

from __future__ import annotations

import heapq
import shutil
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lightning_influence.errors import LogCorrupted
from lightning_influence.report.provenance import RemovalSummary
from lightning_influence.report.tables import in_notebook, write_csv

if TYPE_CHECKING:
    import pandas as pd

Row: TypeAlias = "tuple[int, Tensor, Tensor, Tensor]"
"""Optimizer step at which it was decided, sample ids, scores and weights, ``(n,)`` each."""

_IN_MEMORY = 2**17  # bytes
_HEADER = struct.Struct("<IIq")  # checksum of what follows, number of samples, step
_BYTES = 16  # of a sample: its id, its score and its weight


class Rows:
    """The decisions of a report."""

    def __init__(self, report: SelectionReport) -> None:
        self._report = report

    def __len__(self) -> int:
        return len(self._report)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._report)


class SelectionReport:
    """What was decided, in the order of the decisions.

    A short run's are kept in memory. Beyond that they go to a file, so that neither memory nor checkpoints grow with the run.

    Args:
        file: where they go; None to keep them in memory.

    Attributes:
        removals: how the scores found what a removal changes, and what was verified of it; None where they were given.

    Example:
        >>> report = SelectionReport()
        >>> report.add(0, torch.tensor([4, 9]), scores=torch.tensor([0.5, -0.25]), weights=torch.tensor([1.0, 0.0]))
        >>> report
        SelectionReport(1 decisions on 2 samples; mean weight 0.5)
        >>> report.to_pandas()
           step  sample_id  score  weight
        0     0          4   0.50     1.0
        1     0          9  -0.25     0.0
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._written: tuple[Path, int] | None = None  # a file, and the bytes of it that hold decisions
        self._tail: list[Row] = []
        self._tail_bytes = 0
        self._before: list[SelectionReport] = []  # of the processes of runs that have ended
        self._rows = self._samples = 0
        self._weight = 0.0
        self.removals: RemovalSummary | None = None

    def go_to(self, file: Path) -> None:
        """Write decisions to another file from now on; those that were written are copied when it is begun."""
        self._file = file

    def add(self, step: int, sample_ids: Tensor, scores: Tensor, weights: Tensor) -> None:
        """Note a decision; ``(n,)`` each."""
        row = step, sample_ids.cpu(), scores.detach().float().cpu(), weights.float().cpu()
        self._tail.append(row)
        self._rows, self._samples = self._rows + 1, self._samples + len(sample_ids)
        self._weight += float(row[3].double().sum())
        self._tail_bytes += _HEADER.size + _BYTES * len(sample_ids)
        if self._file is not None and self._tail_bytes > _IN_MEMORY:
            self._write_tail()

    @classmethod
    def merged(cls, parts: Sequence[SelectionReport]) -> SelectionReport:
        """The decisions of several processes, in the order of their steps."""
        if len(parts) == 1:
            return parts[0]
        report = cls()
        report._before = list(parts)
        report.removals = parts[0].removals if parts else None
        return report

    @property
    def rows(self) -> Rows:
        """Each decision, read when it is asked for."""
        return Rows(self)

    def __iter__(self) -> Iterator[Row]:
        """The decisions, one at a time.

        Raises:
            LogCorrupted: the file of the earlier ones is not what was written, or not there.
        """
        before = heapq.merge(*self._before, key=lambda row: row[0])
        return chain(before, () if self._written is None else _read(*self._written), list(self._tail))

    def __len__(self) -> int:
        """The number of decisions."""
        return self._rows + sum(map(len, self._before))

    @property
    def n_samples(self) -> int:
        """The number of samples that they are about, over all decisions."""
        return self._samples + sum(part.n_samples for part in self._before)

    @property
    def kept(self) -> float:
        """Mean weight over all decisions; NaN before the first."""
        return self._total_weight() / self.n_samples if self.n_samples else float("nan")

    def _total_weight(self) -> float:
        return self._weight + sum(part._total_weight() for part in self._before)

    def to_pandas(self) -> pd.DataFrame:
        """One row per decision: ``step``, ``sample_id``, ``score``, ``weight`` (0: removed)."""
        import pandas as pd

        parts = [
            pd.DataFrame({"step": step, "sample_id": ids.numpy(), "score": scores.numpy(), "weight": weights.numpy()})
            for step, ids, scores, weights in self.rows
        ]
        columns = ["step", "sample_id", "score", "weight"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def to_csv(self, path: str | Path) -> None:
        """Write `to_pandas` as CSV."""
        write_csv(self.to_pandas(), path)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a place in the file, and at most what is kept in memory."""
        if self._written is not None:
            self._write_tail()
        file, size = (None, 0) if self._written is None else self._written
        return {
            "file": None if file is None else str(file),
            "bytes": size,
            "tail": list(self._tail),
            "counts": (self._rows, self._samples, self._weight),
            "before": [part.state_dict() for part in self._before],
        }

    def restored(self, state: dict[str, Any] | Sequence[Row]) -> SelectionReport:
        """One that goes on from a `state_dict`, or from the decisions themselves, which earlier versions kept in checkpoints."""
        report = SelectionReport(self._file)
        if isinstance(state, dict):
            report._load(state)
        else:
            for row in state:
                report.add(*row)
        return report

    def _load(self, state: dict[str, Any]) -> None:
        self._written = None if state["file"] is None else (Path(state["file"]), state["bytes"])
        if self._written is not None and not self._written[0].exists():
            warnings.warn(
                f"the decisions before the checkpoint are in {self._written[0]}, which is not there; the selection report "
                "begins with those that follow.",
                stacklevel=2,
            )
            self._written = None
            return
        self._tail = list(state["tail"])
        self._tail_bytes = sum(_HEADER.size + _BYTES * len(ids) for _, ids, *_ in self._tail)
        self._rows, self._samples, self._weight = state["counts"]
        self._before = [SelectionReport().restored(part) for part in state["before"]]

    def _write_tail(self) -> None:
        if self._file is None or not self._tail:
            return
        try:
            size = self._begin(self._file)
            with open(self._file, "r+b") as file:
                file.truncate(size)
                file.seek(size)
                file.write(b"".join(map(_packed, self._tail)))
                self._written = self._file, file.tell()
            self._tail.clear()
            self._tail_bytes = 0
        except OSError as error:
            warnings.warn(
                f"the decisions of selection could not be written to {self._file} ({error}); they stay in memory, and in checkpoints.",
                stacklevel=2,
            )
            self._file = None

    def _begin(self, path: Path) -> int:
        """Bytes that the file holds of this run; those in another file are copied."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._written is None:
            path.write_bytes(b"")
            return 0
        before, size = self._written
        if before != path:
            shutil.copyfile(before, path)
        return size

    def __repr__(self) -> str:
        weight = f"; mean weight {self.kept:.3g}" if len(self) else ""
        how = "" if self.removals is None else f"; {self.removals}"
        return f"SelectionReport({len(self)} decisions on {self.n_samples} samples{weight}{how})"

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.to_pandas())


def _packed(row: Row) -> bytes:
    step, ids, scores, weights = row
    body = b"".join(t.contiguous().numpy().tobytes() for t in (ids.long(), scores.float(), weights.float()))
    checked = struct.pack("<Iq", len(ids), step) + body
    return struct.pack("<I", zlib.crc32(checked)) + checked


def _read(path: Path, size: int) -> Iterator[Row]:
    """The decisions in the first ``size`` bytes of a file, one at a time."""
    with _open(path) as file:
        while (place := file.tell()) < size:
            header = file.read(_HEADER.size)
            body = b""
            if len(header) == _HEADER.size:
                checksum, n, step = _HEADER.unpack(header)
                if _BYTES * n <= size - file.tell():
                    body = file.read(_BYTES * n)
            if len(header) < _HEADER.size or len(body) < _BYTES * n or zlib.crc32(header[4:] + body) != checksum:
                raise LogCorrupted(f"{path} is not what selection wrote, from byte {place} on; restore it from a copy.")
            data = bytearray(body)
            if not n:
                yield step, torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0)
                continue
            ids = torch.frombuffer(data, dtype=torch.int64, count=n)
            scores = torch.frombuffer(data, dtype=torch.float32, count=n, offset=8 * n)
            weights = torch.frombuffer(data, dtype=torch.float32, count=n, offset=12 * n)
            yield step, ids, scores, weights


def _open(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise LogCorrupted(f"the decisions of selection in {path} cannot be read: {error}") from error
