"""The demo checkpoint in the stock nodes: what a user of any other checkpoint expects must work on it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from nightly import daily

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def draw(host, demo, encode):
    """prompt -> pictures [b 128 128 3] in 0..1, through KSampler and VAEDecode."""

    def run(text, *, model=None, latent=None, seed=1, steps=12, denoise=1.0, negative="", batch=2, size=128):
        latent = latent or host.call("EmptyLatentImage", width=size, height=size, batch_size=batch)[0]
        (out,) = host.call(
            "KSampler", model=model or demo[0], seed=seed, steps=steps, cfg=3.0, sampler_name="dpmpp_2m",
            scheduler="karras", positive=encode(text), negative=encode(negative), latent_image=latent, denoise=denoise,
        )  # fmt: skip
        return host.call("VAEDecode", samples=out, vae=demo[2])[0]

    return run


def corners(pictures):
    """Median colour of the corners of a batch, [3]."""
    n = pictures.shape[1] // 8
    parts = [pictures[:, y, x].reshape(-1, 3) for y in (slice(n), slice(-n, None)) for x in (slice(n), slice(-n, None))]
    return torch.cat(parts).median(dim=0).values


def test_the_checkpoints_are_small_enough_to_ship():
    sizes = [path.stat().st_size for path in (ROOT / "models/weights").glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) <= 25_000_000


def test_it_is_an_sd_like_model(demo):
    model, clip, vae = demo
    sampling = model.get_model_object("model_sampling")
    assert type(model.model.model_config).__name__ == "AttuneDemo"
    assert float(sampling.sigma_max) == pytest.approx(14.6146, abs=1e-3)
    assert float(sampling.sigma_min) == pytest.approx(0.0292, abs=1e-4)
    assert clip is not None and vae.latent_channels == 4


@pytest.mark.parametrize(
    "text", ["", "cat", "a (red apple:1.3) on a [black] background", "zxcv qwer", "愛", "cat " * 40]
)
def test_every_prompt_can_be_encoded(encode, text):
    ((context, extra),) = encode(text)
    assert context.shape[-1] == 128 and context.shape[1] % 16 == 0
    assert extra["pooled_output"].shape == (1, 128)
    assert torch.isfinite(context).all() and torch.isfinite(extra["pooled_output"]).all()


def test_weights_in_a_prompt_change_its_encoding(encode):
    plain, strong = encode("a red apple")[0][0], encode("a (red:1.5) apple")[0][0]
    assert (plain - strong).abs().max() > 0.01


BACKGROUNDS = [
    ("black", (0, 0, 0)), ("white", (255, 255, 255)), ("red", (200, 30, 35)), ("dark blue", (14, 28, 96)),
    ("pink", (250, 160, 195)),
]  # fmt: skip


@pytest.mark.parametrize(("word", "colour"), daily(BACKGROUNDS, BACKGROUNDS[1], BACKGROUNDS[3], names=2))
def test_the_background_is_the_one_in_the_prompt(draw, word, colour):
    got = corners(draw(f"a star on a {word} background"))
    assert (got - torch.tensor(colour) / 255).abs().max() < 0.12


@pytest.mark.nightly  # of a file that does not change
def test_an_empty_negative_prompt_and_another_one_differ(draw):
    assert not torch.equal(draw("a cat"), draw("a cat", negative="a dog on a blue background"))


@pytest.mark.nightly  # of a file that does not change
def test_the_same_seed_gives_the_same_picture(draw):
    once = draw("a panda", seed=4)
    assert torch.equal(draw("a panda", seed=4), once)
    assert not torch.equal(draw("a panda", seed=5), once)


def test_plain_colours_survive_encode_and_decode(host, demo):
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [0.8, 0.1, 0.1], [0.1, 0.2, 0.8], [0.5, 0.5, 0.5]])
    pictures = colours[:, None, None, :].expand(-1, 128, 128, -1)
    (latent,) = host.call("VAEEncode", pixels=pictures, vae=demo[2])
    assert latent["samples"].shape == (5, 4, 16, 16)
    (back,) = host.call("VAEDecode", samples=latent, vae=demo[2])
    assert (back - pictures).abs().mean(dim=(1, 2, 3)).max() < 0.03


@pytest.mark.nightly  # of a file that does not change
def test_latents_of_pictures_have_about_unit_spread(host, demo, draw):
    (latent,) = host.call("VAEEncode", pixels=draw("a rocket on an orange background", batch=4), vae=demo[2])
    assert 0.7 < float(latent["samples"].std()) < 1.4


@pytest.mark.nightly  # of a file that does not change
def test_img2img_keeps_more_of_the_picture_the_less_it_denoises(host, demo, draw):
    source = draw("a red heart on a white background")
    (latent,) = host.call("VAEEncode", pixels=source, vae=demo[2])
    far = [
        (draw("a cat on a black background", latent=latent, denoise=d) - source).square().mean()
        for d in (0.3, 0.6, 1.0)
    ]
    assert far[0] < far[1] < far[2]


@pytest.mark.nightly  # of a file that does not change
def test_an_inpaint_mask_protects_its_part(host, demo, draw):
    source = draw("a red heart on a white background")
    (latent,) = host.call("VAEEncode", pixels=source, vae=demo[2])
    mask = torch.zeros(1, 128, 128)
    mask[..., 64:] = 1
    (latent,) = host.call("SetLatentNoiseMask", samples=latent, mask=mask)
    result = draw("a cat on a black background", latent=latent)
    left, right = ((result - source).abs()[:, :, part].mean() for part in (slice(0, 48), slice(80, None)))
    assert left < 0.05 < right


def test_a_lora_file_loads_through_the_stock_node(host, demo, draw):
    import folder_paths
    from safetensors.torch import save_file

    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    generator = torch.Generator().manual_seed(0)
    file = {
        f"{key}.lora_down.weight": torch.randn(4, 160, generator=generator),
        f"{key}.lora_up.weight": torch.randn(160, 4, generator=generator),
    }
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(file, folder / "test.safetensors")
    given = {"model": demo[0], "clip": demo[1], "lora_name": "test.safetensors", "strength_clip": 0.0}
    none, whole = (host.call("LoraLoader", strength_model=strength, **given)[0] for strength in (0.0, 1.0))
    stock = draw("a cat", steps=4)
    assert torch.equal(draw("a cat", model=none, steps=4), stock)
    assert not torch.equal(draw("a cat", model=whole, steps=4), stock)


def test_areas_and_batches_of_conditions_work(host, demo, encode, draw):
    (left,) = host.call(
        "ConditioningSetArea", conditioning=encode("a red heart on white"), width=64, height=128, x=0, y=0, strength=1.0
    )
    (both,) = host.call(
        "ConditioningCombine", conditioning_1=left, conditioning_2=encode("a cat on a black background")
    )
    (out,) = host.call(
        "KSampler", model=demo[0], seed=0, steps=4, cfg=3.0, sampler_name="euler", scheduler="normal", positive=both,
        negative=encode(""), latent_image={"samples": torch.zeros(1, 4, 16, 16)}, denoise=1.0,
    )  # fmt: skip
    assert torch.isfinite(out["samples"]).all()


def test_the_live_preview_shows_the_right_colours(host, demo, draw):
    import latent_preview

    pictures = draw("a star on a red background")
    (latent,) = host.call("VAEEncode", pixels=pictures, vae=demo[2])
    form = demo[0].get_model_object("latent_format")
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    preview = torch.tensor(list(previewer.decode_latent_to_preview(latent["samples"]).getdata())).float() / 255
    small = torch.nn.functional.avg_pool2d(pictures[:1].permute(0, 3, 1, 2), 8).permute(0, 2, 3, 1).reshape(-1, 3)
    assert (preview - small).abs().mean() < 0.1


def test_a_broken_copy_of_the_checkpoint_is_refused_with_the_remedy(host, tmp_path):
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(ROOT / "models/weights/attune_demo.safetensors"))
    state["cond_stage_model.attune_vocabulary"] = torch.zeros(3)
    with pytest.raises(ValueError, match="get the demo checkpoint again"):
        comfy.sd.load_state_dict_guess_config(state)


@pytest.fixture(scope="module")
def video(host):
    """MODEL, CLIP and VAE of the video checkpoint."""
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_video.safetensors")


def test_the_video_model_is_wan_to_the_host(video):
    model, clip, vae = video
    assert type(model.model).__name__ == "WAN21" and type(model.model.diffusion_model).__name__ == "WanModel"
    assert float(model.get_model_object("model_sampling").shift) == 3.0
    assert clip is not None and vae.latent_channels == 16


def test_a_wan_file_without_our_key_is_the_hosts_own(host):
    """Our entry stands before the host's Wan, and claims nothing else."""
    import comfy.model_detection

    config = {"image_model": "wan2.1", "model_type": "t2v", "out_dim": 16}
    found = comfy.model_detection.model_config_from_unet_config(config, {})
    assert type(found).__name__ == "WAN21_T2V"


