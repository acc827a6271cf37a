"""How scores were made and what is known of their faithfulness, as a report's metadata keeps it.

The only place that knows the metadata's keys. Metadata comes from files and from users: an entry of another type than it
should have counts as left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_INTERVAL = re.compile(r"(-?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]")
_WHERE_THERE_ARE_SOME = ("rows", "removals", "replay_drift", "stopped_paths", "hessian", "queried", "query_gradient")


@dataclass(frozen=True)
class Estimate:
    """A statistic, averaged over the queries, and its bootstrap confidence interval over the removals."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @classmethod
    def from_json(cls, entry: Any) -> Estimate | None:
        """From its three numbers or, as reports had it before version 2, the first interval of a text."""
        if isinstance(entry, str):
            match = _INTERVAL.search(entry)
            return None if match is None else cls(*map(float, match.groups()))
        numbers = [_number(_mapping(entry).get(f.name)) for f in fields(cls)]
        return None if None in numbers else cls(*numbers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Coverage:
    """Which coordinates scores rest on.

    Attributes:
        fraction: of the trained coordinates.
        kept, recorded, trained: numbers of coordinates.
        parameters: fraction by name.
        excluded: patterns of parameters that were left out of the recording.
    """

    fraction: float | None = None
    kept: int | None = None
    recorded: int | None = None
    trained: int | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    excluded: Sequence[str] = ()

    @classmethod
    def from_json(cls, entry: Any) -> Coverage:
        part = _mapping(entry)
        excluded = part.get("excluded")
        return cls(
            _number(part.get("fraction")),
            _integer(part.get("kept")),
            _integer(part.get("recorded")),
            _integer(part.get("trained")),
            _numbers(part.get("parameters")),
            [str(name) for name in excluded] if isinstance(excluded, list) else [],
        )


@dataclass(frozen=True)
class RemovalSummary:
    """How a replay found what the removal of a sample changes.

    Attributes:
        by: ``"shares"`` of the gradient, or ``"rerun"`` of each step without the sample.
        reason: why steps are evaluated again, or why shares were not verified.
        verified: samples whose shares were compared with a step without them; all of them agreed.
        largest_error: relative, among those.
        skipped: removals that leave some parameter without any gradient, whose step an optimizer skips; its gradient is taken for
            zero.
    """

    by: str | None = None
    reason: str | None = None
    verified: int = 0
    largest_error: float = 0.0
    skipped: int = 0

    @classmethod
    def from_json(cls, entry: Any) -> RemovalSummary | None:
        part = _mapping(entry)
        if not part:
            return None
        return cls(
            _text(part.get("by")),
            _text(part.get("reason")),
            _integer(part.get("verified")) or 0,
            _number(part.get("largest_error")) or 0.0,
            _integer(part.get("skipped")) or 0,
        )

    def __str__(self) -> str:
        reason = (self.reason or "").rstrip(". ")
        if self.by == "rerun":
            because = f", because {reason}" if reason else ""
            skipped = (
                f"; {self.skipped} of them leave a parameter without a gradient, whose step the optimizer then skips, which is taken for "
                "a gradient of zero"
            )
            return f"removals measured by evaluating each step without the sample{because}{skipped if self.skipped else ''}"
        if self.verified > 0:
            samples = f"{self.verified} of {self.verified} sample{'s' if self.verified > 1 else ''}"
            return f"removal verified on {samples}, largest relative error {_brief(self.largest_error)}"
        return "removals not verified" + (f": {reason}" if reason else "")


@dataclass(frozen=True)
class Provenance:
    """How scores were made; what is not known is None.

    Attributes:
        module, record, compression, precision, versions: of the recorded run.
        optimizer: that trained.
        optimizer_assumption: of the scores, where it is another.
        curvature, response, memory_window, counterfactual, target: as of `attribute`.
        steps: of the run.
        rows: ``"assumed"`` where samples did not come twice alike, so that which row is which could not be told by content.
        removals: of a replay.
        replay_drift: relative distance to the recorded snapshots on arrival, by step.
        stopped_paths: whether the curvature follows paths that the loss stops by ``detach`` or ``no_grad``: ``"none"`` where
            there are none that matter, ``"followed"`` or ``"not followed"``.
        hessian: ``"by differences"`` of gradients, where the training step could not be differentiated twice.
        queried: what is wrong with the parameters at which queries were differentiated, where they are not those that the
            run ended with.
        query_gradient: what is wrong with the gradient of the query loss, where it is not how the loss changes.
    """

    module: str | None = None
    record: str | None = None
    compression: str | None = None
    precision: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    optimizer: str | None = None
    optimizer_assumption: str | None = None
    curvature: str | None = None
    response: str | None = None
    memory_window: int | None = None
    counterfactual: str | None = None
    target: str | None = None
    steps: int | None = None
    coverage: Coverage = Coverage()
    rows: str | None = None
    removals: RemovalSummary | None = None
    replay_drift: Mapping[str, float] = field(default_factory=dict)
    stopped_paths: str | None = None
    hessian: str | None = None
    queried: str | None = None
    query_gradient: str | None = None

    @classmethod
    def from_json(cls, metadata: Mapping[str, Any]) -> Provenance:
        """From a report's metadata; other entries are passed over."""
        versions = _mapping(metadata.get("versions"))
        texts = (
            *("module", "record", "compression", "precision", "optimizer", "optimizer_assumption"),
            *("curvature", "response", "counterfactual", "target", "rows", "stopped_paths", "hessian"),
            *("queried", "query_gradient"),
        )
        return cls(
            **{key: _text(metadata.get(key)) for key in texts},  # type: ignore[arg-type]
            versions={str(package): str(version) for package, version in versions.items()},
            memory_window=_integer(metadata.get("memory_window")),
            steps=_integer(metadata.get("steps")),
            coverage=Coverage.from_json(metadata.get("coverage")),
            removals=RemovalSummary.from_json(metadata.get("removals")),
            replay_drift=_numbers(metadata.get("replay_drift")),
        )

    def to_json(self) -> dict[str, Any]:
        """As a report's metadata has it."""
        made = {key: value for key, value in asdict(self).items() if value or key not in _WHERE_THERE_ARE_SOME}
        if self.removals is not None and not self.removals.skipped:
            del made["removals"]["skipped"]
        return made


@dataclass(frozen=True)
class Measured:
    """What retraining says of scores.

    Attributes:
        errors: relative sizes of the config, algorithm and system errors, by name.
        agreement: Spearman correlation of the scores with retraining.
        ceiling: that of retraining with itself.
        conclusion: what may be concluded, in words.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    agreement: Estimate | None = None
    ceiling: Estimate | None = None
    conclusion: str | None = None

    @classmethod
    def from_json(cls, metadata: Mapping[str, Any]) -> Measured:
        """From a report's metadata; other entries are passed over."""
        conclusion = _text(metadata.get("conclusion"))
        return cls(
            _numbers(metadata.get("errors")),
            Estimate.from_json(metadata.get("agreement", conclusion)),
            Estimate.from_json(metadata.get("ceiling")),
            conclusion,
        )

    def to_json(self) -> dict[str, Any]:
        """For a report: ``report.metadata |= measured.to_json()``."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _mapping(entry: Any) -> Mapping[Any, Any]:
    return entry if isinstance(entry, Mapping) else {}


def _numbers(entry: Any) -> dict[str, float]:
    """The entries of a mapping that are numbers."""
    numbers = {str(key): _number(value) for key, value in _mapping(entry).items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _number(entry: Any) -> float | None:
    if not isinstance(entry, (int, float)) or isinstance(entry, bool):
        return None
    try:
        number = float(entry)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _integer(entry: Any) -> int | None:
    return entry if isinstance(entry, int) and not isinstance(entry, bool) else None


def _text(entry: Any) -> str | None:
    return entry if isinstance(entry, str) else None


def _brief(number: float) -> str:
    """``2e-7`` rather than ``2e-07``."""
    return re.sub(r"e([+-])0+", r"e\1", f"{number:.1g}").replace("e+", "e")
