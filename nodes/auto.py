"""One dial for the pack: look at the run, compose the single nodes that suit it, and say what was done and why."""

from __future__ import annotations

import logging
import math

from ._host.api import advanced, io, say_on_node, schema, ui
from ._host.expand import Expansion
from ._host.folders import installed_files
from ._host.identity import as_sampled, identify, is_distilled, network_of, sampled
from ._host.propagation.transformer import blocks_of
from ._host.propagation.unet import lies_deep, unet_of
from ._host.shelf import installed
from ._host.solvers import run_stock_node, sampler_names, scheduler_names
from ._plan import auto as plan
from ._plan.propagation import UNIFORM
from .golden_noise import AttuneGoldenNoiseModel, AttuneLoadNPNet
from .one_more_step import AttuneLoadOneMoreStep, AttuneOneMoreStep
from .profiles import AttuneApplyProfile, AttuneLoadProfile
from .propagation import AttunePropagation
from .redenoise import AttuneRedenoise
from .schedules import AttuneScheduler

LOG = logging.getLogger(__name__)


def _switch(name: str, what: str) -> io.Combo.Input:
    shown, always, off = plan.WISHES
    states = (
        f"'{shown}': only where a gain was measured for models of this kind. "
        f"'{always}': also where none was measured. '{off}': never."
    )
    return io.Combo.Input(name, options=plan.WISHES, default=shown, tooltip=f"{what} {states}")


