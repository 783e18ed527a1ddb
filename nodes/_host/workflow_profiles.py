"""Profiles travel inside workflows: into every picture that is saved, and out of one that is dropped on the page.

A workflow names its profiles by file. ComfyUI writes the workflow that it was queued with into the pictures it saves,
so each prompt's workflow gets the content of the files that the prompt names, below its `extra`, where the page keeps
what it does not know. On a machine without those files the content is used in their place, checked like any file.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from server import PromptServer

from ...models.calibration import Calibration
from ...models.profile_format import read_profile, spell_profile
from ...models.store import is_profile_file
from .folders import AT, CARRIED, file_and_id, profile_path, readable_profile

LOG = logging.getLogger(__name__)
KEY = "attune_profiles"
WIDGETS = ("profile_name", "schedule", "use", "fast")  # of our nodes: what names a profile's file
TICKET = "attune_ticket"  # in a prompt's extra data: which of the remembered workflows is saved with its pictures
ON_THEIR_WAY = 16  # prompts that may be on their way into the queue at once
LARGEST = 100_000  # characters of JSON in a picture; most profiles have a few thousand
MOST_CARRIED = 256  # kept in memory, the last ones


def register_exchange() -> None:
    """Have the host call `exchange` with each prompt before it is validated."""
    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.add_on_prompt_handler(exchange)


def exchange(queued: dict[str, Any]) -> dict[str, Any]:
    """The queued JSON, its workflow holding only the profiles that its prompt names; what it brought is remembered.

    A brought profile is used where there is no file of its name, or none with the content that is asked for. The prompt
    then names it by its content, so that another prompt in the queue, whose workflow brought another profile under the
    same name, gets its own.
    """
    extra_data = _object(queued.get("extra_data"))
    workflow = _object(_object(extra_data.get("extra_pnginfo")).get("workflow"))
    if not workflow:
        return queued
    _remember_workflow(extra_data, workflow)
    extra = workflow["extra"] = _object(workflow.get("extra"))
    brought, holds = _object(extra.pop(KEY, None)), {}
    for inputs, widget in _places(_object(queued.get("prompt"))):
        name = inputs[widget]
        file, wanted = file_and_id(name)
        installed = readable_profile(file) if profile_path(file) else None
        if profile_path(file) and (not wanted or installed is None or installed.id == wanted):
            profile, inputs[widget] = installed, file
        else:
            profile = _remember(file, brought.get(file)) or CARRIED.get(name) or _only(file)
            inputs[widget] = name if profile is None else content_name(file, profile)
        if profile is None or file in holds:
            continue
        fields = spell_profile(profile)
        if file in brought and brought[file] != fields:
            LOG.warning("The workflow carries another '%s' than the one in models/attune, which is used.", file)
        if len(json.dumps(fields)) <= LARGEST:
            holds[file] = fields
        else:
            LOG.warning("Profile '%s' is too large to travel inside pictures: share its file, too.", file)
    if holds:
        extra[KEY] = holds
    return queued


# --- what a prompt writes into its own workflow ---

QUEUED: dict[int, dict[str, Any]] = {}  # workflows by ticket, the very objects that the host will save


def _remember_workflow(extra_data: dict[str, Any], workflow: dict[str, Any]) -> None:
    """The host copies a prompt's extra data for whoever asks what is running; the ticket leads back to the original."""
    extra_data[TICKET] = ticket = max(QUEUED, default=0) + 1
    QUEUED[ticket] = workflow
    running, waiting = _prompts()
    used = {_object(prompt[3]).get(TICKET) for prompt in (*running, *waiting)}
    for old in [old for old in QUEUED if old not in used and old <= ticket - ON_THEIR_WAY]:
        del QUEUED[old]


def running_workflow() -> dict[str, Any] | None:
    """The workflow that will be saved in the pictures of the prompt that runs now; None for a prompt without one."""
    running, _ = _prompts()
    return QUEUED.get(_object(running[0][3]).get(TICKET, 0)) if len(running) == 1 else None


def running_prompt() -> dict[str, Any] | None:
    """The nodes of the prompt that runs now, as they were queued."""
    running, _ = _prompts()
    return _object(running[0][2]) if len(running) == 1 else None


def _prompts() -> tuple[list[tuple], list[tuple]]:
    """What runs and what waits in the host's queue."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    return list(getattr(queue, "currently_running", {}).values()), list(getattr(queue, "queue", []))


def set_widget(node_id: str, place: int, value: Any, name: str = "", profile: Calibration | None = None) -> None:
    """Set the widget at `place` of a node in the workflow that the pictures of this prompt carry, with the profile that
    it then names. A node that is not in the workflow (one of an expanded graph) is passed over."""
    workflow = running_workflow()
    nodes = [] if workflow is None else _nodes(workflow, node_id.split(":"))
    for node in nodes:
        values = node.get("widgets_values")
        if isinstance(values, list) and place < len(values):
            values[place] = value
    if nodes and workflow is not None and profile is not None:
        extra = workflow["extra"] = _object(workflow.get("extra"))
        extra[KEY] = {**_object(extra.get(KEY)), file_and_id(name)[0]: spell_profile(profile)}


def _nodes(graph: dict[str, Any], path: list[str], definitions: list | None = None) -> list[dict[str, Any]]:
    """The node at `path`, through the subgraphs that lead to it."""
    if definitions is None:
        definitions = _object(graph.get("definitions")).get("subgraphs") or []
    found = [node for node in map(_object, graph.get("nodes") or []) if str(node.get("id")) == path[0]]
    if len(path) == 1:
        return found
    inner = [one for node in found for one in map(_object, definitions) if one.get("id") == node.get("type")]
    return [node for one in inner for node in _nodes(one, path[1:], definitions)]


def content_name(file: str, profile: Calibration) -> str:
    """What a prompt calls a profile that its workflow brought."""
    return f"{file}{AT}{profile.id}"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _places(prompt: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The inputs of our nodes, and the widget among them, that name a profile's file."""
    ours = [node for node in map(_object, prompt.values()) if str(node.get("class_type")).startswith("Attune")]
    places = [(_object(node.get("inputs")), widget) for node in ours for widget in WIDGETS]
    named = [(inputs, widget) for inputs, widget in places if isinstance(inputs.get(widget), str)]
    return [(inputs, widget) for inputs, widget in named if is_profile_file(file_and_id(inputs[widget])[0])]


def _only(file: str) -> Calibration | None:
    """What an earlier workflow brought under a file's name, unless several brought different ones."""
    known = [profile for name, profile in CARRIED.items() if file_and_id(name)[0] == file]
    return known[0] if len(known) == 1 else None


def _remember(file: str, fields: Any) -> Calibration | None:
    """The profile that a workflow brought under a file's name; a bad one is refused in the log."""
    if fields is None:
        return None
    try:
        profile = read_profile(f"'{file}' in the workflow", fields)
    except ValueError as error:
        LOG.warning("%s", error)
        return None
    name = content_name(file, profile)
    if name not in CARRIED:
        LOG.info("Profile '%s' comes with the workflow: keep it with Attune Save Profile.", file)
    CARRIED[name] = CARRIED.pop(name, profile)  # the last one used is the last to go
    while len(CARRIED) > MOST_CARRIED:
        del CARRIED[next(iter(CARRIED))]
    return profile
