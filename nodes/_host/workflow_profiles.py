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

from ...models.calibration import SUFFIX, Calibration, load_profile, read_profile, spell_profile
from .folders import CARRIED, profile_path

LOG = logging.getLogger(__name__)
KEY = "attune_profiles"
WIDGETS = ("profile_name", "schedule")  # of our nodes: what names a profile's file
LARGEST = 100_000  # characters of JSON in a picture; most profiles have a few thousand
MOST_CARRIED = 64  # kept in memory, the last ones


def register_exchange() -> None:
    """Have the host call `exchange` with each prompt before it is validated."""
    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.add_on_prompt_handler(exchange)


def exchange(queued: dict[str, Any]) -> dict[str, Any]:
    """The queued JSON, its workflow holding only the profiles that its prompt names, what it brought remembered."""
    workflow = _object(_object(_object(queued.get("extra_data")).get("extra_pnginfo")).get("workflow"))
    if not workflow:
        return queued
    extra = workflow["extra"] = _object(workflow.get("extra"))
    brought, holds = _object(extra.pop(KEY, None)), {}
    for name in _names(_object(queued.get("prompt"))):
        profile = _installed(name) if profile_path(name) else _remember(name, brought.get(name))
        if profile is None:
            continue
        fields = spell_profile(profile)
        if name in brought and brought[name] != fields:
            LOG.warning("The workflow carries another '%s' than the one in models/attune, which is used.", name)
        if len(json.dumps(fields)) <= LARGEST:
            holds[name] = fields
        else:
            LOG.warning("Profile '%s' is too large to travel inside pictures: share its file, too.", name)
    if holds:
        extra[KEY] = holds
    return queued


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _names(prompt: dict[str, Any]) -> list[str]:
    """The profile files that our nodes name, each once."""
    ours = [node for node in map(_object, prompt.values()) if str(node.get("class_type")).startswith("Attune")]
    values = [_object(node.get("inputs")).get(widget) for node in ours for widget in WIDGETS]
    return list(dict.fromkeys(value for value in values if isinstance(value, str) and value.endswith(SUFFIX)))


def _installed(name: str) -> Calibration | None:
    path = profile_path(name)
    try:
        return None if path is None else load_profile(path)
    except (OSError, ValueError):
        return None  # the node that loads it says why


def _remember(name: str, fields: Any) -> Calibration | None:
    """The profile that a workflow brought, or brought before; a bad one is refused in the log."""
    if fields is not None:
        try:
            CARRIED[name] = read_profile(f"'{name}' in the workflow", fields)
            LOG.info("Profile '%s' comes with the workflow: keep it with Attune Save Profile.", name)
        except ValueError as error:
            LOG.warning("%s", error)
        while len(CARRIED) > MOST_CARRIED:
            del CARRIED[next(iter(CARRIED))]
    return CARRIED.get(name)
