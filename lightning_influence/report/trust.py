"""Reasons to trust scores more or less; they are worded so that no two contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_influence.report.numbers import percent
from lightning_influence.report.provenance import Estimate, Measured, Provenance, RemovalSummary
from lightning_influence.report.scores import Scores

_LEVELS = ("solid", "approximate", "unknown", "caution")
"""From the most to the least that can be relied on."""

_CURVATURE = {
    "hessian": ("solid", "Exact: the run was replayed with its true second derivatives."),
    "gauss_newton": ("approximate", "The run was replayed with the Gauss-Newton matrix."),
    "fisher": (
        "approximate",
        "Estimated from the logged gradients; a run recorded for replay is scored more faithfully.",
    ),
    "none": ("caution", "Ignored: what a removal changes in later gradients is not followed."),
}
_ROWS = (
    "Samples do not come twice alike (augmentation in workers), so that which row of a batch is which sample was not told by "
    "content but by the order in which they were drawn."
)
_ERRORS = {
    "config": "These scores take the run for one of plain SGD, which it was not.",
    "algorithm": "How far the optimizer's answer to a removal is from a straight line. These scores follow the answer "
    "within each parameter; what it sets off beyond grows with this number.",
    "system": "How far the run, trained again from its record, ends from where it ended.",
}


@dataclass(frozen=True)
class Trust:
    """A reason to trust the scores more or less; `level` is solid, approximate, caution or unknown."""

    name: str
    value: str
    level: str
    meaning: str


def trust(scores: Scores) -> list[Trust]:
    """Everything known about how far scores can be believed."""
    made, measured = scores.provenance, Measured.from_json(scores.metadata)
    return [
        *_approximations(made),
        *_errors(own_errors(scores) | dict(measured.errors), made),
        *_retraining(measured),
    ]


def own_errors(scores: Scores) -> dict[str, float]:
    """Relative sizes of error that follow from a report itself."""
    errors, size = dict[str, float](), float(scores.scores.norm())
    if size and scores.provenance.response == "finite":
        errors["algorithm"] = float(scores.nonlinearity.norm()) / size
    if drift := scores.provenance.replay_drift:
        errors["system"] = max(drift.values())
    return errors


def _approximations(made: Provenance) -> Iterator[Trust]:
    coverage = made.coverage.fraction
    if coverage is not None:
        level = "solid" if coverage > 0.99 else "approximate" if coverage > 0.1 else "caution"
        yield Trust("Coverage", percent(coverage), level, "Share of the trained coordinates that the scores rest on.")
    if made.curvature in _CURVATURE:
        name = made.curvature.replace("gauss_newton", "Gauss-Newton")
        yield Trust("Curvature", name, *_CURVATURE[made.curvature])
    if made.rows == "assumed":
        yield Trust("Rows", "order assumed", "unknown", _ROWS)
    if made.removals is not None:
        yield _removals(made.removals)
    if made.queried is not None:
        yield Trust("Parameters", "of another time", "caution", _sentence(made.queried))
    if made.query_gradient is not None:
        yield Trust("Query loss", "another gradient", "caution", _sentence(made.query_gradient))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _removals(removals: RemovalSummary) -> Trust:
    text = _sentence(str(removals))
    if removals.by == "rerun":
        return Trust("Removals", "measured", "approximate" if removals.skipped else "solid", text)
    if removals.verified:
        return Trust("Removals", "verified", _level_of(removals.largest_error, 0.01), text)
    return Trust("Removals", "not verified", "unknown", text)


def _errors(errors: dict[str, float], made: Provenance) -> Iterator[Trust]:
    """The config error is one of these scores only where they assume another optimizer than the run's."""
    if made.optimizer_assumption is not None:
        assumed = f"{made.optimizer_assumption.upper()} assumed"
        yield Trust("Optimizer", assumed, "caution", "The run used another: these scores are a baseline.")
    elif "config" in errors:
        text = f"Followed as it trained. Scores that assume plain SGD differ from these by {percent(errors['config'])}."
        yield Trust("Optimizer", made.optimizer or "followed", "solid", text)
    for name, size in errors.items():
        if name != "config" or made.optimizer_assumption is not None:
            text = _ERRORS.get(name, "Of the scores.")
            yield Trust(f"{name} error".capitalize(), percent(size), _level_of(size, 0.1), text)


def _retraining(measured: Measured) -> Iterator[Trust]:
    """What cannot be reproduced cannot be predicted: agreement is trusted no further than the ceiling."""
    ceiling = measured.ceiling
    if ceiling is None:
        text = "check_faithfulness retrains, and says what scores can reach."
        yield Trust("Ceiling", "not measured", "unknown", text)
    else:
        text = "Agreement of retraining with itself, from a slightly moved initialisation."
        yield Trust("Ceiling", str(ceiling), _level_of_agreement(ceiling), text)
    if measured.conclusion is not None:
        levels = [_level_of_agreement(e) for e in (measured.agreement, ceiling or measured.agreement)]
        yield Trust("Measured", "against retraining", max(levels, key=_LEVELS.index), measured.conclusion)


def _level_of(error: float, small: float) -> str:
    return "solid" if error < small else "approximate" if error < 5 * small else "caution"


def _level_of_agreement(estimate: Estimate | None) -> str:
    """By the lower end of the interval, as `Faithfulness.conclusion` speaks of it."""
    if estimate is None:
        return "unknown"
    return "solid" if estimate.low > 0.9 else "approximate" if estimate.low > 0.5 else "caution"
