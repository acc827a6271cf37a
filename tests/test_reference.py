"""The API reference names what is public, where it lives."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_influence

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
NAMES = re.findall(r"^::: (\S+)$", PAGE.read_text(), flags=re.MULTILINE)
PACKAGE = Path(lightning_influence.__file__).parent
HOMES = {
    node.name: ".".join(("lightning_influence", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
}
"""The module of every class of the package, by its name, which no other class has."""


def annotations(of: Any) -> Iterator[str]:
    """What a function, or the public methods and properties of a class, return, and the fields of a class."""
    if not inspect.isclass(of):
        yield str(inspect.signature(of).return_annotation)
        return
    for kind in of.__mro__:
        if kind.__module__.startswith("lightning_influence"):
            yield from map(str, inspect.get_annotations(kind).values())
            public = [value for name, value in vars(kind).items() if not name.startswith("_")]
            inside = [getattr(value, "fget", None) or getattr(value, "__func__", value) for value in public]
            yield from (
                str(inspect.signature(method).return_annotation) for method in inside if inspect.isfunction(method)
            )


def results() -> set[str]:
    """The classes of what the public functions and classes give, and of what these hold in turn."""
    waiting, known = [getattr(lightning_influence, name) for name in lightning_influence.__all__], set[str]()
    while waiting:
        named = {word for text in annotations(waiting.pop()) for word in re.findall(r"\w+", text)} & HOMES.keys()
        waiting += [pkgutil.resolve_name(f"{HOMES[name]}:{name}") for name in named - known]
        known |= named
    return known


def test_every_name_is_where_the_reference_says() -> None:
    for name in NAMES:
        assert pkgutil.resolve_name(name) is not None


def test_nothing_public_is_left_out() -> None:
    listed = {name.rpartition(".")[2] for name in NAMES}
    public = set(lightning_influence.__all__) - {"InfluenceError"}  # with the module of errors
    assert public | {"errors", "Fraction", "Threshold", "Soft", "Policy", "RowScores"} <= listed


def test_no_result_is_left_out() -> None:
    listed = {name.rpartition(".")[2] for name in NAMES}
    modules = {name for name in NAMES if isinstance(pkgutil.resolve_name(name), ModuleType)}
    assert {"Faithfulness", "PredictedErrors", "Tuning", "SelectionReport", "Agreement"} <= results()
    assert {name for name in results() if name not in listed and HOMES[name] not in modules} == set()


SHOWN = (
    "InfluenceReport", "attribute", "compare", "Fraction", "Threshold", "Soft", "Groups", "Agreement", "agreement_of",
    "TokenScores", "SelectionReport", "Tuning", "Cleaning",
)  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_cheap_to_show_has_an_example(name: str) -> None:
    at = next(listed for listed in NAMES if listed.rpartition(".")[2] == name)
    assert ">>>" in (pkgutil.resolve_name(at).__doc__ or ""), "an example in the docstring, which the tests run"
