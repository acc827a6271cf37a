"""What every test starts from."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import random

import numpy as np
import pytest
import torch

gc.disable()  # while modules are imported, nothing becomes garbage

# Each trainer asks every installed package whether it has callbacks; no answer changes while tests run.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


def pytest_collection_finish() -> None:
    """What was imported stays: each later collection would go through the half a million objects of it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same random numbers whichever tests ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
