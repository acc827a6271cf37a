"""The rooms import only from the rooms below them."""

from __future__ import annotations

import runpy
from pathlib import Path

HOUSE = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "house.py"))
PACKAGE, FLOORS, imports = HOUSE["PACKAGE"], HOUSE["FLOORS"], HOUSE["imports"]


def test_imports_go_one_way() -> None:
    upward = [
        (file, imported)
        for file, room, imported in imports()
        if room != "__init__" and FLOORS.index(imported) > FLOORS.index(room)
    ]
    assert not upward


def test_every_room_is_on_a_floor() -> None:
    rooms = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOORS)


def test_the_drawing_is_of_this_house() -> None:
    drawn = HOUSE["DRAWING"].read_text(encoding="utf-8")
    assert drawn == HOUSE["drawing"](), "the imports have changed: run python docs/house.py"
    assert 'class="up"' not in drawn and drawn.count("marker-end") > len(FLOORS)


def test_a_report_needs_no_replay_to_show_a_sample() -> None:
    assert {imported for _, room, imported in imports() if room == "report"} <= {
        "errors",
        "core",
        "run",
        "log",
        "report",
    }
