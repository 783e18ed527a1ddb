"""Re-denoising and zigzags inside the host, on the demo models."""

from __future__ import annotations

import pytest
import torch

from nightly import daily

STEPS = 3


@pytest.fixture(scope="module")
def common(demo, encode):
    return {"positive": encode("a cat on a black background"), "negative": encode("")}


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")[0]


def empty(model, batch: int = 1):
    return {"samples": torch.zeros(batch, model.get_model_object("latent_format").latent_channels, 16, 16)}


def ksampler(host, model, common, latent=None, **more):
    given = {
        "seed": 5, "steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "latent_image": latent or empty(model), **common, **more,
    }  # fmt: skip
    return host.call("KSampler", model=model, **given)[0]["samples"]


def redenoise(host, model, **more):
    return host.call("AttuneRedenoise", model=model, **more)[0]


def zigzags(host, model, steps, **more):
    same, sampler = host.call("AttuneRedenoise", model=model, zigzag_steps=steps, **more)
    assert (same is model) == (steps > 0)
    return sampler


def counted(model):
    """A clone that notes every call of the network, and the noise that reaches its sampler last."""
    clone, calls, noises = model.clone(), [], []

    def call(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    def sample(executor, guider, sigmas, extra_args, callback, noise, *args):
        noises.append(noise.clone())
        return executor(guider, sigmas, extra_args, callback, noise, *args)

    clone.add_wrapper_with_key("apply_model", "test", call)
    clone.add_wrapper_with_key("sampler_sample", "zzz", sample)
    return clone, calls, noises


class Given:
    """A NOISE that is known."""

    seed = 5

    def __init__(self, noise):
        self.noise = noise

    def generate_noise(self, _):
        return self.noise


def advanced(host, model, common, noise, sampler=None, latent=None, guider=None, steps=STEPS):
    if guider is None:
        (guider,) = host.call("CFGGuider", model=model, cfg=3.0, **common)
    if sampler is None:
        (sampler,) = host.call("KSamplerSelect", sampler_name="euler")
    (sigmas,) = host.call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)
    given = {
        "noise": noise,
        "guider": guider,
        "sampler": sampler,
        "sigmas": sigmas,
        "latent_image": latent or empty(model),
    }
    return host.call("SamplerCustomAdvanced", **given)[0]["samples"]


RUNS = [(kind, mode) for kind in ("unet", "flow") for mode in ("two-step", "direct")]


@pytest.mark.parametrize(("kind", "mode"), daily(RUNS, *RUNS[1:3], names=2))
def test_a_run_is_the_plain_run_from_the_noise_it_made(host, demo, flow, common, kind, mode):
    model = {"unet": demo[0], "flow": flow}[kind]
    patched, calls, noises = counted(redenoise(host, model, rounds=2, mode=mode))
    out = ksampler(host, patched, common)
    assert len(calls) == STEPS + 2 * 2
    assert out.isfinite().all() and not torch.equal(out, ksampler(host, model, common))
    assert torch.equal(out, advanced(host, model, common, Given(noises[0])))


def test_strength_zero_and_patching_twice(host, demo, common):
    model = demo[0]
    assert redenoise(host, model, strength=0.0) is model
    once = redenoise(host, model)
    assert torch.equal(ksampler(host, redenoise(host, once), common), ksampler(host, once, common))
    (noise,) = host.call("RandomNoise", noise_seed=5)
    assert torch.equal(ksampler(host, once, common), advanced(host, once, common, noise))


def test_the_depth_makes_the_effect_independent_of_the_schedule(host, demo, common):
    def noise(depth, scheduler):
        patched, _, noises = counted(redenoise(host, demo[0], depth=depth))
        ksampler(host, patched, common, scheduler=scheduler, steps=4)
        return noises[0]

    assert torch.allclose(noise(0.39, "karras"), noise(0.39, "exponential"), atol=1e-5)
    assert not torch.allclose(noise(0.0, "karras"), noise(0.0, "exponential"), atol=1e-2)


@pytest.mark.parametrize("size", [0.5, 1.5])
def test_the_strength_is_linear_in_the_noise(host, demo, common, size):
    def noise(strength):
        patched, _, noises = counted(redenoise(host, demo[0], strength=strength))
        ksampler(host, patched, common, steps=1)
        return noises[0]

    (plain,) = host.call("RandomNoise", noise_seed=5)
    start = plain.generate_noise(empty(demo[0]))
    torch.testing.assert_close(noise(size), start + size * (noise(1.0) - start))


