"""What a fit finds for a model, what it was found for, and whether it suits a model and a run at hand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

from ..kernels.conditioning import ConditioningMap
from ..kernels.fitted_sampler import FittedRun
from ..kernels.propagation import Reuse
from ..kernels.space import NoiseSpace

Size: TypeAlias = tuple[int, int]  # width and height in pixels

FORMAT = 1  # of the JSON object that stands for a calibration
SCHEDULE, NOISE_SHIFT, ENCODER, BLOCKS = "schedule", "noise_shift", "encoder_propagation", "block_propagation"
SAMPLER, FORECAST, ATTENTION = "fitted_sampler", "step_forecast", "attention_levels"
KINDS = (SCHEDULE, NOISE_SHIFT, ENCODER, BLOCKS, SAMPLER, FORECAST, ATTENTION)
PROPAGATION = (ENCODER, BLOCKS, FORECAST)
NEAR_STEPS, NEAR_CFG = 1.3, 2.0  # a fit holds for runs whose steps and guidance differ by no more than these factors
MOST_CFG = 1.2  # a fitted sampler, for guidance up to this factor: beyond it is worse than plain steps
SAME_LEVEL = 1e-3  # noise levels that differ by less, relative, are the same
SAME_SIDE = 0.1  # a picture whose sides differ by less has the same size
UNPATCHED = "none"  # where a model's weights are changed by no LoRA


@dataclass(frozen=True)
class ModelIdentity:
    """What a MODEL is, as far as a calibration must know.

    families: its configuration class and that class's own bases, by name, nearest first. space: "ve" or "flow".
    sigma_min and sigma_max: the model's own noise levels, in that space's units. prediction: what the network predicts,
    "eps", "v", "edm", "flow". config_hash: names its architecture. shift: of a flow model's own schedulers, None where
    it has none; factor: the same as a factor of sigma / (1 - sigma); reshifted: whether a ModelSampling node set it.
    noise_scale: how strong the noise is that a flow model was trained on, 1 for most.
    weights_hash: names its weights without LoRAs. patches: names the LoRAs and other weight patches on them, UNPATCHED
    without any. network: what its configuration says. All "" or None where unknown.
    """

    families: tuple[str, ...]
    space: Literal["ve", "flow"]
    sigma_min: float
    sigma_max: float
    prediction: str = ""
    config_hash: str = ""
    shift: float | None = None
    weights_hash: str = ""
    patches: str = ""
    factor: float | None = None
    reshifted: bool = False
    noise_scale: float = 1.0
    network: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def family(self) -> str:
        return self.families[0]

    @property
    def noise_space(self) -> NoiseSpace:
        return NoiseSpace(self.space, self.noise_scale)


@dataclass(frozen=True)
class Planned:
    """A run to be made. solver: its name in the table of solvers; levels: of its schedule, and setting: all else that a
    fitted sampler depends on. None, 0, () and "" for what is not known."""

    solver: str = ""
    steps: int = 0
    cfg: float | None = None
    size: Size | None = None
    levels: tuple[float, ...] = ()
    setting: str = ""


@dataclass(frozen=True)
class Point:
    """One calibrated setting: its key steps, what the other steps reuse, and what it gave.

    psnr: dB of the final latents to the whole run's. Of a forecast, whose other steps ask nothing: one_sided, the key
    steps that ask the positive alone; weights, for each step those of its forecast, () where there is none; errors, for
    each step what a forecast misses on a key step, in units of what happened since the last answer, 0 elsewhere.
    """

    reuse: Reuse
    keys: tuple[int, ...]
    speed: float
    psnr: float
    one_sided: tuple[int, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class KeySteps:
    """What was measured on one model, solver and schedule: `points` from the most faithful to the fastest. setting: of
    forecasts, names the other nodes' functions on the MODEL that change its guided answer."""

    blocks: int
    solver: str
    sigmas: tuple[float, ...]
    points: tuple[Point, ...]
    setting: str = ""


@dataclass(frozen=True)
class ShortRun:
    """A fitted run that stands in for a long one, and what it proved.

    psnr: dB of its latents to the long run's, on what it was not fitted to; `pictures` of them, 0 for the other half of
    the one that it was fitted to.
    """

    run: FittedRun
    psnr: float
    pictures: int = 0


