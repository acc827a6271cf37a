"""The API reference names what is public, where it lives."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import lightning_influence

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
NAMES = re.findall(r"^::: (\S+)$", PAGE.read_text(), flags=re.MULTILINE)


def test_every_name_is_where_the_reference_says() -> None:
    for name in NAMES:
        assert pkgutil.resolve_name(name) is not None


def test_nothing_public_is_left_out() -> None:
    listed = {name.rpartition(".")[2] for name in NAMES}
    public = set(lightning_influence.__all__) - {"InfluenceError"}  # with the module of errors
    assert public | {"errors", "Fraction", "Threshold", "Soft", "Policy"} <= listed
    assert {"Faithfulness", "PredictedErrors", "Tuning", "SelectionReport", "Agreement", "RowScores"} <= listed
