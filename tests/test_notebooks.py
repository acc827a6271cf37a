"""The notebooks are those of the scripts, and run."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
SMALL: dict[str, dict[str, Any]] = {
    "digits_mlp": {"n_train": 64, "epochs": 1, "width": 8},
    "mnist_cnn": {"n_train": 128, "epochs": 2},
}
WANTED = ("nbclient", "nbformat", "ipykernel")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in WANTED), reason="the extra 'docs' is not installed"
)


def sources(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("name", SMALL)
def test_notebooks_are_made_of_the_scripts_as_they_are(name: str) -> None:
    import nbformat

    stored = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    nbformat.validate(stored)
    assert sources(stored) == sources(NOTEBOOKS["made"](name)), "run python docs/notebooks.py"
    script = (ROOT / "examples" / f"{name}.py").read_text()
    code = [line.strip() for cell in stored.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    body = script.partition("parse_args(argv)")[2].partition("    return ")[0]
    said = {line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith("#")}
    assert len(said) > 10 and said <= set(code), "nothing that the script does is left out"
    assert stored.cells[-1].outputs, "it was run"


@pytest.mark.parametrize("name", SMALL)
def test_notebooks_run(name: str, tmp_path: Path) -> None:
    done = NOTEBOOKS["run"](NOTEBOOKS["made"](name, **SMALL[name]), tmp_path)
    n = SMALL[name]["n_train"]
    text = NOTEBOOKS["rendered"](done)
    assert (tmp_path / "runs" / name / "scores.csv").read_text().count("\n") == n + 1
    shown = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" for output in shown)
    if name == "mnist_cnn":
        assert "data:image/png;base64," in text and f"of {n} labels are wrong" in text and "relative_harm" in text
    else:
        assert f"{n} samples, 1 query" in text and "most helpful" in text


def test_settings_that_an_example_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="n_train, epochs, width, out"):
        NOTEBOOKS["made"]("digits_mlp", samples=3)


def test_every_notebook_is_tested() -> None:
    assert NOTEBOOKS["SHOWN"].keys() == SMALL.keys() == {p.stem for p in (ROOT / "examples").glob("*.ipynb")}
