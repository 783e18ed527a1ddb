"""Makers' schedules: equal to what diffusers runs, with numbers in the sentence, and read with suspicion."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from pack.kernels.makers import (
    equal_odds,
    lcm_timesteps,
    logit_normal,
    stretch,
    time_shift,
    trailing_timesteps,
    twice,
    uniform,
)
from pack.kernels.schedules import check_sigmas
from pack.models.calibration import ModelIdentity
from pack.models.makers import (
    BySize,
    Constant,
    Linear,
    Published,
    Root,
    StepsToo,
    published_for,
    read_makers,
    shipped_makers,
)
from pack.nodes._plan.makers import BY_DIMENSIONS, Sampled, makers_schedule, moved, named_makers
from pack.nodes._plan.named_schedules import schedule, schedule_names

PAGE = Path(__file__).resolve().parents[1] / "docs/makers.md"
DIFFUSERS = json.loads((Path(__file__).parent / "data/makers_by_diffusers.json").read_text("utf-8"))["runs"]
FOUND = shipped_makers()
SD_NOISE = (0.0292, 14.6146)


def model(name: str, **more) -> ModelIdentity:
    """A MODEL that the schedule is for."""
    one = FOUND[name]
    network = {key: kept[0] for key, kept in one.only.items()}
    low, high = (one.karras.low, one.karras.high) if one.karras else SD_NOISE if one.timesteps else (0.001, 1.0)
    return ModelIdentity((one.families[0],), one.space, low, high, network=network, **more)


def sampled(width: int, height: int, frames: int = 1) -> Sampled:
    return Sampled((width, height), frames)


@pytest.mark.parametrize(
    ("name", "size", "sigmas"), DIFFUSERS, ids=[f"{name} {size} {len(sigmas) - 1}" for name, size, sigmas in DIFFUSERS]
)
def test_the_levels_are_those_that_diffusers_runs(name, size, sigmas):
    ours, _ = makers_schedule(FOUND[name], model(name), len(sigmas) - 1, sampled=sampled(*size))
    want = torch.tensor(sigmas, dtype=torch.float64)
    scale = want.clamp(min=1)  # Stable Diffusion's levels reach 14.6
    assert float(((ours - want) / scale).abs().max()) < 1e-6


def test_every_schedule_is_compared_or_is_a_list_of_its_maker():
    compared = {name for name, _, _ in DIFFUSERS}
    assert {name for name, one in FOUND.items() if one.shift or not one.levels} == compared


@pytest.mark.parametrize("name", FOUND)
def test_any_number_of_steps_falls_to_zero(name):
    for steps, denoise in product([1, 2, 3, 7, 10_000], [1.0, 0.5]):
        sigmas, said = makers_schedule(FOUND[name], model(name), steps, denoise)
        check_sigmas(sigmas)
        assert len(sigmas) == steps + 1 and float(sigmas[-1]) == 0 and said.startswith(f"{name} by ")


@pytest.mark.parametrize("name", [name for name, one in FOUND.items() if one.levels and not one.shift])
def test_a_makers_list_is_run_as_it_is_and_other_counts_between_it(name):
    one = FOUND[name]
    sigmas, said = makers_schedule(one, model(name), len(one.levels) - 1)
    assert sigmas.tolist() == list(one.levels) and "made for" not in said
    finer, said = makers_schedule(one, model(name), 2 * len(one.levels) - 2)
    torch.testing.assert_close(finer[::2], sigmas)
    assert f"made for {len(one.levels) - 1} steps, not for {len(finer) - 1}; other counts get levels" in said


def test_the_lightning_list_of_wan_is_its_shift_of_four_equal_steps():
    sigmas, said = makers_schedule(FOUND["Wan 2.2 Lightning T2V"], model("Wan 2.2 Lightning T2V"), 4)
    torch.testing.assert_close(sigmas, torch.tensor([1, 0.9375, 5 / 6, 0.625, 0], dtype=torch.float64))
    assert "the one for high noise runs 2 of 4 steps, down to sigma 0.875" in said


def test_the_levels_of_flux_2_turbo_undo_the_shift_of_the_pipeline_that_they_are_given_to():
    """So they are levels before the shift: at 1024x1024 theirs are equal steps under a shift of 3, to four digits."""
    name = "FLUX.2 turbo"
    sigmas, _ = makers_schedule(FOUND[name], model(name), 8, sampled=sampled(1024, 1024))
    equal_steps = torch.linspace(1, 0.001, 8, dtype=torch.float64)
    torch.testing.assert_close(sigmas[:-1], time_shift(equal_steps, 3.0), rtol=0, atol=1e-3)
    assert "FLUX.2 turbo unshifted" not in FOUND


def test_karras_levels_of_cosmos_are_for_its_noise_alone():
    with pytest.raises(ValueError, match=r"is for noise up to 80, but this MODEL \(CosmosT2V\) has up to 14\.61"):
        makers_schedule(FOUND["Cosmos Predict1"], replace(model("Cosmos Predict1"), sigma_max=14.61), 8)
    sigmas = makers_schedule(FOUND["Cosmos Predict2"], model("Cosmos Predict2"), 8)[0]
    roots = sigmas[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(7))
    assert float(sigmas[0]) == pytest.approx(80) and float(sigmas[-2]) == pytest.approx(0.002)


def test_logit_normal_levels_are_quantiles_around_the_shift():
    sigmas = logit_normal(4, 2.0, 1.5)
    want = torch.tensor(
        [9.0, math.log(2) + 1.5 * 0.6744897501960817, math.log(2), math.log(2) - 1.5 * 0.6744897501960817]
    )
    torch.testing.assert_close(torch.logit(sigmas[:-1]), want.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sigmas[1:-1], time_shift(logit_normal(4, 1.0, 1.5), 2.0)[1:-1])


# --- the numbers in the sentence ---


@pytest.mark.parametrize(
    ("name", "size", "own", "said"),
    [
        ("Qwen-Image 2.1", (2048, 2048), math.exp(1.15), "mu 1.15 -> 1.31 for 2048x2048, 16384 tokens"),
        ("FLUX.1 dev", (1024, 1024), math.exp(1.15), "mu 1.15 as the MODEL has it for 1024x1024, 4096 tokens"),
        ("Wan 2.1 T2V", (832, 480), 8.0, "shift 8 -> 3 for 832x480"),
        ("Wan 2.1 T2V", (480, 832), 8.0, "shift 8 -> 3 for 832x480"),
        ("Wan 2.1 T2V", (960, 544), 8.0, "shift 8 -> 3 for 832x480, the nearest known to 960x544"),
        ("OmniGen2", (1024, 1024), 2.6, "shift 2.6 -> 3.2 for 1024x1024"),
        ("LTX-2", (1024, 1024), None, "mu 2.05; the last step starts at 0.1"),
        ("Z-Image", (1024, 1024), 3.0, "shift 3 as the MODEL has it"),
    ],
)
def test_the_sentence_has_both_shifts_the_size_and_the_tokens(name, size, own, said):
    told = makers_schedule(FOUND[name], model(name, factor=own), 8, sampled=sampled(*size))[1]
    assert told.removeprefix(f"{name} by {FOUND[name].maker}: ").startswith(said)


def test_equal_odds_are_equal_steps_of_their_logarithm_between_the_ends():
    sigmas = equal_odds(4, -6.0, 2.0)
    torch.testing.assert_close(-torch.logit(sigmas[1:-1]), torch.tensor([-4.0, -2.0, 0.0], dtype=torch.float64))
    assert sigmas[0] == 1 and sigmas[-1] == 0 and equal_odds(1, -6.0, 2.0).tolist() == [1, 0]


def test_without_a_size_the_makers_own_is_taken_and_said():
    sigmas, said = makers_schedule(FOUND["Qwen-Image"], model("Qwen-Image"), 8)
    assert torch.equal(
        sigmas, makers_schedule(FOUND["Qwen-Image"], model("Qwen-Image"), 8, sampled=sampled(1328, 1328))[0]
    )
    assert "1328x1328 (no latent tells the size: its maker's), 6889 tokens" in said


def test_frames_are_tokens_of_a_video_and_not_of_a_picture():
    told = [moved(FOUND[name], 8, sampled(768, 512, 13)) for name in ("LTX-Video", "FLUX.1 dev")]
    assert [one.taken_for for one in told] == ["768x512, 4992 tokens", "768x512, 1536 tokens"]


def test_a_latent_of_any_size_gets_levels_or_a_sentence():
    """The makers' lines of mu have no end: LTX stretches its levels, the others leave nothing but noise."""
    for seconds in (10, 60, 600):
        sigmas, _ = makers_schedule(FOUND["LTX-Video"], model("LTX-Video"), 8, sampled=sampled(1216, 704, 3 * seconds))
        assert bool((sigmas.float().diff() < 0).all()) and sigmas[-2] == pytest.approx(0.1)
    shares = torch.linspace(1, 0, 9)[:-1]  # where the shift is without end, (1 - u) / u is stretched to 0.9 at 1/8
    torch.testing.assert_close(sigmas[:-1].float(), 1 - (1 - shares) / shares * 0.9 / 7, rtol=0, atol=1e-6)
    for name in ("FLUX.1 dev", "FLUX.2", "Chroma"):
        told = lambda side, name=name: makers_schedule(FOUND[name], model(name), 8, sampled=sampled(side, side))[1]
        assert "almost all noise" not in told(2048) and "'by latent dimensions' moves it less" in told(4096)
        with pytest.raises(
            ValueError, match=r"finds no 8 noise levels for 32768x32768, 4194304 tokens: .* in tiles\.$"
        ):
            told(32768)


