"""Each shipped workflow in the real web page: opened, converted, queued, looked at."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "workflows").glob("*.json"))}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def page(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM_PATH"], args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(server.url)
        ready = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.['AttuneScheduler']"
        page.wait_for_function(ready, timeout=120_000)
        yield page
        browser.close()


def open_workflow(page, workflow) -> dict:
    """Load it and return what the page would queue (API format), with the missing node types."""
    return page.evaluate(
        """async workflow => {
            await app.loadGraphData(workflow, true, true, null)
            const missing = app.graph._nodes.map(n => n.type)
                .filter(type => !LiteGraph.registered_node_types[type])
            return {missing, prompt: (await app.graphToPrompt()).output}
        }""",
        workflow,
    )


def without_meta(prompt: dict) -> dict:
    return {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in prompt.items()}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_page_opens_it_without_a_missing_node_and_makes_the_prompt_we_test(page, name):
    opened = open_workflow(page, WORKFLOWS[name])
    assert opened["missing"] == []
    assert without_meta(opened["prompt"]) == json.loads((ROOT / "tests/prompts" / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_page_queues_it_and_shows_the_pictures(page, dev, server, name, tmp_path):
    open_workflow(page, WORKFLOWS[name])
    # A fresh seed where the page would draw one, so that the executor's cache cannot answer for the sampler.
    page.evaluate(
        """() => { for (const node of app.graph._nodes) for (const widget of node.widgets ?? [])
            if (widget.linkedWidgets?.some(w => w.name === 'control_after_generate')) widget.value += 1000 }"""
    )
    before = set(dev.ask(f"{server.url}/history"))
    page.evaluate("() => app.queuePrompt(0, 1)")
    until = time.time() + 240
    new = {}
    while time.time() < until and not new:
        new = {key: entry for key, entry in dev.ask(f"{server.url}/history").items() if key not in before}
        time.sleep(0.2)
    assert new, "the queued workflow did not end"
    (entry,) = new.values()
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    page.evaluate(
        "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"
    )  # a node out of sight loads no pictures
    savers = "app.graph._nodes.filter(n => n.type === 'SaveImage')"
    page.wait_for_function(f"() => {savers}.every(n => n.imgs?.length && n.imgs[0].complete)", timeout=30_000)
    page.wait_for_timeout(1500)
    picture = Path(os.environ.get("ATTUNE_SCREENSHOTS", tmp_path)) / f"{name}.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 20_000
    assert not page.evaluate("() => app.lastNodeErrors && Object.keys(app.lastNodeErrors).length")


def test_an_error_of_ours_is_shown_as_a_sentence(page):
    workflow = json.loads(json.dumps(WORKFLOWS["aligned_ksampler"]))
    (node,) = (node for node in workflow["nodes"] if node["type"] == "AttuneKSampler")
    node["widgets_values"] = ["AYS SVD" if value == "auto" else value for value in node["widgets_values"]]
    open_workflow(page, workflow)
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_function("() => document.body.innerText.includes('starts at sigma 700')", timeout=60_000)
    page.keyboard.press("Escape")