def test_the_video_model_goes_on_from_a_given_frame(host, video):
    """On the background that the first frame has, which the prompt does not name; and the first frame stays."""
    model, clip, vae = video
    pictures = torch.zeros(1, 64, 64, 3)
    pictures[..., 2] = 0.8
    (start,) = host.call("VAEEncode", pixels=pictures, vae=vae)
    (empty,) = host.call("EmptyHunyuanLatentVideo", width=64, height=64, length=29, batch_size=1)
    film, _ = host.call("AttuneFilm", film=empty, start=start)
    text = lambda words: host.call("CLIPTextEncode", clip=clip, text=words)[0]
    (out,) = host.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=1, cfg=2.0, positive=text("a cat"), negative=text(""),
        sampler=host.call("AttuneTimestepField")[0], latent_image=film,
        sigmas=host.call("BasicScheduler", model=model, scheduler="simple", steps=8, denoise=1.0)[0],
    )[:1]  # fmt: skip
    _, frames = host.call("AttuneFilm", film=out)
    (drawn,) = host.call("VAEDecode", samples=frames, vae=vae)
    assert drawn.shape == (8, 64, 64, 3)
    torch.testing.assert_close(out["samples"][:, :, 0], film["samples"][:, :, 0], rtol=0, atol=1e-6)
    assert (corners(drawn[1:]) - torch.tensor([0, 0, 0.8])).abs().max() < 0.3


