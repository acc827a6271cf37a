"""Failures of recording: each is told in full, noted in the log, and costs the run that is recorded nothing but its log."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path

from lightning_influence.log.missing import note_missing


def tell_missing(part: Path, what: str, why: BaseException | str, consequence: str) -> None:
    """Warn that a log lacks something, and note it there.

    Args:
        part: the process's part of the log.
        what: is missing.
        why: the error, which is shown with its traceback, or a reason.
        consequence: what becomes of the run, in a sentence.
    """
    reason = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
    try:
        note_missing(part, what, reason)
    except Exception as error:
        consequence += f" The log could not note that {what} is missing ({error})."
    shown = "" if isinstance(why, str) else "\n" + "".join(traceback.format_exception(why))
    warnings.warn(f"{part.parent} lacks {what}: {reason}. {consequence}{shown}", stacklevel=2)