def test_a_modelsampling_node_changes_what_is_said_and_not_the_levels():
    one = FOUND["FLUX.1 dev"]
    plain = makers_schedule(one, model("FLUX.1 dev", factor=math.exp(1.15)), 8)
    patched = makers_schedule(one, model("FLUX.1 dev", factor=6.0, reshifted=True), 8)
    assert torch.equal(plain[0], patched[0])
    assert "mu 1.79 -> 1.15" in patched[1] and "the ModelSampling node's shift has no part in it" in patched[1]


def test_the_steps_of_flux_2_move_its_shift():
    assert (
        moved(FOUND["FLUX.2"], 10, sampled(1024, 1024)).factor > moved(FOUND["FLUX.2"], 50, sampled(1024, 1024)).factor
    )
    assert moved(FOUND["FLUX.2"], 10, sampled(2048, 2048)) == moved(FOUND["FLUX.2"], 50, sampled(2048, 2048))


# --- which model gets which ---


def test_what_a_configuration_says_tells_relatives_of_one_class():
    wan = lambda **network: published_for(replace(model("Wan 2.1 T2V"), network=network)).name
    assert wan(dim=5120, in_dim=16) == wan() == "Wan 2.1 T2V"
    assert wan(dim=1536, in_dim=16) == "Wan 2.1 T2V 1.3B" and wan(dim=5120, in_dim=36) == "Wan 2.2 I2V A14B"


