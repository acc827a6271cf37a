"""What a run is told when its first step has been recorded: what is recorded, and what it will take."""

from __future__ import annotations

import shutil

from lightning_influence.log.place import Log, is_remote

_REPLAY = "what a replay needs"


def first_step_line(
    log: Log, record: str, share: float, per_step: float, per_snapshot: float, steps: float, snapshots: float
) -> str:
    """One line about a recording.

    Args:
        log: its directory, or its URL, of which nobody knows how much room it has.
        record: ``"gradients"``, ``"replay"`` or ``"both"``.
        share: of the trained coordinates, those on which per-sample gradients are kept.
        per_step, per_snapshot: bytes.
        steps, snapshots: that the run will have written at its end; infinite where nobody knows when it ends.
    """
    gradients = f"per-sample gradients on {share:.0%} of the coordinates"
    what = {"gradients": gradients, "replay": _REPLAY, "both": f"{gradients} and {_REPLAY}"}[record]
    end = per_step * steps + per_snapshot * snapshots
    expected = f"about {_size(end)} at the end" if steps < float("inf") else "for as long as the run goes on"
    held = f", {_size(per_snapshot)} a snapshot" if per_snapshot else ""
    line = f"Influence: {what} go to {log}: {_size(per_step)} a step{held}, {expected}"
    if is_remote(log):
        return f"{line}."
    free = shutil.disk_usage(log).free
    short = "; THE DISK WILL BE FULL BEFORE THE RUN ENDS" if steps < float("inf") and end > free else ""
    return f"{line}, {_size(free)} of disk are free{short}."


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
