"""What every test starts from."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import random
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

gc.disable()  # while modules are imported, nothing becomes garbage

# Each trainer asks every installed package whether it has callbacks; no answer changes while tests run.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


def pytest_collection_finish() -> None:
    """What was imported stays: each later collection would go through the half a million objects of it again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process of tests has the browser, and that of the site another."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()) and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same random numbers whichever tests ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, where one is installed."""
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on the path")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed; it is in the extra 'browser'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()
