"""Our MODEL -> MODEL nodes on the demo models, each with settings that do something and settings that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from graphs import STEPS, Kit
from pack.kernels.propagation import Reuse
from pack.models.calibration import Calibration, CondLevels, KeySteps, Point
from pack.models.store import shipped_profiles

NUMBERS = count()


@dataclass(frozen=True)
class Method:
    """A MODEL -> MODEL node on a demo model, with settings that do something and settings that do nothing."""

    model: str
    node: str
    inputs: dict
    off: dict
    needs: Callable[[Kit], dict] = lambda kit: {}
    where: dict | None = None  # graph -> why the method rightly changes nothing there
    silent: str = ""  # why the method rightly changes nothing in any graph but those of `changes`
    changes: tuple[str, ...] = ()
    refused: dict | None = None  # graph -> part of the sentence with which the method refuses it
    place: str = ""  # what a MODEL has one of: of two methods in one place the later counts
    asks: int = STEPS  # calls of the network in a run of KSampler, the first ones of a method with more

    def beside(self, other: Method) -> bool:
        """Whether both can be on one MODEL."""
        return (self.place or self.node) != (other.place or other.node)

    def same(self, graph: str) -> str:
        """Why the method changes nothing in a graph; "" where it changes something."""
        return (self.where or {}).get(graph) or ("" if graph in self.changes else self.silent)

    def on(self, kit: Kit) -> Callable:
        return self._put(kit, self.inputs)

    def idle(self, kit: Kit) -> Callable:
        return self._put(kit, {**self.inputs, **self.off})

    def _put(self, kit: Kit, inputs: dict) -> Callable:
        return lambda model: kit.host.call(self.node, model=model, **inputs, **self.needs(kit))[0]


def aligned(space: str, prediction: str, sigma: tuple, told: tuple) -> Calibration:
    knots = CondLevels("", (128, 128), sigma, told)
    levels = (*reversed(sigma), 0.0)
    family = {"ve": "AttuneDemo", "flow": "SD3"}[space]
    return Calibration(
        "test", "by hand", space, (family,), (128, 128), levels, "a test", prediction=prediction, alignments=(knots,)
    )


def module(kit: Kit) -> dict:
    """The demo model's module of One More Step, and a prompt for it."""
    (loaded,) = kit.host.call("AttuneLoadOneMoreStep", oms_name="attune_demo.safetensors")
    return {"oms_model": loaded, "positive": kit.positive}


def npnet(kit: Kit) -> dict:
    return {"npnet": kit.host.call("AttuneLoadNPNet", npnet_name="attune_demo_npnet.safetensors")[0]}


def examples(kit: Kit) -> dict:
    """Latents to take brightness and colours from."""
    return {"examples": {"samples": 0.3 + 0.2 * kit.picture(32)["samples"]}}


def forecasts(kit: Kit) -> dict:
    """A profile for the graphs' own run, whose steps 2, 3 and 5 hold the last answer and go a little on."""
    (levels,) = kit.host.call("BasicScheduler", model=kit.model, scheduler="normal", steps=STEPS, denoise=1.0)
    keys = (0, 1, 4, 6, 7)
    rows = tuple(
        (0.0, *[0.2] * min(sum(k < i for k in keys) - 1, 2), 0.0) if i in (2, 3, 5) else () for i in range(STEPS)
    )
    point = Point(Reuse(0, 1), keys, STEPS / 4.5, 40.0, (4,), rows, (0.0,) * STEPS)
    sigmas = tuple(levels.tolist())
    family = {"unet": "AttuneDemo", "flow": "SD3"}[kit.name]
    space = {"unet": "ve", "flow": "flow"}[kit.name]
    return {
        "profile": Calibration(
            "test", "by hand", space, (family,), (64, 64), sigmas, "a test", kind="step_forecast", solver="euler",
            key_steps=KeySteps(1, "euler", sigmas, (point,)),
        )
    }  # fmt: skip


