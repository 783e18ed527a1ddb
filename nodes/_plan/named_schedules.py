"""The schedules a user can choose by name: shipped profiles and closed forms."""

from __future__ import annotations

import math

import torch

from ...kernels.ays import kl_optimal
from ...kernels.schedules import check_sigmas, end_at_zero, for_denoise, resample_loglinear, resample_theta
from ...kernels.space import NoiseSpace
from ...kernels.types import Sigmas
from ...models.calibration import SCHEDULE, Calibration, ModelIdentity, Size, misfits, pick_profile, size_text
from ...models.makers import Published, published_for, shipped_makers
from ...models.store import shipped_profiles
from .makers import BY_DIMENSIONS, Sampled, by_dimensions, makers_schedule, named_makers
from .refine import REFINES, refine_schedule

AUTO = "auto"
DETAIL = 8.0  # pixels of the picture
NO_SIGNAL = 500  # sigma_max of models without signal at their first timestep: CogVideoX, zsnr in ModelSamplingDiscrete
TUNED = "tuned for "  # and a sampler: the shipped fit for it nearest in steps
CLOSED_FORMS = {  # name -> the data's standard deviation c, in units of the latent
    "KL-optimal": 1.0,
    "KL-optimal, c = 0.5": 0.5,
    "KL-optimal, c = 1.4": 1.4,
}


def published_profiles() -> dict[str, Calibration]:
    """The shipped tables of others by name, without what we tuned ourselves."""
    return {name: one for name, one in shipped_profiles().items() if one.kind == SCHEDULE and not one.is_fitted}


def tuned_profiles() -> list[Calibration]:
    """The shipped fits, each for one network, sampler and number of steps."""
    return [one for one in shipped_profiles().values() if one.kind == SCHEDULE and one.is_fitted and one.solver]


def schedule_names() -> list[str]:
    solvers = dict.fromkeys(one.solver for one in tuned_profiles())
    tuned = (TUNED + solver for solver in solvers)
    return [AUTO, *published_profiles(), *CLOSED_FORMS, *tuned, *named_makers(), BY_DIMENSIONS, *REFINES]


def of_auto(model: ModelIdentity, size: Size | None = None) -> Calibration | Published | None:
    """What "auto" is for a model: a published table of its family, else what its maker runs; None for unknown ones."""
    table = pick_profile(published_profiles().values(), model.families, size)
    fits = table is not None and all(one.aspect != "noise" for one in misfits(table, model))
    return table if fits else published_for(model)


def schedule(
    name: str,
    model: ModelIdentity,
    steps: int,
    denoise: float = 1.0,
    sampled: Sampled = Sampled(),  # noqa: B008
    detail: float = DETAIL,
) -> tuple[Sigmas, str]:
    """The levels of the schedule called `name`, float32 [steps+1] ending in 0, and one sentence on what was chosen.

    `denoise` below 1 keeps the last `steps` steps of a longer run; at 0 there is none and the tensor is empty.
    `sampled` lets "auto" choose between profiles of one family, and makers' schedules move with the picture's size.
    `detail`, in pixels, is for "refine: by detail".
    Raises ValueError with the choices on screen when the schedule is unknown or does not fit the model.
    """
    one = of_auto(model, sampled.size) if name == AUTO else shipped_makers().get(name)
    if isinstance(one, Published):
        sigmas, said = makers_schedule(one, model, steps, denoise, sampled)
    elif name in REFINES:
        sigmas, said = refine_schedule(name, model, steps, denoise, sampled, detail)
    elif name == BY_DIMENSIONS:
        sigmas, said = by_dimensions(model, steps, denoise, sampled)
    elif name in CLOSED_FORMS:
        space, c = model.noise_space, CLOSED_FORMS[name]
        said = f"{name} from sigma {model.sigma_max:.4g}"
        said += f", noise of scale {space.scale:g}" if space.scale != 1 else ""
        said += ", where no signal is left" if model.space == "ve" and model.sigma_max > NO_SIGNAL else ""
        sigmas = for_denoise(lambda n: kl_optimal(n, model.sigma_max, space, c), steps, denoise)
    else:
        profile = _profile(name, model, steps, sampled.size)
        unfit = next((one for one in misfits(profile, model) if one.aspect == "noise"), None)
        if unfit is not None:  # a table of another family may be asked for by name
            raise ValueError(f"{unfit} Choose another one in 'schedule', such as '{next(iter(CLOSED_FORMS))}'.")
        made = "fitted on" if profile.is_fitted else "published for"
        said = f"{profile.name}, {made} {profile.families[0]} at {size_text(profile.resolution)}"
        if profile.alignments:
            said += "; Attune Apply Profile also applies its timestep alignment"
        if profile.sigmas[0] < model.sigma_max * 0.99:
            said += f" (it starts at sigma {profile.sigmas[0]:.4g}, below this model's {model.sigma_max:.4g})"
        sigmas = for_denoise(lambda n: resample_profile(profile, n), steps, denoise)
    if len(sigmas):
        check_sigmas(sigmas)
    return sigmas.float(), said


def resample_profile(profile: Calibration, steps: int, denoise: float = 1.0) -> Sigmas:
    """The levels of `profile` at another step count: a published table by its authors' rule, a fit by angle."""
    levels = torch.tensor(profile.sigmas, dtype=torch.float64)
    if profile.is_fitted:
        return resample_theta(levels, steps, NoiseSpace(profile.space), denoise)
    return end_at_zero(resample_loglinear(levels, steps, denoise))


def _profile(name: str, model: ModelIdentity, steps: int, resolution: Size | None) -> Calibration:
    if name == AUTO:
        profile = of_auto(model, resolution)
        if not isinstance(profile, Calibration):
            raise ValueError(
                f"'auto' knows no schedule for the model family {model.families[0]}. Choose "
                f"'{next(iter(CLOSED_FORMS))}' in 'schedule', which runs on every model, or by name one of: "
                f"{', '.join(schedule_names()[1:])}."
            )
        return profile
    if name.startswith(TUNED):
        return _tuned_for(name.removeprefix(TUNED), model, steps)
    if name not in shipped_profiles():
        raise ValueError(f"There is no schedule '{name}'. Choose one of: {', '.join(schedule_names())}.")
    return shipped_profiles()[name]


def _tuned_for(solver: str, model: ModelIdentity, steps: int) -> Calibration:
    """The shipped fit for this very network and the sampler, nearest in ln(steps)."""
    fitting = [one for one in tuned_profiles() if one.solver == solver and one.config_hash == model.config_hash]
    if not fitting or not model.config_hash:
        raise ValueError(
            f"'{TUNED}{solver}' is for the pack's demo models; nothing is tuned for this MODEL ({model.families[0]}) "
            "yet. Tune it with Attune Fit Sampler, or choose 'auto' or 'KL-optimal' in 'schedule'."
        )
    return min(fitting, key=lambda one: abs(math.log(one.steps / steps)))
