"""A file of finished retrainings: one line that identifies the check, then one line per retraining."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch

from lightning_influence.errors import ConfigurationError, InfluenceError

_SUBJECT = "of"


class Results:
    """Finished retrainings in a file, so that an interrupted check can be continued.

    Args:
        subject: what is checked; its ``baseline`` holds the losses of the run trained again, one per query, which tell
            runs and queries apart.

    Raises:
        ConfigurationError: the file is of another check.
        InfluenceError: it cannot be read or written, or a line is whole and not what `keep` wrote; also raised by every
            method.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self._path, self._n_queries = path, len(subject["baseline"])
        lines = dict(self._lines())
        if not lines:
            self._append({_SUBJECT: subject})
            return
        number = min(lines)
        before = lines[number].get(_SUBJECT)
        if not _is_subject(before):
            raise self._malformed(number, "it does not say of which check the file is")
        if not _same(before, subject):
            raise ConfigurationError(
                f"results={str(path)!r} holds the retrainings of another check ({_described(before)}; here "
                f"{_described(subject)}). Give another file, or delete it."
            )

    def done(self, what: str) -> dict[str, list[float]]:
        """Effects of the removals that were measured, ``n_queries`` numbers each.

        Args:
            what: the name under which they were kept.
        """
        effects = {}
        for number, line in self._lines():
            if _SUBJECT in line:
                continue
            removal, effect = line.get("removal"), line.get("effect")
            if not isinstance(line.get("what"), str) or not isinstance(removal, str):
                raise self._malformed(number, "it does not say what was removed")
            if not _are_numbers(effect) or len(effect) != self._n_queries:
                raise self._malformed(number, f"its effect is not {self._n_queries} finite numbers, one per query")
            if line["what"] == what:
                effects[removal] = effect
        return effects

    def keep(self, what: str, removal: str, effect: list[float]) -> None:
        """Note a finished retraining."""
        self._append({"what": what, "removal": removal, "effect": effect})

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a+b") as file:
                if file.tell():  # where an earlier check was interrupted, its last line may be without an end
                    file.seek(-1, os.SEEK_END)
                    cut = file.read(1) != b"\n"
                    file.write(b"\n" if cut else b"")
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise InfluenceError(f"results={str(self._path)!r} cannot be written: {error}") from error

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The whole lines, counted from 1; the file holds what is no JSON where a check was interrupted in a line."""
        try:
            with open(self._path, "rb") as file:
                for number, text in enumerate(file, 1):
                    try:
                        line = json.loads(text)
                    except (ValueError, RecursionError):
                        continue  # its retraining is done again
                    if not isinstance(line, dict):
                        raise self._malformed(number, "it is no JSON object")
                    yield number, line
        except FileNotFoundError:
            return
        except OSError as error:
            raise InfluenceError(f"results={str(self._path)!r} cannot be read: {error}") from error

    def _malformed(self, number: int, reason: str) -> InfluenceError:
        return InfluenceError(
            f"results={str(self._path)!r}, line {number}, is not what check_faithfulness wrote: {reason}. Remove the line to "
            "retrain for it again, or give another file."
        )


def _is_subject(subject: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(subject, dict) and _are_numbers(subject.get("baseline")) and len(subject["baseline"]) > 0


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    """Whether it is a list of finite numbers that a float can hold."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return False
    try:
        return all(math.isfinite(value) for value in values)
    except OverflowError:
        return False


def _same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether results are those of the same check."""
    if any(before.get(k) != v for k, v in now.items() if k != "baseline"):
        return False
    losses, expected = (torch.tensor(subject["baseline"], dtype=torch.float64) for subject in (before, now))
    return losses.shape == expected.shape and torch.allclose(losses, expected, rtol=1e-5, atol=0)


def _described(subject: Mapping[str, Any]) -> str:
    mean = sum(subject["baseline"]) / len(subject["baseline"])
    rest = ", ".join(f"{k}={v!r}" for k, v in subject.items() if k != "baseline")
    return f"{len(subject['baseline'])} losses of mean {mean:.6g}, {rest:.300}"
