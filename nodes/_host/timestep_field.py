"""Sample a film whose frames have noise levels of their own, and tell the network each of them.

The host's sampling knows one level. A call gets the highest in sight; inside `apply_model` the network is told every
frame's, and its answer becomes each frame's own denoised state. So guidance, LoRAs and what else a MODEL carries act
on true states, as in any other run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_base
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.ldm.wan.model import WanModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.space import NoiseSpace
from ...kernels.timestep_field import Timetable, sample_field
from .._plan.films import STAIRCASE, FieldWish
from .._plan.latents import latent_text
from .clock import noise_space
from .conditioning import KEY as TOLD
from .conditioning import options_over
from .session import stop_if_asked

LOG = logging.getLogger(__name__)
WHO = "Attune Timestep Field"
KEY = "attune.timestep_field"
WHOLE_FILM = slice(None)
BY_FRAME, BY_TOKEN, BY_FIRST = "frame", "token", "first frame and rest"
READS = {  # class of the host -> a level for each …
    "WAN21": BY_FRAME, "CosmosPredict2": BY_FRAME, "LTXV": BY_TOKEN, "HunyuanVideo": BY_FIRST,
}  # fmt: skip
TOLD_FIRST = "guiding_frame_index"  # HunyuanVideo's own name for the timestep that its first frame is told
MORE_FRAMES = ("reference_latent", "time_dim_concat")  # conditions that the network puts beside the film's frames


def reads(base_model: Any) -> str:
    """What this network can be told a level for; ValueError, with the models to use, for one level a film."""
    names = [one.__name__ for one in type(base_model).__mro__]
    found = next((READS[name] for name in names if name in READS), None)
    network = getattr(base_model.diffusion_model, "_orig_mod", base_model.diffusion_model)  # as torch.compile keeps it
    another = isinstance(network, WanModel) and type(network).forward_orig is not WanModel.forward_orig  # as VACE's
    if found is None or another:
        raise ValueError(
            f"{WHO}: the network of this MODEL ({names[0]}) reads one noise level for all it samples, so frames cannot "
            "have levels of their own. Use Wan 2.1 or 2.2 for text or pictures (best with weights of SkyReels-V2-DF or "
            "Pusa), LTX-Video, Cosmos Predict2, HunyuanVideo for a first frame, or the demo video model."
        )
    return found


@dataclass(frozen=True)
class _Run:
    """A film in the hands of the host: what is asked, its guider, and noise, latent and mask in the model's scale."""

    ask: Any
    guider: Any
    base_model: Any
    noise: Tensor
    latent: Tensor
    mask: Tensor | None
    space: NoiseSpace
    extra_args: dict

    @classmethod
    def of(cls, model: Any, x: Tensor, extra_args: dict) -> _Run:
        inside = model
        while inside is not None and not hasattr(inside, "latent_image"):
            inside = getattr(inside, "inner_model", None)
        if inside is None:
            raise ValueError(
                f"{WHO}: another node wraps its SAMPLER and hides the latent, and with it the given frames. Connect "
                f"the sampler of {WHO} to SamplerCustom or SamplerCustomAdvanced without that node."
            )
        base_model = inside.inner_model.inner_model
        if x.ndim != 5:
            raise ValueError(
                f"{WHO}: the latent must be a film, [batch, channels, frames, height, width], but it is "
                f"{latent_text(x.shape)}."
            )
        latent = torch.zeros_like(x) if inside.latent_image is None else inside.latent_image.to(x)
        mask, space = extra_args.get("denoise_mask"), noise_space(base_model.model_sampling)
        return cls(model, inside.inner_model, base_model, inside.noise.to(x), latent, mask, space, extra_args)

    def at(self, levels: Tensor, frames: slice = WHOLE_FILM) -> Tensor:
        """The latent's frames with their part of the noise, as the host noises at one level."""
        clean, noise = self.latent[:, :, frames], self.noise[:, :, frames]
        return self.space.alpha(levels) * clean + levels * self.space.scale * noise

    def denoise(self, x: Tensor, levels: Tensor, frames: slice, sigmas: Tensor) -> Tensor:
        """Guided estimate of these frames; x outside of a mask is the latent's own, as in the host."""
        stop_if_asked()
        mask = None if self.mask is None else self.mask.expand_as(self.noise)[:, :, frames]
        top = levels.max().expand(len(x)).to(x)
        if mask is not None:
            x = x * mask + self._outside(x, levels, frames, top) * (1 - mask)
        options = _told(options_over(self.extra_args["model_options"], sigmas), levels, reads(self.base_model))
        answer = self.ask(x, top, **{**self.extra_args, "denoise_mask": None, "model_options": options})
        return answer if mask is None else answer * mask + self.latent[:, :, frames] * (1 - mask)

    def _outside(self, x: Tensor, levels: Tensor, frames: slice, top: Tensor) -> Tensor:
        """What the network sees outside of a mask: the host's rule, for some models the latent without noise."""
        if type(self.base_model).scale_latent_inpaint is comfy.model_base.BaseModel.scale_latent_inpaint:
            return self.at(levels, frames)
        parts = {"noise": self.noise[:, :, frames], "latent_image": self.latent[:, :, frames]}
        return self.base_model.scale_latent_inpaint(x=x, sigma=top, **parts)


