"""Choosing a schedule by name for a model: what fits, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pack.kernels.ays import kl_optimal
from pack.kernels.schedules import check_sigmas
from pack.kernels.space import NoiseSpace
from pack.models.calibration import KINDS, SCHEDULE, ModelIdentity
from pack.models.store import shipped_profiles
from pack.nodes._plan import named_schedules
from pack.nodes._plan.makers import BY_DIMENSIONS, named_makers
from pack.nodes._plan.named_schedules import (
    AUTO,
    CLOSED_FORMS,
    of_auto,
    published_profiles,
    schedule,
    schedule_names,
    tuned_profiles,
)
from pack.nodes._plan.refine import REFINES

SD15 = ModelIdentity(("SD15",), "ve", 0.0292, 14.6146)
SDXL = ModelIdentity(("SSD1B", "SDXL"), "ve", 0.0292, 14.6146)
SD3 = ModelIdentity(("SD3",), "flow", 0.003, 1.0)


def test_the_list_starts_with_auto_and_has_every_profile_and_closed_form():
    tuned = ["tuned for dpmpp_2m", "tuned for euler", "tuned for uni_pc"]
    fitted = len(published_profiles()) + len(CLOSED_FORMS) + 1
    assert schedule_names()[0] == "auto" and sorted(schedule_names()[fitted : fitted + 3]) == tuned
    assert schedule_names()[1:fitted] == [*published_profiles(), *CLOSED_FORMS]
    assert schedule_names()[fitted + 3 :] == [*named_makers(), BY_DIMENSIONS, *REFINES]


@pytest.mark.parametrize(("model", "name"), [(SD15, "AYS SD 1.5"), (SDXL, "AYS SDXL")])
def test_auto_is_the_schedule_of_the_family(model, name):
    auto, said = schedule("auto", model, 10)
    assert torch.equal(auto, schedule(name, model, 10)[0])
    assert said.startswith(name)


def test_at_the_native_count_the_published_levels_come_out_with_a_final_zero():
    sigmas, _ = schedule("AYS SD 1.5", SD15, 10)
    want = torch.tensor([*shipped_profiles()["AYS SD 1.5"].sigmas[:-1], 0.0])
    torch.testing.assert_close(sigmas, want, rtol=1e-7, atol=0)


@pytest.mark.parametrize("model", [SD15, SD3], ids=["ve", "flow"])
@pytest.mark.parametrize(
    ("name", "ratio"), [("refine: Resfusion", None), ("refine: ResShift", 1.98), ("refine: HIR-Diff", 14.6146)]
)
def test_starts_from_a_picture_are_the_same_noise_over_signal_on_every_model(model, name, ratio):
    sigmas, said = schedule(name, model, 12)
    check_sigmas(sigmas)
    first = float(sigmas[0])
    over_signal = first if model.space == "ve" else first / (1 - first)
    wanted = {None: 3**0.5 if model.space == "ve" else 1.0, 14.6146: 14.6146 if model.space == "ve" else 30}
    assert len(sigmas) == 13 and sigmas[-1] == 0 and over_signal == pytest.approx(wanted.get(ratio, ratio), rel=1e-3)
    assert f"at {over_signal:.3g} parts of noise" in said
    with pytest.raises(ValueError, match="set 'denoise' to 1"):
        schedule(name, model, 12, denoise=0.5)


@pytest.mark.parametrize("name", [AUTO, "AYS SD 1.5", "AYS SDXL", *CLOSED_FORMS])
@pytest.mark.parametrize("steps", [1, 5, 10000])
@pytest.mark.parametrize("denoise", [1.0, 0.5, 0.05])
def test_every_choice_gives_steps_plus_one_decreasing_levels_in_float32(name, steps, denoise):
    sigmas, _ = schedule(name, SD15, steps, denoise)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32 and float(sigmas[-1]) == 0
    check_sigmas(sigmas)


def test_no_denoise_is_no_step():
    assert schedule("auto", SD15, 10, 0.0)[0].numel() == 0


def test_thirty_profiles_are_tuned_to_the_demo_models_and_chosen_by_network_sampler_and_steps():
    hashes = {one.config_hash for one in tuned_profiles()}
    wanted = {(h, solver, n) for h in hashes for solver in ("euler", "dpmpp_2m", "uni_pc") for n in (5, 6, 8, 10, 20)}
    assert len(hashes) == 2 and {(p.config_hash, p.solver, p.steps) for p in tuned_profiles()} == wanted
    for profile in tuned_profiles():
        model = ModelIdentity(
            profile.families, profile.space, 0.01, profile.sigmas[0], profile.prediction, profile.config_hash
        )
        sigmas, said = schedule(f"tuned for {profile.solver}", model, profile.steps)
        assert sigmas.tolist() == list(profile.sigmas) and said.startswith(profile.name)
        assert len(schedule(f"tuned for {profile.solver}", model, 9)[0]) == 10
        held = profile.metrics["held_out"]
        assert min(held.values()) < held["start"] or (len(held) == 1 and profile.metrics["refused"])
        assert (
            profile.provenance["evaluations"] > 0 and profile.cfg == 3.0 and profile.metrics["reference_error"] < 0.01
        )
        assert not profile.alignments or profile.solver == "euler"


@pytest.mark.parametrize("model", [SD15, SD3])
def test_a_fit_of_another_network_is_not_taken(model):
    with pytest.raises(ValueError, match=rf"nothing is tuned for this MODEL \({model.families[0]}\) yet\. Tune it"):
        schedule("tuned for euler", model, 8)


@pytest.mark.parametrize(("name", "c"), CLOSED_FORMS.items())
@pytest.mark.parametrize("model", [SD15, SD3], ids=["ve", "flow"])
def test_closed_forms_start_at_the_models_own_level(name, c, model):
    want = kl_optimal(12, model.sigma_max, NoiseSpace(model.space), c).float()
    assert torch.equal(schedule(name, model, 12)[0], want)


def test_auto_on_a_flow_model_is_its_makers_schedule():
    sigmas, said = schedule("auto", SD3, 10)
    assert said.startswith("SD3 by Stability AI: shift 3") and len(sigmas) == 11


def test_auto_knows_no_schedule_for_a_family_under_other_noise_than_its_own():
    """Such as a fine-tune of SDXL that was turned into a flow model; the node runs the stock schedule then."""
    assert of_auto(SDXL) is shipped_profiles()["AYS SDXL"]
    assert of_auto(replace(SDXL, space="flow", sigma_max=1.0)) is of_auto(replace(SD3, space="ve")) is None


def test_auto_on_an_unknown_family_names_it_and_what_to_choose():
    with pytest.raises(ValueError, match=r"family New\. Choose 'KL-optimal' in 'schedule'.*AYS SD 1\.5"):
        schedule("auto", replace(SD3, families=("New",)), 10)


def test_a_schedule_of_the_other_noise_convention_is_refused():
    with pytest.raises(ValueError, match=r"'AYS SDXL' is for models with Stable Diffusion's noise.*\(SD3\)"):
        schedule("AYS SDXL", SD3, 10)


def test_a_schedule_that_starts_above_the_models_noise_is_refused():
    with pytest.raises(ValueError, match=r"'AYS SVD' starts at sigma 700, but this MODEL \(SD15\).*14\.61"):
        schedule("AYS SVD", SD15, 10)


def test_a_schedule_that_starts_below_the_models_noise_says_so():
    zero_terminal = ModelIdentity(("SD15",), "ve", 0.0292, 4518.0)
    assert "below this model's 4518" in schedule("auto", zero_terminal, 10)[1]
    assert "below" not in schedule("auto", SD15, 10)[1]


def test_a_name_from_another_install_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"no schedule 'tuned by a friend'\. Choose one of: auto, "):
        schedule("tuned by a friend", SD15, 10)


def test_a_shipped_profile_of_another_kind_is_no_schedule(monkeypatch):
    """A fitted sampler has levels that fall to 0 and a solver, too, but they are those of the run that it replaces."""
    shipped = shipped_profiles()
    tuned = next(one for one in shipped.values() if one.is_fitted and one.solver)
    others = {kind: replace(tuned, name=kind, kind=kind) for kind in KINDS if kind != SCHEDULE}
    before = schedule_names(), tuned_profiles()
    monkeypatch.setattr(named_schedules, "shipped_profiles", lambda: {**shipped, **others})
    assert (schedule_names(), tuned_profiles()) == before
