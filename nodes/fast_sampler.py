"""A sampler that learns the user's own long run and makes a short one of it."""

from __future__ import annotations

from ..models.calibration import SAMPLER
from ._draw.plots import draw_learned
from ._draw.sheets import draw_card
from ._host.api import io, schema
from ._host.fitted_sampler import Drawing, fast_for, fast_stamp
from ._host.folders import has_profile, missing_profile, profiles_of_kind
from ._plan.fitted_sampler import AUTO, USES, Wish

CATEGORY = "attune/sampling"


class AttuneFastSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneFastSampler",
            display_name="Attune Fast Sampler",
            category=CATEGORY,
            description="Makes the first picture with your own long run and learns from it. The next pictures take a "
            "fifth of the evaluations.",
            search_aliases=[
                "speed", "faster", "fast sdxl", "fast flux", "fewer steps", "fitted sampler", "learn", "distill",
                "teacache",
            ],
            essentials_category="Image Generation",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Sampler.Input(
                    "sampler",
                    tooltip="The solver of your own run. A solver that adds noise always runs in full, as it is.",
                ),
                io.Combo.Input(
                    "use", options=[*USES, *profiles_of_kind(SAMPLER)], default=AUTO,
                    tooltip="auto: the short run, if one was learned for this model, schedule, cfg, size and "
                    "set-up; otherwise a full run to learn from. full run: your own run, bit for bit. learn again: a "
                    "full run that replaces what was learned. forget: a full run, and what was learned is deleted. A "
                    "file: this calibration, or an error. When you open a saved picture again, this input names what "
                    "made it.",
                ),
                io.Int.Input(
                    "evaluations", default=10, min=0, max=100,
                    tooltip="How many times the short run asks the model. 0 takes the fewest of 6, 8, 10, 12, 16 "
                    "that reach 'fidelity'.",
                ),
                io.Float.Input(
                    "fidelity", default=40.0, min=0.0, max=100.0, step=1.0,
                    tooltip="How near the short run must come to the long one, in dB of the latents, on the part of "
                    "the picture that it was not fitted to. From about 45 dB on the pictures look the same.",
                ),
                io.Int.Input(
                    "check_every", default=0, min=0, max=100000,
                    tooltip="After how many short runs one picture is made in full as a check. A short run that "
                    "falls below 'fidelity' is learned again. 0: never.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, use=None):
        return use is None or use in USES or has_profile(use) or missing_profile(use)

    @classmethod
    def fingerprint_inputs(cls, use=None, **_):
        return fast_stamp(cls, use, "use")

    @classmethod
    def execute(cls, sampler, use=AUTO, evaluations=10, fidelity=40.0, check_every=0) -> io.NodeOutput:
        wish = Wish(use, evaluations, fidelity, check_every)
        return io.NodeOutput(fast_for(cls, wish, "use", Drawing(draw_card, draw_learned))(sampler))


NODES = [AttuneFastSampler]