def field_sampler(wish: FieldWish, order: int) -> Any:
    """A SAMPLER: Euler's method, or its second order, over a field of noise levels."""

    @torch.no_grad()
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        run = _Run.of(model, x, extra_args or {})
        table = _checked(run, wish, x, sigmas)
        start = table.levels[0].to(x)
        x = torch.where(start == sigmas[0], x, run.at(start))

        def denoise(state: Tensor, levels: Tensor, frames: slice) -> Tensor:
            return run.denoise(state, levels, frames, sigmas)

        LOG.info("%s: %s", WHO, said(wish, table))
        for i, state, denoised, after in sample_field(denoise, x, table, order, wish.shown, run.noise, run.space):
            if callback is not None:
                at = i * (len(sigmas) - 1) // table.steps
                callback({"x": state, "i": at, "sigma": sigmas[at], "sigma_hat": sigmas[at], "denoised": denoised})
            x = after
        return x

    sample.__name__ = "sample_attune_timestep_field"
    return comfy.samplers.KSAMPLER(sample)


def said(wish: FieldWish, table: Timetable) -> str:
    frames, first = table.levels.shape[1], table.windows[0]
    seen = "" if first == (0, frames) else f", {first[1] - first[0]} of them in sight"
    return f"{wish.preset}; {frames} frames{seen}; {table.steps} evaluations"


def _checked(run: _Run, wish: FieldWish, x: Tensor, sigmas: Tensor) -> Timetable:
    """The run's timetable; ValueError, before the first call of the model, for what cannot be sampled so."""
    by = reads(run.base_model)
    known = (comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW)
    if not isinstance(run.base_model.model_sampling, known):
        raise ValueError(
            f"{WHO}: this MODEL was given another kind of noise than its own; remove that ModelSampling node."
        )
    if len(sigmas) < 2 or float(sigmas[-1]) != 0 or not bool((sigmas[:-1] > sigmas[1:]).all()):
        raise ValueError(f"{WHO}: 'sigmas' must fall throughout and end in 0; the run cannot be split in two.")
    options = run.extra_args.get("model_options", {})
    if run.mask is not None and run.space.kind == "ve":
        raise ValueError(
            f"{WHO}: the latent has a noise mask, which Cosmos cannot take beside levels of frames. Use 'levels' here."
        )
    if options.get("context_handler") is not None:
        raise ValueError(
            f"{WHO}: context windows cut the film themselves. Remove them, and use the preset '{STAIRCASE}'."
        )
    if "denoise_mask_function" in options:
        raise ValueError(
            f"{WHO}: Differential Diffusion reads a mask by one noise level. Remove it, and use 'mask' here."
        )
    if wish.takes_frames and not bool(run.latent.any()):
        raise ValueError(
            f"{WHO}: '{wish.preset}' takes given frames from the latent, but that is empty. Put your pictures in with "
            f"Attune Film, or with '{STAIRCASE}' set 'given_frames' to 0."
        )
    try:
        table = wish.timetable(sigmas.float().cpu(), (x.shape[2], x.shape[3], x.shape[4]), by == BY_TOKEN)
    except ValueError as error:
        raise ValueError(f"{WHO}: {error}") from None
    _check_conditions(run, by, table)
    if options.get("transformer_options", {}).get(TOLD):
        LOG.warning("%s: each frame is told its own level, so a timestep alignment or noise shift does not act.", WHO)
    return table


def _check_conditions(run: _Run, by: str, table: Timetable) -> None:
    """ValueError for conditions that do not go with the levels, or not with a part of the film."""
    frames = table.levels.shape[1]
    conds = [cond for side in getattr(run.guider, "conds", {}).values() for cond in side or ()]
    held = {name: getattr(one, "cond", None) for cond in conds for name, one in cond.get("model_conds", {}).items()}
    beside = [name for name in MORE_FRAMES if name in held]
    if by == BY_FRAME and beside:
        raise ValueError(
            f"{WHO}: the prompt carries frames beside those of the film ({', '.join(beside)}), and these have no "
            "level. Take them out of the prompt."
        )
    if by == BY_FIRST:
        _check_first(run, table, held)
    if any(first > 0 or behind < frames for first, behind in table.windows):
        films = {name: one for name, one in held.items() if isinstance(one, Tensor) and one.ndim == 5}
        long = [name for name, one in films.items() if one.shape[2] == frames]
        if long or any("control" in cond for cond in conds):
            raise ValueError(
                f"{WHO}: the film is longer than 'window', and the prompt carries pictures for all of it "
                f"({', '.join(long) or 'ControlNet'}), which cannot be cut. Set 'window' to {frames}, or take them out."
            )