@pytest.fixture(scope="module")
def flow(host):
    """MODEL and VAE of the flow checkpoint."""
    model, clip, vae = host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")
    assert clip is None
    return model, vae


def test_the_flow_model_is_sd3_to_the_host(flow):
    sampling = flow[0].get_model_object("model_sampling")
    assert type(flow[0].model.model_config).__name__ == "SD3"
    assert float(sampling.sigma_max) == 1.0 and float(sampling.shift) == 3.0
    assert flow[1].latent_channels == 16


FLOW_BACKGROUNDS = [("black", (0, 0, 0)), ("white", (255, 255, 255)), ("blue", (35, 90, 210))]


@pytest.mark.parametrize(("word", "colour"), daily(FLOW_BACKGROUNDS, FLOW_BACKGROUNDS[2], names=2))
def test_the_flow_model_follows_the_prompt(host, flow, encode, word, colour):
    (latent,) = host.call("EmptySD3LatentImage", width=128, height=128, batch_size=2)
    (out,) = host.call(
        "KSampler", model=flow[0], seed=0, steps=12, cfg=3.0, sampler_name="euler", scheduler="simple",
        positive=encode(f"a star on a {word} background"), negative=encode(""), latent_image=latent, denoise=1.0,
    )  # fmt: skip
    (pictures,) = host.call("VAEDecode", samples=out, vae=flow[1])
    assert (corners(pictures) - torch.tensor(colour) / 255).abs().max() < 0.12


