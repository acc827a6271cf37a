"""Importing the package costs little beyond Lightning."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("jinja2", "matplotlib", "pandas", "pyarrow", "scipy", "transformers")
CODE = f"""
import gc
gc.disable()  # it takes a quarter of the time of an import
import sys
import lightning
import torch
heavy, before = {HEAVY!r}, set(sys.modules)
import lightning_influence
every = [getattr(lightning_influence, name) for name in lightning_influence.__all__]
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


SHOWN = """
import gc
gc.disable()
import sys
import tempfile
import torch
from torch.utils.data import TensorDataset
from lightning_influence.report import InfluenceReport
report = InfluenceReport.from_rows(torch.arange(4), torch.arange(4), torch.randn(4, 1))
data = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4))
with tempfile.TemporaryDirectory() as folder:
    report.save(f"{folder}/report.safetensors")
    read = InfluenceReport.load(f"{folder}/report.safetensors")
    read.to_html(f"{folder}/report.html", data=data)
    read.plot.samples(data, k=2)
parts = [name.split(".") for name in sys.modules]
print(*sorted({part[1] for part in parts if part[0] == "lightning_influence" and len(part) > 1}))
print("lightning" in sys.modules or "pytorch_lightning" in sys.modules)
"""


def test_a_report_shows_a_sample_without_replay_and_without_lightning() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWN], capture_output=True, text=True, check=True)
    rooms, lightning = done.stdout.splitlines()
    assert set(rooms.split()) == {"core", "errors", "log", "report", "run"}
    assert lightning == "False"
