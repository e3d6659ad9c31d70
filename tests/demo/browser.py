"""A page in a headless browser that reaches nobody but the page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hf_fedmoe.demo import page, serve


CHROMIUM = shutil.which("chromium")
SWITCHES = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def need_a_browser() -> None:
    """Skips the test where Gradio, Playwright or Chromium is missing."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")


@contextmanager
def opened(model: str, port: int) -> Iterator[Any]:
    """The page of a model; fails if it asked another machine for anything, or wrote an error to the console."""
    from playwright.sync_api import sync_playwright

    blocks = page(model)
    address = serve(blocks, port, wait=False)
    asked, errors = [], []
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
            shown = browser.new_page(viewport={"width": 1200, "height": 1000})
            shown.set_default_timeout(60_000)
            shown.on("request", lambda request: asked.append(request.url))
            shown.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
            shown.goto(address)
            yield shown
            browser.close()
    finally:
        blocks.close(verbose=False)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert asked and errors == []
