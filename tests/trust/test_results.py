"""The file of finished retrainings, whatever is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_influence.errors import ConfigurationError, InfluenceError
from lightning_influence.trust.results import Results

SUBJECT = {"baseline": [1.0, 2.0], "counterfactual": "drop", "target": None}
LINE = {"what": "retraining", "removal": "3", "effect": [0.5, -0.25]}


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "done"
    results = Results(path, SUBJECT)
    results.keep("retraining", "3", [0.5, -0.25])
    results.keep("ceiling", "3", [1.0, 1.0])
    with open(path, "a") as file:
        file.write('{"what": "retrai')  # a check that was killed
    again = Results(path, SUBJECT)
    again.keep("retraining", "4", [0.0, 0.0])
    assert again.done("retraining") == {"3": [0.5, -0.25], "4": [0.0, 0.0]}
    assert again.done("ceiling") == {"3": [1.0, 1.0]}
    for other in ({**SUBJECT, "baseline": [1.0, 2.1]}, {**SUBJECT, "baseline": [1.0]}, {**SUBJECT, "target": "mean"}):
        with pytest.raises(ConfigurationError, match="retrainings of another check \\(2 losses of mean 1.5"):
            Results(path, other)


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "3",
        "null",
        "{}",
        json.dumps({**LINE, "what": 1}),
        json.dumps({**LINE, "removal": [3]}),
        json.dumps({**LINE, "effect": "0.5"}),
        json.dumps({**LINE, "effect": [0.5]}),
        json.dumps({**LINE, "effect": [0.5, "1"]}),
        json.dumps({**LINE, "effect": [0.5, True]}),
        json.dumps({**LINE, "effect": [0.5, float("nan")]}),
        json.dumps({**LINE, "effect": [0.5, 10**400]}),
        json.dumps({"what": "retraining"}),
    ],
)
def test_a_line_that_nobody_wrote_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "done"
    path.write_text(f"{json.dumps({'of': SUBJECT})}\n{json.dumps(LINE)}\n{line}\n")
    with pytest.raises(
        InfluenceError, match=f"results='{re.escape(str(path))}', line 3, is not what check_faithfulness"
    ):
        Results(path, SUBJECT).done("retraining")


@pytest.mark.parametrize("subject", ["1", "{}", '{"baseline": []}', '{"baseline": ["a"]}', '{"baseline": 3}', "null"])
def test_a_first_line_that_names_no_check_is_an_error(tmp_path: Path, subject: str) -> None:
    path = tmp_path / "done"
    path.write_text(f'{{"of": {subject}}}\n')
    with pytest.raises(InfluenceError, match="line 1, is not what check_faithfulness wrote"):
        Results(path, SUBJECT)


@pytest.mark.parametrize("text", [b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"\0" * 100])
def test_what_is_no_json_is_retrained_for(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "done"
    path.write_bytes(json.dumps({"of": SUBJECT}).encode() + b"\n" + text + b"\n" + json.dumps(LINE).encode() + b"\n")
    assert Results(path, SUBJECT).done("retraining") == {"3": [0.5, -0.25]}


def test_a_directory_is_no_file_of_results(tmp_path: Path) -> None:
    with pytest.raises(InfluenceError, match="cannot be read"):
        Results(tmp_path, SUBJECT)