class AttuneAuto(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneAuto", "Attune Auto", "attune/auto",
            "Looks at the run and at what is installed, uses what suits the run, and says what it used and why.",
            search_aliases=["automatic", "align your steps", "sigmas", "one node", "preset", "faster", "better"],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            enable_expand=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled, with its LoRAs and patches."),
                io.Latent.Input("latent", tooltip="The latent to sample, which tells the picture's size."),
                io.Int.Input("steps", default=10, min=1, max=10000, tooltip="How many steps the sampler takes."),
                io.Combo.Input(
                    "sampler_name", options=sampler_names(), default="dpmpp_2m",
                    tooltip="The solver of your sampler node: what is fitted belongs to one solver.",
                ),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="The guidance of your sampler or guider node; 1 and few steps mean a distilled model.",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="1 starts from pure noise. Less keeps more of the input picture, as in the stock KSampler.",
                ),
                *advanced(io.Combo.Input(
                    "scheduler", options=scheduler_names(), default="simple",
                    tooltip="The stock schedule to use where nothing better is known.",
                )),
                _switch("schedule", "Levels and timesteps that fit the model."),
                *advanced(
                    _switch(
                        "one_more_step",
                        "One More Step: true darks and brights, for models that would drift to medium brightness.",
                    ),
                    _switch(
                        "noise_shift",
                        "Noise shift, from a profile: for pictures of other sizes than the model was trained on.",
                    ),
                    _switch("golden_noise", "Noise fitted to the prompt, by a network or by re-denoising."),
                ),
                io.Combo.Input(
                    "speed", options=plan.SPEEDS, default=plan.OFF,
                    tooltip="Reuses features between steps. faithful: the picture hardly changes (45 dB). fast: the "
                    "fastest setting that was measured. off: every step computes the whole network.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True,
                    tooltip="For One More Step: the prompt, from the text encoder that its module reads.",
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True,
                    tooltip="Your graph's own schedule: used in place of 'scheduler', and handed through while this "
                    "node is bypassed.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler or its guider."),
                io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom or SamplerCustomAdvanced."),
                io.String.Output(
                    display_name="report", tooltip="What was used and why, what was left out and what would enable it."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return installed_files()

    @classmethod
    def execute(
        cls, model, latent, steps, sampler_name, cfg, denoise, scheduler, schedule, one_more_step, noise_shift,
        golden_noise, speed, positive=None, sigmas=None,
    ) -> io.NodeOutput:  # fmt: skip
        width = positive[0][0].shape[-1] if positive and positive[0][0] is not None else None
        stock = scheduler if sigmas is None else "sigmas"
        wishes = plan.Wishes(schedule, one_more_step, noise_shift, golden_noise, speed)
        inside = Expansion(cls, {"model": model, "latent": latent, "positive": positive})
        if sigmas is None:
            (sigmas,) = run_stock_node("BasicScheduler", model=model, scheduler=scheduler, steps=steps, denoise=denoise)
        run = plan.Run(steps, sampler_name.removesuffix("_gpu"), cfg, denoise, width, stock, tuple(sigmas.tolist()))
        facts = _facts(model, latent)
        shelf, unread = installed(modules=one_more_step != plan.OFF, npnets=golden_noise == plan.ALWAYS)
        decisions = plan.decide(facts, run, wishes, shelf, float(sigmas[0]) if len(sigmas) else None)
        picked = {one.method: one.pick for one in decisions if one.pick}
        out, levels = _composed(inside, run, speed, picked, shelf)
        said = plan.auto_report(facts, run, decisions, unread)
        LOG.info("Attune Auto: %s", said)
        say_on_node(cls, said)
        used = inside.graph is not None
        return io.NodeOutput(
            out if used else model, sigmas if levels is None else levels, said, expand=inside.graph,
            ui=ui.PreviewText(said),
        )  # fmt: skip


def _composed(inside: Expansion, run: plan.Run, speed: str, picked: dict[str, str], shelf: plan.Shelf) -> tuple:
    """MODEL and SIGMAS (None: the stock ones) out of the single nodes that stand for what was picked."""
    model, sigmas = inside.given("model"), None
    if name := picked.get(plan.SCHEDULE):
        if name in shelf.profiles:
            strength = 1.0 if plan.TOLD in picked else 0.0
            choice = {"steps": run.steps, "denoise": run.denoise, "denoise_mode": "comfy", "strength": strength}
            node = inside.add(AttuneApplyProfile, model=model, profile=_profile(inside, name), **choice)
            model, sigmas = node.out(0), node.out(2)
        else:
            choice = {"steps": run.steps, "denoise": run.denoise, "schedule": name}
            node = inside.add(AttuneScheduler, model=model, latent=inside.given("latent"), **choice)
            sigmas = node.out(0)
    if name := picked.get(plan.SHIFT):
        model = inside.add(AttuneApplyProfile, model=model, profile=_profile(inside, name)).out(0)
    if name := picked.get(plan.START):
        module = inside.add(AttuneLoadOneMoreStep, oms_name=name).out(0)
        model = inside.add(AttuneOneMoreStep, model=model, oms_model=module, positive=inside.given("positive")).out(0)
    if picked.get(plan.NOISE) == plan.REDENOISE:
        model = inside.add(AttuneRedenoise, model=model).out(0)
    elif name := picked.get(plan.NOISE):
        npnet = inside.add(AttuneLoadNPNet, npnet_name=name).out(0)
        model = inside.add(AttuneGoldenNoiseModel, model=model, npnet=npnet).out(0)
    if name := picked.get(plan.SPEED):
        model = _with_speed(inside, model, name, speed, shelf).out(0)
    return model, sigmas


def _profile(inside: Expansion, name: str):
    return inside.add(AttuneLoadProfile, profile_name=name).out(0)


def _with_speed(inside: Expansion, model, name: str, wish: str, shelf: plan.Shelf):
    if found := plan.key_steps_of(name):
        reuse, interval = found
        return inside.add(AttunePropagation, model=model, mode=UNIFORM, interval=interval, reuse=reuse)
    key_steps = shelf.profiles[name].key_steps
    assert key_steps is not None
    speed = max(point.speed for point in key_steps.points) if wish == plan.FAST else 0.0
    return inside.add(AttuneApplyProfile, model=model, profile=_profile(inside, name), speed=speed)


def _facts(model, latent: dict) -> plan.Facts:
    latent_format = model.get_model_object("latent_format")
    blocks = blocks_of(network_of(model))
    width = model.model.model_config.unet_config.get("context_dim")
    made, nested = sampled(model, latent), latent["samples"].is_nested
    return plan.Facts(
        identify(model, weights=True),
        "unet" if unet_of(model) is not None else "transformer" if blocks else "",
        type(latent_format).__name__,
        latent_format.latent_channels,
        made.size,
        0 if nested else math.prod(as_sampled(model, latent).shape[-2:]),
        len(blocks),
        width if isinstance(width, int) else None,
        is_distilled(model.get_model_object("model_sampling")),
        made.frames,
        not nested and lies_deep(model, as_sampled(model, latent)),
    )


NODES = [AttuneAuto]
