"""The rooms import only from the rooms below them."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

HOUSE = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "house.py"))
PACKAGE, FLOORS, imports = HOUSE["PACKAGE"], HOUSE["FLOORS"], HOUSE["imports"]


DOORS = {"__init__", "__main__"}
"""The package itself, and ``python -m`` of it."""


def test_imports_go_one_way() -> None:
    upward = [
        (file, imported)
        for file, room, imported in imports()
        if room not in DOORS and FLOORS.index(imported) > FLOORS.index(room)
    ]
    assert not upward


def test_every_room_is_on_a_floor() -> None:
    rooms = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - DOORS == set(FLOORS)


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


ADAPTERS = {
    "run/lightning_task.py": "a LightningModule as a Task",
    "run/trainer.py": "what a Trainer says of a run",
}
ROOMS_OF_LIGHTNING = {
    "lightning": "the callbacks and the datamodule",
    "cli": "builds modules as LightningCLI does",
    "selection": "decides inside a Trainer's run: its loader is the Trainer's, its look-ahead reads the Trainer's schedules",
}
HOOKS = {"training_step", "configure_optimizers", "transfer_batch_to_device", "_trainer"}


def knows_lightning(tree: ast.AST) -> bool:
    """Whether a file imports Lightning, for annotations too, or asks a module for what only a LightningModule has."""
    for node in ast.walk(tree):
        imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        imported += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        if any(name.partition(".")[0] in ("lightning", "pytorch_lightning") for name in imported):
            return True
        if isinstance(node, ast.Attribute) and node.attr in HOOKS:
            return True
    return False


def test_only_the_adapters_know_lightning() -> None:
    knowing = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if knows_lightning(ast.parse(path.read_text()))
    }
    assert ADAPTERS.keys() <= knowing, "what is looked for is found"
    outside = {file for file in knowing if file.partition("/")[0].removesuffix(".py") not in ROOMS_OF_LIGHTNING}
    assert outside == ADAPTERS.keys()


FILLERS = {"found", "told", "here", "bent", "some"}
"""Names that say nothing of what they hold."""


def named(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What a file names: variables, attributes that are set, arguments, functions and classes, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), node.lineno
        elif isinstance(node, (ast.arg, ast.FunctionDef, ast.ClassDef)):
            yield (node.arg if isinstance(node, ast.arg) else node.name), node.lineno


def test_a_name_says_what_it_holds() -> None:
    filler = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name, line in named(ast.parse(path.read_text()))
        if name.strip("_") in FILLERS
    ]
    assert not filler


def test_a_public_class_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: files for name, files in places.items() if len(files) > 1}
