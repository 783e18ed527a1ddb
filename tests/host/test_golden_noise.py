"""Golden noise inside the host: the stock samplers, masks, batches, second stages, and what stays untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import npnets
from nightly import daily
from pack.models.npnet_files import save_npnet

STEPS = 3


@pytest.fixture(scope="module")
def npnet(host):
    """A tiny network for the demo model with seeded weights, through the loader node."""
    folder = host.folders / "models" / "npnet"
    folder.mkdir(parents=True, exist_ok=True)
    save_npnet(npnets.seeded(npnets.TINY), folder / "tiny.safetensors", {})
    return host.call("AttuneLoadNPNet", npnet_name="tiny.safetensors")[0]


@pytest.fixture(scope="module")
def common(demo, encode):
    return {"positive": encode("a cat on a black background"), "negative": encode("")}


def ksampler(host, model, common, seed=5, latent=None, **more):
    given = {
        "steps": STEPS,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        **common,
        **more,
    }
    latent = latent or {"samples": torch.zeros(2, 4, 16, 16)}
    return host.call("KSampler", model=model, seed=seed, latent_image=latent, **given)[0]["samples"]


def golden_model(host, model, npnet, **more):
    return host.call("AttuneGoldenNoiseModel", model=model, npnet=npnet, **more)[0]


def golden_noise(host, model, npnet, positive, seed=5, noise=None, **more):
    """The start of the patched MODEL, as NOISE."""
    noise = noise or host.call("RandomNoise", noise_seed=seed)[0]
    patched, (sigmas,) = golden_model(host, model, npnet, **more), levels(host, model)
    return host.call("AttuneNoise", noise=noise, model=patched, sigmas=sigmas, positive=positive)[0]


def levels(host, model):
    return host.call("BasicScheduler", model=model, scheduler="normal", steps=STEPS, denoise=1.0)


def guiders(host, model, positive, negative):
    call = host.call
    return {
        "CFGGuider": call("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)[0],
        "BasicGuider": call("BasicGuider", model=model, conditioning=positive)[0],
        "DualCFGGuider": call(
            "DualCFGGuider", model=model, cond1=positive, cond2=negative, negative=negative, cfg_conds=3.0,
            cfg_cond2_negative=2.0, style="regular",
        )[0],
    }  # fmt: skip


def advanced(host, guider, noise, model, size=(2, 4, 16, 16)):
    (sampler,) = host.call("KSamplerSelect", sampler_name="euler")
    (sigmas,) = levels(host, model)
    latent = {"samples": torch.zeros(size)}
    given = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    return host.call("SamplerCustomAdvanced", **given)[0]["samples"]


SIZES, GUIDERS = [(2, 4, 16, 16), (1, 4, 12, 20)], ["CFGGuider", "BasicGuider", "DualCFGGuider"]
GUIDED = [(size, kind) for size in SIZES for kind in GUIDERS]


@pytest.mark.parametrize(("size", "kind"), daily(GUIDED, *GUIDED[::2], names=2))
def test_the_model_node_equals_the_noise_node_bit_for_bit(host, demo, npnet, common, kind, size):
    patched = golden_model(host, demo[0], npnet)
    (plain,) = host.call("RandomNoise", noise_seed=5)
    on_model = advanced(host, guiders(host, patched, **common)[kind], plain, demo[0], size)
    noise = golden_noise(host, demo[0], npnet, common["positive"])
    as_noise = advanced(host, guiders(host, demo[0], **common)[kind], noise, demo[0], size)
    assert torch.equal(on_model, as_noise)
    assert not torch.equal(on_model, advanced(host, guiders(host, demo[0], **common)[kind], plain, demo[0], size))


def test_the_stock_ksampler_equals_the_advanced_sampler_with_the_noise_node(host, demo, npnet, common):
    ours = ksampler(host, golden_model(host, demo[0], npnet), common)
    noise = golden_noise(host, demo[0], npnet, common["positive"])
    assert torch.equal(ours, advanced(host, guiders(host, demo[0], **common)["CFGGuider"], noise, demo[0]))


def test_strength_zero_is_the_stock_run_to_the_bit(host, demo, npnet, common):
    plain = ksampler(host, demo[0], common)
    assert torch.equal(ksampler(host, golden_model(host, demo[0], npnet, strength=0.0), common), plain)
    (latent,) = host.call("EmptyLatentImage", width=128, height=128, batch_size=1)
    (noise,) = host.call("RandomNoise", noise_seed=5)
    golden = golden_noise(host, demo[0], npnet, common["positive"], strength=0.0)
    assert torch.equal(golden.generate_noise(latent), noise.generate_noise(latent))


def test_img2img_and_second_stages_are_untouched_unless_asked(host, demo, npnet, common):
    model, patched = demo[0], golden_model(host, demo[0], npnet)
    picture = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))}
    assert torch.equal(
        ksampler(host, patched, common, latent=picture, denoise=0.5),
        ksampler(host, model, common, latent=picture, denoise=0.5),
    )
    asked = golden_model(host, model, npnet, partial_denoise="apply")
    assert not torch.equal(
        ksampler(host, asked, common, latent=picture, denoise=0.5),
        ksampler(host, model, common, latent=picture, denoise=0.5),
    )

    def second_stage(model):
        return host.call(
            "KSamplerAdvanced", model=model, add_noise="disable", noise_seed=5, steps=4, cfg=3.0, sampler_name="euler",
            scheduler="normal", latent_image=picture, start_at_step=2, end_at_step=4,
            return_with_leftover_noise="disable", **common,
        )[0]["samples"]  # fmt: skip

    assert torch.equal(second_stage(patched), second_stage(model))


def test_a_mask_keeps_the_picture_outside(host, demo, npnet, common):
    picture = {"samples": torch.randn(1, 4, 16, 16), "noise_mask": torch.zeros(1, 1, 128, 128)}
    picture["noise_mask"][..., 64:] = 1
    out = ksampler(host, golden_model(host, demo[0], npnet), common, latent=picture)
    torch.testing.assert_close(out[..., :7], picture["samples"][..., :7], rtol=0, atol=1e-5)


def test_a_batch_index_picks_the_same_noise(host, demo, npnet, common):
    noise = golden_noise(host, demo[0], npnet, common["positive"])
    three = noise.generate_noise({"samples": torch.zeros(3, 4, 16, 16)})
    one = noise.generate_noise({"samples": torch.zeros(1, 4, 16, 16), "batch_index": [2]})
    assert torch.equal(one, three[2:])


def test_a_noise_keeps_its_prompt_and_tells_its_seed(host, demo, npnet, common):
    first = golden_noise(host, demo[0], npnet, common["positive"], seed=7)
    assert first.seed == 7
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    before = first.generate_noise(latent)
    second = golden_noise(host, demo[0], npnet, common["negative"], seed=8)
    assert torch.equal(first.generate_noise(latent), before)
    assert not torch.equal(second.generate_noise(latent), before)


def test_no_noise_stays_no_noise(host, demo, npnet, common):
    (nothing,) = host.call("DisableNoise")
    noise = golden_noise(host, demo[0], npnet, common["positive"], noise=nothing)
    assert not noise.generate_noise({"samples": torch.zeros(1, 4, 16, 16)}).any()


def test_patched_twice_acts_once_and_the_model_itself_is_unchanged(host, demo, npnet, common):
    plain = ksampler(host, demo[0], common)
    once = golden_model(host, demo[0], npnet)
    assert torch.equal(ksampler(host, golden_model(host, once, npnet), common), ksampler(host, once, common))
    assert torch.equal(ksampler(host, demo[0], common), plain)


@pytest.mark.parametrize(
    ("node", "part"),
    [("Area", {"width": 64, "height": 64, "x": 0, "y": 0}),
     ("Mask", {"mask": torch.ones(1, 128, 128), "set_cond_area": "default"})],
)  # fmt: skip
def test_a_prompt_for_a_part_of_the_picture_is_passed_over(host, demo, npnet, common, caplog, node, part):
    (area,) = host.call(f"ConditioningSet{node}", conditioning=common["negative"], strength=1.0, **part)
    (both,) = host.call("ConditioningCombine", conditioning_1=area, conditioning_2=common["positive"])
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    with caplog.at_level("INFO"):
        found = golden_noise(host, demo[0], npnet, both).generate_noise(latent)
    assert torch.equal(found, golden_noise(host, demo[0], npnet, common["positive"]).generate_noise(latent))
    assert "of 2 prompts it reads number 2" in caplog.text


def test_the_log_says_what_was_done(host, demo, npnet, common, caplog):
    with caplog.at_level("INFO"):
        ksampler(host, golden_model(host, demo[0], npnet), common, latent={"samples": torch.zeros(1, 4, 20, 16)})
    assert "changed the noise of 20 x 16 latents by" in caplog.text and "in windows of 16 x 16" in caplog.text


def test_bad_input_is_refused_before_the_first_call_of_the_model(host, demo, npnet, common):
    model, seen = demo[0].clone(), []

    def see(executor, *args, **kwargs):
        seen.append(1)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "test", see)
    with pytest.raises(ValueError, match=r"trained for 16 x 16 latents .*got 20 x 16"):
        ksampler(host, golden_model(host, model, npnet, other_sizes="refuse"), common, latent={"samples": torch.zeros(1, 4, 20, 16)})  # fmt: skip
    (flow, _, _) = host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")
    with pytest.raises(ValueError, match="needs latents of 4 channels, but this model's latent has 16"):
        ksampler(host, golden_model(host, flow, npnet), common, latent={"samples": torch.zeros(1, 16, 16, 16)})
    wide = [[torch.zeros(1, 16, 64), {}]]
    with pytest.raises(ValueError, match="expects 16 x 128 prompt embeddings, but the conditioning has 16 x 64"):
        golden_noise(host, demo[0], npnet, wide)
    with pytest.raises(ValueError, match=r"there is none\. Connect 'positive'"):
        golden_noise(host, demo[0], npnet, [])
    assert not seen


def test_the_network_is_the_hosts_to_free(host, demo, npnet, common):
    from comfy import model_management

    golden_noise(host, demo[0], npnet, common["positive"]).generate_noise({"samples": torch.zeros(1, 4, 16, 16)})
    assert any(loaded.model is npnet.patcher for loaded in model_management.current_loaded_models)
    model_management.free_memory(1e30, npnet.patcher.load_device)
    assert not any(loaded.model is npnet.patcher for loaded in model_management.current_loaded_models)


def test_a_changed_file_is_read_again(host):
    folder = host.folders / "models" / "npnet"
    save_npnet(npnets.seeded(npnets.TINY), folder / "again.safetensors", {})
    node = host.nodes.NODE_CLASS_MAPPINGS["AttuneLoadNPNet"]
    before = node.fingerprint_inputs(npnet_name="again.safetensors")
    save_npnet(npnets.seeded(replace(npnets.TINY, hidden=16)), folder / "again.safetensors", {})
    assert node.fingerprint_inputs(npnet_name="again.safetensors") != before
    with pytest.raises(ValueError, match=r"no NPNet 'none.pth'.*models.npnet and press R"):
        host.call("AttuneLoadNPNet", npnet_name="none.pth")
