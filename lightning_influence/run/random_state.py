"""The states of the random number generators as tensors: read, and put back for a while."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_random_state() -> dict[str, Tensor]:
    """States of Python's, NumPy's, torch's and, where it is in use, the current CUDA device's generator.

    The tensors are not to be written to: where nothing drew from a generator, they are those of the last call.
    """
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words = np.asarray(keys, dtype=np.uint32).tobytes()
    state = {**_python(*random.getstate()[1:]), **_numpy(words, position, has_gauss, cached)}
    state["torch"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


@lru_cache(maxsize=1)
def _python(words: tuple[int, ...], gauss: float | None) -> dict[str, Tensor]:
    return {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }


@lru_cache(maxsize=1)
def _numpy(keys: bytes, position: int, has_gauss: int, cached: float) -> dict[str, Tensor]:
    words = np.append(np.frombuffer(keys, dtype=np.uint32), [position, has_gauss])
    return {
        "numpy": torch.from_numpy(words.astype(np.int64)),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }


def write_random_state(state: Mapping[str, Tensor]) -> None:
    """Put a state that `read_random_state` gave back in force."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def random_state(state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Run under a recorded state (or the present one, for None) and leave the generators as they were."""
    before = read_random_state()
    try:
        if state is not None:
            write_random_state(state)
        yield
    finally:
        write_random_state(before)


@contextmanager
def generator_as_it_was(loader: Any) -> Iterator[None]:
    """A loader may be read without moving on the generator it was given, which it may share with another."""
    generator = getattr(loader, "generator", None)
    before = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None:
            generator.set_state(before)


_LOOKED_THROUGH = 2000  # objects that a dataset may consist of


@contextmanager
def own_generators_as_they_were(*owners: Any) -> Iterator[None]:
    """Generators that objects hold, such as a dataset or its transforms, are afterwards as they were, and so are the owners' attributes."""
    attributes = [(vars(owner), dict(vars(owner))) for owner in owners if hasattr(owner, "__dict__")]
    undo = [put_back for owner in owners for put_back in _generators_in(owner)]
    try:
        yield
    finally:
        for held, before in attributes:
            held.update(before)
        for put_back in undo:
            put_back()


def _generators_in(root: Any) -> Iterator[Callable[[], object]]:
    """For every generator that is reachable from an object, what puts it back to its present state."""
    seen, waiting = set[int](), [root]
    while waiting and len(seen) < _LOOKED_THROUGH:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _WITHOUT_GENERATORS):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Generator):
            yield partial(thing.set_state, thing.get_state())
        elif isinstance(thing, random.Random):
            yield partial(thing.setstate, thing.getstate())
        elif isinstance(thing, np.random.RandomState):
            yield partial(thing.set_state, thing.get_state())
        elif isinstance(thing, np.random.Generator):
            yield partial(setattr, thing.bit_generator, "state", thing.bit_generator.state)
        elif isinstance(thing, (list, tuple, dict)):
            if len(thing) < _LOOKED_THROUGH:  # longer ones hold data
                waiting += thing.values() if isinstance(thing, dict) else thing
        elif isinstance(thing, MethodType):
            waiting.append(thing.__self__)
        elif isinstance(thing, partial):
            waiting += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, FunctionType):
            waiting += [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        elif hasattr(thing, "__dict__"):
            waiting.append(vars(thing))


_WITHOUT_GENERATORS = (str, bytes, int, float, type(None), Tensor, np.ndarray, type, ModuleType)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # an empty cell
        return False
