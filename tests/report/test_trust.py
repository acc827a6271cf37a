"""What a report says of how far it can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_report import some_report

from lightning_influence.core.curvature import CURVATURES
from lightning_influence.report.provenance import Coverage, Estimate, Measured, Provenance, RemovalSummary
from lightning_influence.report.trust import Trust, trust


def told(**metadata: Any) -> dict[str, Trust]:
    report = some_report()
    report.metadata |= metadata
    return {item.name: item for item in trust(report)}


@pytest.mark.parametrize(
    ("ceiling", "level"),
    [
        ("0.657 [-0.600, 1.000]", "caution"),
        ({"value": 0.657, "low": -0.6, "high": 1.0}, "caution"),
        ("0.930 [0.910, 0.950]", "solid"),
        ("0.930 [0.890, 0.950]", "approximate"),
    ],
)
def test_a_ceiling_is_trusted_as_far_as_its_interval_reaches(ceiling: Any, level: str) -> None:
    assert told(ceiling=ceiling)["Ceiling"].level == level
    assert told(ceiling=ceiling)["Ceiling"].value == str(Estimate.from_json(ceiling))


@pytest.mark.parametrize(
    ("size", "level"),
    [(0.0, "solid"), (0.099, "solid"), (0.1, "approximate"), (0.49, "approximate"), (0.5, "caution"), (7.0, "caution")],
)
def test_an_error_is_badged_by_its_size(size: float, level: str) -> None:
    """By the rule that the page states."""
    assert told(errors={"system": size})["System error"].level == level
    assumed = told(errors={"config": size}, optimizer_assumption="sgd")
    assert assumed["Config error"].level == level


def test_a_ceiling_that_nobody_can_read_is_not_measured() -> None:
    for ceiling in ("high", 0.9, {"value": 1.0}, None):
        assert told(ceiling=ceiling)["Ceiling"].value == "not measured"


def test_agreement_is_trusted_no_further_than_the_ceiling() -> None:
    good, poor = Estimate(0.97, 0.95, 0.99), Estimate(0.6, 0.2, 0.8)
    for agreement, ceiling, level in ((good, good, "solid"), (good, poor, "caution"), (poor, good, "caution")):
        measured = Measured(agreement=agreement, ceiling=ceiling, conclusion="So and so.")
        assert told(**measured.to_json())["Measured"].level == level
    assert told(**Measured(agreement=good, conclusion="So.").to_json())["Measured"].level == "solid"
    assert told(conclusion="Someone's own words.")["Measured"].level == "unknown"
    earlier = "Scores of 'finite' do not reliably rank removals (0.310 [-0.100, 0.600]); do not act on single scores."
    assert told(conclusion=earlier)["Measured"].level == "caution"


def test_the_config_error_is_one_of_scores_that_assume_another_optimizer() -> None:
    followed = told(errors={"config": 0.98}, optimizer="AdamW")
    assert "Config error" not in followed and "98 %" not in {item.value for item in followed.values()}
    assert (
        followed["Optimizer"].value == "AdamW"
        and "plain SGD differ from these by 98 %" in followed["Optimizer"].meaning
    )
    assumed = told(errors={"config": 0.98}, optimizer="AdamW", optimizer_assumption="sgd")
    assert assumed["Config error"] == Trust(
        "Config error", "98 %", "caution", "These scores take the run for one of plain SGD, which it was not."
    )
    assert assumed["Optimizer"].value == "SGD assumed"


@pytest.mark.parametrize(
    ("removals", "value", "words"),
    [
        (
            {"by": "shares", "reason": None, "verified": 3, "largest_error": 2.1e-7},
            "verified",
            "removal verified on 3 of 3 samples, largest relative error 2e-7",
        ),
        (
            {"by": "shares", "reason": None, "verified": 1, "largest_error": 0.0},
            "verified",
            "removal verified on 1 of 1 sample, largest relative error 0",
        ),
        (
            {"by": "rerun", "reason": "no rule gives shares of Mixer.", "verified": 0, "largest_error": 0.0},
            "measured",
            "removals measured by evaluating each step without the sample, because no rule gives shares of Mixer",
        ),
        (
            {"by": "shares", "reason": "the training step draws random numbers", "verified": 0, "largest_error": 0.0},
            "not verified",
            "removals not verified: the training step draws random numbers",
        ),
        (
            {"by": "shares", "reason": None, "verified": 0, "largest_error": 0.0},
            "not verified",
            "removals not verified",
        ),
    ],
)
def test_removals_are_told_in_plain_words(removals: dict[str, Any], value: str, words: str, tmp_path: Path) -> None:
    report = some_report()
    report.metadata["removals"] = removals
    assert words in repr(report) and "\n" not in repr(report)
    item = next(item for item in trust(report) if item.name == "Removals")
    assert item.value == value and item.meaning == f"{words[0].upper()}{words[1:]}."
    assert item.meaning in report.to_html(tmp_path / "report.html").read_text()
    assert (item.level == "unknown") == (value == "not verified")


def test_provenance_comes_back_from_json() -> None:
    whole = Provenance(
        module="M",
        record="replay",
        compression="auto",
        precision="32-true",
        versions={"torch": "2"},
        optimizer="AdamW",
        curvature="hessian",
        response="finite",
        memory_window=8,
        counterfactual="drop",
        steps=12,
        coverage=Coverage(0.5, 5, 6, 10, {"w": 0.5}, ["head.*"]),
        removals=RemovalSummary("shares", None, 3, 1e-7),
        replay_drift={"4": 1e-6},
    )
    assert Provenance.from_json(whole.to_json()) == whole
    assert "removals" not in Provenance(record="gradients").to_json()
    measured = Measured({"config": 0.9}, Estimate(0.9, 0.8, 1.0), None, "So.")
    assert Measured.from_json(measured.to_json()) == measured


def test_the_page_has_a_word_on_every_curvature() -> None:
    for name in CURVATURES:
        assert told(curvature=name)["Curvature"].meaning
