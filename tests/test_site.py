"""The site of the documentation: it builds without a warning, and a reader without a network misses nothing."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
WANTED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in WANTED), reason="the extra 'docs' is not installed"
)


class Fetched(HTMLParser):
    """What a browser loads with a page, and what else is looked for in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        loaded = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "srcset"}
        if tag in loaded and given.get(loaded[tag]):
            self.urls.append(str(given[loaded[tag]]))


in_one_process = pytest.mark.xdist_group("site")  # which builds it once


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@in_one_process
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        for url in Fetched(page.read_text()).urls:
            if url.startswith("data:"):  # in the page itself
                continue
            assert "//" not in url, f"{page.name} loads {url}"
            if page.name != "404.html":  # whose paths are those of a server
                assert (page.parent / url.split("#")[0]).exists(), f"{page.name} loads {url}, which is not there"
    assert "mermaid" not in (site / "index.html").read_text(), "its script would be fetched"


@in_one_process
def test_a_reader_searches_reads_in_the_dark_and_on_a_phone(site: Path, browser: Any) -> None:
    """On pages that are opened from a folder, as no server gives them."""
    problems: list[str] = []
    page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: problems.append(asked.url) if asked.url.startswith("http") else None)
    page.goto((site / "index.html").as_uri())

    page.fill("input.md-search__input", "margin")
    hit = page.locator(".md-search-result__link").first
    hit.wait_for(timeout=20_000)
    assert page.locator(".md-search-result__link").count() > 1
    assert (site / hit.get_attribute("href").partition("#")[0].partition("?")[0].rpartition("/")[2]).exists()

    page.goto((site / "howto.html").as_uri())
    blocks = page.locator("div.highlight pre").count()
    page.locator("button[data-clipboard-target], .md-code__button[data-md-type=copy]").first.wait_for(
        state="attached", timeout=20_000
    )
    copies = page.locator("button[data-clipboard-target], .md-code__button[data-md-type=copy]").count()
    assert copies == blocks > 5

    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ground} !== '{light}'")
    red, green, blue = (int(part) for part in re.findall(r"\d+", page.evaluate(ground))[:3])
    assert red + green + blue < 200 < sum(int(part) for part in re.findall(r"\d+", light)[:3])

    page.set_viewport_size({"width": 390, "height": 844})
    for name in [path.relative_to(site) for path in sorted(site.rglob("*.html")) if path.name != "404.html"]:
        page.goto((site / name).as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        wide = "[...document.querySelectorAll('pre')].map(each => each.getBoundingClientRect().right)"
        ends = page.evaluate(wide)
        assert max(ends, default=0) <= 390, f"{name}: a block of code ends at {max(ends)}"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"{name} is wider than a phone"
    page.close()
    assert not problems


@in_one_process
def test_formulas_and_the_diagram_are_drawn_by_the_browser_itself(site: Path) -> None:
    method = (site / "method.html").read_text()
    assert "math" in Fetched(method).tags and "$$" not in method and "\\theta" not in method.split("<math")[0]
    assert "svg" in Fetched((site / "index.html").read_text()).tags
    assert (site / "search" / "search_index.js").exists(), "the search works from a file"


def test_formulas_are_mathml_and_code_is_left_alone() -> None:
    typeset = runpy.run_path(str(ROOT / "docs" / "formulas.py"))["typeset"]
    assert typeset("so $x^2$.") == (
        'so <span class="formula"><math xmlns="http://www.w3.org/1998/Math/MathML" display="inline"><mrow><msup><mi>x</mi>'
        "<mn>2</mn></msup></mrow></math></span>."
    )
    assert typeset("$$\na\n$$").startswith("<math") and 'display="block"' in typeset("$$a$$")
    for code in ("`$HOME` and `$x$`", "```console\necho $A $B\n```", "costs 5 $ a month"):
        assert typeset(code) == code
