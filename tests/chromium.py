"""A real browser for tests of pages: the chromium of the distribution, driven by playwright, without a network.

Without chromium or playwright such a test is skipped with the reason; tests/install_chromium.sh installs the browser.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

_OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")


@dataclass(frozen=True)
class Tab:
    """An open page and what went wrong in it."""

    page: Page
    errors: list[str] = field(default_factory=list)  # of scripts, and what the content policy refused


@contextmanager
def browsing(width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light") -> Iterator[Tab]:
    """A tab of a new browser, which is closed at the end.

    Args:
        width, height: of the window in CSS pixels.
        scheme: of colours, which the reader prefers.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed: tests/install_chromium.sh")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *_OFFLINE])
        try:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab = Tab(page)
            page.on("pageerror", lambda error: tab.errors.append(str(error)))
            page.on("console", lambda line: tab.errors.append(line.text) if line.type == "error" else None)
            yield tab
        finally:
            browser.close()
