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
            "Gives the starting noise of a patched MODEL as NOISE, for guiders that ignore the MODEL's options.",
            search_aliases=["custom noise", "golden noise", "one more step noise", "signal leak noise"],
            inputs=[
                io.Noise.Input(
                    "noise",
                    tooltip="The noise to start from, usually RandomNoise. Its seed stays the seed.",
                ),
                io.Model.Input(
                    "model", tooltip="The MODEL behind Attune One More Step, Signal Leak, Golden Noise or Redenoise. "
                    "The guider gets the MODEL from before these nodes.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The same sigmas that the sampler gets. The first level decides how much noise the start "
                    "holds.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True,
                    tooltip="The positive prompt of the guider. Attune Golden Noise and Redenoise need it.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True,
                    tooltip="The negative prompt of the guider. Attune Redenoise needs it at cfg above 1.",
                ),
                *advanced(
                    io.Float.Input(
                        "cfg", default=8.0, min=0.0, max=100.0, step=0.1,
                        tooltip="The cfg of the guider. Attune Redenoise uses it when its strong_cfg is 0.",
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
