"""Samplers that were fitted, and the one that learns them while the user works."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import trange
from PIL import Image
from torch import Tensor

from ...kernels.fitted_sampler import (
    FAR,
    FittedRun,
    OnPaper,
    advance,
    distance,
    fidelity,
    learn,
    probe,
    solve,
)
from ...kernels.space import NoiseSpace
from ...kernels.timestep_aligner import Trajectory
from ...kernels.types import Denoiser, Sigmas
from ...models.calibration import SAMPLER, Calibration, ModelIdentity, Planned, ShortRun, misfits
from .._plan.fitted_sampler import (
    AUTO,
    COUNTS,
    FORGET,
    FULL_RUN,
    LEARN_AGAIN,
    USES,
    Wish,
    fitted_sampler,
    said_of_run,
    serving_run,
    was_tried,
)
from .._plan.time_left import TimeLeft, duration
from .api import io, text_on, widget_place
from .cached_pictures import Ran, recall, remember
from .calibrating import CACHES, stands_aside
from .card import Draw, Shown, card_of, keep_card
from .conditioning import options_over
from .folders import (
    file_and_id,
    find_profile,
    forget_profile,
    keep_profile,
    keep_update,
    profile_path,
    profile_stamps,
    profiles_of_kind,
)
from .identity import identify, is_distilled, pixels_of
from .live import ProgressBar
from .propagation import KEY as PROPAGATION
from .recorder import Recorder
from .session import denoiser, last
from .setting import setting_of
from .solvers import adds_noise, facts_of, solver_name
from .workflow_profiles import content_name, set_widget

LOG = logging.getLogger(__name__)
KEY = "attune.fitted_sampler"
FITTED_RUN = "fitted_run"  # option of the sampler function
SKIPS = {PROPAGATION: "Attune Propagation", **{key.lower(): key for key in CACHES}}  # by the key of their wrappers
SINCE: dict[str, int] = {}  # short runs of each calibration since its last check, by file


@torch.no_grad()
def sample_attune_fitted(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    fitted_run: FittedRun | None = None,
    probes: list[Tensor] | None = None,
):
    """The host's form of a solver, for one fitted run: its levels must be those of the run.

    probes: takes what `distance` looks at.
    """
    run = _checked(fitted_run, sigmas)
    answers: list[Tensor] = []
    each = x.new_ones(len(x))
    for i in trange(run.steps, disable=disable):
        denoised = model(x, sigmas[i] * each, **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        answers = [denoised, *answers[: run.history]]
        if probes is not None:
            probes.append(probe(x, denoised))
        x = advance(run, i, x, answers)
    if probes is not None:
        probes.append(probe(x, denoised))
    return _outside_kept(x, model, extra_args or {}) if run.sigmas[-1] == 0 else x


def _outside_kept(x: Tensor, model: Any, extra_args: dict) -> Tensor:
    """x with the picture as it was where the mask of an inpainting lets nothing change: Euler's last step ends there by
    itself, a fitted one nearly."""
    mask = extra_args.get("denoise_mask")
    return x if mask is None else x * mask + model.latent_image * (1 - mask)


def _checked(run: FittedRun | None, sigmas: Tensor) -> FittedRun:
    assert run is not None
    given = sigmas.tolist()
    if len(given) != len(run.sigmas) or any(
        abs(a - b) > 1e-4 * max(abs(a), abs(b)) for a, b in zip(given, run.sigmas, strict=True)
    ):
        raise ValueError(
            f"The fitted sampler has {run.steps} steps on noise levels of its own, but SIGMAS are another schedule of "
            f"{len(given) - 1} steps. Connect the SIGMAS of the same Attune Apply Profile, without a node between them."
        )
    return run


def fitted_sampler_of(run: FittedRun, **options: Any) -> Any:
    """A SAMPLER that makes a fitted run; goes with the run's levels as SIGMAS."""
    return comfy.samplers.KSAMPLER(sample_attune_fitted, {FITTED_RUN: run, **options})


# --- the sampler that learns ---


@dataclass(frozen=True)
class Drawing:
    """How to draw the card of what was learned; and, while it is learned, a long run's levels and the runs found."""

    card: Draw
    learned: Callable[[Sequence[float], Sequence[ShortRun]], Image.Image]


@dataclass(frozen=True)
class Scene:
    """A run that is about to begin, as calibrations are matched to it. refused: why it cannot be learned, or ""."""

    identity: ModelIdentity
    planned: Planned
    refused: str


