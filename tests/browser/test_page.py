"""The page around the nodes: values that stay, help, error dialog, languages."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

import pytest

from browsing import READY, alerts, drop, load, open_page, run, saved_picture, screenshot, shipped

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
PHRASES = {path.stem: json.loads(path.read_text("utf-8")) for path in (ROOT / "locales").glob("*.json")}


def values(page) -> dict[str, dict]:
    """Every widget in the graph: {node id: {widget: value}}."""
    return page.evaluate(
        """() => Object.fromEntries(app.graph._nodes.map(node => [node.id, Object.fromEntries(
            (node.widgets ?? []).filter(w => w.serialize !== false).map(w => [w.name, w.value]))]))"""
    )


def test_widgets_keep_their_values_through_saving_and_a_reload(page):
    """One of each of our nodes, every widget set to something that is not its default."""
    load(page, {"nodes": [], "links": [], "last_node_id": 0, "last_link_id": 0, "version": 0.4})
    unchanged = page.evaluate(
        """() => {
            const unchanged = []
            const change = ({type, value, options}) => {
                if (type === 'combo') return options.values[(options.values.indexOf(value) + 1) % options.values.length]
                if (type === 'toggle') return !value
                if (type === 'number') return value < options.max ? Math.min(options.max, value + 1) : options.min
                return value + ' ä "b" {c}' + (type === 'customtext' ? '\\nd' : '')
            }
            for (const type of Object.keys(LiteGraph.registered_node_types).filter(type => type.startsWith('Attune'))) {
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                for (const widget of node.widgets ?? []) {
                    const before = widget.value
                    widget.value = change(widget)
                    if (widget.value === before && widget.options.values?.length !== 1) unchanged.push(`${type}.${widget.name}`)
                }
            }
            return unchanged
        }"""
    )
    before = values(page)
    assert len(before) == 40 and unchanged == []
    saved = page.evaluate("() => JSON.stringify(app.graph.serialize())")
    page.reload()
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(2000)  # newer pages then open what was open before
    drop(page, "saved.json", saved.encode())
    assert values(page) == before and alerts(page) == []


def test_a_picture_brings_its_profile_along(page, dev, server):
    """Saved with a profile of the user's, its file deleted, dropped again: it runs and saves the profile again."""
    path = server.folder / "models/attune" / f"test {secrets.token_hex(8)}.json"
    published = json.loads((ROOT / "models/profiles/ays_sd15.json").read_text("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**published, "name": "mine"}), "utf-8")
    graph = shipped("apply_profile")
    (loader,) = (node for node in graph["nodes"] if node["type"] == "AttuneLoadProfile")
    loader["widgets_values"] = [path.name]
    try:
        load(page, graph)
        picture = saved_picture(server, run(page, dev, server.url))
    finally:
        path.unlink()
    for _ in range(2):
        drop(page, "picture.png", picture)
        assert alerts(page) == []
        picture = saved_picture(server, run(page, dev, server.url))


def test_the_info_button_of_a_node_shows_our_help(page, tmp_path):
    load(page, shipped("apply_profile"))
    help_page = (ROOT / "web/docs/AttuneApplyProfile.md").read_text("utf-8")
    page.evaluate(
        """() => { const node = app.graph._nodes.find(n => n.type === 'AttuneApplyProfile')
            app.canvas.selectNode(node); app.canvas.centerOnNode(node) }"""
    )
    button = page.get_by_test_id("info-button")
    button.dispatch_event("click")
    content = page.locator(".node-help-content .markdown-content")
    content.wait_for(timeout=10_000)
    page.wait_for_function(
        "() => document.querySelector('.node-help-content h1')?.innerText === 'Attune Apply Profile'"
    )
    shown = content.inner_text()
    bold = re.findall(r"\*\*([^*]+)\*\*", help_page)
    assert len(bold) >= 3
    for said in bold:
        assert said.split("\n")[0] in shown
    assert content.locator("table").count() == len(re.findall(r"^\|[-|]+\|$", help_page, re.M))
    page.wait_for_function("() => document.querySelector('.node-help-content img')?.naturalWidth > 100")
    screenshot(page, "help", tmp_path)
    button.dispatch_event("click")  # closes the panel again


def test_an_error_of_ours_is_shown_as_a_sentence(page, tmp_path):
    graph = shipped("aligned_ksampler")
    (node,) = (node for node in graph["nodes"] if node["type"] == "AttuneKSampler")
    node["widgets_values"] = ["AYS SVD" if value == "auto" else value for value in node["widgets_values"]]
    load(page, graph)
    page.evaluate("() => app.queuePrompt(0, 1)")
    details = "button:has-text('View details'), button:has-text('See Errors')"  # newer pages: one click away
    said = "document.body.innerText.includes('starts at sigma 700')"
    page.wait_for_function(f"() => {said} || document.body.innerText.includes('View details')", timeout=60_000)
    if not page.evaluate(f"() => {said}"):
        page.locator(details).first.click()
        page.wait_for_function(f"() => {said}", timeout=10_000)
    screenshot(page, "error", tmp_path)
    page.keyboard.press("Escape")


def test_a_german_browser_sees_german_nodes(browser, server, tmp_path):
    """German, because this frontend overwrites what packs say in the languages that it brings itself (its issue 6748).

    Newer ones do not, and know their own languages alone: German is none of them, so there French is asked for.
    """
    page, german = open_page(browser, server.url, locale="de-DE"), PHRASES["de"]
    if page.evaluate("() => app.extensionManager.setting.get('Comfy.Locale')") == "en":
        page.close()
        page, german = open_page(browser, server.url, locale="fr-FR"), PHRASES["fr"]
    load(page, shipped("apply_profile"))
    node = page.evaluate(
        """() => { const {title, inputs, outputs, widgets, constructor} =
                app.graph._nodes.find(n => n.type === 'AttuneApplyProfile')
            return {title, category: constructor.category, help: constructor.nodeData.description,
                sockets: [...inputs, ...outputs].map(s => s.localized_name), widgets: widgets.map(w => w.label),
                options: widgets.map(w => w.value).filter(v => typeof v === 'string')} }"""
    )
    names = german["names"]
    assert node["title"] == german["nodes"]["Attune Apply Profile"]
    assert node["category"].split("/") == [german["menu"][part] for part in ("attune", "profiles")]
    said = json.loads((ROOT / "locales/en/main.json").read_text("utf-8"))["nodeDefs"]["AttuneApplyProfile"][
        "description"
    ]
    assert node["help"] == german["texts"][said] != said
    assert {names[name] for name in ("model", "profile", "latent", "steps", "report")} <= set(node["sockets"])
    assert node["widgets"] == [
        names[name]
        for name in ("steps", "denoise", "denoise_mode", "resolution_policy", "strength", "speed", "fidelity")
    ]
    assert node["options"] == ["exact", "ignore"]
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    screenshot(page, "german", tmp_path)
    page.close()


def test_every_language_is_served(dev, server):
    served = dev.ask(f"{server.url}/i18n")
    for language, book in PHRASES.items():
        node = served[language]["nodeDefs"]["AttuneScheduler"]
        assert node["display_name"] == book["nodes"]["Attune Scheduler"]
        assert node["inputs"]["steps"]["name"] == book["names"]["steps"]
    assert served["en"]["nodeDefs"]["AttuneScheduler"]["inputs"]["steps"]["name"] == "steps"
