"""Attune Auto in the page: bypassed it is not there, its report is on the node, its blueprint is a node that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blueprints import SPECS

from browsing import alerts, load, missing_nodes, prompt, queue, shipped

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]


def test_bypassed_it_hands_the_loaders_model_and_the_graphs_own_schedule_through(page):
    load(page, shipped("few_step"))
    sampler, scheduler = page.evaluate(
        """async () => {
            const auto = app.graph._nodes.find(node => node.type === 'AttuneAuto')
            const stock = LiteGraph.createNode('BasicScheduler')
            app.graph.add(stock)
            app.graph.getNodeById(1).connect(0, stock, 0)
            stock.connect(0, auto, auto.inputs.findIndex(input => input.name === 'sigmas'))
            auto.mode = 4
            const prompt = (await app.graphToPrompt()).output
            return [Object.values(prompt).find(node => node.class_type === 'SamplerCustom').inputs, String(stock.id)]
        }"""
    )
    assert sampler["model"] == ["1", 0] and sampler["sigmas"] == [scheduler, 0]


def test_the_report_stands_on_the_node_and_in_no_saved_value_that_counts(page, dev, server):
    load(page, shipped("few_step"))
    queue(page, dev, server.url)
    said = "() => app.graph._nodes.find(n => n.type === 'AttuneAuto').widgets.find(w => w.name.startsWith('$$') && w.value)?.value"
    page.wait_for_function(said, timeout=30_000)
    assert page.evaluate(said).startswith("SD3, flow; 128x128; 5 steps of dpmpp_2m")
    again = """async () => {
        await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())), true, true, null)
        return (await app.graphToPrompt()).output
    }"""
    prompt = {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in page.evaluate(again).items()}
    assert prompt == json.loads((ROOT / "tests/prompts/few_step.json").read_text("utf-8"))


def test_a_page_that_takes_what_nodes_said_away_has_it_back(page, dev, server):
    """As 1.58 does when a run ends: what is left is ours, and no value that a workflow keeps."""
    load(page, shipped("few_step"))
    auto = "app.graph._nodes.find(n => n.type === 'AttuneAuto')"
    page.evaluate(
        """() => app.api.addEventListener('execution_success', () => { for (const node of app.graph._nodes)
            node.widgets = node.widgets?.filter(widget => widget.name !== '$$node-text-preview') })"""
    )
    for steps in (6, 7):  # what is said anew takes the place of what was said before
        page.evaluate(f"() => {{ {auto}.widgets.find(w => w.name === 'steps').value = {steps} }}")
        queue(page, dev, server.url)
        kept = f"{auto}.widgets.filter(w => w.name === '$$attune-said').map(w => w.element.textContent)"
        page.wait_for_function(f"() => {kept}.some(said => said.includes('128x128; {steps} steps'))", timeout=30_000)
        assert len(page.evaluate(f"() => {kept}")) == 1
    assert "128x128; 7 steps" not in json.dumps(page.evaluate("() => app.graph.serialize()"))
    want = json.loads((ROOT / "tests/prompts/few_step.json").read_text("utf-8"))
    assert {key: node["inputs"].keys() for key, node in prompt(page).items()} == {
        key: node["inputs"].keys() for key, node in want.items()
    }


@pytest.mark.parametrize("name", SPECS)
def test_a_blueprint_asks_for_what_its_prompt_asks_with_its_dials_turned(page, name):
    """As the page unfolds it: each node inside with the prompt's values, and a dial reaches each node that it turns."""
    load(page, json.loads((ROOT / "subgraphs" / f"{name}.json").read_text("utf-8")))
    assert missing_nodes(page) == [] and alerts(page) == []
    spec = SPECS[name]
    want = json.loads((ROOT / f"tests/prompts/{spec.prompt}.json").read_text("utf-8"))
    dial, targets = max(spec.dials.items(), key=lambda one: (one[0] == "steps", len(one[1])))
    page.evaluate(f"() => {{ app.graph._nodes[0].widgets.find(w => w.name === '{dial}').value = 17 }}")
    asked = {node["class_type"]: node["inputs"] for node in prompt(page).values()}
    assert sorted(asked) == sorted(want[one]["class_type"] for one in spec.inside)
    for one in spec.inside:
        fixed = {key: value for key, value in want[one]["inputs"].items() if not isinstance(value, list)}
        turned = {widget: 17 for node, widget in targets if node == one}
        got = asked[want[one]["class_type"]]
        assert {key: got[key] for key in fixed} == {**fixed, **turned}


def test_the_blueprint_is_found_by_search_and_takes_a_ksamplers_place(page, dev, server):
    load(page, shipped("first_picture"))
    page.evaluate("() => { app.canvas.ds.scale = 0.4; app.canvas.ds.offset = [0, 0]; app.canvas.setDirty(true, true) }")
    page.mouse.dblclick(900, 600)
    dialogs = (".invisible-dialog-root", ".comfy-vue-node-search-container", "[role=search]")  # the last since 1.49
    page.wait_for_selector(", ".join(dialogs), timeout=10_000)
    page.keyboard.type("Attune Auto Sampler", delay=20)
    page.locator("li, span.highlight", has_text="Attune Auto Sampler").first.click()
    page.wait_for_function("() => app.graph._nodes.some(node => node.title === 'Attune Auto Sampler')")
    page.evaluate(
        """() => {
            const old = app.graph._nodes.find(node => node.type === 'KSampler')
            const blueprint = app.graph._nodes.find(node => node.title === 'Attune Auto Sampler')
            for (const name of ['model', 'positive', 'negative', 'latent']) {
                const theirs = old.inputs.find(input => input.name === (name === 'latent' ? 'latent_image' : name))
                const link = app.graph.getLink(theirs.link)
                const mine = blueprint.inputs.findIndex(input => input.name === name)
                app.graph.getNodeById(link.origin_id).connect(link.origin_slot, blueprint, mine)
            }
            blueprint.connect(0, app.graph._nodes.find(node => node.type === 'VAEDecode'), 0)
            app.graph.remove(old)
            blueprint.widgets.find(widget => widget.name === 'cfg').value = 3
        }"""
    )
    inner = page.evaluate("async () => Object.values((await app.graphToPrompt()).output)")
    both = [node["inputs"] for node in inner if node["class_type"] in ("AttuneAuto", "SamplerCustom")]
    assert [inputs["cfg"] for inputs in both] == [3, 3]
    queue(page, dev, server.url)
