"""Films whose frames have noise levels of their own: continue, fill in and extend them; and the films' latents."""

from __future__ import annotations

from ._host.api import advanced, io, schema
from ._host.timestep_field import field_sampler
from ._plan.films import FIRST_GIVEN, PRESETS, FieldWish, film_of, frames_of

CATEGORY = "attune/video"
ORDERS = {"euler": 1, "second order": 2}


class AttuneTimestepField(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneTimestepField", "Attune Timestep Field", CATEGORY,
            "Makes a sampler that gives each frame of a film its own noise level, to continue a film, to fill it "
            "in, or to extend it without end.",
            search_aliases=[
                "diffusion forcing", "image to video", "I2V", "interpolate frames", "extend video", "long video",
                "Pusa", "SkyReels", "FVDM", "per-frame noise",
            ],
            is_experimental=True,
            inputs=[
                io.Combo.Input(
                    "preset", options=list(PRESETS), default=FIRST_GIVEN,
                    tooltip="first frame given: goes on from a picture. first and last given: fills in between. "
                    "extend: goes on from 'given_frames'. staircase: block by block, for films of any length. free: by "
                    "'levels' or 'mask'.",
                ),
                io.Int.Input(
                    "given_frames", default=1, min=0, max=4096,
                    tooltip="For extend and staircase: how many frames at the start of the latent are given. Staircase "
                    "with 0 starts from noise.",
                ),
                io.Float.Input(
                    "given_noise", default=0.0, min=0.0, max=0.9, step=0.01,
                    tooltip="The noise level at which given and finished frames are shown to the model; the frames "
                    "themselves do not change. With 0.02 to 0.1 the model goes on from them more freely, as "
                    "SkyReels-V2 and Pusa do.",
                ),
                io.Combo.Input(
                    "solver", options=list(ORDERS), default="second order",
                    tooltip="second order: each frame moves by its own last two slopes (Adams-Bashforth). euler: "
                    "Euler's method; with equal levels it is the stock euler. Both take one evaluation a step.",
                ),
                io.String.Input(
                    "levels", default="",
                    tooltip="For free: each frame's share of the noise level, 0 to 1, with commas between: 0, 0.5, 1. "
                    "A list of another length is stretched over the film. 0 keeps the latent's frame.",
                ),
                *advanced(
                    io.Int.Input(
                        "window", default=0, min=0, max=4096,
                        tooltip="For staircase: how many frames of the latent the model sees at once. 0: all of them.",
                    ),
                    io.Int.Input(
                        "block", default=1, min=1, max=4096,
                        tooltip="For staircase: how many frames begin together.",
                    ),
                    io.Int.Input(
                        "overlap", default=0, min=0, max=4096,
                        tooltip="For staircase: at least how many finished frames stay in the window. 0: half of the "
                        "window. A higher number holds on to more of the past and takes more steps.",
                    ),
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="For free, in place of 'levels': white is the full noise level, black keeps the latent. "
                    "One for each frame; LTX-Video takes regions too.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, preset=FIRST_GIVEN, given_frames=1, given_noise=0.0, solver="second order", levels="", window=0, block=1,
        overlap=0, mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        wish = FieldWish(preset, given_frames, given_noise, levels, window, block, overlap, mask)
        return io.NodeOutput(field_sampler(wish, ORDERS[solver]))


class AttuneFilm(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneFilm", "Attune Film", CATEGORY,
            "Puts frames at the start and the end of a film's latent, and takes its frames apart as a batch.",
            search_aliases=["video latent", "first frame", "last frame", "frames to batch", "batch to video latent"],
            inputs=[
                io.Latent.Input("film", tooltip="A latent of a film, mostly empty, such as EmptyHunyuanLatentVideo."),
                io.Latent.Input(
                    "start", optional=True,
                    tooltip="From VAE Encode: a picture, a batch of frames, or a film. They become the first frames.",
                ),
                io.Latent.Input("end", optional=True, tooltip="The same for the film's last frames."),
            ],
            outputs=[
                io.Latent.Output(display_name="film", tooltip="For the sampler, with Attune Timestep Field."),
                io.Latent.Output(
                    display_name="frames",
                    tooltip="The frames as a batch of pictures, for VAEs that know no films, as the demo's.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, film, start=None, end=None) -> io.NodeOutput:
        whole = film_of(film, start, end)
        return io.NodeOutput(whole, frames_of(whole))


NODES = [AttuneTimestepField, AttuneFilm]