@dataclass(frozen=True)
class CondLevels:
    """What the network is told in place of the true noise level, knot by knot.

    solver: the sampler it was fitted with, "" for every sampler. resolution: (width, height) it holds for. sigma:
    ascending levels inside the model's range; sigma_cond: the level told there.
    """

    solver: str
    resolution: Size
    sigma: tuple[float, ...]
    sigma_cond: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """One calibration and what it was made for; made by `fitted`, or read from a file.

    kind: one of KINDS. name: what the user sees. space: "ve" or "flow". families: class names of the host's model
    configurations; of a fit the one it was made on. resolution: (width, height) in pixels. sigmas: decreasing noise
    levels of the native run. A published table has only positive ones and the last is replaced by 0 when it runs; a
    fitted schedule ends in its own 0; a noise shift has none. source: where it comes from.

    Of a fit also, "" or None where unknown: solver, prediction, cfg, config_hash, weights_hash, patches (see
    ModelIdentity); alignments, one per resolution; key_steps, what propagation reuses on which of the `sigmas`, or
    which steps have exact attention; runs,
    by their steps, that stand in for the long run over `sigmas`, and setting, which names what else that run depends on
    (the guider, the kinds of conditioning, patches on the network). metrics (the evidence) and provenance are free-form
    facts; prompts only as hashes.
    """

    name: str
    method: str
    space: Literal["ve", "flow"]
    families: tuple[str, ...]
    resolution: Size
    sigmas: tuple[float, ...]
    source: str
    kind: str = SCHEDULE
    solver: str = ""
    prediction: str = ""
    cfg: float | None = None
    config_hash: str = ""
    weights_hash: str = ""
    patches: str = ""
    alignments: tuple[CondLevels, ...] = ()
    key_steps: KeySteps | None = None
    runs: tuple[ShortRun, ...] = ()
    setting: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the native run."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def is_fitted(self) -> bool:
        """Whether the levels are run as they are, 0 included, and not as a published table."""
        return bool(self.sigmas) and self.sigmas[-1] == 0

    @property
    def id(self) -> str:
        """Names the calibration itself: the same whatever it is called, however it was measured, by whom and when."""
        said = self.fields()
        what = {key: said[key] for key in said if key not in ("name", "source", "metrics", "provenance")}
        if self.runs:
            what["runs"] = [{key: one[key] for key in ("sigmas", "numbers")} for one in said["runs"]]
        return f"attune-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}"

    def fields(self) -> dict[str, Any]:
        """The JSON object of the calibration without its id; what it does not have is left out."""
        said = {"format": FORMAT, "kind": self.kind, **_spelled(self)}
        fit, runs = said.pop("key_steps") or {"blocks": None, "points": []}, said.pop("runs")
        said["blocks"], said["points"] = (
            fit["blocks"],
            [_without_empty({**one.pop("reuse"), **one}) for one in fit["points"]],
        )
        said["runs"] = [{**one.pop("run"), **one} for one in runs]
        for last in ("setting", "metrics", "provenance"):
            said[last] = said.pop(last)
        return _without_empty(said)

    def with_facts(self, metrics: Mapping[str, Any] | None = None, **provenance: Any) -> Calibration:
        """The same calibration with more `metrics` and more provenance."""
        return replace(self, metrics={**self.metrics, **(metrics or {})}, provenance={**self.provenance, **provenance})


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in ("", None, [], {})}


def _spelled(value: Any) -> Any:
    """As JSON has it: objects for dataclasses and lists for tuples, all of them new."""
    if isinstance(value, tuple | list):
        return [_spelled(one) for one in value]
    parts = value if isinstance(value, Mapping) else vars(value) if is_dataclass(value) else None
    return value if parts is None else {key: _spelled(one) for key, one in parts.items()}


def fitted(
    identity: ModelIdentity, kind: str, name: str, method: str, resolution: Size, metrics: Mapping[str, Any], *,
    solver: str = "", cfg: float | None = None, sigmas: Sequence[float] = (), alignments: Sequence[CondLevels] = (),
    key_steps: KeySteps | None = None, runs: Sequence[ShortRun] = (), setting: str = "", **provenance: Any,
) -> Calibration:  # fmt: skip
    """What a fit found on a model: the only way in which a fitted calibration comes to be.

    `name` goes behind the model's family. metrics: the evidence; provenance: how it was made, the date comes by itself.
    ValueError for a model whose network has no name, which could never be matched again.
    """
    if not identity.config_hash:
        raise ValueError(
            f"This MODEL ({identity.family}) does not say what network it has: nothing can be kept for it."
        )
    shift = {} if identity.shift is None else {"shift": round(identity.shift, 6)}
    scale = {} if identity.noise_scale == 1 else {"noise_scale": round(identity.noise_scale, 6)}
    return Calibration(
        name=f"{identity.family} {name}", method=method, space=identity.space, families=identity.families[:1],
        resolution=resolution, sigmas=tuple(map(float, sigmas)), source="Fitted with ComfyUI-Attune on this model.",
        kind=kind, solver=solver, prediction=identity.prediction, cfg=cfg, config_hash=identity.config_hash,
        weights_hash=identity.weights_hash, patches=identity.patches, alignments=tuple(alignments),
        key_steps=key_steps, runs=tuple(runs), setting=setting, metrics=metrics,
        provenance={"date": datetime.now(timezone.utc).date().isoformat(), **shift, **scale, **provenance},
    )  # fmt: skip


