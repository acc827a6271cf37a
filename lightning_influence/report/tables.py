"""Tables for other programs and for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def made(path: str | Path) -> Path:
    """The path, in a directory that is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def score_table(
    scores: Tensor, query_ids: Sequence[int | str], *, before: Mapping[str, Any], after: Mapping[str, Any]
) -> pd.DataFrame:
    """Scores ``(n, n_queries)`` as a table: one column per query (``score`` where there is one) between others, whose names
    queries may have, too.
    """
    import pandas as pd

    names = ["score"] if len(query_ids) == 1 else [str(q) for q in query_ids]
    table = pd.DataFrame(scores.numpy(), columns=names)
    for place, (name, values) in enumerate(before.items()):
        table.insert(place, name, values, allow_duplicates=True)
    for name, values in after.items():
        table.insert(len(table.columns), name, values, allow_duplicates=True)
    return table


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    """A table as CSV that a spreadsheet shows and does not run: a text that begins as a formula does is quoted."""
    safe = table.rename(columns=_quoted)
    for column in safe.select_dtypes(exclude="number"):
        safe[column] = safe[column].map(_quoted)
    safe.to_csv(made(path), index=False, errors="backslashreplace")


def in_notebook(text: str, table: pd.DataFrame) -> str:
    """A line above a table, for the output of a notebook's cell."""
    return f"<div>{html.escape(text)}</div>{table.to_html(index=False, max_rows=20, float_format='{:.4g}'.format)}"


def _quoted(cell: Any) -> Any:
    """A spreadsheet takes what follows an apostrophe for text."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
