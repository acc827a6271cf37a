"""Every Python snippet of the documentation runs, page by page, on a small model and its data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, digits
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(digits(48), 8, shuffle=True)

    def val_dataloader(self) -> Any:
        x, y = digits(60).tensors
        return DataLoader(TensorDataset(x[48:], y[48:]), 12)


def make_model(lr: float = 1e-3) -> Classifier:
    return Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=lr), width=8)


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore:.*differ from those at the end:UserWarning")
def test_snippets(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model()
    x, y = digits(90).tensors
    here: dict[str, Any] = {
        "model": model,
        "datamodule": Data(),
        "make_model": make_model,
        "held_out": [(x[60:], y[60:])],
    }
    for number, code in enumerate(snippets(page)):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), here)
        if number == 0:  # pages go on training the model; what is said of the first run needs it as it was
            here["trained"] = make_model()
            here["trained"].load_state_dict(model.state_dict())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_docstrings_refer_to_sections_of_the_method_that_exist() -> None:
    titles = set(re.findall(r"^## (.+)$", (ROOT / "docs" / "method.md").read_text(), flags=re.MULTILINE))
    referred = set()
    for path in [*(ROOT / "lightning_influence").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = " ".join(path.read_text().split())
        referred |= set(re.findall(r'docs/method\.md, "([^"]+)"', text))
        assert not re.search(r"method\.md section|\bsection \d", text), f"{path.name} refers to a section by its number"
    assert referred and referred <= titles, referred - titles
