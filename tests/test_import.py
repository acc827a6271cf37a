"""Importing the package costs little beyond Lightning."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("jinja2", "matplotlib", "pandas", "pyarrow", "scipy", "transformers")
CODE = f"""
import sys
import lightning
import torch
heavy, before = {HEAVY!r}, set(sys.modules)
import lightning_influence
report = lightning_influence.InfluenceReport.from_rows(torch.arange(2), torch.arange(2), torch.ones(2, 1))
repr(report)
loaded = lambda: [name for name in heavy if name in sys.modules and name not in before]
print("imported", *loaded())
report.to_pandas()
print("used", *loaded())
"""


def test_nothing_heavy_is_loaded_before_it_is_used() -> None:
    """Beyond what torch and Lightning load themselves."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    imported, used = done.stdout.splitlines()
    assert imported == "imported"
    assert "pandas" in used.split(), "what is loaded is seen"
