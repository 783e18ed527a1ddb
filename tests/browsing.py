"""What a user does in the page: drop a file on the canvas, press Run, look."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path

from templates import WORKFLOWS

import pictures

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.['AttuneScheduler']"


def open_page(browser, url: str, **settings):
    page = browser.new_page(viewport={"width": 1600, "height": 900}, **settings)
    page.goto(url, timeout=120_000)
    page.wait_for_function(READY, timeout=120_000)
    return page


def shipped(name: str) -> dict:
    return json.loads(WORKFLOWS[name].read_text("utf-8"))


def load(page, workflow: dict) -> None:
    """Open a workflow without a file."""
    page.evaluate("workflow => app.loadGraphData(workflow, true, true, null)", workflow)


def drop(page, name: str, content: bytes) -> None:
    """Drop a file on the canvas, and wait until another graph has replaced the one that was there."""
    page.evaluate(
        """([name, content]) => {
            app.graph.extra.wasHereBeforeTheDrop = true
            const data = new DataTransfer()
            data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name,
                {type: name.endsWith('.png') ? 'image/png' : 'application/json'}))
            document.querySelector('#graph-canvas').dispatchEvent(
                new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: data}))
        }""",
        [name, base64.b64encode(content).decode()],
    )
    page.wait_for_function(
        "() => !app.graph.extra.wasHereBeforeTheDrop && app.graph._nodes.length && !app.extensionManager.spinner"
    )


def missing_nodes(page) -> list[str]:
    return page.evaluate("() => app.graph._nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])")


def overlaps(page) -> list[list[str]]:
    """Pairs of nodes that lie on each other, at the sizes that the page gives them; titles are above a position.

    Where the page draws nodes in Vue, their boxes are those of the document, higher and at times wider.
    """
    if page.evaluate("() => !!document.querySelector('[data-node-id]')"):
        page.wait_for_function("() => app.graph._nodes.every(n => document.querySelector(`[data-node-id='${n.id}']`))")
        page.wait_for_timeout(300)
    return page.evaluate(
        """() => { const box = node => {
                const drawn = document.querySelector(`[data-node-id='${node.id}']`)?.getBoundingClientRect()
                if (!drawn?.width) return {left: node.pos[0], right: node.pos[0] + node.size[0],
                    top: node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, bottom: node.pos[1] + node.size[1]}
                const at = 1 / app.canvas.ds.scale
                return {left: drawn.left * at, right: drawn.right * at, top: drawn.top * at, bottom: drawn.bottom * at}
            }
            const boxes = app.graph._nodes.filter(n => !n.flags.collapsed).map(n => ({name: n.title, ...box(n)}))
            return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right && b.left < a.right &&
                a.top < b.bottom && b.top < a.bottom).map(b => [a.name, b.name])) }"""
    )


def alerts(page) -> list[str]:
    """What the page complains of in its corner, such as a workflow file that breaks its schema."""
    return page.locator(".p-toast-message").all_inner_texts()


def prompt(page) -> dict:
    """What the page would queue (API format), without the titles, and the text that older pages add to PreviewAny."""
    nodes = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in nodes.values():
        if node["class_type"] == "PreviewAny":
            node["inputs"].pop("preview", None)
    return {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in nodes.items()}


def run(page, dev, url: str) -> dict:
    """Queue what is open with fresh seeds where the page would draw them, so that no cache answers for the sampler."""
    page.evaluate(
        """() => { for (const node of app.graph._nodes) for (const widget of node.widgets ?? [])
            if (widget.linkedWidgets?.some(w => w.name === 'control_after_generate')) widget.value += 1000 }"""
    )
    return queue(page, dev, url)


def queue(page, dev, url: str) -> dict:
    """Press Run, and return the history's entry when it has succeeded."""
    before = set(dev.ask(f"{url}/history"))
    page.evaluate("() => { app.canvas.pause_rendering = true; app.queuePrompt(0, 1) }")  # drawn on the same two cores
    until = time.time() + 240
    new = {}
    while time.time() < until and not new:
        new = {key: entry for key, entry in dev.ask(f"{url}/history").items() if key not in before}
        time.sleep(0.2)
    page.evaluate("() => { app.canvas.pause_rendering = false }")
    assert new, "the queued workflow did not end"
    (entry,) = new.values()
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry


def saved_picture(server, entry: dict) -> bytes:
    """The first file that a run saved."""
    return pictures.saved(server, entry)[0].read_bytes()


def fit_view(page) -> None:
    """Bring every node into sight: one that is out of sight loads no pictures."""
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")


def screenshot(page, name: str, folder: Path) -> None:
    """Keep what the page shows, in ATTUNE_SCREENSHOTS when that is set."""
    page.wait_for_timeout(500)
    picture = Path(os.environ.get("ATTUNE_SCREENSHOTS", folder)) / f"{name}.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 20_000