class FastSampler(comfy.samplers.Sampler):
    """A SAMPLER that makes the user's own run, or the short one that was learned from it.

    It passes for the sampler that it stands for wherever a solver is asked for. use_at: the place of the widget `use`
    among those of its node `node_id`.
    """

    def __init__(
        self, inner: Any, wish: Wish, draw: Drawing | None = None, say: Callable[[str], None] = lambda _: None,
        node_id: str = "", use_at: int = 0, progress: Callable[[str], None] = lambda _: None,
    ):  # fmt: skip
        self.inner, self.wish, self.draw, self._say, self.progress = inner, wish, draw, say, progress
        self.node_id, self.use_at = node_id, use_at

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: while a copy is made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        given = (sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        if not hasattr(model_wrap, "model_patcher") or stands_aside(extra_args["model_options"], KEY):
            return self.own.sample(model_wrap, *given)
        return _Run(self, model_wrap, *given).made()

    @property
    def own(self) -> Any:
        """The sampler that it stands for, with what others have set on this one in its place."""
        changed = {name: vars(self)[name] for name in ("sampler_function", "extra_options") if name in vars(self)}
        if not changed:
            return self.inner
        inner = copy.copy(self.inner)
        vars(inner).update(changed)
        return inner

    def say(self, text: str) -> None:
        LOG.info("Attune Fast Sampler: %s", text)
        self._say(text)

    def note(self, used: str, profile: Calibration | None = None) -> None:
        """Have the saved workflow make the same picture again: with this very calibration, or in full."""
        if self.node_id:
            value = used if profile is None else content_name(file_and_id(used)[0], profile)
            set_widget(self.node_id, self.use_at, value, used, profile)
            remember(self.node_id, Ran(value, used, profile))


def fast_for(node: type[io.ComfyNode], wish: Wish, widget: str, draw: Drawing) -> Callable[[Any], FastSampler]:
    """SAMPLER -> the one that learns, which speaks on the running node and names in its `widget` what ran."""
    if node.hidden is None:
        return lambda sampler: FastSampler(sampler, wish, draw)
    node_id, at, show = str(node.hidden.unique_id), widget_place(node, widget), text_on(node)
    return lambda sampler: FastSampler(sampler, wish, draw, show, node_id, at, show)


def fast_stamp(node: type[io.ComfyNode], use: str | None, widget: str) -> tuple:
    """The fingerprint of a node that learns: another one once there is something else to use. Its `widget` names what
    ran for a picture that comes out of the cache."""
    stamp = use, profile_stamps(SAMPLER)
    recall(widget_place(node, widget), stamp)
    return stamp


@dataclass
class _Run:
    """One call of a FastSampler, with the host's arguments."""

    sampler: FastSampler
    guider: Any
    sigmas: Tensor
    extra_args: dict
    callback: Callable | None
    noise: Tensor
    latent: Tensor | None
    mask: Tensor | None
    quiet: bool
    asked: float = 0.0  # seconds that evaluations of short runs took

    def made(self) -> Tensor:
        """The picture: by the short run where one is proved, else in full, from which the sampler learns."""
        wish, scene = self.sampler.wish, self._scene()
        name, known = self._known(scene)
        short = None if known is None or wish.use == LEARN_AGAIN else serving_run(known, wish)
        if known is not None and wish.use not in USES:
            short = short or max(known.runs, key=lambda one: one.psnr)
        if known is not None and short is not None and wish.use not in (FULL_RUN, FORGET) and not self._is_due(name):
            end, far = self._short(short.run)
            if far <= FAR or wish.use not in USES:
                self.sampler.say(said_of_run(known, short, len(self.sigmas) - 1, name))
                self.sampler.note(name, known)
                return end
            self.sampler.say(
                f"A full run of {len(self.sigmas) - 1} steps: the corrections of the short run '{name}' are {far:.1f} "
                "times as large as on the picture that it was learned from, so it is not trusted here."
            )
            self.sampler.note(FULL_RUN)
            return self._whole(self.guider)
        end, said = self._full(scene, name, known, short)
        self.sampler.say(f"A full run of {len(self.sigmas) - 1} steps. {said}".strip())
        self.sampler.note(FULL_RUN)
        return end

    def _full(self, scene: Scene, name: str, known: Calibration | None, short: ShortRun | None) -> tuple[Tensor, str]:
        """The end of the user's own run, and what came of it."""
        wish = self.sampler.wish
        why = scene.refused
        if wish.use == FULL_RUN:
            why = "As 'use' asks for."
        elif wish.use == FORGET and known is None:
            why = "There was nothing to forget."
        elif wish.use == FORGET:
            forget_profile(name)
            why = f"'{name}' is forgotten."
        elif known is not None and short is None and wish.use == AUTO and was_tried(known, wish):
            best = max(known.runs, key=lambda one: one.psnr)
            why = (
                f"Short runs proved {best.psnr:.1f} dB at most with {best.run.steps} evaluations, less than the "
                f"'fidelity' of {wish.fidelity:g} dB: allow more evaluations, or less fidelity."
            )
        if why:
            return self._whole(self.guider), why
        self.sampler.progress(f"A full run of {len(self.sigmas) - 1} steps, to learn from")
        recorder, began = Recorder(self.guider, self.sigmas.clone()), time.monotonic()  # uni_pc writes into its own
        end = self._whole(recorder)
        took = time.monotonic() - began
        try:
            return end, self._taught(scene, recorder.path(end), name, known, short, took)
        # The picture is there: nothing that goes wrong afterwards may cost it. Newer hosts' interrupt is no Exception.
        except (Exception, comfy.model_management.InterruptProcessingException) as error:  # noqa: BLE001
            LOG.warning("Attune Fast Sampler", exc_info=error)
            return end, f"Nothing was learned: {error or type(error).__name__}"

    def _scene(self) -> Scene:
        options, patcher = self.extra_args["model_options"], self.guider.model_patcher
        inner, steps = self.sampler.inner, len(self.sigmas) - 1
        size = pixels_of(patcher.get_model_object("latent_format"), self.noise.shape)
        cfg = getattr(self.guider, "cfg", None)
        planned = Planned(
            solver_name(inner), steps, float(cfg) if isinstance(cfg, int | float) else None, size,
            tuple(self.sigmas.tolist()), setting_of(self.guider, inner, options),
        )  # fmt: skip
        identity = identify(patcher, weights=True)
        nameless = "The weights of this MODEL are packed in a form that cannot be told from others."
        return Scene(identity, planned, self._refused(size) or ("" if identity.weights_hash else nameless))

    def _refused(self, size: tuple[int, int] | None) -> str:
        inner, patcher = self.sampler.inner, self.guider.model_patcher
        facts, levels = facts_of(inner), self.sigmas.tolist()
        if facts is None or adds_noise(inner) or facts.jumps or facts.own_levels:
            return (
                f"Only solvers that add no noise and keep to their levels can be learned, not '{solver_name(inner)}'."
            )
        if is_distilled(patcher.get_model_object("model_sampling")):
            return "LCM, Turbo and Lightning models need few steps already."
        if size is None:
            return "Only pictures and videos can be learned."
        if any(a <= b for a, b in pairwise(levels)):
            return "The noise levels do not decrease."
        wrappers = self.extra_args["model_options"].get("transformer_options", {}).get("wrappers", {})
        for key, name in SKIPS.items():
            if any(key in kind for kind in wrappers.values()):
                return f"{name} is on this MODEL and counts its steps: bypass one of the two."
        return ""

    def _known(self, scene: Scene) -> tuple[str, Calibration | None]:
        """The calibration for this run and its file's name; ValueError where the node names one that does not fit."""
        use = self.sampler.wish.use
        if use in USES:
            fitting = {} if scene.refused else profiles_of_kind(SAMPLER)
            fits = lambda one: one.setting and not misfits(one, scene.identity, scene.planned)
            matching = [(name, one) for name, one in fitting.items() if fits(one)]
            away = (
                lambda item: abs(math.log(scene.planned.cfg / item[1].cfg)) if scene.planned.cfg and item[1].cfg else 0
            )
            return min(matching, key=away, default=("", None))
        profile = find_profile(use)
        wrong = [str(one) for one in misfits(profile, scene.identity, scene.planned)]
        if profile.kind != SAMPLER:
            wrong = [f"'{profile.name}' is no fitted sampler."]
        if wrong or scene.refused:
            said = " ".join([*wrong, scene.refused]).strip()
            raise ValueError(f"{said} Set 'use' of Attune Fast Sampler to '{AUTO}', or make the run that it is for.")
        return use, profile

    @property
    def _calls(self) -> int:
        """Evaluations of the long run."""
        facts = facts_of(self.sampler.inner)
        return (len(self.sigmas) - 1) * (facts.calls if facts else 1)

    def _is_due(self, name: str) -> bool:
        """Whether this picture is the one that is made in full, to see whether the short run still holds."""
        wish = self.sampler.wish
        SINCE[name] = SINCE.get(name, 0) + 1
        if wish.use not in USES or self.mask is not None or not 0 < wish.check_every < SINCE[name]:
            return False
        SINCE[name] = 0
        return True

    def _whole(self, guider: Any) -> Tensor:
        """The user's own run, as if this sampler were not there."""
        return self.sampler.own.sample(
            guider, self.sigmas, self.extra_args, self.callback, self.noise, self.latent, self.mask, self.quiet
        )

    def _short(self, run: FittedRun) -> tuple[Tensor, float]:
        """The end of the short run, and how far it went from what it was fitted to; 0 where that cannot be said."""
        levels = torch.tensor(run.sigmas, dtype=self.sigmas.dtype, device=self.sigmas.device)
        arguments = {**self.extra_args, "model_options": options_over(self.extra_args["model_options"], levels)}
        probes: list[Tensor] | None = [] if run.shares and self.mask is None else None
        end = fitted_sampler_of(run, probes=probes).sample(
            self.guider, levels, arguments, self.callback, self.noise, self.latent, self.mask, self.quiet
        )
        return end, distance(run, probes) if probes else 0.0

    def _taught(
        self, scene: Scene, path: Trajectory | None, name: str, known: Calibration | None, short: ShortRun | None,
        seconds: float,
    ) -> str:  # fmt: skip
        """Fit what is asked for to the recorded run, keep it, and say what it proved."""
        wish = self.sampler.wish
        if self.mask is not None:
            return "Nothing is learned from a run with a mask."
        if path is None:
            return (
                "The run was too large to be recorded, or it left out some of its levels: nothing is learned from it."
            )
        if short is not None and known is not None:
            self.sampler.progress(f"Checking the short run, {duration(short.run.steps * seconds / self._calls)}")
            levels = torch.tensor(short.run.sigmas)
            reached = fidelity(solve(self._denoise_over(levels), path.states[0], short.run), path.end)
            if reached >= wish.fidelity:
                file, seen = profile_path(name), replace(short, psnr=round(reached, 2), pictures=len(path.end))
                if file is not None:
                    keep_update(file, known, fitted_sampler(scene.identity, scene.planned, [seen], known))
                return f"The short run of '{name}' was checked: {reached:.1f} dB to this picture."
        self.asked = 0.0
        runs, end = self._learned(path, scene.identity.noise_space, seconds / self._calls)
        if end is None:
            return "The run has no more steps than the short run that is asked for."
        each = self.asked / (2 * sum(one.run.steps for one in runs))
        made, best = fitted_sampler(scene.identity, scene.planned, runs, known), max(runs, key=lambda one: one.psnr)
        file = None if known is None else profile_path(name)
        kept = keep_profile(made) if file is None or known is None else keep_update(file, known, made)
        SINCE.pop(kept.name, None)
        card, drawn = "", len(path.end)
        if self.sampler.draw is not None:
            times = seconds / drawn, each * runs[-1].run.steps / drawn
            shown = Shown(times, (path.end, end), runs[-1].run.steps)
            card = keep_card(card_of(self.guider.model_patcher, made, shown, self.sampler.draw.card), kept)
        proved = f"{best.run.steps} evaluations proved {best.psnr:.1f} dB"
        if best.psnr < wish.fidelity:
            return f"Learned, but {proved}, less than the 'fidelity' of {wish.fidelity:g} dB: full runs go on."
        return f"Learned: {proved}, so the next pictures take {best.run.steps}. Kept as '{kept.name}'. {card}".strip()

    def _learned(self, path: Trajectory, space: NoiseSpace, seconds: float) -> tuple[list[ShortRun], Tensor | None]:
        """The runs that were tried, and the end of the last one. seconds: that an evaluation takes."""
        wish, paper, end = self.sampler.wish, OnPaper(path), None
        runs: list[ShortRun] = []
        counts = [n for n in ([wish.evaluations] if wish.evaluations else COUNTS) if n < len(path.sigmas) - 1]
        if not counts:
            return runs, end
        most, made = 2 * sum(counts), itertools.count(1)
        left, bar = TimeLeft(self.sampler.progress, most, seconds), ProgressBar(most, self.sampler.node_id)
        left.update(0, "Learning")
        bar.update(0, self._drawn(path, runs))

        def told() -> None:
            done = next(made)
            left.update(done, "Learning")
            bar.update(done)

        for steps in counts:
            found = last(learn(self._denoise_over, path, steps, space, paper), told)
            runs.append(ShortRun(found.run, round(max(found.psnr, 0.0), 2), len(path.end) // 2))
            end = found.end
            bar.update(2 * sum(counts[: len(runs)]), self._drawn(path, runs))
            if found.psnr >= wish.fidelity:
                break
        bar.end()
        return runs, end

    def _drawn(self, path: Trajectory, runs: Sequence[ShortRun]) -> Image.Image | None:
        """What is learned by now."""
        return None if self.sampler.draw is None else self.sampler.draw.learned(path.sigmas.tolist(), runs)

    def _denoise_over(self, levels: Sigmas) -> Denoiser:
        """The guided model, for latents in main memory, as a run over `levels` asks it."""
        options = options_over(self.extra_args["model_options"], levels.to(self.noise.device, torch.float32))
        ask = denoiser(self.guider, options, self.noise, self.extra_args.get("seed"))

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            began = time.monotonic()
            answer = ask(x, sigma)
            self.asked += time.monotonic() - began
            return answer

        return denoise
