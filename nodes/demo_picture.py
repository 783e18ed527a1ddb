"""Pictures that come with the pack, drawn by hand: something real to begin from without a file of one's own."""

from __future__ import annotations

from PIL import Image

from ._draw.axes import to_image
from ._host.api import io, schema
from ._host.folders import own_pictures


class AttuneDemoPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneDemoPicture", "Attune Demo Picture", "attune/tools",
            "Gives a picture drawn by hand, in the place of Load Image where you have none at hand.",
            search_aliases=["example image", "test picture", "load image"],
            inputs=[
                io.Combo.Input(
                    "picture", options=list(own_pictures()), default="apple",
                    tooltip="Which picture. All were drawn in flat shapes with a drawing program, none by a model.",
                ),
                io.Int.Input(
                    "side", default=128, min=16, max=4096, step=8,
                    tooltip="Its width and height in pixels: 128 for the demo models.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="For VAE Encode.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, picture="apple", side=128) -> io.NodeOutput:
        with Image.open(own_pictures()[picture]) as drawn:
            return io.NodeOutput(to_image(drawn.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)))


NODES = [AttuneDemoPicture]
