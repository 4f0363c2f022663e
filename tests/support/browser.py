"""A browser for tests of pages; they are skipped where there is none."""

import shutil

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"desk": 1280, "phone": 390}
"""Widths of windows in pixels."""


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, driven with playwright."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="a browser is driven with playwright"
    )
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(_NAMES)} is here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