def test_a_child_of_a_known_class_is_not_served_as_its_parent():
    assert published_for(ModelIdentity(("ZImagePixelSpace", "ZImage"), "flow", 0.001, 1.0)) is None


def test_one_schedule_alone_is_for_a_plain_model_of_a_class():
    plain = [family for one in FOUND.values() if one.auto and not one.only for family in one.families]
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("name", named_makers())
def test_a_named_schedule_refuses_a_model_of_another_family(name):
    other = ModelIdentity(("Flux",), "flow", 0.001, 1.0)
    with pytest.raises(
        ValueError, match=rf"'{name}' is for models of the family .*, but this MODEL is Flux\. Choose 'auto'"
    ):
        schedule(name, other, 8)


def test_a_named_schedule_takes_children_of_its_class():
    child = ModelIdentity(("WAN21_FunControl2V", "WAN21_T2V"), "flow", 0.001, 1.0)
    assert len(schedule("Wan 2.2 Lightning T2V", child, 4)[0]) == 5


def test_timesteps_of_stable_diffusion_refuse_other_noise():
    zero_terminal = replace(model("DMD2 SDXL"), sigma_max=4518.0)
    with pytest.raises(
        ValueError, match=r"'DMD2 SDXL' is for noise up to 14\.61, but this MODEL \(SDXL\) has up to 4518"
    ):
        schedule("DMD2 SDXL", zero_terminal, 4)


