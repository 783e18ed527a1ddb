"""What is installed, and what a profile is and was measured to do, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...models.calibration import (
    ATTENTION,
    NOISE_SHIFT,
    OF_THE_MODEL,
    PROPAGATION,
    SAMPLER,
    SCHEDULE,
    Calibration,
    ModelIdentity,
    kind_text,
    misfits,
    size_text,
)
from .auto import Shelf
from .fitted_sampler import proved
from .noise_shift import shift_for
from .propagation import kinds_of
from .time_left import duration

MOST_TOLD = 1e12  # of a number that is told; JSON has whole ones beyond every float


def listing(shelf: Shelf, unread: Sequence[str], model: ModelIdentity | None = None) -> str:
    """A line for each file of `shelf`, first the profiles made for `model`, with a star; then what is `unread`."""
    ours = "" if model is None else f" (* made for this model, {model.families[0]})"
    fits = {name: model is not None and made_for(one, model) for name, one in shelf.profiles.items()}
    profiles = [
        f"{'*' if fits[name] else '-'} {name}: {_profile(shelf.profiles[name])}"
        for name in sorted(fits, key=fits.__getitem__, reverse=True)
    ]
    modules = [
        f"- {name}: for {space or 'unnamed'} latents and prompts of width {width}"
        for name, (space, width) in shelf.modules.items()
    ]
    npnets = [
        f"- {name}: for {c.channels} x {c.side} x {c.side} {space or 'unnamed'} latents"
        for name, (c, space) in shelf.npnets.items()
    ]
    parts = [
        (f"Profiles, {len(profiles)}{ours}", profiles),
        (f"One More Step, {len(modules)}", modules),
        (f"Golden noise, {len(npnets)}", npnets),
        (f"Cannot be read, {len(unread)}", [f"! {sentence}" for sentence in unread]),
    ]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in parts if lines)


def made_for(profile: Calibration, model: ModelIdentity) -> bool:
    """Whether it was made for this very model, or published for its family; LoRAs and a shift are no matter."""
    return all(one.aspect not in OF_THE_MODEL or one.aspect in ("patches", "shift") for one in misfits(profile, model))


def about(profile: Calibration) -> str:
    """What a profile is, where it comes from and what was measured, a line each. A file's free-form facts are told as
    far as they are what a fit writes."""
    made = [f"on {date}" if isinstance(date := profile.provenance.get("date"), str) else ""]
    if seconds := _number(profile.provenance.get("seconds")):
        made.append(f"in {duration(seconds)}")
    if isinstance(preset := profile.provenance.get("preset"), str):
        made.append(f"with preset '{preset}'")
    fitted = f"Fitted {' '.join(filter(None, made))}." if any(made) else ""
    source = f"{profile.source.rstrip('.')}." if profile.source else ""
    return "\n".join(filter(None, [f"{profile.name}: {_profile(profile)}.", source, fitted, *_measured(profile)]))


def _measured(profile: Calibration) -> Iterator[str]:
    """The evidence of a fit, by its kind, a line each."""
    if profile.kind == SCHEDULE:
        yield from _held_out(profile.metrics)
    elif profile.kind == SAMPLER:
        yield from (f"- {proved(one)}" for one in profile.runs)
    elif profile.kind == NOISE_SHIFT:
        yield from (f"- {shift_for(profile, one.resolution)[1]}" for one in profile.alignments)
    elif profile.kind in PROPAGATION and profile.key_steps:
        for point in profile.key_steps.points:
            yield f"- {point.speed:.2f} times less computing, {point.psnr:.1f} dB: {kinds_of(point)}"
    elif profile.kind == ATTENTION and profile.key_steps:
        for point in profile.key_steps.points:
            yield f"- {profile.steps - len(point.keys)} of {profile.steps} steps may be fast: {point.psnr:.1f} dB"


def _held_out(metrics: Mapping[str, Any]) -> Iterator[str]:
    held, start, refused = metrics.get("held_out"), metrics.get("start"), metrics.get("refused")
    errors = [_number(one) for one in held.values()] if isinstance(held, dict) else []
    if errors and all(errors) and isinstance(start, str):
        yield (
            "Error on noises that no fit has seen (distance of the end of a run from that of many small steps with the "
            "same noise, relative):"
        )
        same = "" if len(errors) > 1 else ", which this profile is"
        yield f"- {errors[0]:.4f}: the best known schedule, {start}{same}"
        if not same:
            yield f"- {errors[-1]:.4f}: this profile"
    yield from filter(lambda one: isinstance(one, str), refused if isinstance(refused, list) else [])


def _number(value: Any) -> float:
    """0 for what is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < MOST_TOLD else 0.0


def _profile(profile: Calibration) -> str:
    sizes = [profile.resolution] if profile.sigmas else [one.resolution for one in profile.alignments]
    facts = [
        f"{kind_text(profile.kind)} for {profile.families[0]}",
        " and ".join(map(size_text, sizes)),
        profile.solver,
        f"{profile.steps} steps" if profile.is_fitted else "any steps" if profile.sigmas else "",
        f"cfg {profile.cfg:g}" if profile.cfg is not None else "",
    ]
    return ", ".join(filter(None, facts))
