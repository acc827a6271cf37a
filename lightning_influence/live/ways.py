"""The ways in which a run is recorded; ``record="auto"`` is both of them, as far as each turns out to be possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_influence.errors import ConfigurationError
from lightning_influence.live.first_step import first_step_line
from lightning_influence.live.steps import LiveSteps
from lightning_influence.log.manifest import LEFT_OUT, Manifest
from lightning_influence.log.missing import tell_place
from lightning_influence.log.place import Log
from lightning_influence.log.recorder import Recorder

BUDGET = 2**16
"""Bytes of a sample's gradients at a step that ``record="auto"`` keeps unasked."""


def budget_of(record: str, budget: int | None) -> int | None:
    """The bytes of a sample's gradients at a step that a run keeps, where nobody says otherwise."""
    return BUDGET if budget is None and record == "auto" else budget


class Ways:
    """What a run is recorded as, which may become less.

    Args:
        asked: ``"auto"``, or one of `RECORDS`, which is not given up.
        begun_as: what a log that goes on was begun as, for ``"auto"``.
        tell: is told what is left out after the line of the first step; None for nobody.

    Attributes:
        record: one of `RECORDS`.
        left_out: why, of what turned out to be impossible.
    """

    def __init__(self, asked: str, begun_as: str | None = None, tell: Callable[[str], None] | None = None) -> None:
        self._auto, self._tell = asked == "auto", tell
        self.record = (begun_as or "both") if self._auto else asked
        self.left_out: dict[str, str] = {}
        self._announced = False
        self._begun: tuple[LiveSteps, Recorder, Manifest] | None = None

    def begin(self, steps: LiveSteps, recorder: Recorder, manifest: Manifest) -> None:
        """Recording begins; what is left out from now on is taken from there."""
        self._begun, self._announced = (steps, recorder, manifest), False
        if self._auto and recorder.ranks.size > 1:
            recorder.collector.settle = self._settle

    def give_up(self, what: str, error: ConfigurationError) -> None:
        """One of the two ways is not possible; the run is recorded in the other.

        Under several processes each gives up for itself: at the first step the others are told; later it is noted in the log.

        Raises:
            ConfigurationError: it is not recorded in the other.
        """
        if self.record != "both":
            raise error
        self.record = "replay" if what == "gradients" else "gradients"
        self.left_out[what] = str(error).rstrip(".")
        if self._begun is None:
            return
        steps, recorder, manifest = self._begun
        if what == "replay":
            steps.rehearse_no_more()
            recorder.replay = None
            manifest = replace(manifest, record="gradients")
        else:
            recorder.verified = None
            manifest = manifest.without_gradients()
        self._begun = steps, recorder, manifest
        if recorder.ranks.rank == 0:
            recorder.writer.write_manifest(manifest.to_json())
        elif recorder.begun:
            tell_place(recorder.writer.place, recorder.ranks.rank, LEFT_OUT[what], self.left_out[what])
        if self._announced and self._tell is not None:
            self._tell(f"Influence: {recorder.writer.log} goes on with {self._why(what)}")

    def _settle(self) -> None:
        """What one process has left out at the first step, all of them leave out."""
        assert self._begun is not None
        _, recorder, _ = self._begun
        for rank, left_out in enumerate(recorder.ranks.gather(dict(self.left_out))):
            for what, why in left_out.items():
                if what in self.left_out:
                    continue
                error = ConfigurationError(f"of what process {rank} found: {why}")
                if what == "gradients":
                    recorder.collector.give_up(error)
                else:
                    self.give_up(what, error)

    def first_step(self, log: Log, steps_left: float) -> str | None:
        """The line about the first step, once it has been taken; None before that, and afterwards.

        Args:
            steps_left: that the run will have written at its end; infinite where nobody knows.
        """
        if self._announced or self._begun is None or not self._begun[1].begun:
            return None
        self._announced = True
        _, recorder, manifest = self._begun
        step, snapshot = recorder.bytes_written()
        every = recorder.replay.snapshot_every if recorder.replay is not None else 1
        share = recorder.n_coordinates / max(manifest.coverage.trained, 1)
        line = first_step_line(log, self.record, share, step, snapshot, steps_left, steps_left / every + 1)
        return " ".join([line, *(f"There are {self._why(what)}" for what in self.left_out)])

    def _why(self, what: str) -> str:
        return f"no {LEFT_OUT[what]}, because {self.left_out[what]}."
