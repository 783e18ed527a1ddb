"""A list of what is installed, for people."""

from __future__ import annotations

from collections.abc import Sequence

from ...models.calibration import OF_THE_MODEL, Calibration, ModelIdentity, kind_text, misfits, size_text
from .auto import Shelf


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
