"""Inversion, replay and morph inside the host, on the demo models: exact where they say so, refused where they must be."""

from __future__ import annotations

import pytest
import torch

from graphs import GRAPHS, REPLAYED, SIDE, Kit
from live_memory import LiveMemory
from methods import METHODS
from nightly import daily
from tiny_networks import TINY, conditioning, tiny_network

STEPS = 5
CASES = [(0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (7.5, 1.0), (7.5, 0.0)]  # cfg 0 is the negative prompt's alone


def levels(kit: Kit, steps: int = STEPS, denoise: float = 1.0, model=None):
    given = {"scheduler": "normal", "steps": steps, "denoise": denoise}
    return kit.host.call("BasicScheduler", model=model or kit.model, **given)[0]


def inverted(kit: Kit, latent: dict | None = None, cfg: float = 3.0, sigmas=None, model=None, **more):
    given = {"model": model or kit.model, "positive": kit.positive, "negative": kit.negative, "cfg": cfg, **more}
    picture = kit.picture() if latent is None else latent
    return kit.host.call("AttuneInvert", latent=picture, sigmas=levels(kit) if sigmas is None else sigmas, **given)[0]


def sampled(kit: Kit, sampler, sigmas, latent: dict, cfg: float = 3.0, model=None, **more):
    """Through the stock SamplerCustom, with noise that must not matter."""
    given = {"positive": kit.positive, "negative": kit.negative, "add_noise": True, "noise_seed": 5, **more}
    return kit.host.call(
        "SamplerCustom", model=model or kit.model, cfg=cfg, sampler=sampler, sigmas=sigmas, latent_image=latent, **given
    )[0]["samples"]


def replayed(kit: Kit, maps, latent: dict | None = None, run: dict | None = None, **more):
    """What Attune Replay with the settings `more` makes of a run."""
    sampler, sigmas, picture, _ = kit.host.call("AttuneReplay", noise_maps=maps, **{"skip": 0.0, "focus": 0.0, **more})
    return sampled(kit, sampler, sigmas, latent or picture, **(run or {}))


def worst(got, want) -> float:
    return float((got - want).abs().max())


# --- exact ---


@pytest.mark.parametrize("kit", ["unet", "flow"], indirect=True)
@pytest.mark.parametrize(("cfg", "eta"), daily(CASES, (7.5, 1.0), (7.5, 0.0), names=2))
def test_a_replay_is_the_picture_at_every_guidance(kit, cfg, eta):
    picture, run = kit.picture(2), {"cfg": cfg}
    half = inverted(kit, picture, cfg, eta=eta)
    whole = inverted(kit, picture, cfg, eta=eta, precision="float32")
    for maps, skip in ((half, 0.0), (half, 0.4), (whole, 0.0)):
        assert worst(replayed(kit, maps, run=run, skip=skip, focus=skip), picture["samples"]) <= 1e-5
    assert half.maps.bytes < 0.6 * whole.maps.bytes


@pytest.mark.parametrize("skip", [0.0, 0.4])
def test_the_stock_ancestral_sampler_given_our_maps_ends_in_the_picture(kit, skip, monkeypatch):
    """An independent implementation of the step: the host's euler_ancestral, from our state, with our maps as its noise."""
    import comfy.samplers

    maps = inverted(kit, precision="float32").maps
    start = round(skip * maps.steps)
    noises = iter(maps.maps[start:])
    stock = comfy.samplers.ksampler("euler_ancestral", {"noise_sampler": lambda sigma, sigma_next: next(noises)})

    def begin(model, x, sigmas, **more):
        return stock.sampler_function(model, maps.states[start].clone(), sigmas, **more, **stock.extra_options)

    got = sampled(kit, comfy.samplers.KSAMPLER(begin), maps.sigmas[start:].float(), kit.picture())
    missed = kit.model.model.process_latent_out(maps.picture - maps.residual)
    torch.testing.assert_close(got, missed, rtol=0, atol=2e-3)  # which knows no grid


class RoundTrip(Kit):
    """The graphs with Invert and Replay in the place of KSampler."""

    def ksampler(self, model, sampler="euler", positive=None, latent_image=None, **_):
        count = 1 if latent_image is None else len(latent_image["samples"])
        latent = {**(latent_image or {}), **self.picture(count)}
        positive = positive or self.positive
        maps = inverted(self, latent, model=model, positive=positive, precision="float32")
        out = replayed(self, maps, latent, {"model": model, "positive": positive}, skip=0.2)
        assert worst(out, latent["samples"]) <= 1e-5
        return out


@pytest.fixture(scope="module")
def trips(host):
    return {name: RoundTrip(host, name) for name in ("unet", "flow")}


CELLS = [(model, name) for model in ("unet", "flow") for name in REPLAYED]
SEEN = [("flow" if i % 4 else "unet", name) for i, name in enumerate(REPLAYED) if name != "torch.compile"]


@pytest.mark.parametrize(("model", "name"), daily(CELLS, *SEEN, names=2))
def test_the_picture_comes_back_in_the_graph(trips, model, name):
    """And the stock graph gives the bits that it gave before, the random state included."""
    trip, stock = trips[model], Kit(trips[model].host, model)
    same = lambda model: model
    before = GRAPHS["KSampler"](stock, same)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    inverted(trip)
    assert torch.equal(torch.get_rng_state(), state)
    GRAPHS[name](trip, same)
    assert torch.equal(GRAPHS["KSampler"](stock, same), before)


@pytest.mark.parametrize(
    "name",
    daily(METHODS, "encoder propagation", "one more step", "noise shift"),
)
def test_the_picture_comes_back_behind_our_own_nodes(trips, name):
    method = METHODS[name]
    kit = trips[method.model]
    model = method.on(kit)(kit.model)
    maps = inverted(kit, sigmas=levels(kit, 8), model=model)
    assert worst(replayed(kit, maps, run={"model": model}), kit.picture()["samples"]) <= 1e-5


def test_the_picture_comes_back_on_the_levels_of_a_fitted_sampler(kit):
    (profile, *_) = kit.host.call(
        "AttuneLoadProfile", profile_name=f"Attune demo {kit.name}, fitted sampler, euler 50 steps"
    )
    given = {"steps": 8, "denoise": 1.0, "denoise_mode": "exact", "resolution_policy": "ignore", "strength": 1.0}
    model, _, sigmas, *_ = kit.host.call("AttuneApplyProfile", model=kit.model, profile=profile, speed=0.0, **given)
    maps = inverted(kit, sigmas=sigmas, model=model)
    assert maps.maps.steps == 8
    assert worst(replayed(kit, maps, run={"model": model}), kit.picture()["samples"]) <= 1e-5


def test_the_picture_comes_back_through_every_guider(kit):
    call, maps = kit.host.call, inverted(kit, cfg=1.0)
    sampler, sigmas, latent, _ = call("AttuneReplay", noise_maps=maps, skip=0.0)
    conds = {"positive": kit.positive, "negative": kit.negative}
    for guider in (
        call("BasicGuider", model=kit.model, conditioning=kit.positive)[0],
        call("CFGGuider", model=kit.model, cfg=1.0, **conds)[0],
    ):
        given = {"noise": call("DisableNoise")[0], "guider": guider, "sampler": sampler, "sigmas": sigmas}
        out = call("SamplerCustomAdvanced", latent_image=latent, **given)[0]["samples"]
        assert worst(out, latent["samples"]) <= 1e-5


@pytest.mark.parametrize(
    "family", daily(["WAN21_T2V", "LTXV", "StableAudio", "SDXL", "Flux"], "WAN21_T2V", "StableAudio")
)
def test_videos_sounds_and_other_networks_come_back(host, family):
    model, shape = tiny_network(family), TINY[family].latent
    latent = {"samples": torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1))}
    if family == "SVD_img2vid":
        latent = {"samples": latent["samples"][:1]}
    positive, negative = conditioning(family, 1), conditioning(family, 2)
    (sigmas,) = host.call("BasicScheduler", model=model, scheduler="normal", steps=4, denoise=1.0)
    given = {"model": model, "positive": positive, "negative": negative, "cfg": 4.0}
    maps, _ = host.call("AttuneInvert", latent=latent, sigmas=sigmas, **given)
    sampler, sigmas, _, _ = host.call("AttuneReplay", noise_maps=maps, skip=0.0)
    out = host.call(
        "SamplerCustom", add_noise=False, noise_seed=1, sampler=sampler, sigmas=sigmas, latent_image=latent, **given
    )[0]["samples"]
    assert worst(out, latent["samples"]) <= 1e-5 * max(1.0, float(out.abs().max()))