# --- does it suit? ---


@dataclass(frozen=True)
class Misfit:
    """One way in which a calibration does not suit a model or a run.

    aspect: one of ASPECTS. short: what it is for instead, for a list. fatal: it cannot be applied at all, as against:
    its gain was not measured so.
    """

    aspect: str
    short: str
    sentence: str
    fatal: bool = False

    def __str__(self) -> str:
        return self.sentence


OF_THE_MODEL = ("noise", "family", "prediction", "network", "weights", "patches", "shift")
ASPECTS = (*OF_THE_MODEL, "solver", "size", "steps", "cfg", "setting")  # from what matters most


def misfits(calibration: Calibration, identity: ModelIdentity, run: Planned | None = None) -> list[Misfit]:
    """Every way in which `calibration` does not suit, in the order of ASPECTS; none means that it fits.

    Loaders, lists, appliers and Attune Auto all ask this. A published table (without config_hash) is for a family, a
    fit for one network. A noise shift has a curve for every size, so a run's size is no matter to it.
    """
    found = [*_model_misfits(calibration, identity), *(_run_misfits(calibration, run) if run else ())]
    return sorted(found, key=lambda one: ASPECTS.index(one.aspect))


def _model_misfits(one: Calibration, model: ModelIdentity) -> Iterable[Misfit]:
    exact = one.kind != SCHEDULE  # what is told or reused holds for one kind of network, levels for more
    if one.space != model.space:
        kinds = {
            "ve": "models with Stable Diffusion's noise (sigma up to about 15)",
            "flow": "flow models (sigma 0 to 1)",
        }
        ours = kinds[model.space]
        said = f"'{one.name}' is for {kinds[one.space]}, but this MODEL ({model.family}) is one of the {ours}."
        yield Misfit("noise", "for another kind of noise", said, True)
    elif one.sigmas and one.sigmas[0] > model.sigma_max * 1.01:
        said = (
            f"'{one.name}' starts at sigma {one.sigmas[0]:.4g}, but this MODEL ({model.family}) knows noise only up to "
            f"{model.sigma_max:.4g}."
        )
        yield Misfit("noise", f"for noise up to {one.sigmas[0]:.3g}", said, True)
    if not set(one.families) & set(model.families):
        said = f"'{one.name}' was made for another architecture: {one.families[0]}, but this MODEL is {model.family}."
        yield Misfit("family", "for another network", said, True)
    elif one.families[0] != model.family and not one.config_hash:
        said = f"'{one.name}' was published for {one.families[0]}, but this MODEL is {model.family}."
        yield Misfit("shift", "for a relative", said)
    if one.prediction and model.prediction and one.prediction != model.prediction:
        said = f"'{one.name}' was made for {one.prediction} prediction, but this MODEL has {model.prediction}."
        yield Misfit("prediction", f"for {one.prediction} prediction", said, exact)
    if one.config_hash and model.config_hash and one.config_hash != model.config_hash:
        said = f"'{one.name}' was fitted on another network configuration of the family {one.families[0]}."
        yield Misfit("network", "for another network", said, one.kind in (*PROPAGATION, SAMPLER, ATTENTION))
    elif one.weights_hash and model.weights_hash and one.weights_hash != model.weights_hash:
        said = (
            f"'{one.name}' was fitted on other weights of the same architecture; its gain was not measured with the "
            "weights of this MODEL."
        )
        yield Misfit("weights", "for other weights", said)
    if one.patches and model.patches and one.patches != model.patches:
        had = "without LoRAs" if one.patches == UNPATCHED else "with LoRAs or other weight patches"
        has = "none" if model.patches == UNPATCHED else "some" if one.patches == UNPATCHED else "others"
        yield Misfit("patches", had, f"'{one.name}' was fitted {had}, but this MODEL has {has}.")
    shift = one.provenance.get("shift")
    if model.shift is not None and isinstance(shift, int | float) and abs(shift - model.shift) > 0.01 * model.shift:
        said = (
            f"'{one.name}' was fitted beside a shift of {shift:g}, but this MODEL has {model.shift:g}; the levels of a "
            "profile are absolute and do not move with the shift."
        )
        yield Misfit("shift", f"for a shift of {shift:g}", said)
    scale = one.provenance.get("noise_scale", 1.0)
    if one.config_hash and isinstance(scale, int | float) and abs(scale - model.noise_scale) > 0.01 * scale:
        said = f"'{one.name}' was fitted on noise of scale {scale:g}, but this MODEL has {model.noise_scale:g}."
        yield Misfit("prediction", f"for noise of scale {scale:g}", said)


