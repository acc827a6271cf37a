"""Tables for other programs and for notebooks."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def made(path: str | Path) -> Path:
    """The path, in a directory that is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    """A table as CSV that a spreadsheet shows and does not run: a text that begins as a formula does is quoted."""
    safe = table.rename(columns=_quoted)
    for column in safe.select_dtypes(exclude="number"):
        safe[column] = safe[column].map(_quoted)
    safe.to_csv(made(path), index=False, errors="backslashreplace")


def in_notebook(told: str, table: pd.DataFrame) -> str:
    """A line above a table, for the output of a notebook's cell."""
    return f"<div>{html.escape(told)}</div>{table.to_html(index=False, max_rows=20, float_format='{:.4g}'.format)}"


def _quoted(cell: Any) -> Any:
    """A spreadsheet takes what follows an apostrophe for text."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
