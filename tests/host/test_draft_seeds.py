"""Draft Seeds inside the host: drafts stand for the stock runs of their seeds, and the pick is that run itself."""

from __future__ import annotations

import pytest
import torch

from graphs import Kit
from harness import counting
from nightly import daily
from tiny_networks import TINY, conditioning, tiny_network

STEPS = 16


@pytest.fixture(scope="module")
def kit(host) -> Kit:
    return Kit(host, "unet")


def drafts(kit, seeds=(5, 6, 7, 8), speed=2.0, at_once=4, profile=None, **changed):
    """Latents, what is said of them, and the calls of the network."""
    ours = kit.host.module("nodes._host.draft_seeds")
    given = {"positive": kit.positive, "negative": kit.negative, "latent": kit.empty(), "steps": STEPS, "cfg": 3.0}
    run = ours.WholeRun(**{**given, "sampler_name": "euler", "scheduler": "normal", **changed})
    with torch.inference_mode(), counting(kit.model) as calls:
        latents, said = ours.draw_drafts(kit.model, run, [*seeds], speed, at_once, profile)
    return latents, said, calls[0]


def dB(ours, whole) -> float:
    from pack.kernels.fitted_sampler import fidelity

    return fidelity(ours.float(), whole.float())


@pytest.fixture(scope="module")
def stock(kit):
    return torch.cat([kit.ksampler(kit.model, steps=STEPS, seed=seed) for seed in (5, 6, 7, 8)])


def test_the_first_are_whole_and_the_others_like_their_stock_runs_at_less_cost(kit, stock):
    latents, said, _ = drafts(kit)
    torch.testing.assert_close(latents[:2], stock[:2], rtol=0, atol=1e-3)  # two in a batch round otherwise
    assert dB(latents[2:], stock[2:]) > 30 > dB(latents[2:], stock[:2]) + 10
    assert (
        "Whole pictures: the first 2. The other 2 were drafted by forecasts" in said
        and "2.00 times less computing" in said
    )


@pytest.mark.nightly
def test_one_at_a_time_the_first_is_the_stock_run_to_the_bit(kit, stock):
    latents, said, _ = drafts(kit, at_once=1, seeds=[5, 6])
    assert torch.equal(latents[:1], stock[:1]) and dB(latents[1:], stock[1:2]) > 25
    assert "Whole pictures: the first 1." in said


def test_an_empty_latent_of_other_channels_is_what_it_is_for_the_stock_sampler(host):
    flow, stocks = Kit(host, "flow"), {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [2]}
    latents, _, _ = drafts(flow, seeds=[5], at_once=1, steps=8, speed=1.5, latent=stocks)
    assert torch.equal(latents, flow.ksampler(flow.model, steps=8, seed=5, latent_image=stocks))


@pytest.mark.nightly
def test_noise_that_a_solver_adds_is_each_seeds_own(kit):
    latents, _, _ = drafts(kit, sampler_name="euler_ancestral", seeds=[5, 6], speed=1.5)
    whole = [kit.ksampler(kit.model, "euler_ancestral", steps=STEPS, seed=seed) for seed in (5, 6)]
    assert torch.equal(latents[:1], whole[0]) and dB(latents[1:], whole[1]) > dB(latents[1:], whole[0]) + 5


@pytest.mark.nightly
def test_a_profile_drafts_all_and_none_is_whole(kit, host, stock):
    profile = host.call(
        "AttuneFitPropagation", model=kit.model, positive=kit.positive, negative=kit.negative, seed=4, steps=STEPS,
        latent_image=kit.empty(), cfg=3.0, sampler_name="euler", scheduler="normal", reuse="automatic", fastest=2.0,
        longest=4,
    )[0]  # fmt: skip
    latents, said, calls = drafts(kit, profile=profile, speed=9.0)  # its fastest
    fastest = profile.key_steps.points[-1]
    assert calls == len(fastest.keys) and f"{fastest.speed:.2f}x" in said and dB(latents, stock) > 30
    with pytest.raises(ValueError, match="stands for 16 steps of euler on its own levels, but the drafts are for 12"):
        drafts(kit, profile=profile, steps=12)


