"""The rooms import only from the rooms below them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_influence"
FLOORS = [
    "errors",
    "core",
    "run",
    "capture",
    "log",
    "replay",
    "report",
    "scoring",
    "selection",
    "trust",
    "lightning",
    "cli",
]


def imports() -> Iterator[tuple[str, str, str]]:
    """``(file, its room, the room that it imports)``; imports for annotations alone do not count."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE)
        room = file.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        annotations = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        ignored = {id(inner) for block in annotations for inner in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and id(node) not in ignored:
                package, *rest = node.module.split(".")
                if package == "lightning_influence" and rest:
                    yield str(file), room, rest[0]


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
