"""Draw which room of the package imports which: ``python docs/house.py`` writes ``docs/images/house.svg``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_influence"
DRAWING = ROOT / "docs" / "images" / "house.svg"
FLOORS = [
    "errors",
    "words",
    "core",
    "run",
    "capture",
    "log",
    "replay",
    "live",
    "report",
    "scoring",
    "selection",
    "trust",
    "lightning",
    "cli",
]
"""The rooms from the lowest to the highest."""

_HEIGHT, _WIDTH, _TOP = 46, 420, 16  # of a floor, and of the drawing
_LEFT, _RIGHT = 10, 150  # edges of the boxes
_STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#191c20}"
    "rect{fill:#fff;stroke:#c9c5bb}path{fill:none;stroke:#1f5fd0;stroke-opacity:.55;stroke-width:1.3}"
    "marker path{fill:#1f5fd0;stroke:none}.up{stroke:#bf3b2b;stroke-opacity:1;stroke-width:2.5}"
    "@media(prefers-color-scheme:dark){text{fill:#e9e7e2}rect{fill:#1a1d21;stroke:#4a5058}"
    "path{stroke:#8db4ff}marker path{fill:#8db4ff}}"
)


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


def drawing() -> str:
    """The house as SVG: an arrow from each room to every room that it imports; one that leads up is red."""
    pairs = sorted({(room, imported) for _, room, imported in imports() if room in FLOORS and room != imported})
    arrows = [_arrow(FLOORS.index(room), FLOORS.index(imported)) for room, imported in pairs]
    height = _HEIGHT * len(FLOORS) + _TOP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
            "<title>The rooms of lightning_influence and what they import</title>",
            f"<style>{_STYLE}</style>",
            '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z"/></marker></defs>',
            *arrows,
            *(_box(floor, room) for floor, room in enumerate(FLOORS)),
            "</svg>\n",
        ]
    )


def _top(floor: int) -> int:
    return _TOP + _HEIGHT * (len(FLOORS) - 1 - floor)


def _box(floor: int, room: str) -> str:
    y = _top(floor)
    return (
        f'<rect x="{_LEFT}" y="{y}" width="{_RIGHT - _LEFT}" height="30" rx="7"/>'
        f'<text x="{(_LEFT + _RIGHT) // 2}" y="{y + 20}" text-anchor="middle">{room}</text>'
    )


def _arrow(floor: int, imported: int) -> str:
    """An arc beside the boxes, wider the further it reaches."""
    start, end = _top(floor) + 18, _top(imported) + 12
    bend = _RIGHT + 26 * abs(floor - imported) + 14
    kind = "" if imported < floor else ' class="up"'
    return f'<path{kind} marker-end="url(#end)" d="M{_RIGHT} {start}C{bend} {start} {bend} {end} {_RIGHT + 3} {end}"/>'


if __name__ == "__main__":
    DRAWING.write_text(drawing(), encoding="utf-8")
    print(f"wrote {DRAWING.relative_to(ROOT)}")
