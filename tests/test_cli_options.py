"""What a verb can be told in Python, the command line can be told, too."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest

import lightning_influence as li
from lightning_influence.cli import VERBS

PYTHON: dict[str, Callable[..., Any]] = {
    "attribute": li.attribute,
    "report": li.InfluenceReport.to_html,
    "check": li.check_faithfulness,
    "proxy": li.error_proxy,
    "suspects": li.suspects,
    "select": li.InfluenceReport.select,
    "clean": li.clean,
    "compare": li.compare,
    "tune": li.tune_horizon,
}
NO_VERB = {"inspect": "says what a log holds; in Python its reader does"}
CALLED = {"path": "out", "dynamics": "log", "make_model": "model"}
EXCEPTIONS = {
    ("attribute", "queries"): "those of val_dataloader",
    ("check", "queries"): "those of val_dataloader",
    ("proxy", "queries"): "those of val_dataloader",
    ("clean", "queries"): "those of val_dataloader",
    ("tune", "queries"): "half of val_dataloader",
    ("tune", "held_out"): "the other half",
    ("tune", "target"): "the old word for queries",
    ("attribute", "fabric"): "processes that a script has launched",
    ("report", "queries"): "those of a script, whose columns the page shows",
    ("report", "tokens"): "scores of chosen texts, which a script has made",
}
"""Options of Python that the command line does not have, and why."""


def command(name: str) -> Callable[..., Any]:
    return next(verb for verb in VERBS if verb.__name__ == name)


def test_every_verb_has_its_command_and_every_command_its_verb() -> None:
    assert {verb.__name__ for verb in VERBS} == PYTHON.keys() | NO_VERB.keys()


@pytest.mark.parametrize("name", PYTHON)
def test_every_option_of_python_is_one_of_the_command_line(name: str) -> None:
    ours, theirs = signature(command(name)).parameters, signature(PYTHON[name]).parameters
    missing = {
        option
        for option, parameter in theirs.items()
        if option != "self"
        and option not in ours
        and CALLED.get(option) not in ours
        and parameter.kind is not parameter.VAR_KEYWORD
        and (name, option) not in EXCEPTIONS
    }
    assert not missing, f"give lightning-influence {name} {missing}, or say in EXCEPTIONS why not"


@pytest.mark.parametrize("name", PYTHON)
def test_defaults_are_the_same(name: str) -> None:
    """Except where the command line shows part of a table, reads it from a file, or has to name the file that it writes."""
    ours, theirs = signature(command(name)).parameters, signature(PYTHON[name]).parameters
    own = {("suspects", "k"), ("check", "dtype"), ("check", "estimators"), ("tune", "make_model")}
    for option, parameter in theirs.items():
        given = ours.get(option)
        if given is None or (name, option) in own or parameter.default is parameter.empty:
            continue
        told = list(given.default) if isinstance(given.default, tuple | list) else given.default
        meant = list(parameter.default) if isinstance(parameter.default, tuple | list) else parameter.default
        assert told == meant, f"--{option} of {name} is {told!r} by default, and in Python {meant!r}"


def test_exceptions_are_needed() -> None:
    for name, option in EXCEPTIONS:
        assert option in signature(PYTHON[name]).parameters and option not in signature(command(name)).parameters