def test_all_names_are_in_the_list_once():
    assert len(set(schedule_names())) == len(schedule_names()) and {*named_makers(), BY_DIMENSIONS} < {
        *schedule_names()
    }


# --- the dimension rule ---


def test_the_shift_by_dimensions_is_the_root_of_their_ratio_to_4096():
    flow = ModelIdentity(("NewModel",), "flow", 0.001, 1.0, factor=3.0)
    sigmas, said = schedule(BY_DIMENSIONS, flow, 8, sampled=Sampled((1024, 1024), 1, 16 * 128 * 128))
    torch.testing.assert_close(sigmas.double(), uniform(8, 8.0), rtol=0, atol=1e-7)
    assert said == f"{BY_DIMENSIONS}: shift 3 -> 8 for 262144 latent dimensions, 4096 have 1"


def test_the_dimension_rule_asks_for_a_latent_and_a_flow_model():
    with pytest.raises(ValueError, match=r"connect 'latent'"):
        schedule(BY_DIMENSIONS, ModelIdentity(("NewModel",), "flow", 0.001, 1.0), 8)
    with pytest.raises(ValueError, match=r"is for flow models .* this MODEL is SD15"):
        schedule(BY_DIMENSIONS, ModelIdentity(("SD15",), "ve", *SD_NOISE), 8, sampled=Sampled((512, 512), 1, 16384))


# --- the mathematics ---


def test_a_shift_multiplies_noise_over_signal_and_keeps_both_ends():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    moved_u = time_shift(u, 2.5)
    torch.testing.assert_close((moved_u / (1 - moved_u))[1:-1], 2.5 * (u / (1 - u))[1:-1])
    assert float(moved_u[0]) == 0 and float(moved_u[-1]) == 1 and torch.equal(time_shift(u, 1.0), u)
    torch.testing.assert_close(time_shift(moved_u, 0.4), u)


def test_stretching_ends_at_the_terminal_and_leaves_one_step_alone():
    stretched = stretch(uniform(10, 3.0), 0.1)
    assert float(stretched[-2]) == pytest.approx(0.1) and float(stretched[0]) == 1 and float(stretched[-1]) == 0
    assert stretch(uniform(1, 3.0), 0.1).tolist() == [1, 0]


def test_timesteps_of_distilled_models_are_those_of_their_schedulers():
    assert trailing_timesteps(4) == [999, 749, 499, 249] and trailing_timesteps(1) == [999]
    assert lcm_timesteps(4) == [999, 759, 499, 259] and len(lcm_timesteps(50)) == 50
    assert twice(1, 3.0).tolist() == [1, 0]


# --- the files ---


def file(**changes) -> bytes:
    source = {"says": "shift 3", "url": "https://example.org", "read": "2026-11-29"}
    one = {"name": "New", "families": ["New"], "auto": True, "shift": {"factor": 3.0}, "sources": [source]}
    return json.dumps({"format": 1, "maker": "Some", "schedules": [{**one, **changes}]}).encode()


