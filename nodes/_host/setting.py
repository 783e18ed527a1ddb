"""The name of all that a run depends on besides its model, solver, levels, guidance and size: a hash."""

from __future__ import annotations

import dis
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor

MOST_NESTED = 6
OURS = "attune."  # what the keys of our own wrappers and options begin with
PLAIN = (int, float, bool, str)
OF_EVERY_RUN = {"sample_sigmas", "sigmas", "uuids", "cond_or_uncond", "callbacks", "model_options"}
OF_THE_PROMPT = {"uuid", "cross_attn", "pooled_output", "model_conds"}
OF_THE_PROMPT |= {"width", "height", "target_width", "target_height"}  # SDXL's
OF_GUIDANCE = (
    "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "sampler_calc_cond_batch_function",
    "denoise_mask_function",
)  # fmt: skip


def setting_of(guider: Any, sampler: Any, model_options: Mapping) -> str:
    """16 hex digits: the guider's kind and numbers but its cfg, the sampler's options, the kinds of conditioning with
    their numbers (never what a prompt says), and the patches, wrappers and functions of the MODEL with theirs."""
    guidance = {name: one for name, one in _plain(guider).items() if name != "cfg"}
    said = lambda cond: {key: one for key, one in cond.items() if one is not None and key not in OF_THE_PROMPT}
    conds = {role: [said(one) for one in many] for role, many in getattr(guider, "conds", {}).items()}
    parts = [type(guider).__name__, guidance, getattr(sampler, "extra_options", {}), conds, model_options]
    return hashlib.sha256("\n".join(_spelled(one) for one in parts).encode()).hexdigest()[:16]


def guidance_of(model_options: Mapping) -> str:
    """16 hex digits: the functions on a MODEL that change the guided answer or the mask, with their numbers."""
    kept = {name: model_options[name] for name in OF_GUIDANCE if model_options.get(name)}
    return hashlib.sha256(_spelled(kept).encode()).hexdigest()[:16]


def without_ours(options: Mapping) -> dict[str, Any]:
    """model_options as they are where none of our nodes is on the MODEL: what a fit measures, for ours stand aside."""
    ours = lambda key: str(key).startswith(OURS)
    only_ours = lambda one: isinstance(one, Mapping) and one and all(map(ours, one))
    kept = {key: one for key, one in options.items() if not ours(key) and not only_ours(one)}
    return {key: without_ours(one) if isinstance(one, Mapping) else one for key, one in kept.items()}


def _spelled(value: Any, depth: int = 0) -> str:
    """A text that is the same in every process for what acts the same, as far as can be seen from outside."""
    if depth > MOST_NESTED:
        return "…"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Tensor):
        return "tensor"
    deeper = depth + 1
    if isinstance(value, Mapping):
        kept = sorted((str(key), one) for key, one in value.items() if key not in OF_EVERY_RUN)
        return "{" + ", ".join(f"{key}: {_spelled(one, deeper)}" for key, one in kept) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_spelled(one, deeper) for one in value) + "]"
    if isinstance(value, MethodType) and isinstance(value.__func__, FunctionType):
        return f"{_spelled_object(value.__self__, value.__func__, deeper)}.{value.__name__}"
    if isinstance(value, FunctionType):
        state = _kept_by(value.__code__)
        plain = [one for name, one in around(value).items() if type(one) in PLAIN and name not in state]
        return f"{value.__qualname__}{_spelled(plain, deeper)}"
    return _spelled_object(value, type(value).__call__ if callable(value) else None, deeper)


def _spelled_object(value: Any, function: Any, depth: int) -> str:
    """An object by its kind and numbers, without those that `function`, as which it is called, assigns itself."""
    state = _kept_by(function.__code__) if isinstance(function, FunctionType) else ()
    numbers = {name: one for name, one in _plain(value).items() if name not in state}
    return f"{type(value).__qualname__}{_spelled(numbers, depth) if numbers else ''}"


@lru_cache(maxsize=256)
def _kept_by(code: CodeType) -> frozenset[str]:
    """The variables around a function and the attributes that it assigns: a count of steps is state, and no setting."""
    return frozenset(one.argval for one in dis.get_instructions(code) if one.opname in ("STORE_DEREF", "STORE_ATTR"))


def _plain(value: Any) -> dict[str, Any]:
    """The attributes that are numbers or texts."""
    return {name: one for name, one in getattr(value, "__dict__", {}).items() if type(one) in PLAIN}


def around(function: FunctionType) -> dict[str, Any]:
    """The variables that a function keeps from where it was made, by name, without those that are not filled yet."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != CellType()}