def _run_misfits(one: Calibration, run: Planned) -> Iterable[Misfit]:
    long = one.kind in (SAMPLER, FORECAST)  # what stands in for one long run alone
    if one.solver and run.solver and one.solver != run.solver:
        said = f"'{one.name}' was fitted with {one.solver}, but the run has {run.solver}."
        yield Misfit("solver", f"for {one.solver}", said)
    sized = long or (one.kind == SCHEDULE and one.config_hash)
    if sized and run.size and not (run.size == one.resolution if long else same_size(run.size, one.resolution)):
        said = f"'{one.name}' was made at {size_text(one.resolution)}, but the latent is {size_text(run.size)}."
        yield Misfit("size", f"for {size_text(one.resolution)}", said)
    if long and run.levels and not _same_levels(run.levels, one.sigmas):
        said = f"'{one.name}' stands in for {one.steps} steps of another schedule, or with another 'denoise'."
        yield Misfit("steps", f"for {one.steps} steps", said)
    counted = not long and one.config_hash and one.steps and run.steps
    if counted and not 1 / NEAR_STEPS <= run.steps / one.steps <= NEAR_STEPS:
        said = f"'{one.name}' was fitted for {one.steps} steps, but the run has {run.steps}; fit one for that number."
        yield Misfit("steps", f"for {one.steps} steps", said)
    most = MOST_CFG if long else NEAR_CFG
    if one.cfg and run.cfg is not None and not 1 / NEAR_CFG <= run.cfg / one.cfg <= most:
        said = f"'{one.name}' was fitted at cfg {one.cfg:g}, but the run has {run.cfg:g}."
        yield Misfit("cfg", f"for cfg {one.cfg:g}", said)
    if long and one.setting and run.setting and one.setting != run.setting:
        said = f"'{one.name}' was fitted with another guider, kind of conditioning, sampler option or model patch."
        yield Misfit("setting", "for another set-up", said)


def _same_levels(one: Sequence[float], other: Sequence[float]) -> bool:
    near = lambda a, b: abs(a - b) <= SAME_LEVEL * max(a, b)
    return len(one) == len(other) and all(map(near, one, other))


def refuse_unfit(calibration: Calibration, identity: ModelIdentity, remedy: str, kinds: Sequence[str] = KINDS) -> None:
    """ValueError, ending in `remedy`, where `calibration` is of none of `kinds` or cannot be applied to the model."""
    if calibration.kind not in kinds:
        wanted = " or ".join(dict.fromkeys(kind_text(kind) for kind in kinds))
        raise ValueError(
            f"'{calibration.name}' is a {kind_text(calibration.kind)}, but a {wanted} is needed here. {remedy}"
        )
    fatal = next((one for one in misfits(calibration, identity) if one.fatal), None)
    if fatal is not None:
        raise ValueError(f"{fatal} {remedy}")


def kind_text(kind: str) -> str:
    """A kind as people call it."""
    named = {
        SCHEDULE: "schedule",
        NOISE_SHIFT: "noise shift",
        SAMPLER: "fitted sampler",
        ATTENTION: "calibration of attention",
    }
    return named.get(kind, "calibration of propagation")


def same_size(one: Size, other: Size) -> bool:
    """Whether both sides agree within a tenth."""
    return all(abs(a - b) <= SAME_SIDE * b for a, b in zip(one, other, strict=True))


def size_text(size: Size) -> str:
    return "x".join(map(str, size))


def conditioning_map(calibration: Calibration, levels: CondLevels, strength: float = 1.0) -> ConditioningMap:
    """The function of sigma that the `levels` of `calibration` stand for."""
    return ConditioningMap.through(NoiseSpace(calibration.space), levels.sigma, levels.sigma_cond, strength)


def pick_profile(
    calibrations: Iterable[Calibration], families: Iterable[str], resolution: Size | None = None
) -> Calibration | None:
    """The one for the first of `families` that has any; with a resolution, the nearest in log pixels.

    `families` goes from the model's own configuration class to its base classes.
    """
    calibrations = list(calibrations)
    for family in families:
        fitting = [one for one in calibrations if family in one.families]
        if fitting:
            wanted = resolution or fitting[0].resolution
            return min(fitting, key=lambda one: abs(math.log(math.prod(one.resolution) / math.prod(wanted))))
    return None
