"""The log of a run, as its checkpoints know it: which run it is of, and where the run goes on in it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal
from uuid import uuid4

from lightning_influence.errors import ConfigurationError
from lightning_influence.log.format import MANIFEST
from lightning_influence.log.manifest import Manifest
from lightning_influence.log.place import Log, place_of
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.writer import StoreWriter
from lightning_influence.run.ranks import Ranks


class RunLog:
    """Opens the log of one run after another.

    Args:
        dirpath: the log's directory, or its URL.
        existing: what to do where the directory already holds a log.

    Attributes:
        steps: of the run that the trainer's present state comes from.
        run: identifies a log even if it is moved; on the process that saves checkpoints.
        stopped: why recording ended before the run did.
        left: of the recorder's parameters, as its attribute of that name.
    """

    def __init__(self, dirpath: Log, existing: Literal["error", "overwrite", "resume"]) -> None:
        self.dirpath, self.existing = dirpath, existing
        self.steps: int | None = None
        self.run: str | None = None
        self.stopped: str | None = None
        self.left: list[float] | None = None
        self._resume_at: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "run": self.run, "stopped": self.stopped, "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next run goes on from a checkpoint."""
        self.steps = self._resume_at = state["steps"]
        self.run, self.stopped, self.left = state.get("run"), state.get("stopped"), state.get("left")

    @property
    def awaited(self) -> bool:
        """Whether a run that goes on from a checkpoint has not opened the log yet."""
        return self._resume_at is not None

    def look_for(self, key: str, states: dict[str, Any]) -> None:
        """Find the state of a log that was moved, which lies under its former place, among those of a checkpoint's callbacks.

        Raises:
            ConfigurationError: the run has to go on with this log, and the checkpoint is of another run.
        """
        recorded = self._recorded_run()
        if key in states or recorded is None:
            return
        own = [state for state in states.values() if isinstance(state, dict) and state.get("run") == recorded]
        if own:
            self.load_state_dict(own[0])
        elif self.existing == "resume":
            raise self._of_another_run()

    def begun_as(self) -> str | None:
        """What a log that goes on began to record; None for a log that begins."""
        goes_on = self._resume_at is not None or self.existing == "resume"
        return Manifest.of(StoreReader(self.dirpath)).record if goes_on and self._is_there() else None

    def open(self, manifest: Manifest, ranks: Ranks, undo: ExitStack) -> StoreWriter:
        """The log, open for the steps that come; every process calls this.

        Args:
            manifest: of the run that begins.
            undo: closes the log.

        Raises:
            ConfigurationError: the log cannot go on from where the run is, or with its settings.
            LogError: there is a log that is not to go on, or it cannot be written.
        """
        resume_at, self._resume_at = self._resume_at, None
        existing = self.existing if resume_at is None else "resume"
        if resume_at is None or ranks.rank > 0:  # a checkpoint holds what the first process noted
            self.left = None
        if existing == "resume" and self.stopped is not None:
            raise ConfigurationError(
                f"recording to {self.dirpath} stopped during the run that goes on here ({self.stopped}), so the log cannot go on "
                "from where the run is; record to another directory, or start the run from an earlier checkpoint."
            )
        self.stopped = None
        if existing == "resume":
            self._refuse_other_settings(manifest, ranks.size)
        recorded = self._recorded_run() if existing == "resume" else None
        if resume_at is not None and recorded not in (None, self.run):  # another run has overwritten the checkpoint's
            raise self._of_another_run()
        self.run = recorded or uuid4().hex
        writer = undo.enter_context(StoreWriter(self.dirpath, rank=ranks.rank, ranks=ranks.size, existing=existing))
        # without a checkpoint, up to where every process came
        steps = min(ranks.gather(len(writer))) if resume_at is None else resume_at
        if ranks.rank == 0:
            writer.truncate(steps)
        ranks.wait()  # first the one whose part says that the log is whole; and until all have seen what was there
        if ranks.rank == 0:
            writer.write_manifest(replace(manifest, run=self.run).to_json())
        else:
            writer.truncate(steps)
        return writer

    def _is_there(self) -> bool:
        return place_of(self.dirpath).file(MANIFEST).exists()

    def _recorded_run(self) -> str | None:
        """The identifier of the run whose log the directory holds; None where it holds none."""
        return Manifest.of(StoreReader(self.dirpath)).run if self._is_there() else None

    def _of_another_run(self) -> ConfigurationError:
        return ConfigurationError(
            f"the checkpoint is not of the run whose log is {self.dirpath}, so the log cannot go on from it; give the directory of "
            "the checkpoint's own log, or another directory."
        )

    def _refuse_other_settings(self, manifest: Manifest, ranks: int) -> None:
        """Refuse to continue a log with settings other than those it began with."""
        if not self._is_there():
            return
        reader = StoreReader(self.dirpath)
        recorded = Manifest.of(reader).to_json() | {"ranks": reader.ranks}
        for key, value in json.loads(json.dumps(manifest.to_json() | {"ranks": ranks})).items():
            if key != "versions" and recorded.get(key) != value:
                raise ConfigurationError(
                    f"the log {self.dirpath} was recorded with {key}={recorded.get(key)!r:.200} and cannot go on with "
                    f"{value!r:.200}; resume with the settings it began with, or record to another directory."
                )
