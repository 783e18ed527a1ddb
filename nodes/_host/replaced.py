"""The nodes of before the redesign, for hosts that turn a workflow's old nodes into new ones (from ComfyUI 0.38 on)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .api import io


@dataclass(frozen=True)
class Replaced:
    """old: node id; widgets: its widgets in the order in which workflows store their values; new: node id. renamed: old
    input -> new one, where they differ; dropped: old inputs that the new node has not; fixed: new input -> value;
    outputs: old output -> new one, where they differ."""

    old: str
    new: str
    widgets: tuple[str, ...]
    sockets: tuple[str, ...]
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    outputs: dict[int, int] = field(default_factory=lambda: {0: 0})

    def inputs(self) -> list[dict[str, Any]]:
        """What the host calls the input mapping."""
        kept = [name for name in (*self.sockets, *self.widgets) if name not in self.dropped]
        return [
            *({"new_id": self.renamed.get(name, name), "old_id": name} for name in kept),
            *({"new_id": name, "set_value": value} for name, value in self.fixed.items()),
        ]


RUN_INPUTS = ("model", "positive", "negative", "sampler", "latent", "sigmas")
PROPAGATION_INPUTS = (
    "mode", "interval", "speed", "reuse", "forecast", "keep_last", "start_percent", "end_percent", "prior_noise",
    "cache_dtype", "cache_device", "memory_limit",
)  # fmt: skip
REPLACED = [
    Replaced(
        "AttuneTuneSchedule", "AttuneFitSampler", ("cfg", "steps", "preset", "budget_minutes", "seed", "method"),
        RUN_INPUTS, dropped=("method",), outputs={0: 0, 1: 1, 2: 2, 3: 3},
    ),
    Replaced(
        "AttuneAlignTimesteps", "AttuneFitSampler", ("cfg", "noises", "seed"), RUN_INPUTS, dropped=("noises",),
        fixed={"levels": False}, outputs={0: 0, 1: 2, 2: 3},
    ),
    Replaced(
        "AttuneNoiseShift", "AttuneApplyProfile", ("strength",), ("model", "profile", "latent"), outputs={0: 0, 1: 3}
    ),
    Replaced("AttuneInstalled", "AttuneLoadProfile", (), ("model",), outputs={0: 2}),
    Replaced("AttuneEncoderPropagation", "AttunePropagation", (*PROPAGATION_INPUTS, "parallel"), ("model", "profile")),
    Replaced("AttuneBlockPropagation", "AttunePropagation", PROPAGATION_INPUTS, ("model", "profile")),
    Replaced(
        "AttuneFitEncoderPropagation", "AttuneFitPropagation",
        ("seed", "steps", "cfg", "sampler_name", "scheduler", "reuse", "fastest", "longest"),
        ("model", "positive", "negative", "latent_image"), outputs={0: 0, 1: 1, 2: 2},
    ),
    Replaced(
        "AttuneOneMoreStepPredict", "AttuneOneMoreStep", ("cfg", "seed"),
        ("model", "oms_model", "positive", "negative", "latent"), dropped=("seed",), outputs={0: 1},
    ),
    Replaced(
        "AttuneZigzagSampler", "AttuneRedenoise", ("zigzag_steps", "strong_cfg", "weak_cfg", "rounds"), (),
        outputs={0: 1},
    ),
]  # fmt: skip


async def register_replacements() -> None:
    """Tell the host which node stands for which old one, where it wants to know."""
    try:
        from comfy_api.latest import ComfyAPI
    except ImportError:
        return
    registry, replace = getattr(ComfyAPI(), "node_replacement", None), getattr(io, "NodeReplace", None)
    if registry is None or replace is None:
        return
    for one in REPLACED:
        await registry.register(
            replace(
                new_node_id=one.new, old_node_id=one.old, old_widget_ids=list(one.widgets),
                input_mapping=one.inputs(),
                output_mapping=[{"new_idx": new, "old_idx": old} for old, new in one.outputs.items()],
            )
        )  # fmt: skip
