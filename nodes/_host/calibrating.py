"""How our wrappers on a MODEL learn that a fit measures, and stand aside: what it measures is whole."""

from __future__ import annotations

CALIBRATING = "attune.calibrating"  # of a MODEL's options: which of our wrappers acts while a fit measures, "" for none


def calibrating(model, key: str = ""):
    """A clone of MODEL on which every wrapper of ours stands aside, but for the one under `key`."""
    clone = model.clone()
    clone.model_options["transformer_options"][CALIBRATING] = key
    return clone


def stands_aside(model_options: dict, key: str) -> bool:
    """Whether the wrapper under `key` must leave a run alone, because a fit measures in it."""
    acts = model_options.get("transformer_options", {}).get(CALIBRATING)
    return acts is not None and acts != key