@pytest.mark.parametrize(("speed", "asked"), [(5.0, 10), pytest.param(10.0, 6, marks=pytest.mark.nightly)])
def test_a_fitted_sampler_drafts_in_as_many_evaluations_as_the_speed_allows(kit, host, speed, asked):
    profile = host.module("models.store").shipped_profiles()["Attune demo unet, fitted sampler, euler 50 steps"]
    drawn = drafts(kit, profile=profile, seeds=[5], speed=speed, steps=50, scheduler="karras")
    assert drawn[2] == asked and f"in {asked} steps" in drawn[1]  # six at least, though five would do for 10 times


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sampler_name": "heun"}, "'heun' asks the model more than once a step"),
        ({"steps": 4}, "a run of 4 steps is too short"),
        ({"latent": {"samples": torch.zeros(2, 4, 8, 8)}}, "'latent_image' holds 2: set its 'batch_size' to 1"),
    ],
)
def test_what_cannot_be_drafted_is_said_before_anything_is_drawn(kit, changed, said):
    with counting(kit.model) as calls, pytest.raises(ValueError, match=said):
        drafts(kit, **changed)
    assert calls[0] == 0


@pytest.mark.parametrize("family", daily(["WAN21_T2V", "Flux"], "Flux"))
def test_videos_and_pictures_with_references_are_drafted(host, family):
    """Forecasts are of what is drawn: frames count as pixels, and tokens of a reference take no part in the fit."""
    model, latent = tiny_network(family), {"samples": torch.zeros(TINY[family].latent)}
    positive, negative = (conditioning(family, seed) for seed in (1, 2))
    if family == "Flux":
        positive[0][1]["reference_latents"] = [torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))]
    ours = host.module("nodes._host.draft_seeds")
    run = ours.WholeRun(positive, negative, latent, 9, 3.0, "euler", "simple")
    with torch.inference_mode():
        latents, _ = ours.draw_drafts(model, run, [3, 4], 1.5, 1, None)

    def stock(seed: int, **changed):
        given = {"positive": positive, "negative": negative, "latent_image": latent, "cfg": 3.0, **changed}
        return host.call(
            "KSampler", model=model, seed=seed, steps=9, sampler_name="euler", scheduler="simple", denoise=1.0, **given
        )[0]["samples"]

    whole = [stock(3), stock(4)]
    assert latents.shape == (2, *TINY[family].latent[1:]) and torch.equal(latents[:1], whole[0])
    assert dB(latents[1:], whole[1]) > dB(whole[0], whole[1]) + 10
    if family == "Flux":
        assert not torch.equal(stock(3, positive=conditioning(family, 1)), whole[0])


def test_nothing_is_drawn_whole_until_a_number_is_set_and_then_the_stock_picture(host, kit):
    import folder_paths

    def graph(number: int) -> dict:
        common = {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "cfg": 3.0}
        common |= {"model": ["1", 0], "steps": 8, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        said = lambda text: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}}
        given = {"vae": ["1", 2], "seed": 2**64 - 1, "drafts": 3, "speed": 1.5, "at_once": 4}
        return {
            "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": kit.file}},
            "2": said("a cat on a black background"), "3": said(""),
            "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "5": {"class_type": "AttuneDraftSeeds", "inputs": {**common, **given}},
            "6": {"class_type": "AttunePickSeed", "inputs": {"drafts": ["5", 0], "number": number}},
            "7": {"class_type": "KSampler", "inputs": {**common, "seed": ["6", 0]}},
            "8": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": f"pick{number}"}},
            "9": {"class_type": "PreviewImage", "inputs": {"images": ["5", 2]}},
        }  # fmt: skip

    shown = host.run(graph(0))
    assert not [*host.folders.rglob("pick0*")] and shown["9"]["images"]
    host.run(graph(2))
    (file,) = host.folders.rglob("pick2*.latent")
    (latent,) = host.call("LoadLatent", latent=f"{file.relative_to(folder_paths.get_output_directory())} [output]")
    assert torch.equal(latent["samples"], kit.ksampler(kit.model, steps=8, seed=0))  # behind the last seed comes 0
