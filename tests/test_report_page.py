"""The page, its parts, and what a browser makes of it."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, digits, fit, loader
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceReport, attribute
from lightning_influence.errors import ConfigurationError
from lightning_influence.render import as_html, default_render, label_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def some_report(n: int = 40, q: int = 3) -> InfluenceReport:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, q, generator=generator)
    steps = torch.arange(n) // 8
    return InfluenceReport.from_rows(
        torch.arange(n), steps, scores, metadata={"curvature": "fisher", "response": "finite"}
    )


def images(n: int = 40) -> TensorDataset:
    x, y = digits(n).tensors
    return TensorDataset(x.view(-1, 1, 8, 8), y)


def test_page_shows_the_extremes_of_every_query(tmp_path: Path) -> None:
    report = some_report()
    text = report.to_html(
        tmp_path / "deep" / "report.html", data=images(), groups=[z % 2 for z in range(40)]
    ).read_text()
    sections = text.split('<section class="view"')[1:]
    assert len(sections) == 4
    for query, section in zip([None, 0, 1, 2], sections, strict=True):
        for table in (report.top(8, query), report.bottom(8, query)):
            for row in table.itertuples():
                assert f"sample {row.sample_id} " in section and f"{row.score:+.3g}" in section
    assert text.count("data:image/png;base64,") == 4 * 16
    assert not re.search(r"(src|href)=.?(https?:|//)", text), "the page asks the network for something"
    assert "fisher" in text and "not measured" in text
    odd = report.scores.mean(1)[1::2].sum()
    assert f"{float(odd):+.3g}" in text


def test_what_users_bring_is_escaped(tmp_path: Path) -> None:
    evil = ["<script>alert(1)</script>"] * 40
    text = some_report().to_html(tmp_path / "r.html", data=evil, groups=evil, title="<b>t</b>").read_text()
    assert "<script>alert" not in text and "<b>t</b>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_samples_are_shown_as_what_they_are() -> None:
    render = default_render()
    assert "data:image/png" in as_html(render((torch.rand(1, 8, 8), 3)))
    assert "data:image/png" in as_html(render({"image": torch.rand(3, 9, 9)}))
    assert as_html(render((torch.tensor([0.5, 1.0]), 1))) == "<pre>0.5, 1</pre>"
    assert as_html(render("plain & simple")) == "<pre>plain &amp; simple</pre>"
    assert "data:image/png" in as_html(Image.new("L", (4, 4)))

    class Tokens:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    assert default_render(Tokens())({"input_ids": torch.tensor(list(b"hello"))}) == "hello"
    assert (label_of((1, torch.tensor(7))), label_of({"label": "cat"}), label_of(3)) == ("7", "cat", "")
    with pytest.raises(TypeError, match="render returned int"):
        as_html(3)  # type: ignore[arg-type]


def test_groups_have_to_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="3 samples, but sample 39"):
        some_report().to_html(tmp_path / "r.html", groups=[1, 2, 3])


def test_suspects_are_the_flipped_labels(tmp_path: Path) -> None:
    x, y = digits(360).tensors
    flipped = torch.arange(0, 300, 10)
    labels = y[:300].clone()
    labels[flipped] = (labels[flipped] + 5) % 10
    module = Classifier(lambda m: torch.optim.AdamW(m.parameters(), lr=5e-3), width=32)
    log = tmp_path / "log"
    fit(module, loader(TensorDataset(x[:300], labels), 32), InfluenceCallback(log, record="replay"), max_epochs=3)
    queries = DataLoader(TensorDataset(x[300:], y[300:]), 100)
    report = attribute(log, queries=queries, model=module, response="tangent", progress=False)
    first = report.suspects(60)
    assert sum(z in flipped.tolist() for z in first.sample_id) > 0.4 * len(flipped)  # by chance 0.2
    assert first.suspicion.is_monotonic_decreasing
    assert (report.suspects().harmed > 0).all()


def test_figures() -> None:
    report = some_report()
    plots = report.plot
    bars = plots.histogram().axes[0].patches
    assert sum(b.get_height() for b in bars) == 40
    helped = sum(b.get_height() for b in plots.over_time().axes[0].patches)
    assert helped == pytest.approx(float(report.rows.scores.mean(1).sum()), rel=1e-4)
    assert len(plots.samples(images(), k=3).axes) == 6
    with pytest.raises(ConfigurationError, match="an image has 2 or 3"):
        plots.samples(digits(40))
    assert "most harmful" in report._repr_html_()


def test_the_callback_writes_the_page_and_logs_it(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    x, y = digits(60).tensors
    val = DataLoader(TensorDataset(x[40:], y[40:]), 20)
    influence = InfluenceCallback(tmp_path / "log", record="replay", report=True)
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    fit(Classifier(), loader(TensorDataset(x[:40], y[:40]), 8), influence, val=val, logger=loggers, log_every_n_steps=1)
    assert influence.report is not None and len(influence.report.sample_ids) == 40
    assert (tmp_path / "log" / "report.html").exists()
    assert InfluenceReport.load(tmp_path / "log" / "report.safetensors").scores.shape == (40, 1)
    assert "influence/most_harmful" in (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text()
    events = next((tmp_path / "tb").rglob("events*"))
    assert b"influence/histogram" in events.read_bytes()


@pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="needs chromium and playwright"
)
def test_a_browser_sorts_and_searches(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    report = some_report()
    path = report.to_html(tmp_path / "report.html", data=images())
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page: Any = browser.new_page(viewport={"width": 390, "height": 844})
        errors: list[str] = []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: errors.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "scrolls sideways on a phone"

        page.select_option("#view", "2")
        assert page.locator("#view-2").is_visible() and not page.locator("#view-0").is_visible()

        heads = page.locator("#samples th button")
        heads.nth(1).focus()
        page.keyboard.press("Enter")
        scores = [float(t) for t in page.locator("#samples tbody tr td:nth-child(2)").all_inner_texts()]
        assert scores == sorted(scores, reverse=True)
        heads.nth(0).click()
        heads.nth(0).click()
        ids = [int(t) for t in page.locator("#samples tbody tr td:nth-child(1)").all_inner_texts()]
        assert ids == sorted(ids) == list(range(40))
        page.fill("#search", "17")
        assert [r.strip() for r in page.locator("#samples tbody tr:visible td:nth-child(1)").all_inner_texts()] == [
            "17"
        ]
        assert page.locator("#count").inner_text() == "1 of 40"
        assert errors == []
        browser.close()
