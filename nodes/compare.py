"""Compare pictures."""

from __future__ import annotations

from ._draw.axes import labels_of, to_image
from ._draw.sheets import Batch, draw_comparison
from ._host.api import io, schema

MOST = 6  # batches side by side


class AttuneCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        more = [
            io.Image.Input(f"image_{i}", optional=True, tooltip="Pictures to compare with the first.")
            for i in range(2, MOST + 1)
        ]
        return schema(
            "AttuneCompare", "Attune Compare", "attune/tools",
            "Shows pictures side by side, where they differ from the first, and how bright they are.",
            search_aliases=["difference", "side by side", "compare images", "histogram", "xy plot", "grid"],
            essentials_category="Image Tools",
            inputs=[
                io.Image.Input("image_1", tooltip="What the others are compared with, usually the stock run."),
                *more,
                io.String.Input("labels", default="", tooltip="Names for the columns, separated by commas."),
                io.Float.Input(
                    "difference", default=4.0, min=0.0, max=100.0, step=0.5,
                    tooltip="How many times the differences are amplified. 4 shows small ones; 0 draws no difference "
                    "columns.",
                ),
                io.Boolean.Input(
                    "histogram", default=True,
                    tooltip="Draws a curve for each column that shows how many pixels are how bright.",
                ),
                io.Int.Input(
                    "width", default=256, min=64, max=2048,
                    tooltip="The width of each picture in the grid, in pixels.",
                ),
                io.Int.Input(
                    "rows", default=4, min=1, max=64,
                    tooltip="How many pictures of each batch are shown at most.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The grid, for PreviewImage or SaveImage.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, labels="", difference=4.0, histogram=True, width=256, rows=4, **images) -> io.NodeOutput:
        given = [(key, images[key]) for key in sorted(images) if images[key] is not None]
        names = labels_of(labels)
        names += [key.replace("_", " ") for key, _ in given[len(names) :]]
        batches = [Batch(name, image.cpu()) for name, (_, image) in zip(names, given, strict=False)]
        return io.NodeOutput(to_image(draw_comparison(batches, difference, histogram, width, rows)))


NODES = [AttuneCompare]
