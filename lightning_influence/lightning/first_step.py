"""What a run is told when its first step has been recorded: what is recorded, and what it will take."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_influence.log.manifest import Manifest

_WHAT = {
    "gradients": "per-sample gradients",
    "replay": "what a replay needs",
    "both": "per-sample gradients and what a replay needs",
}


def first_step_line(
    log: Path, manifest: Manifest, per_step: float, per_snapshot: float, steps: float, snapshots: float
) -> str:
    """One line about a recording.

    Args:
        log: its directory.
        manifest: what the log says of itself.
        per_step, per_snapshot: bytes.
        steps, snapshots: that the run will have written at its end; infinite where nobody knows when it ends.
    """
    share = (
        ""
        if manifest.record == "replay"
        else f" of {manifest.coverage.recorded / max(manifest.coverage.trained, 1):.0%} of the coordinates"
    )
    end, free = per_step * steps + per_snapshot * snapshots, shutil.disk_usage(log).free
    expected = f"about {_size(end)} at the end" if steps < float("inf") else "for as long as the run goes on"
    held = f", {_size(per_snapshot)} a snapshot" if per_snapshot else ""
    short = "; THE DISK WILL BE FULL BEFORE THE RUN ENDS" if steps < float("inf") and end > free else ""
    return (
        f"Influence: {_WHAT[manifest.record]}{share} go to {log}: {_size(per_step)} a step{held}, {expected}, "
        f"{_size(free)} of disk are free{short}."
    )


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
