"""A tuning run around its mathematics: what fits into the time, what is reported, what becomes a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...kernels.space import NoiseSpace
from ...kernels.timestep_aligner import Alignment
from ...kernels.tuner import TUNER_PRESETS, Progress, Tuned, TunerPreset
from ...models.calibration import SCHEDULE, Calibration, CondLevels, ModelIdentity, fitted, size_text

FIT_METHOD = "tuned schedule"


@dataclass(frozen=True)
class Setting:
    """What a schedule is fitted to. solver: as chosen; runs: the one without added noise that was run for it."""

    model: ModelIdentity
    solver: str
    runs: str
    cfg: float
    resolution: tuple[int, int]  # in pixels
    seed: int

    @property
    def space(self) -> NoiseSpace:
        return self.model.noise_space


def affordable(
    wanted: str, needed: Mapping[str, int], seconds: float, minutes: float, fewer: str = "steps"
) -> tuple[TunerPreset, str]:
    """The preset `wanted`, or the largest smaller one that fits into `minutes` (0: no limit), and a sentence on it.

    needed: evaluations of the guided model by preset, the smallest first; seconds: measured for one of them; fewer:
    what the user can take fewer of. ValueError when not even the smallest fits.
    """
    names = list(needed)
    for name in reversed(names[: names.index(wanted) + 1]):
        needs = needed[name] * seconds / 60
        if not minutes or needs <= minutes:
            said = f"Preset '{name}': at most {needed[name]} evaluations of {seconds:.3g} s, {needs:.3g} minutes."
            longer = "" if name == wanted else f"'{wanted}' would take longer than the budget. "
            return TUNER_PRESETS[name], longer + said
    raise ValueError(
        f"One evaluation of this MODEL takes {seconds:.3g} s here, so the smallest preset '{names[0]}' needs "
        f"{needs:.3g} minutes, but 'budget_minutes' is {minutes:g}. Allow more minutes, take fewer {fewer} or a "
        "smaller latent."
    )


def tuned_profile(tuned: Tuned, setting: Setting, preset: str, seconds: float) -> Calibration:
    """What was found, with its evidence and how it was found."""
    metrics = {
        "held_out": tuned.held_out, "start": tuned.start, "known_schedules": tuned.candidates,
        "reference_error": tuned.reference_error, "refused": tuned.refused,
    }  # fmt: skip
    return _profile(
        setting, tuned.sigmas.tolist(), tuned.alignment, metrics,
        preset=preset, evaluations=tuned.evaluations, seconds=round(seconds, 1),
    )  # fmt: skip


def stopped_profile(now: Progress, setting: Setting) -> Calibration:
    """The best levels of a search that was stopped, which no held-out noise has seen."""
    assert now.best is not None
    metrics = {"fitted": now.error, "refused": [f"Stopped while {now.stage}: not proved on held-out noises."]}
    profile = _profile(setting, now.best.tolist(), None, metrics, evaluations=now.evaluations)
    return replace(profile, name=f"{profile.name}, stopped")


def tuning_report(
    tuned: Tuned, setting: Setting, seconds: float, plan: str, levels: bool = True, timesteps: bool = True
) -> str:
    """Everything that was measured, what was kept and what was refused, in lines."""
    held = tuned.held_out
    lines = [
        f"{len(tuned.sigmas) - 1} steps of {setting.solver}, cfg {setting.cfg:g}, {size_text(setting.resolution)}.",
        plan,
        "Error: distance of the end of a run from that of many small steps with the same noise, relative.",
        *(f"  {error:.4f}  {name}" for name, error in sorted(tuned.candidates.items(), key=lambda item: item[1])),
        f"Best known schedule: {tuned.start}; on held-out noises {held['start']:.4f}.",
    ]
    if setting.runs != setting.solver:
        lines.append(f"Fitted with {setting.runs}, which {setting.solver} follows but for the noise that it adds.")
    for stage, what in (("aligned", "Aligned timesteps"), ("refined", "Refined levels")):
        if stage in held:
            verdict = tuned.verdicts.get(stage)
            over = f" Over what was kept before: {verdict.said}." if verdict else ""
            lines.append(f"{what}: {held[stage]:.4f} on held-out noises, kept.{over}")
    if timesteps and setting.runs != "euler":
        lines.append(f"Timesteps are fitted for euler alone; {setting.solver} keeps the true ones.")
    if not levels:
        lines.append("The levels stay as they are: 'levels' is off.")
    lines += tuned.refused
    if not tuned.changed:
        lines.append(f"Nothing better was found: the profile is '{tuned.start}', unchanged.")
    lines.append(f"Levels: {' '.join(f'{s:.4g}' for s in tuned.sigmas.tolist())}")
    lines.append(
        f"{tuned.evaluations} evaluations in {seconds:.0f} s. The reference's own error: {tuned.reference_error:.4f}."
    )
    if len(tuned.sigmas) < 7:
        lines.append(
            "Below 6 steps no schedule reaches the reference; look at the pictures before you trust the number."
        )
    return "\n".join(lines)


def _profile(
    setting: Setting, sigmas: list[float], alignment: Alignment | None, metrics: dict[str, Any], **how: Any
) -> Calibration:
    levels: tuple[CondLevels, ...] = ()
    if alignment is not None and alignment.changes:
        levels = (CondLevels(setting.runs, setting.resolution, *alignment.knots(setting.space)),)
    return fitted(
        setting.model, SCHEDULE, f"{setting.solver} {len(sigmas) - 1} steps, {FIT_METHOD}", FIT_METHOD,
        setting.resolution, metrics, solver=setting.solver, cfg=setting.cfg, sigmas=sigmas, alignments=levels,
        seed=setting.seed, ran=setting.runs, **how,
    )  # fmt: skip
