"""The pictures of the documentation, from the page that `make demo` wrote; needs chromium and playwright."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

VIEWS = {"light": ("light", 1100, 900), "dark": ("dark", 1100, 900), "phone": ("light", 390, 844)}

if __name__ == "__main__":
    page_file, folder = Path(sys.argv[1]).resolve(), Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (scheme, width, height) in VIEWS.items():
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
            page.goto(page_file.as_uri())
            page.screenshot(path=folder / f"report-{name}.png")
            if name == "light":
                page.get_by_role("button", name="Next").click()
                page.get_by_role("heading", name="Most helpful and most harmful samples").scroll_into_view_if_needed()
                page.mouse.wheel(0, 380)
                page.wait_for_timeout(300)
                page.screenshot(path=folder / "report-query.png")
        browser.close()