def test_equal_guidance_changes_little_and_is_warned_about(host, demo, common, caplog):
    patched, _, noises = counted(redenoise(host, demo[0], strong_cfg=1.0, weak_cfg=1.0, depth=0.05))
    wide, _, more = counted(redenoise(host, demo[0], strong_cfg=6.0, weak_cfg=1.0, depth=0.05))
    with caplog.at_level("INFO"):
        ksampler(host, patched, common, steps=1)
    ksampler(host, wide, common, steps=1)
    (plain,) = host.call("RandomNoise", noise_seed=5)
    start = plain.generate_noise(empty(demo[0]))
    assert (noises[0] - start).norm() < 0.1 * (more[0] - start).norm()
    assert "strong guidance 1 is not above weak 1" in caplog.text and "1 x 2 evaluations" in caplog.text


def test_a_mask_keeps_the_noise_and_the_picture_outside(host, demo, common):
    picture = {"samples": torch.randn(1, 4, 16, 16), "noise_mask": torch.zeros(1, 1, 128, 128)}
    picture["noise_mask"][..., 64:] = 1
    patched, _, noises = counted(redenoise(host, demo[0]))
    out = ksampler(host, patched, common, latent=picture)
    (plain,) = host.call("RandomNoise", noise_seed=5)
    start = plain.generate_noise(picture)
    assert torch.equal(noises[0][..., :7], start[..., :7]) and not torch.equal(noises[0][..., 9:], start[..., 9:])
    torch.testing.assert_close(out[..., :7], picture["samples"][..., :7], rtol=0, atol=1e-5)


def test_img2img_is_untouched_unless_asked(host, demo, common, caplog):
    picture = {"samples": torch.randn(1, 4, 16, 16)}
    plain = ksampler(host, demo[0], common, latent=picture, denoise=0.5)
    with caplog.at_level("INFO"):
        assert torch.equal(ksampler(host, redenoise(host, demo[0]), common, latent=picture, denoise=0.5), plain)
    assert "Attune Redenoise: stands aside, the run starts from a picture" in caplog.text
    asked = redenoise(host, demo[0], partial_denoise="apply", renormalize=True)
    assert not torch.equal(ksampler(host, asked, common, latent=picture, denoise=0.5), plain)


def test_what_cannot_work_is_said_before_the_first_call(host, demo, flow, common):
    (noise,) = host.call("RandomNoise", noise_seed=5)
    model, calls, _ = counted(redenoise(host, demo[0]))
    (basic,) = host.call("BasicGuider", model=model, conditioning=common["positive"])
    with pytest.raises(
        ValueError, match=r"no negative conditioning, so strong and weak guidance are the same\. Use CFG"
    ):
        advanced(host, model, common, noise, guider=basic)
    zigzag = zigzags(host, demo[0], 5)
    plain, more_calls, _ = counted(demo[0])
    (basic,) = host.call("BasicGuider", model=plain, conditioning=common["positive"])
    with pytest.raises(ValueError, match="Attune Redenoise: this guider has no negative"):
        advanced(host, plain, common, noise, guider=basic, sampler=zigzag)
    model, flow_calls, _ = counted(redenoise(host, flow, evaluate_at="first level"))
    with pytest.raises(ValueError, match=r"this is a flow model\. Set 'evaluate_at' to 'next level'"):
        ksampler(host, model, common)
    assert not calls and not more_calls and not flow_calls


def test_guidance_that_the_network_is_told_is_what_changes(host):
    from pack.nodes._host.redenoise import _with_guidance, guidance_gap

    class Number:
        def __init__(self, cond):
            self.cond = cond

    class Guider:
        conds = {"positive": [{"model_conds": {"guidance": Number(3.5)}}]}
        cfg, inner_model = 1.0, None

    positive, distilled = _with_guidance(Guider(), 1.0)
    assert distilled and float(positive[0]["model_conds"]["guidance"].cond) == 1.0
    assert Guider.conds["positive"][0]["model_conds"]["guidance"].cond == 3.5
    assert guidance_gap(Guider(), 0.0, 1.0) == "guidance the sampler's own down, 1 back"