def _check_first(run: _Run, table: Timetable, held: dict) -> None:
    """ValueError for what a network cannot be told that reads one level for the first frame and one for all others."""
    frames = table.levels.shape[1]
    rest = table.levels[:, 1:]
    whole = all(window == (0, frames) for window in table.windows)
    if not whole or not bool((rest == rest[:, :1]).all()):
        raise ValueError(
            f"{WHO}: this network (HunyuanVideo) reads one noise level for the first frame and one for all others. Use "
            "'first frame given', or 'free' with 'levels' that differ in the first frame alone, such as 0, 1, 1, 1."
        )
    if TOLD_FIRST in held:
        raise ValueError(
            f"{WHO}: the prompt already tells HunyuanVideo of a first frame. Use a prompt without pictures."
        )


def _told(model_options: dict, levels: Tensor, by: str) -> dict:
    """A copy of a run's options in which the network is told these levels [f h w], innermost of all wrappers."""
    options = model_options["transformer_options"]
    kinds = options.get("wrappers", {})
    calls = {**kinds.get(WrappersMP.APPLY_MODEL, {}), KEY: [_teller(levels, by)]}
    wrapped = {**kinds, WrappersMP.APPLY_MODEL: calls}
    return {**model_options, "transformer_options": {**options, "wrappers": wrapped}}


def _teller(levels: Tensor, by: str) -> Any:
    """APPLY_MODEL: one call of the network for frames [b c f h w] with levels [f h w]."""

    def tell(executor: Any, x, sigma, *args, **kwargs):
        base_model = executor.class_obj
        sampling, field = base_model.model_sampling, levels.to(x.device)[None, None]
        heard = sampling.timestep(field).float().expand(len(x), 1, -1, *x.shape[-2:])

        def told(timestep, denoise_mask=None, **more):
            """With the share of a mask, where the host tells the network of one."""
            each = heard if denoise_mask is None else heard * denoise_mask[:, :1]
            if by == BY_FIRST:
                return heard[: len(timestep), 0, -1].mean(dim=(1, 2)).to(timestep)
            if by == BY_TOKEN:
                return base_model.diffusion_model.patchifier.patchify(each)[0].to(timestep)
            return each.mean(dim=(1, 3, 4)).to(timestep)

        if by == BY_FIRST and bool((heard != heard[:, :, :1]).any()):
            kwargs = {**kwargs, TOLD_FIRST: heard[:, 0, 0].mean(dim=(1, 2))}
            executor = partial(_row_by_row, executor)  # the host's code for a first frame takes one
        shadowed = base_model.__dict__.get("process_timestep")
        base_model.process_timestep = told
        try:
            return _each_by_its_level(executor, sampling, x, sigma, field, args, kwargs)
        finally:
            if shadowed is None:
                del base_model.process_timestep
            else:
                base_model.process_timestep = shadowed

    return tell


def _row_by_row(
    executor, x: Tensor, sigma: Tensor, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more
) -> Tensor:  # fmt: skip
    """APPLY_MODEL for one film and condition after the other, in place of all at once."""
    count, options = len(x), transformer_options or {}

    def row(value: Any, i: int) -> Any:
        if isinstance(value, Tensor):
            return value[i : i + 1] if value.ndim and len(value) == count else value
        if isinstance(value, dict):
            return {name: row(one, i) for name, one in value.items()}
        return [row(one, i) for one in value] if isinstance(value, list) else value

    answers = []
    for i in range(count):
        lists = {name: options[name] for name in ("cond_or_uncond", "uuids") if name in options}
        mine = {**options, **{name: [one[i * len(one) // count]] for name, one in lists.items()}}
        conds = [row(one, i) for one in (c_concat, c_crossattn, control)]
        answers.append(executor(x[i : i + 1], sigma[i : i + 1], *conds, mine, **row(more, i)))
    return torch.cat(answers)


def _each_by_its_level(executor, sampling, x: Tensor, sigma: Tensor, field: Tensor, args, kwargs) -> Tensor:
    """Each frame's denoised state, from an answer that the host made for one level `sigma` [b]."""
    scalar = sigma.reshape(-1, *[1] * (x.ndim - 1))
    if isinstance(sampling, comfy.model_sampling.CONST):
        return x - field * ((x - executor(x, sigma, *args, **kwargs)) / scalar)
    t, s = field / (field + 1), scalar / (scalar + 1)  # Cosmos: input (1 - t) x, denoised (1 - t) x - t output
    scaled = x * (1 - t)
    output = (scaled - executor(scaled / (1 - s), sigma, *args, **kwargs)) / s
    return scaled - t * output