NO_NEGATIVE = "The guider does not ask one positive and one negative: every step asks what the guider asks."
OTHER_LEVELS = "The run has other noise levels than the forecasts were fitted to: every step is asked."
FROM_A_PICTURE = "The run begins from a picture, not from noise: the method stands aside."
APPLY = {
    "steps": 0,
    "denoise": 1.0,
    "denoise_mode": "exact",
    "resolution_policy": "ignore",
    "strength": 1.0,
    "speed": 0.0,
}
REUSE = {
    "mode": "uniform", "interval": 2, "speed": 1.5, "forecast": True, "keep_last": 1, "start_percent": 0.0,
    "end_percent": 1.0, "prior_noise": 0.0, "cache_dtype": "as computed", "cache_device": "as computed",
    "memory_limit": 0,
}  # fmt: skip
METHODS = {
    "aligned timesteps": Method(
        "unet", "AttuneApplyProfile",
        {**APPLY, "profile": aligned("ve", "v", (0.4, 1.4, 4.0, 14.0), (0.33, 1.1, 3.3, 13.0))}, {"strength": 0.0},
    ),
    "aligned timesteps, flow": Method(
        "flow", "AttuneApplyProfile",
        {**APPLY, "profile": aligned("flow", "flow", (0.4, 0.7, 0.9), (0.35, 0.62, 0.88))}, {"strength": 0.0},
    ),
    "encoder propagation": Method(
        "unet", "AttunePropagation", {**REUSE, "reuse": "encoder reused", "parallel": "auto"}, {"interval": 1}
    ),
    "top level fresh": Method(
        "unet", "AttunePropagation", {**REUSE, "reuse": "top level fresh", "parallel": "off"}, {"interval": 1}
    ),
    "block propagation": Method(
        "flow", "AttunePropagation", {**REUSE, "reuse": "first block fresh"}, {"interval": 1}
    ),
    "one-sided steps": Method(
        "flow", "AttunePropagation",
        {**REUSE, "reuse": "automatic", "interval": 1, "guidance": "every second step"}, {"guidance": "every step"},
        where={"SamplerCustomAdvanced, BasicGuider": NO_NEGATIVE, "SamplerCustomAdvanced, DualCFGGuider": NO_NEGATIVE},
    ),
    "forecasts": Method(
        "unet", "AttunePropagation", {**REUSE, "mode": "calibrated profile", "reuse": "automatic"},
        {"mode": "uniform", "interval": 1}, forecasts,
        {"KSampler (Advanced), two stages": OTHER_LEVELS, "img2img": OTHER_LEVELS}, asks=5,
    ),
    "noise shift": Method(
        "flow", "AttuneApplyProfile",
        {**APPLY, "profile": next(p for p in shipped_profiles().values() if p.kind == "noise_shift")}, {"strength": 0.0},
        place="noise shift",  # beside a schedule, which the same node applies
    ),
    "one more step": Method(
        "unet", "AttuneOneMoreStep", {"strength": 1.0, "diversity": 1.0}, {"strength": 0.0}, module,
        {"img2img": FROM_A_PICTURE}, place="first state",
    ),
    "signal leak": Method(
        "unet", "AttuneSignalLeak",
        {"frequencies": 3, "strength": 1.0, "diversity": 1.0, "noise_level": "exact"}, {"strength": 0.0}, examples,
        {"img2img": FROM_A_PICTURE}, place="first state",
    ),
    "golden noise": Method(
        "unet", "AttuneGoldenNoiseModel",
        {"strength": 1.0, "other_sizes": "windows", "long_prompt": "first part", "svd_on": "cpu",
         "partial_denoise": "skip"}, {"strength": 0.0}, npnet, {"img2img": FROM_A_PICTURE},
    ),
    "re-denoise": Method(
        "flow", "AttuneRedenoise",
        {"strong_cfg": 5.5, "weak_cfg": 1.0, "rounds": 1, "strength": 1.0, "zigzag_steps": 0, "mode": "two-step", "depth": 0.39,
         "evaluate_at": "next level", "renormalize": False, "partial_denoise": "skip"},
        {"strength": 0.0},
        where={"img2img": FROM_A_PICTURE,
               "context windows": "Context windows know the run's own noise levels only: the method stands aside."},
        refused={"SamplerCustomAdvanced, BasicGuider": "no negative conditioning"},
    ),
    "attention by sigma": Method(
        "unet", "AttuneAttentionBySigma", {"kernel": "split", "highest_sigma": 10.0, "lowest_sigma": 0.1},
        {"kernel": "stock"},
    ),
    "precision guard": Method(
        "unet", "AttunePrecisionGuard",
        {"full_precision": "checkpoints/attune_demo.safetensors", "parts": "sensitive and outermost blocks"},
        {"full_precision": "none"}, silent="No weight of the model is rounded, so there is nothing to put back.",
        changes=("fp8 weights",),
    ),
    "calibration set": Method(
        "unet", "AttuneCalibrationSet",
        {"samples": 1000000, "per_run": 2, "spacing": "uniform", "conditioning": "embeddings"}, {},
        lambda kit: {"name": f"compatibility {next(NUMBERS)}"},  # a folder of its own: samples of two models do not mix
        silent="The node reads what the model is asked and changes no picture.",
    ),
    "training noise": Method(
        "flow", "AttuneTrainingNoise", {"timesteps": "logit-normal", "noise": "nearest of several"}, {},
        silent="The node changes what a training draws, and no picture.",
    ),
}  # fmt: skip
# Those that change what a run asks of its network or where it begins: each day more is asked of them than of the others.
EVERY_DAY = [name for name, method in METHODS.items() if not method.silent and name != "attention by sigma"]