@pytest.mark.parametrize("kind", ["unet", "flow"])
def test_no_zigzags_are_the_stock_euler_to_the_bit(host, demo, flow, common, kind):
    model = {"unet": demo[0], "flow": flow}[kind]
    (noise,) = host.call("RandomNoise", noise_seed=5)
    zigzag = zigzags(host, model, 0, strong_cfg=4.0)
    picture = {"samples": torch.randn_like(empty(model)["samples"]), "noise_mask": torch.zeros(1, 1, 128, 128)}
    picture["noise_mask"][..., 64:] = 1
    for latent in (empty(model, 2), picture):
        stock = advanced(host, model, common, noise, latent=latent)
        assert torch.equal(advanced(host, model, common, noise, zigzag, latent), stock)


@pytest.mark.parametrize("kind", ["unet", "flow"])
def test_zigzags_cost_two_calls_each_and_keep_what_a_mask_keeps(host, demo, flow, common, kind):
    model, calls, _ = counted({"unet": demo[0], "flow": flow}[kind])
    (noise,) = host.call("RandomNoise", noise_seed=5)
    zigzag = zigzags(host, model, 2, strong_cfg=4.0)
    picture = {"samples": torch.randn_like(empty(model)["samples"]), "noise_mask": torch.zeros(1, 1, 128, 128)}
    picture["noise_mask"][..., 64:] = 1
    out = advanced(host, model, common, noise, zigzag, picture)
    assert len(calls) == STEPS + 2 * 2 and out.isfinite().all()
    torch.testing.assert_close(out[..., :7], picture["samples"][..., :7], rtol=0, atol=1e-5)


def wrapped(inner, factor, hidden=False):
    """As other packs wrap a SAMPLER (Detail Daemon, Lying Sigma): what the inner one gets is a plain function."""
    import comfy.samplers

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def lower(x, sigma, **more):
            return model(x, sigma * factor, **more)

        if not hidden:
            lower.inner_model, lower.sigmas = model.inner_model, sigmas
        return inner.sampler_function(lower, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    return comfy.samplers.KSAMPLER(sample)


WRAPPED = [(kind, strong) for kind in ("unet", "flow") for strong in (0.0, 4.0)]


@pytest.mark.parametrize(("kind", "strong"), daily(WRAPPED, *WRAPPED[1:3], names=2))
def test_a_wrapped_zigzag_keeps_what_the_wrapper_and_the_mask_do(host, demo, flow, common, kind, strong):
    model, calls, _ = counted({"unet": demo[0], "flow": flow}[kind])
    (noise,) = host.call("RandomNoise", noise_seed=5)
    zigzag = zigzags(host, model, 2, strong_cfg=strong)
    picture = {"samples": torch.randn(empty(model)["samples"].shape), "noise_mask": torch.zeros(1, 1, 128, 128)}
    picture["noise_mask"][..., 64:] = 1
    for latent in (empty(model, 2), picture):
        bare = advanced(host, model, common, noise, zigzag, latent)
        assert torch.equal(advanced(host, model, common, noise, wrapped(zigzag, 1.0), latent), bare)
    calls.clear()
    out = advanced(host, model, common, noise, wrapped(zigzag, 0.95), picture)
    assert len(calls) == STEPS + 2 * 2 and not torch.equal(out, bare)
    torch.testing.assert_close(out[..., :7], picture["samples"][..., :7], rtol=0, atol=1e-5)


def test_a_wrapper_that_hides_the_guider_is_told_so(host, demo, common):
    (noise,) = host.call("RandomNoise", noise_seed=5)
    with pytest.raises(ValueError, match="another node wraps its SAMPLER and hides the guider"):
        advanced(host, demo[0], common, noise, wrapped(zigzags(host, demo[0], 1), 1.0, hidden=True))


def test_one_zigzag_is_the_redenoise_node_at_the_runs_own_depth(host, demo, common):
    (noise,) = host.call("RandomNoise", noise_seed=5)
    zigzag = zigzags(host, demo[0], 1)
    ours = advanced(host, demo[0], common, noise, zigzag)
    other = advanced(host, redenoise(host, demo[0], depth=0.0), common, noise)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-3)