def test_every_number_has_a_source_and_a_date():
    assert all(
        one.sources and all(len(source.read) == 10 and source.says for source in one.sources) for one in FOUND.values()
    )
    assert read_makers("new.json", file())[0].shift == Constant(3.0, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"families": []}, '"families"'),
        ({"colour": 1}, "unknown: colour"),
        ({"sources": []}, "sources"),
        ({"timesteps": [999]}, "one of shift, levels"),
        ({"shift": {"tokens": [1, 2], "mu": [0.5, 1.0]}}, "own size"),
        ({"shift": {"gamma": 1}}, "no shift has gamma"),
        ({"terminal": 2}, '"terminal" is between 0 and 1'),
        ({"grid": "odd"}, '"grid" is one of'),
        ({"grid": "logit-normal"}, "the logit-normal grid, and no other, a spread"),
        ({"karras": {"high": 80, "low": 0.002, "rho": 7}}, "one of shift, levels"),
        ({"odds": {"low": -6.2, "high": 2.0}}, "one of shift, levels"),
    ],
)
def test_a_file_that_is_wrong_says_what_in_which_schedule(changes, said):
    with pytest.raises(ValueError, match=rf"new\.json, New: .*{said}"):
        read_makers("new.json", file(**changes))


# --- the page ---


def of_a_shift(one: Published) -> str:
    """The rule in a few words."""
    match one.shift:
        case Constant(value, as_mu):
            said = f"{'mu' if as_mu else 'shift'} {value:g}"
        case Linear((low, high), (first, last)):
            said = f"mu {first:g} at {low} tokens, {last:g} at {high}"
        case StepsToo():
            said = "mu by tokens and steps"
        case BySize(sizes, factors):
            said = "shift " + ", ".join(
                f"{factor:g} at {'x'.join(map(str, size))}" for size, factor in zip(sizes, factors, strict=True)
            )
        case Root(side, mu):
            said = f"shift: root of the pixels / {side}" + (f", mu {mu:g} beside it" if mu else "")
        case _:
            fixed = one.levels or one.timesteps
            said = f"{fixed} timesteps" if isinstance(fixed, str) else " ".join(f"{level:g}" for level in fixed)
            if one.karras:
                said = f"Karras from {one.karras.high:g} to {one.karras.low:g}, rho {one.karras.rho:g}"
            if one.odds:
                said = f"equal steps of ln((1 − σ)/σ) from {one.odds.low:g} to {one.odds.high:g}"
            said = said or f"half linear to {1 - one.threshold:g}, then quadratic"
    if one.shift and one.levels:
        said = " ".join(f"{level:g}" for level in one.levels) + f", under {said}"
    said += f", logit-normal of spread {one.spread:g}" if one.spread else ""
    return said + (f"; last level {one.terminal:g}" if one.terminal else "")


def page() -> str:
    lines = [
        "| schedule | maker | classes in ComfyUI | chosen | levels | steps | sources |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in FOUND.values():
        only = ", ".join(f"{key} {' or '.join(map(str, kept))}" for key, kept in one.only.items())
        classes = ", ".join(one.families) + (f" ({only})" if only else "")
        read = "; ".join(
            f"[{source.says}]({source.url})"
            + (
                f", read in [a copy]({source.through})"
                if source.through[:4] == "http"
                else f", read in {source.through}"
                if source.through
                else ""
            )
            for source in one.sources
        )
        steps = ", ".join(map(str, one.counts)) + (f"; experts switch at {one.switch:g}" if one.switch else "")
        chosen = "*auto*" if one.auto else "by name"
        lines.append(
            f"| {one.name} | {one.maker} | {classes} | {chosen} | {of_a_shift(one)} | {steps.removeprefix('; ')} | {read} |"
        )
    return "\n".join(lines)


def test_the_page_has_every_schedule_with_its_sources():
    text, marks = PAGE.read_text("utf-8"), r"(<!-- made: .*?-->\n).*?(\n<!-- end -->)"
    if os.environ.get("ATTUNE_WRITE"):
        text = re.sub(marks, lambda found: found[1] + page() + found[2], text, count=1, flags=re.S)
        PAGE.write_text(text, "utf-8")
    assert page() in text
