"""The nodes of before the redesign: each is gone, and what stands for it has every input and output that is named."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import pytest


def test_every_old_node_finds_its_inputs_and_outputs_in_the_new(host):
    from pack.nodes._host.replaced import REPLACED

    assert len({one.old for one in REPLACED}) == len(REPLACED) > 0
    for one in REPLACED:
        assert one.old not in host.nodes.NODE_CLASS_MAPPINGS
        new = host.nodes.NODE_CLASS_MAPPINGS[one.new].GET_SCHEMA()
        named = [mapping["new_id"] for mapping in one.inputs()]
        assert set(named) <= {socket.id for socket in new.inputs} and len(set(named)) == len(named), one.old
        assert set(one.dropped) | set(one.renamed) <= {*one.sockets, *one.widgets}, one.old
        assert all(0 <= index < len(new.outputs) for index in one.outputs.values()), one.old
        assert len({*one.outputs.values()}) == len(one.outputs) > 0, one.old


# Of nodes that kept their ids and got widgets: those of before, in the order in which workflows store their values.
STORED = {
    "AttuneApplyProfile": ["steps", "denoise", "denoise_mode", "resolution_policy", "strength"],
    "AttuneRedenoise": [
        "strong_cfg", "weak_cfg", "rounds", "strength", "mode", "depth", "evaluate_at", "renormalize", "partial_denoise",
    ],
    "AttuneTrainOneMoreStep": [
        "folder", "name", "size", "steps", "batch_size", "learning_rate", "empty_prompts", "seed", "captions",
    ],
}  # fmt: skip


@pytest.mark.parametrize("node", STORED)
def test_a_workflow_of_before_keeps_its_values(host, node):
    inputs = host.nodes.NODE_CLASS_MAPPINGS[node].GET_SCHEMA().inputs
    widgets = [one.id for one in inputs if one.io_type in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")]
    assert widgets[: len(STORED[node])] == STORED[node]


@pytest.mark.parametrize("knows", [False, True])
def test_a_host_is_told_only_where_it_can_replace_nodes(host, monkeypatch, knows):
    from pack.nodes._host import replaced

    told = []

    class Registry:
        async def register(self, one):
            told.append(one)

    api = SimpleNamespace(node_replacement=Registry()) if knows else SimpleNamespace()
    monkeypatch.setattr(sys.modules["comfy_api.latest"], "ComfyAPI", lambda: api)
    monkeypatch.setattr(replaced, "io", SimpleNamespace(NodeReplace=lambda **facts: facts))
    asyncio.run(replaced.register_replacements())
    assert [one["old_node_id"] for one in told] == ([one.old for one in replaced.REPLACED] if knows else [])