def test_plain_colours_survive_the_flow_models_autoencoder(host, flow):
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [0.8, 0.1, 0.1], [0.1, 0.2, 0.8]])
    pictures = colours[:, None, None, :].expand(-1, 128, 128, -1)
    (latent,) = host.call("VAEEncode", pixels=pictures, vae=flow[1])
    assert latent["samples"].shape == (4, 16, 16, 16)
    (back,) = host.call("VAEDecode", samples=latent, vae=flow[1])
    assert (back - pictures).abs().mean(dim=(1, 2, 3)).max() < 0.03


@pytest.fixture(scope="module")
def inpaint(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_inpaint.safetensors")


def test_the_inpainting_file_opens_as_the_demo_model_with_a_mask_and_a_masked_picture(demo, inpaint):
    model, clip, vae = inpaint
    assert model.model.concat_keys == ("mask", "masked_image")
    ours, theirs = (one.model.diffusion_model.state_dict() for one in (model, demo[0]))
    assert ours.keys() == theirs.keys() and ours["input_blocks.0.0.weight"].shape[1] == 9
    for one, other in ((clip.get_sd(), demo[1].get_sd()), (vae.get_sd(), demo[2].get_sd())):
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_file_of_the_whole_inpainting_model_is_the_same_model(inpaint):
    import comfy.sd
    from safetensors.torch import load_file

    model, clip, vae = inpaint
    newer = "unet_state_dict" in inspect.signature(model.model.state_dict_for_saving).parameters
    network = [model.model.diffusion_model.state_dict()] if newer else []
    whole = model.model.state_dict_for_saving(*network, clip.get_sd(), vae.get_sd())
    shipped = load_file(ROOT / "models/weights/attune_demo_inpaint.safetensors")
    whole |= {name: value for name, value in shipped.items() if name.endswith("vocabulary")}
    again = comfy.sd.load_state_dict_guess_config(whole)[0]
    assert again.model.concat_keys == ("mask", "masked_image")
    ours, theirs = (one.model.diffusion_model.state_dict() for one in (again, inpaint[0]))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def inpainted(host, inpaint, encode):
    """picture, mask, text -> the picture with the mask painted anew, by stock nodes."""

    def run(picture, mask, text, **more):
        model, _, vae = inpaint
        positive, negative, latent = host.call(
            "InpaintModelConditioning", positive=encode(text), negative=encode(""), vae=vae, pixels=picture, mask=mask,
            noise_mask=False,
        )  # fmt: skip
        (out,) = host.call(
            "KSampler", model=model, seed=1, steps=12, cfg=2.0, sampler_name="dpmpp_2m", scheduler="karras",
            positive=positive, negative=negative, latent_image=latent, denoise=1.0, **more,
        )  # fmt: skip
        return host.call("VAEDecode", samples=out, vae=vae)[0]

    return run


@pytest.mark.nightly  # of a file that does not change
def test_it_continues_what_it_is_shown_and_paints_what_it_is_asked_for(host, draw, inpainted):
    """From all of the noise and without a latent mask, so that the rest is known by the masked picture alone."""
    source = draw("a red heart on a blue background", batch=1)
    mask = torch.zeros(1, 128, 128)
    mask[:, 16:112, 16:112] = 1
    got = inpainted(source, mask, "a cat")
    rest = mask < 0.5
    assert float((got - source).abs()[rest].mean()) < 0.05
    assert float((got - source).abs()[~rest].mean()) > 0.1


def test_without_a_mask_the_inpainting_model_is_shown_grey_everywhere(host, inpaint):
    model, _, vae = inpaint
    (grey,) = host.call("VAEEncode", pixels=torch.full((1, 128, 128, 3), 0.5), vae=vae)
    shown = model.model.blank_inpaint_image_like(grey["samples"])
    middle = (slice(None), slice(None), slice(4, 12), slice(4, 12))  # at the border the autoencoder sees black
    torch.testing.assert_close(shown[middle], model.model.process_latent_in(grey["samples"])[middle], rtol=0, atol=0.1)
