"""Each shipped workflow in the real web page: dropped, converted, queued, looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from templates import TITLES, WORKFLOWS

import pictures
from browsing import (
    alerts,
    drop,
    fit_view,
    load,
    missing_nodes,
    overlaps,
    prompt,
    run,
    saved_picture,
    screenshot,
    shipped,
)
from nightly import LONG, REPEATED, daily

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
FITS = ["AttuneFitSampler", "AttuneFitNoiseShift", "AttuneFitPropagation"]
SHOWN = f"app.graph._nodes.filter(n => {['SaveImage', 'PreviewImage', *FITS]}.includes(n.type) && n.mode === 0)"
# A classic node keeps its pictures; 1.45.21 has those of a batch in the document alone where it draws nodes in Vue.
LOADED = "n => [...n.imgs ?? [], ...document.querySelectorAll(`[data-node-id='${n.id}'] img`)][0]?.complete"


@pytest.mark.parametrize("name", daily(WORKFLOWS, *TITLES))
def test_dropped_on_the_page_it_lacks_no_node_and_makes_the_prompt_we_test(page, name):
    drop(page, WORKFLOWS[name].name, WORKFLOWS[name].read_bytes())
    assert missing_nodes(page) == [] and alerts(page) == [] and overlaps(page) == []
    want = json.loads((ROOT / "tests/prompts" / f"{name}.json").read_text("utf-8"))
    got = prompt(page)
    for key in want.keys() & got.keys():
        if not want[key]["class_type"].startswith("Attune"):  # newer hosts' own nodes have more widgets
            inputs = got[key]["inputs"]
            got[key]["inputs"] = {one: inputs[one] for one in inputs if one in want[key]["inputs"]}
    assert got == want


@pytest.mark.parametrize("name", daily(WORKFLOWS, *(set(WORKFLOWS) - {*REPEATED, *LONG})))
def test_the_page_queues_it_and_shows_the_pictures(page, dev, server, name, tmp_path):
    load(page, shipped(name))
    entry = run(page, dev, server.url)
    pictures.check(pictures.saved(server, entry), entry["prompt"][2])
    fit_view(page)
    page.wait_for_function(f"() => {SHOWN}.every({LOADED})", timeout=30_000)
    screenshot(page, name, tmp_path)
    assert name not in TITLES or overlaps(page) == []  # what nodes say and show makes them higher
    assert not page.evaluate("() => app.lastNodeErrors && Object.keys(app.lastNodeErrors).length")


@pytest.mark.parametrize("name", daily(["first_picture", "aligned_ksampler", "apply_profile"], "aligned_ksampler"))
def test_the_picture_it_saves_opens_as_the_workflow_that_made_it(page, dev, server, name):
    """The PNG holds the workflow as it was run, with the seed that the page drew."""
    load(page, shipped(name))
    entry = run(page, dev, server.url)
    made = {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in entry["prompt"][2].items()}
    drop(page, "picture.png", saved_picture(server, entry))
    assert missing_nodes(page) == [] and alerts(page) == []
    assert prompt(page) == made
