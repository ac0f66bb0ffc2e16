"""The browser of all tests here."""

from __future__ import annotations

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing: `make test-browser` installs it"
    )
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.fail("there is no chromium: install it, or set CHROMIUM to the path of a Chrome or Chromium.")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium)
        yield started
        started.close()
