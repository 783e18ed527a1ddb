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
from .folders import AT, CARRIED, profile_path, readable_profile

LOG = logging.getLogger(__name__)
KEY = "attune_profiles"
WIDGETS = ("profile_name", "schedule")  # of our nodes: what names a profile's file
LARGEST = 100_000  # characters of JSON in a picture; most profiles have a few thousand
MOST_CARRIED = 256  # kept in memory, the last ones


def register_exchange() -> None:
    """Have the host call `exchange` with each prompt before it is validated."""
    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.add_on_prompt_handler(exchange)


def exchange(queued: dict[str, Any]) -> dict[str, Any]:
    """The queued JSON, its workflow holding only the profiles that its prompt names; what it brought is remembered.

    A brought profile is used where there is no file of its name. The prompt then names it by its content, so that
    another prompt in the queue, whose workflow brought another profile under the same name, gets its own.
    """
    workflow = _object(_object(_object(queued.get("extra_data")).get("extra_pnginfo")).get("workflow"))
    if not workflow:
        return queued
    extra = workflow["extra"] = _object(workflow.get("extra"))
    brought, holds = _object(extra.pop(KEY, None)), {}
    for inputs, widget in _places(_object(queued.get("prompt"))):
        name = inputs[widget]
        file = name.partition(AT)[0]
        if profile_path(file):
            profile, inputs[widget] = readable_profile(file), file
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
    return [(inputs, widget) for inputs, widget in named if is_profile_file(inputs[widget].partition(AT)[0])]


def _only(file: str) -> Calibration | None:
    """What an earlier workflow brought under a file's name, unless several brought different ones."""
    known = [profile for name, profile in CARRIED.items() if name.partition(AT)[0] == file]
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