# --- cost, progress, stop ---


def counted(model, stop_at: int | None = None):
    """A clone that notes every call of the network, and at one of them presses stop."""
    import comfy.model_management as management

    clone, calls = model.clone(), []

    def call(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == stop_at:
            management.interrupt_current_processing(True)
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key("apply_model", "test", call)
    return clone, calls


@pytest.mark.parametrize(("eta", "cost"), [(1.0, 1), (0.0, 2)])
def test_an_inversion_and_a_replay_cost_a_call_a_step(kit, eta, cost):
    model, calls = counted(kit.model)
    maps = inverted(kit, model=model, eta=eta)
    assert len(calls) == cost * STEPS
    replayed(kit, maps, run={"model": model}, skip=0.4)
    assert len(calls) == cost * STEPS + STEPS - 2


def test_an_inversion_and_a_replay_take_the_memory_of_a_sampling_and_the_maps(net):
    """To two latents, whatever the number of steps."""
    latent, many = net.picture(4), levels(net, 12)
    sampled(net, *net.host.call("KSamplerSelect", sampler_name="euler"), many, latent)  # what is made once
    with LiveMemory() as sampling:
        sampled(net, *net.host.call("KSamplerSelect", sampler_name="euler"), many, latent)
    with LiveMemory() as inversion:
        maps = inverted(net, latent, sigmas=many)
    with LiveMemory() as replay:
        replayed(net, maps)
    slack = 2 * latent["samples"].nbytes
    assert inversion.most < sampling.most + maps.maps.bytes + slack and replay.most < sampling.most + slack


def test_a_stop_ends_an_inversion_at_once_and_leaves_nothing(kit):
    import comfy.model_management as management

    before = kit.ksampler(kit.model)
    model, calls = counted(kit.model, stop_at=2)
    with pytest.raises(management.InterruptProcessingException):
        inverted(kit, model=model)
    assert len(calls) == 2
    assert torch.equal(kit.ksampler(kit.model), before)


# --- edits ---


def test_another_prompt_edits_and_a_mask_keeps_the_rest_exactly(kit):
    picture = kit.picture()
    maps, other = inverted(kit, picture), {"positive": kit.encode("a red heart on a white background"), "cfg": 6.0}
    edit = replayed(kit, maps, run=other)
    assert edit.isfinite().all() and worst(edit, picture["samples"]) > 0.1
    mask = torch.zeros(1, 8 * SIDE, 8 * SIDE)
    mask[..., 4 * SIDE :] = 1
    (masked,) = kit.host.call("SetLatentNoiseMask", samples=picture, mask=mask)
    inside = replayed(kit, maps, masked, other)
    kept = SIDE // 2 - 1
    torch.testing.assert_close(inside[..., :kept], picture["samples"][..., :kept], rtol=0, atol=1e-5)
    assert worst(inside[..., kept + 2 :], picture["samples"][..., kept + 2 :]) > 0.1
    (soft,) = kit.host.call("DifferentialDiffusion", model=kit.model)
    assert (
        worst(replayed(kit, maps, masked, {**other, "model": soft})[..., :kept], picture["samples"][..., :kept]) <= 1e-5
    )


def test_the_focus_changes_less_of_the_picture_and_off_nothing(kit):
    picture, run = kit.picture()["samples"], {"positive": kit.encode("a red heart on a white background")}
    maps = inverted(kit)
    free, off, some, most = (
        replayed(kit, maps, run=run, **one) for one in ({}, {"focus": 0.0}, {"focus": 0.3}, {"focus": 1.0})
    )
    assert torch.equal(free, off)
    changes = [float((one - picture).abs().mean()) for one in (free, some, most)]
    assert changes[0] > changes[2] > 0 and changes[0] >= changes[1] >= changes[2]


def test_a_variation_differs_by_its_seed_and_in_a_batch_by_picture(kit):
    maps, picture = inverted(kit), kit.picture()["samples"]
    one, again, other = (replayed(kit, maps, variation=0.5, vary_from=0.2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and worst(one, other) > 0.01 and worst(one, picture) > 0.01
    late = replayed(kit, maps, variation=0.5, vary_from=0.6, seed=1)
    assert float((late - picture).norm()) < float((one - picture).norm())
    two = {"samples": picture.repeat(2, 1, 1, 1)}
    batch = replayed(kit, maps, two, variation=0.5, vary_from=0.2, seed=1)
    assert worst(batch[0], batch[1]) > 0.01
    # A network rounds otherwise in a batch of another size, and with it the states of half precision.
    assert worst(replayed(kit, maps, two), two["samples"]) <= 2e-2 * float(picture.std())
    assert worst(replayed(kit, inverted(kit, precision="float32"), two), two["samples"]) <= 1e-3


def test_the_latent_follows_flips_shifts_and_a_second_picture(kit):
    call, maps = kit.host.call, inverted(kit)
    other = inverted(kit, {"samples": kit.picture()["samples"].flip(-1) * 0.5}, seed=9)
    _, _, moved, _ = call("AttuneReplay", noise_maps=maps, flip="left to right", shift_right=0.25, shift_down=-0.5)
    want = maps.latent.flip(-1).roll((-SIDE // 2, SIDE // 4), (-2, -1))
    assert torch.equal(moved["samples"], want)
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1
    sampler, sigmas, both, _ = call("AttuneReplay", noise_maps=maps, other_maps=other, mask=mask, skip=0.0)
    assert torch.equal(both["samples"][..., : SIDE // 2], maps.latent[..., : SIDE // 2])
    assert torch.equal(both["samples"][..., SIDE // 2 :], other.latent[..., SIDE // 2 :])
    out = sampled(kit, sampler, sigmas, both)
    assert out.isfinite().all() and worst(out, maps.latent) > 0.01


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_morph_begins_and_ends_in_the_pictures(kit, eta):
    pictures = kit.picture(), {"samples": 0.7 * kit.picture(2)["samples"][1:]}
    one, two = (inverted(kit, picture, 1.0, eta=eta, seed=i, precision="float32") for i, picture in enumerate(pictures))
    given = {"positive_1": kit.positive, "positive_2": kit.encode("a red heart on a white background")}
    given = {"model": kit.model, "maps_1": one, "maps_2": two, **given}
    latent, sampler, sigmas, positive, report = kit.host.call("AttuneMorph", frames=4, skip=0.4, **given)
    assert latent["samples"].shape[0] == 4 and positive[0][0].shape[0] == 4 and "4 frames" in report
    run = {"cfg": 1.0, "positive": positive}
    out = sampled(kit, sampler, sigmas, latent, **run)
    # The second picture was inverted with the first prompt, and so comes back with that alone.
    # In a batch a network rounds otherwise, and states that lie between two of the grid go to the other one.
    assert worst(out[0], pictures[0]["samples"][0]) <= 1e-3
    exact = sampled(kit, sampler, sigmas, latent, cfg=1.0)
    assert worst(exact[[0, 3]], torch.cat([p["samples"] for p in pictures])) <= 1e-3
    assert worst(out[1], out[2]) > 1e-3
    # A stock sampler goes on from the latent: without noise the host makes the inversions' states of it.
    sampling, given_latent = kit.model.get_model_object("model_sampling"), kit.model.model.process_latent_in
    state = sampling.noise_scaling(sigmas[0], torch.zeros_like(latent["samples"]), given_latent(latent["samples"]))
    torch.testing.assert_close(state[[0, 3]], torch.cat([one.maps.states[2], two.maps.states[2]]), rtol=0, atol=1e-4)
    (euler,) = kit.host.call("KSamplerSelect", sampler_name="euler")
    assert sampled(kit, euler, sigmas, latent, cfg=1.0, add_noise=False).isfinite().all()
    single, *_ = kit.host.call("AttuneMorph", frames=1, factor=1 / 3, skip=0.4, **given)
    torch.testing.assert_close(single["samples"], latent["samples"][1:2])


def test_a_morph_from_pure_noise_says_how_to_sample_it(kit):
    one = inverted(kit, precision="float32")
    two = inverted(kit, {"samples": kit.picture(2)["samples"][1:]}, seed=1, precision="float32")
    latent, sampler, sigmas, positive, report = kit.host.call(
        "AttuneMorph", model=kit.model, maps_1=one, maps_2=two, frames=3, skip=0.0, fresh_noise=0.3, seed=4,
        positive_1=kit.positive,
    )  # fmt: skip
    assert ("flow's level 1" in report) == (kit.name == "flow") and positive is kit.positive
    out = sampled(kit, sampler, sigmas, latent)
    assert worst(out[0], one.latent[0]) <= 1e-3 and worst(out[2], two.latent[0]) <= 1e-3


# --- files ---


def test_saved_maps_are_the_same_maps(kit):
    maps = inverted(kit)
    name = f"my {kit.name}"
    _, path = kit.host.call("AttuneSaveNoiseMaps", noise_maps=maps, name=name)
    _, second = kit.host.call("AttuneSaveNoiseMaps", noise_maps=maps, name=name)
    assert path.endswith(f"{name}.safetensors") and second.endswith(f"{name} (2).safetensors")
    loaded, latent, info = kit.host.call("AttuneLoadNoiseMaps", maps_name=f"{name}.safetensors")
    assert f"{STEPS} steps" in info and "cfg: 3" in info
    assert torch.equal(latent["samples"], kit.picture()["samples"])
    assert torch.equal(replayed(kit, loaded), replayed(kit, maps))


# --- refusals ---


def test_what_cannot_be_inverted_is_said_before_the_first_call(kit):
    model, calls = counted(kit.model)
    picture = kit.picture()
    mask = torch.zeros(1, 1, 8 * SIDE, 8 * SIDE)
    with pytest.raises(ValueError, match=r"has a noise mask.*before Set Latent Noise Mask"):
        inverted(kit, {**picture, "noise_mask": mask}, model=model)
    with pytest.raises(ValueError, match=r"latent is empty.*VAE Encode"):
        inverted(kit, kit.empty(), model=model)
    with pytest.raises(ValueError, match="needs levels from this model's"):
        inverted(kit, sigmas=levels(kit)[:-1], model=model)
    with pytest.raises(ValueError, match="needs levels from this model's"):
        inverted(kit, sigmas=torch.cat([torch.tensor([2000.0]), levels(kit)]), model=model)
    with pytest.raises(ValueError, match="must decrease"):
        inverted(kit, sigmas=levels(kit).flip(0), model=model)

    class Nested:
        is_nested = True

    with pytest.raises(ValueError, match="a video with its sound"):
        inverted(kit, {"samples": Nested()}, model=model)
    assert not calls
    whole = {**picture, "noise_mask": torch.ones(1, 1, 8 * SIDE, 8 * SIDE)}
    assert inverted(kit, whole).maps.steps == STEPS


def test_maps_of_another_run_are_refused_before_the_first_call(kit, trips):
    model, calls = counted(kit.model)
    maps, run = inverted(kit), {"model": model}
    small = {"samples": torch.ones(1, kit.channels, SIDE, SIDE // 2)}
    with pytest.raises(ValueError, match=r"noise maps are of 1 latents of .*, but the sampler got 1 of"):
        replayed(kit, maps, small, run)
    two = inverted(kit, kit.picture(2))
    with pytest.raises(ValueError, match="are of 2 latents"):
        replayed(kit, two, kit.picture(3), run)
    sampler, *_ = kit.host.call("AttuneReplay", noise_maps=maps, skip=0.0)
    for sigmas in (levels(kit, 9), levels(kit, 3), levels(kit)[:-1]):
        with pytest.raises(ValueError, match="Connect the SIGMAS of Attune Replay"):
            sampled(kit, sampler, sigmas, kit.picture(), model=model)
    other = trips["flow" if kit.name == "unet" else "unet"]
    with pytest.raises(ValueError, match=r"made with another kind of model \(\w+\) than this MODEL"):
        sampled(other, sampler, maps.maps.sigmas.float(), kit.picture())
    assert not calls


def test_another_checkpoint_of_the_same_kind_is_refused_and_other_loras_are_told(kit, caplog):
    from dataclasses import replace

    maps = inverted(kit)
    with pytest.raises(ValueError, match="made with another checkpoint"):
        replayed(kit, replace(maps, facts={**maps.facts, "weights": "0" * 16}))
    patched = kit.model.clone()
    key, weight = kit.weight(patched)
    patched.add_patches({key: ("diff", (0.05 * torch.ones_like(weight),))}, 1.0)
    with caplog.at_level("INFO"):
        assert worst(replayed(kit, maps, run={"model": patched}), maps.latent) > 1e-4
    assert "LoRAs are not those of the inversion" in caplog.text


def test_settings_that_cannot_be_are_refused(kit):
    call, maps = kit.host.call, inverted(kit)
    ddim = inverted(kit, eta=0.0)
    with pytest.raises(ValueError, match="eta 0 hold no noise to vary"):
        call("AttuneReplay", noise_maps=ddim, variation=0.5)
    with pytest.raises(ValueError, match=r"'skip' 0\.95 leaves none of the 5 steps"):
        call("AttuneReplay", noise_maps=maps, skip=0.95)
    with pytest.raises(ValueError, match="'mask' is connected without 'other_maps'"):
        call("AttuneReplay", noise_maps=maps, mask=torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="'other_maps' is connected without 'mask'"):
        call("AttuneReplay", noise_maps=maps, other_maps=maps)
    with pytest.raises(ValueError, match=r"'eta' 1 and 0 do not mix"):
        call("AttuneMorph", model=kit.model, maps_1=maps, maps_2=ddim)
    with pytest.raises(ValueError, match="A morph goes between two pictures"):
        call("AttuneMorph", model=kit.model, maps_1=inverted(kit, kit.picture(2)), maps_2=maps)


def test_a_fit_refuses_the_replay(kit):
    sampler, *_ = kit.host.call("AttuneReplay", noise_maps=inverted(kit))
    given = {"model": kit.model, "positive": kit.positive, "negative": kit.negative, "cfg": 3.0, "steps": 4}
    with pytest.raises(ValueError, match="does not know the sampler 'attune_replay'"):
        kit.host.call("AttuneFitSampler", sampler=sampler, latent=kit.empty(), **given)


def test_the_drawings_are_pictures_of_the_side_that_is_asked(host):
    drawn = {name: host.call("AttuneDemoPicture", picture=name, side=64)[0] for name in ("apple", "cat", "heart")}
    for image in drawn.values():
        assert image.shape == (1, 64, 64, 3) and 0 <= float(image.min()) < float(image.max()) <= 1
    red = drawn["apple"][0, 36, 32]
    assert float(red[0]) > 2 * float(red[1:].max())
    with pytest.raises(ValueError, match=r"'picture' is 'dog'\. Choose one of: apple, cat, heart"):
        host.call("AttuneDemoPicture", picture="dog")


def test_the_maps_that_come_with_the_pack_are_the_demo_models(host, unet):
    maps, latent, info = host.call("AttuneLoadNoiseMaps", maps_name="attune_demo_apple.safetensors")
    assert "20 steps" in info and "AttuneDemo" in info
    out = replayed(unet, maps, run={"cfg": 1.0, "positive": unet.encode("a red apple on a light blue background")})
    assert worst(out, latent["samples"]) <= 2e-2 * float(latent["samples"].std())
