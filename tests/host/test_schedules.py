"""Our schedule nodes inside the host: against its own nodes, on models of its own classes."""

from __future__ import annotations

import pytest
import torch

import comfy_stub
from nightly import daily

STEPS = [1, 2, 5, 8, 10, 20, 33]


@pytest.fixture(scope="module")
def models(host):
    return {name: comfy_stub.tiny_model(name) for name in ("SD15", "SDXL", "SVD_img2vid", "SD20", "SD3")}


def levels(host, model, steps, denoise=1.0, schedule="auto", **more):
    return host.call("AttuneScheduler", model=model, steps=steps, denoise=denoise, schedule=schedule, **more)[0]


@pytest.mark.parametrize(("family", "table"), [("SD15", "SD1"), ("SDXL", "SDXL"), ("SVD_img2vid", "SVD")])
@pytest.mark.parametrize("steps", STEPS)
def test_auto_equals_the_builtin_align_your_steps_node(host, models, family, table, steps):
    theirs = host.call("AlignYourStepsScheduler", model_type=table, steps=steps, denoise=1.0)[0]
    torch.testing.assert_close(levels(host, models[family], steps), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("denoise", [1.0, 0.99, 0.6, 0.25, 0.05, 0.0])
@pytest.mark.parametrize("steps", [1, 10, 25])
def test_denoise_keeps_as_many_steps_as_the_stock_scheduler(host, models, steps, denoise):
    stock = host.call("BasicScheduler", model=models["SD15"], scheduler="karras", steps=steps, denoise=denoise)[0]
    ours = levels(host, models["SD15"], steps, denoise)
    assert ours.shape == stock.shape and ours.dtype == stock.dtype and ours.device == stock.device


def test_denoise_is_the_end_of_the_longer_schedule(host, models):
    assert torch.equal(levels(host, models["SD15"], 8, 0.4), levels(host, models["SD15"], 20)[-9:])


def test_the_demo_model_gets_the_schedule_of_its_noise(host, demo):
    assert torch.equal(levels(host, demo[0], 10), levels(host, demo[0], 10, schedule="AYS SD 1.5"))


@pytest.mark.parametrize("denoise", [1.0, 0.4])
def test_auto_on_a_family_without_a_schedule_is_the_stock_one_and_says_so(host, models, denoise, caplog):
    (stock,) = host.call("BasicScheduler", model=models["SD20"], scheduler="simple", steps=10, denoise=denoise)
    with caplog.at_level("INFO"):
        assert torch.equal(levels(host, models["SD20"], 10, denoise), stock)
    assert "no schedule is published for SD20: the stock 'simple'" in caplog.text


def test_kl_optimal_suits_a_flow_model_with_the_shift_it_has(host, models):
    (shifted,) = host.call("ModelSamplingSD3", model=models["SD3"], shift=6.0)
    for model in (models["SD3"], shifted):
        sigmas = levels(host, model, 8, schedule="KL-optimal")
        want = torch.tensor([1, 0.834089, 0.707107, 0.599456, 0.5, 0.400544, 0.292893, 0.165911, 0])
        torch.testing.assert_close(sigmas, want, rtol=0, atol=1e-6)


def test_a_model_sampling_node_before_ours_is_seen(host, models):
    (changed,) = host.call("ModelSamplingDiscrete", model=models["SD15"], sampling="v_prediction", zsnr=True)
    assert float(levels(host, changed, 10, schedule="KL-optimal")[0]) > 1000


def test_the_log_says_what_was_chosen_and_with_which_numbers(host, models, caplog):
    with caplog.at_level("INFO"):
        levels(host, models["SD15"], 5, latent={"samples": torch.zeros(1, 4, 48, 64)})
    assert "AYS SD 1.5" in caplog.text and "picture 512x384; 5 steps: 14.61 " in caplog.text


def test_every_run_gets_its_own_levels(host, models):
    first = levels(host, models["SD15"], 10)
    with torch.inference_mode():
        first.fill_(0)
    assert float(levels(host, models["SD15"], 10)[0]) > 14


@pytest.mark.parametrize(
    "sampler", daily(["euler", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "heun", "dpm_2"], "dpmpp_2m_sde")
)
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_our_ksampler_equals_the_custom_sampler_bit_for_bit(host, demo, encode, sampler, denoise):
    model, _, _ = demo
    positive, negative = encode("a cat on a black background"), encode("")
    latent = {"samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    common = {"cfg": 3.0, "positive": positive, "negative": negative}
    (ours,) = host.call(
        "AttuneKSampler", model=model, seed=5, steps=4, sampler_name=sampler, schedule="auto", latent_image=latent,
        denoise=denoise, **common,
    )  # fmt: skip
    (noise,) = host.call("RandomNoise", noise_seed=5)
    (guider,) = host.call("CFGGuider", model=model, **common)
    (solver,) = host.call("KSamplerSelect", sampler_name=sampler)
    theirs, _ = host.call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=solver,
        sigmas=levels(host, model, 4, denoise), latent_image=latent,
    )  # fmt: skip
    assert torch.equal(ours["samples"], theirs["samples"])


def test_our_ksampler_keeps_masks_and_batch_indices(host, demo, encode):
    latent = {"samples": torch.randn(2, 4, 16, 16), "batch_index": [3, 1], "noise_mask": torch.zeros(1, 1, 128, 128)}
    latent["noise_mask"][..., 64:] = 1
    (out,) = host.call(
        "AttuneKSampler", model=demo[0], seed=0, steps=3, cfg=2.0, sampler_name="euler", schedule="auto",
        positive=encode("star"), negative=encode(""), latent_image=latent, denoise=1.0,
    )  # fmt: skip
    assert out["batch_index"] == [3, 1]
    torch.testing.assert_close(out["samples"][..., :7], latent["samples"][..., :7], rtol=0, atol=1e-5)
    assert (out["samples"][..., 9:] - latent["samples"][..., 9:]).abs().mean() > 0.1


def test_no_denoise_returns_the_latent_unchanged(host, demo, encode):
    latent = {"samples": torch.randn(1, 4, 16, 16)}
    (out,) = host.call(
        "AttuneKSampler", model=demo[0], seed=0, steps=3, cfg=2.0, sampler_name="euler", schedule="auto",
        positive=encode("star"), negative=encode(""), latent_image=latent, denoise=0.0,
    )  # fmt: skip
    assert torch.equal(out["samples"], latent["samples"])


def test_a_sampler_that_is_not_installed_is_refused_by_name(host, demo, encode):
    with pytest.raises(ValueError, match=r"'sampler_name' is 'res_2s'\. Choose one of: euler, "):
        host.call(
            "AttuneKSampler", model=demo[0], seed=0, steps=3, cfg=2.0, sampler_name="res_2s", schedule="auto",
            positive=encode("star"), negative=encode(""), latent_image={"samples": torch.zeros(1, 4, 16, 16)}, denoise=1.0,
        )  # fmt: skip


def test_stock_nodes_of_the_old_and_the_new_api_can_be_run(host):
    from pack.nodes._host.solvers import run_stock_node

    (latent,) = run_stock_node("EmptyLatentImage", width=64, height=32, batch_size=2)
    assert latent["samples"].shape == (2, 4, 4, 8)
    (sigmas,) = run_stock_node("AlignYourStepsScheduler", model_type="SD1", steps=10, denoise=1.0)
    assert len(sigmas) == 11


def test_a_nested_latent_has_no_picture_size(models):
    from pack.nodes._host.identity import pixels

    nested = type("Nested", (), {"is_nested": True})()
    assert pixels(models["SD15"], {"samples": nested}) is None
    assert pixels(models["SD15"], {"samples": torch.zeros(1, 16, 5, 40, 60)}) == (480, 320)
