"""Noise for films longer than a model's window."""

from __future__ import annotations

from ._host.api import io, schema
from ._plan.films import LongNoise


class AttuneLongNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneLongNoise", "Attune Long-Video Noise", "attune/video",
            "Makes noise for a film longer than the window: later windows shuffle the frames of the first, so that "
            "one scene goes on.",
            search_aliases=["FreeNoise", "long video", "context windows", "noise shuffle", "BlockVid"],
            is_experimental=True,
            inputs=[
                io.Noise.Input("noise", tooltip="The noise of the first window, such as RandomNoise."),
                io.Int.Input(
                    "window", default=21, min=1, max=4096,
                    tooltip="Frames of the latent that the model sees at once: 21 for the 81 frames of Wan, and of its "
                    "Context Windows.",
                ),
                io.Int.Input(
                    "stride", default=4, min=1, max=4096,
                    tooltip="How many frames at a time are put into random order; at most 'window'.",
                ),
            ],
            outputs=[io.Noise.Output(display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, noise, window=21, stride=4) -> io.NodeOutput:
        if stride > window:
            raise ValueError(f"'stride' is {stride}, but a window has {window} frames: set it to {window} or less.")
        return io.NodeOutput(LongNoise(noise, window, stride))


NODES = [AttuneLongNoise]
