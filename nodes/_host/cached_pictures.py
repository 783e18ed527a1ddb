"""What ran for a picture whose latent the host's cache gives again, so that it is named when the picture is saved anew.

The host asks every node of a prompt for its fingerprint before it runs any of them, the nodes that its cache then
answers for included. So what a sampler of ours did is remembered by the content of the node that ran it, and when that
content comes again it is written into the prompt's workflow at once. If the node runs all the same, it overwrites that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...models.calibration import Calibration
from .api import executing_context
from .workflow_profiles import running_prompt, set_widget

MOST_REMEMBERED = 256  # the last ones
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Ran:
    """What a widget is set to in the workflow of a picture: see `set_widget`."""

    value: str
    name: str = ""
    profile: Calibration | None = None


RAN: dict[Key, Ran] = {}  # by the contents of the sampler's node and of the node that ran it, and the former's stamp
STAMPS: dict[tuple[str, str], str] = {}  # of the prompt that runs, by its id and the sampler's node


def recall(place: int, stamp: Any) -> None:
    """While a node is asked for its fingerprint `stamp`: name at its widget `place` what ran for these contents."""
    context, prompt = executing_context(), running_prompt()
    if context is None or prompt is None:
        return
    node_id = context.node_id
    for old in [one for one in STAMPS if one[0] != context.prompt_id]:
        del STAMPS[old]
    STAMPS[context.prompt_id, node_id] = repr(stamp)
    wanted = {key_of(prompt, node_id, one, repr(stamp)) for one in users_of(prompt, node_id)}
    for key, ran in RAN.items():  # of several samplers on one node the last one counts, as when they run
        if key in wanted:
            set_widget(node_id, place, ran.value, ran.name, ran.profile)


def remember(node_id: str, ran: Ran) -> None:
    """While a node runs the sampler of the node `node_id`: remember what came of it."""
    context, prompt = executing_context(), running_prompt()
    stamp = None if context is None else STAMPS.get((context.prompt_id, node_id))
    if context is None or prompt is None or stamp is None or context.node_id not in prompt:
        return
    key = key_of(prompt, node_id, context.node_id, stamp)
    RAN.pop(key, None)
    RAN[key] = ran
    while len(RAN) > MOST_REMEMBERED:
        del RAN[next(iter(RAN))]


def key_of(prompt: Mapping[str, Any], node_id: str, user: str, stamp: str) -> Key:
    """Of contents alone: the host's cache does not ask for the numbers of nodes either."""
    known: dict[str, str] = {}
    return _content(prompt, node_id, known), _content(prompt, user, known), stamp


def users_of(prompt: Mapping[str, Any], node_id: str) -> list[str]:
    """The node and every one behind it."""
    found = {node_id}
    while True:
        more = {one for one in prompt if one not in found and any(link[0] in found for link in _links(prompt[one]))}
        if not more:
            return [one for one in prompt if one in found]
        found |= more


def _content(prompt: Mapping[str, Any], node_id: str, known: dict[str, str]) -> str:
    """The same for the same kind of node with the same values and, in front of it, the same nodes."""
    if node_id not in known:
        node = prompt.get(node_id) or {}
        values = {
            name: [_content(prompt, one[0], known), one[1]] if _is_link(one, prompt) else one
            for name, one in (node.get("inputs") or {}).items()
        }
        said = json.dumps([node.get("class_type"), values], sort_keys=True, default=repr)
        known[node_id] = hashlib.sha256(said.encode()).hexdigest()
    return known[node_id]


def _links(node: Mapping[str, Any]) -> list[list]:
    return [one for one in (node.get("inputs") or {}).values() if isinstance(one, list) and len(one) == 2]


def _is_link(value: Any, prompt: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in prompt
