"""Failures of recording: each is told in full, noted in the log, and costs the run that is recorded nothing but its log."""

from __future__ import annotations

import traceback
import warnings

from lightning_influence.log.missing import tell_place
from lightning_influence.log.place import Place


def tell_missing(place: Place, rank: int, what: str, why: BaseException | str, consequence: str) -> None:
    """Warn that a log lacks something, and note it there.

    Args:
        place: where the log lies.
        rank: of the process.
        what: is missing.
        why: the error, which is shown with its traceback, or a reason.
        consequence: what becomes of the run, in a sentence.
    """
    reason = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
    try:
        tell_place(place, rank, what, reason)
    except Exception as error:
        consequence += f" The log could not note that {what} is missing ({error})."
    shown = "" if isinstance(why, str) else "\n" + "".join(traceback.format_exception(why))
    warnings.warn(f"{place} lacks {what}: {reason}. {consequence}{shown}", stacklevel=2)
