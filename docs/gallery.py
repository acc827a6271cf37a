"""Run the examples, and keep what they print and draw: ``python docs/gallery.py``; needs chromium and playwright."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
IMAGES, TEXTS = ROOT / "docs" / "images", ROOT / "docs" / "gallery"
EXAMPLES = ("demo", "digits_mlp", "mnist_cnn", "gpt2_text", "llama_lora", "plain_loop")
_NOISE = re.compile(r"it/s|INFO|[┏┃┡│└━]|params|Modules in|FLOPs")  # of the trainer


def printed(example: str, folder: Path) -> str:
    """What an example prints, run in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py")]
    run = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line for part in run.stdout.split("\n\n") for line in [*part.split("\n"), ""]]
    told = [line.rstrip() for line in lines if line == "" or not _NOISE.search(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(told)).strip() + "\n"


def pictures(folder: Path) -> None:
    """The pages of the examples, as a reader sees them."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def shoot(
            example: str, name: str, do: Callable[[Any], Any], scheme: str = "light", size: Any = (1100, 900)
        ) -> None:
            page = browser.new_page(color_scheme=scheme, viewport=dict(zip(("width", "height"), size, strict=True)))
            page.goto((folder / "runs" / example / "report.html").as_uri())
            do(page)
            page.wait_for_timeout(300)
            page.screenshot(path=IMAGES / f"{name}.png")
            page.close()

        shoot("demo", "report-light", lambda page: None)
        shoot("demo", "report-dark", lambda page: None, scheme="dark")
        shoot("demo", "report-phone", lambda page: None, size=(390, 844))
        shoot("demo", "report-query", _next_query)
        shoot("demo", "report-sample", _open)
        shoot("mnist_cnn", "report-labels", lambda page: _at(page, "#mislabelled"))
        shoot("gpt2_text", "report-tokens", lambda page: _at(page, "#tokens"))
        browser.close()


def _next_query(page: Any) -> None:
    page.get_by_role("button", name="Next").click()
    _at(page, "#samples")


def _open(page: Any) -> None:
    page.locator("#view-0 .card").first.click()
    page.wait_for_timeout(1500)  # it scrolls
    _at(page, "#all")


def _at(page: Any, part: str) -> None:
    page.evaluate(f"document.querySelector('{part}').scrollIntoView({{behavior: 'instant'}})")


if __name__ == "__main__":
    TEXTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        for example in EXAMPLES:
            (TEXTS / f"{example}.txt").write_text(printed(example, Path(made)), encoding="utf-8")
        pictures(Path(made))
