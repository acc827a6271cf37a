"""The states of the random number generators as tensors: read, and put back for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

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
