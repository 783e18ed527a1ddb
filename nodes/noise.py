"""The start of a patched MODEL as NOISE."""

from __future__ import annotations

import logging

from ._host.api import advanced, io, schema
from ._host.start import StartNoise, starts_of

LOG = logging.getLogger(__name__)


class AttuneNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneNoise", "Attune Noise", "attune/noise",
            "The start of a patched MODEL as NOISE, for guiders that leave the MODEL's options out.",
            search_aliases=["custom noise", "golden noise", "one more step noise", "signal leak noise"],
            inputs=[
                io.Noise.Input("noise", tooltip="What to start from, mostly RandomNoise; its seed stays the seed."),
                io.Model.Input(
                    "model", tooltip="From Attune One More Step, Signal Leak, Golden Noise or Redenoise. Give the "
                    "guider the MODEL from before them.",
                ),
                io.Sigmas.Input("sigmas", tooltip="The same that the sampler gets: the first level rules the start."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="As the guider gets it, for Attune Golden Noise and Redenoise."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="As the guider gets it, for Attune Redenoise at cfg above 1."
                ),
                *advanced(
                    io.Float.Input(
                        "cfg", default=8.0, min=0.0, max=100.0, step=0.1,
                        tooltip="The guider's, for Attune Redenoise at strong_cfg 0.",
                    )
                ),
            ],
            outputs=[io.Noise.Output(display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, noise, model, sigmas, positive=None, negative=None, cfg=8.0) -> io.NodeOutput:
        if not starts_of(model):
            LOG.warning("Attune Noise: nothing on this MODEL changes where its runs begin, so the noise is as it came.")
        return io.NodeOutput(StartNoise(noise, model, sigmas, positive, negative, cfg))


NODES = [AttuneNoise]
