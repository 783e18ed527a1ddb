"""One browser and one page for each file here; Playwright's event loop must end before host tests need theirs."""

from __future__ import annotations

import os

import pytest

from browsing import FLAGS, open_page


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM_PATH"], args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, server):
    return open_page(browser, server.url)
