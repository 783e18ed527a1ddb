"""One More Step through the host's own samplers: on a model whose every answer is known, with networks of known output."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import comfy_stub
from analytic import SharedLevel, euler_gain
from pack.kernels.one_more_step import SignalLeak, first_state, keyed_noise

KNOWN = json.loads((Path(__file__).parents[1] / "data" / "one_more_step.json").read_text("utf-8"))
MU = torch.tensor([0.9, -0.6, 0.3, -1.1])[:, None, None]
TOY = SharedLevel(MU, 0.8, 0.5)
PIXELS = SharedLevel(MU, 0.8, 0.0)
SIDE = 64
WIDTH = 16  # of the toy module's text


class ExactNetwork(torch.nn.Module):
    """What a perfect eps- or v-network of the toy data would say."""

    dtype = torch.float32

    def __init__(self, target, prediction, sigmas):
        super().__init__()
        self.target, self.prediction, self.sigmas = target, prediction, sigmas

    def forward(self, x, timesteps, **_):
        sigma = self.sigmas[timesteps.long()][:, None, None, None]
        seen = x * (1 + sigma**2).sqrt()
        denoised = self.target.denoise(seen, sigma.flatten())
        if self.prediction == "eps":
            return (seen - denoised) / sigma
        return (seen / (1 + sigma**2) - denoised) * (1 + sigma**2).sqrt() / sigma


class ToldNetwork(torch.nn.Module):
    """v = -mean, scaled by the first number of the text."""

    def __init__(self, mean):
        super().__init__()
        self.mean = torch.nn.Parameter(mean.clone(), requires_grad=False)

    def forward(self, x, context):
        return -(self.mean * context[:, :1, :1, None]).expand_as(x)


@pytest.fixture(scope="module")
def kit(host):
    from comfy.model_patcher import ModelPatcher

    from pack.models.one_more_step import Architecture
    from pack.nodes._host import one_more_step, start, train_one_more_step

    cpu = torch.device("cpu")
    architecture = Architecture(4, (32, 64, 128), (2, 2, 2), (0, 0, 1, 1, 1, 1), 1, (1,) * 6 + (0,) * 3, 48, False, 32)

    def module(mean=MU, latent_space="SD15", **more):
        facts = {"name": "toy", "dtype": torch.float32, "prediction": "v", "leak": None} | more
        told = Architecture(4, (32,), (1,), (1,), 1, (1, 1), WIDTH, False, 32)
        patcher = ModelPatcher(ToldNetwork(mean), cpu, cpu)
        return one_more_step.Module(patcher=patcher, architecture=told, latent_space=latent_space, **facts)

    def toy(target=TOY, prediction="eps"):
        model = comfy_stub.tiny_model("SD15")
        model.model.diffusion_model = ExactNetwork(target, prediction, model.model.model_sampling.sigmas.clone())
        if prediction == "v":
            (model,) = host.call("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
        return model

    return SimpleNamespace(
        module=module, toy=toy, architecture=architecture, net=one_more_step, oms=one_more_step,
        training=train_one_more_step, start=start,
    )  # fmt: skip


def text(value=1.0, width=WIDTH):
    return [[torch.full((1, 4, width), value), {}]]


def apply(host, model, module, positive=None, output=0, **more):
    return host.call("AttuneOneMoreStep", model=model, oms_model=module, positive=positive or text(), **more)[output]


def sample(host, model, batch=4, steps=20, scheduler="simple", seed=1234, latent=None, side=SIDE, **more):
    """KSampler's answer in the model's own scale."""
    latent = latent or {"samples": torch.zeros(batch, 4, side, side)}
    (out,) = host.call(
        "KSampler", model=model, seed=seed, steps=steps, cfg=1.0, sampler_name="euler", scheduler=scheduler,
        positive=text(0.0), negative=text(0.0), latent_image=latent, **({"denoise": 1.0} | more),
    )  # fmt: skip
    return out["samples"] * 0.18215


def noise_of(seed, shape):
    return torch.randn(shape, generator=torch.manual_seed(seed))


def levels(host, model, scheduler, steps=20):
    return host.call("BasicScheduler", model=model, scheduler=scheduler, steps=steps, denoise=1.0)[0].double()


def answer(target, start, sigmas):
    """Where Euler ends on the toy, exactly."""
    level, pixel = (float(euler_gain(v, sigmas)) for v in target.variances(start.shape[-1] * start.shape[-2]))
    away = start.double() - target.mean
    shared = away.mean((2, 3), keepdim=True)
    return (target.mean + level * shared + pixel * (away - shared)).float()


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("scheduler", ["simple", "ddim_uniform"])
def test_every_pixel_ends_where_the_closed_form_says(host, kit, prediction, scheduler):
    model = kit.toy(prediction=prediction)
    sigmas = levels(host, model, scheduler)
    noise = noise_of(1234, (4, 4, SIDE, SIDE))
    ours = sample(host, apply(host, model, kit.module()), scheduler=scheduler)
    wanted = answer(TOY, first_state(MU, noise, float(sigmas[0])), sigmas)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)
    if scheduler == "simple":
        assert float(euler_gain(TOY.variances(SIDE**2)[0], sigmas)) == pytest.approx(0.8993533, abs=1e-5)
        means = ours.mean((0, 2, 3)).tolist()
        assert means == pytest.approx([0.994115, -0.625305, 0.329593, -1.176654], abs=1e-4)
        plain = sample(host, model).mean((0, 2, 3)).tolist()
        assert plain == pytest.approx([0.184917, -0.085752, 0.059856, -0.187544], abs=1e-4)
    else:
        assert float(euler_gain(TOY.variances(SIDE**2)[0], sigmas)) == pytest.approx(0.9392914, abs=1e-5)


def test_another_prompts_colour_wins_nine_tenths(host, kit):
    other = torch.tensor([0.0, 0.0, 1.0, 0.0])[:, None, None]
    means = sample(host, apply(host, kit.toy(), kit.module(other))).mean((0, 2, 3))
    assert means.tolist() == pytest.approx([0.184697, -0.085693, 0.959140, -0.187365], abs=1e-4)


def test_guidance_goes_from_the_negative_to_the_positive_prompt_and_beyond(host, kit):
    model, noise = kit.toy(), noise_of(1234, (1, 4, SIDE, SIDE))
    sigmas = levels(host, model, "simple", 2)
    for cfg, scale in ((0.0, 0.5), (1.0, 2.0), (3.0, 5.0)):
        module, calls = kit.module(), []
        module.patcher.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        patched = apply(host, model, module, text(2.0), negative=text(0.5), cfg=cfg)
        wanted = answer(TOY, first_state(scale * MU, noise, float(sigmas[0])), sigmas)
        torch.testing.assert_close(sample(host, patched, batch=1, steps=2), wanted, rtol=0, atol=5e-5)
        assert len(calls) == (1 if cfg == 1 else 2)


def test_strength_0_is_the_model_itself_and_img2img_the_same_bits(host, kit, caplog):
    model, picture = kit.toy(), {"samples": 3 * torch.randn(1, 4, 16, 16)}
    assert apply(host, model, kit.module(), strength=0.0) is model
    patched = apply(host, model, kit.module())
    with caplog.at_level(logging.INFO):
        got = sample(host, patched, latent=picture, steps=4, denoise=0.6)
    assert torch.equal(got, sample(host, model, latent=picture, steps=4, denoise=0.6))
    assert "stands aside, the run starts from a picture" in caplog.text


def test_two_stages_are_one_and_runs_without_noise_are_untouched(host, kit):
    model = kit.toy()
    patched = apply(host, model, kit.module())

    def stage(which, latent, first, last, add):
        return host.call(
            "KSamplerAdvanced", model=which, add_noise=add, noise_seed=1234, steps=6, cfg=1.0, sampler_name="euler",
            scheduler="simple", positive=text(0.0), negative=text(0.0), latent_image=latent, start_at_step=first,
            end_at_step=last, return_with_leftover_noise="enable" if last < 6 else "disable",
        )[0]  # fmt: skip

    empty = {"samples": torch.zeros(2, 4, 16, 16)}
    begun = stage(patched, empty, 0, 3, "enable")
    both = stage(patched, begun, 3, 6, "disable")["samples"]
    assert torch.equal(both, stage(model, begun, 3, 6, "disable")["samples"])
    whole = sample(host, patched, batch=2, steps=6, side=16)
    torch.testing.assert_close(both * 0.18215, whole, rtol=0, atol=1e-5)


def test_every_sampling_node_begins_alike(host, kit):
    model = kit.toy()
    patched, latent = apply(host, model, kit.module()), {"samples": torch.zeros(2, 4, 16, 16)}
    wanted = sample(host, patched, batch=2, steps=3, side=16)
    (sigmas,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0)
    (solver,) = host.call("KSamplerSelect", sampler_name="euler")
    (noise,) = host.call("RandomNoise", noise_seed=1234)
    guided = {"positive": text(0.0), "negative": text(0.0), "cfg": 1.0}
    custom = host.call(
        "SamplerCustom", model=patched, add_noise=True, noise_seed=1234, sampler=solver, sigmas=sigmas,
        latent_image=latent, **guided,
    )[0]["samples"]  # fmt: skip
    assert torch.equal(custom * 0.18215, wanted)
    for used, start in (
        (patched, noise),
        (model, host.call("AttuneNoise", noise=noise, model=patched, sigmas=sigmas)[0]),
    ):  # fmt: skip
        (guider,) = host.call("CFGGuider", model=used, **guided)
        out = host.call(
            "SamplerCustomAdvanced", noise=start, guider=guider, sampler=solver, sigmas=sigmas, latent_image=latent
        )
        assert torch.equal(out[0]["samples"] * 0.18215, wanted)


def test_inpainting_repaints_with_the_right_mean_and_keeps_the_rest(host, kit):
    kept = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 16:48, 16:48] = 1
    latent = {"samples": kept / 0.18215, "noise_mask": mask}
    model = kit.toy(PIXELS)
    ours = sample(host, apply(host, model, kit.module()), latent=latent)
    inside = mask.bool().expand_as(ours)
    torch.testing.assert_close(ours[~inside], kept[~inside], rtol=1e-6, atol=1e-6)
    sigmas = levels(host, model, "simple")
    wanted = answer(PIXELS, first_state(MU, noise_of(1234, ours.shape), float(sigmas[0])), sigmas)
    torch.testing.assert_close(ours[inside], wanted[inside], rtol=0, atol=2e-5)


def test_the_unit_level_is_the_stock_sampler_on_the_prediction(host, kit):
    model, module = kit.toy(), kit.module()
    empty = {"samples": torch.zeros(2, 4, 16, 16)}
    predicted = apply(host, model, module, latent=empty, output=1)
    torch.testing.assert_close(predicted["samples"] * 0.18215, MU.expand(2, 4, 16, 16))
    stock = sample(host, model, latent=predicted, steps=3)
    unit = sample(host, apply(host, model, module, noise_level="unit"), batch=2, steps=3, side=16)
    torch.testing.assert_close(unit, stock, rtol=0, atol=1e-5)
    again = sample(host, apply(host, model, module, noise_level="unit"), latent=predicted, steps=3)
    torch.testing.assert_close(again, stock, rtol=0, atol=1e-5)  # the latent's own leak is taken away
    nothing = sample(host, apply(host, model, kit.module(0 * MU), noise_level="unit"), batch=2, steps=3, side=16)
    torch.testing.assert_close(nothing, sample(host, model, batch=2, steps=3, side=16), rtol=0, atol=1e-5)
    exact = sample(host, apply(host, model, kit.module(0 * MU)))
    assert 0 < float((exact - sample(host, model)).abs().max()) < 0.002 * float(noise_of(1234, exact.shape).abs().max())


def test_a_run_of_every_kind_begins_as_it_should(kit, caplog):
    """Above the model's noise with a warning, below it as the levels say; without noise or against time untouched."""
    from comfy.model_sampling import EPS, ModelSamplingDiscrete

    sampling = type("Sampling", (ModelSamplingDiscrete, EPS), {})()
    noise, empty = noise_of(7, (2, 4, 8, 8)), torch.zeros(2, 4, 8, 8)
    plan = kit.oms.FirstState(kit.module(), text(), None)

    def start(levels, noise=noise, latent=empty, plan=plan):
        sigmas = torch.tensor(levels)
        run = kit.start.StartingRun(
            None, sampling, sigmas, noise, latent, None, kit.start.from_the_top(sampling, sigmas), {}
        )
        return noise if kit.start.not_from_noise(run, False) else plan.begin(run)[0]

    for first, scale, warned in ((3.65, 3.65, False), (20.0, (1 + 20.0**2) ** 0.5, True)):
        caplog.clear()
        torch.testing.assert_close(scale * start([first, 1.0]), first_state(MU, noise, first), rtol=1e-6, atol=1e-4)
        assert ("above the model's own 14.61" in caplog.text) is warned
    for levels, given, latent in (
        ([0.0, 14.6], noise, empty), ([14.6, 0.0], empty, empty), ([5.0, 0.0], noise, empty + 1), ([14.6], noise, empty),
    ):  # fmt: skip
        assert start(levels, given, latent) is given
    later = [[torch.full((1, 4, WIDTH), 9.0), {"start_percent": 0.2}]]
    of_now = kit.oms.FirstState(kit.module(), text() + later, None)
    assert torch.equal(start([5.0, 0.0], plan=of_now), start([5.0, 0.0]))
    leak = SignalLeak(torch.zeros(4, 3, 3), 0.1 * torch.eye(36), torch.ones(4))
    shared = kit.oms.FirstState(kit.module(leak=leak), text(), None, diversity=1.0, share=True)
    x0 = 5.0 * (start([5.0, 0.0], plan=shared) - noise)
    torch.testing.assert_close(x0[0], x0[1], rtol=0, atol=1e-4)
    assert float((x0 - MU).abs().max()) > 0.1


def test_lcm_begins_like_any_other_solver(host, kit):
    (model,) = host.call("ModelSamplingDiscrete", model=kit.toy(), sampling="lcm", zsnr=False)
    network, seen = model.model.diffusion_model, []
    handle = network.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    inputs = {"seed": 1234, "steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "sgm_uniform", "denoise": 1.0}
    host.call(
        "KSampler", model=apply(host, model, kit.module()), positive=text(0.0), negative=text(0.0), latent_image=latent,
        **inputs,
    )  # fmt: skip
    handle.remove()
    sigma = float(levels(host, model, "sgm_uniform", 4)[0])
    wanted = first_state(MU, noise_of(1234, (1, 4, 16, 16)), sigma) / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=1e-5)


def test_a_picture_does_not_depend_on_its_place_in_the_batch(host, kit):
    leak = SignalLeak(torch.zeros(4, 3, 3), 0.1 * torch.eye(36), torch.ones(4))
    patched = apply(host, kit.toy(), kit.module(leak=leak), diversity=1.0)
    before = torch.random.get_rng_state()
    batch = sample(host, patched, batch=3, steps=2, side=16)
    torch.random.set_rng_state(before)
    (second,) = host.call("LatentFromBatch", samples={"samples": torch.zeros(3, 4, 16, 16)}, batch_index=1, length=1)
    alone = sample(host, patched, latent=second, steps=2)
    moved = torch.random.get_rng_state()
    sample(host, kit.toy(), latent=second, steps=2)
    assert torch.equal(torch.random.get_rng_state(), moved)  # by the host alone
    torch.testing.assert_close(alone, batch[1:2], rtol=0, atol=1e-5)


def test_the_leak_adds_its_own_draw_to_the_prediction_or_to_its_own_mean(host, kit):
    examples = TOY.sample((40, 4, 16, 16), torch.Generator().manual_seed(4))
    model = kit.toy()
    patched, leak = host.call("AttuneSignalLeak", model=model, examples={"samples": examples / 0.18215})
    sigmas = levels(host, model, "simple", 3)
    noise = noise_of(1234, (2, 4, 16, 16))
    residual = leak.residual(keyed_noise(noise, "leak"))
    for used, mean in (
        (patched, leak.mean_latent(16, 16)),
        (apply(host, model, kit.module(), signal_leak=leak, diversity=1.0), MU),
    ):
        wanted = answer(TOY, first_state(mean + residual, noise, float(sigmas[0])), sigmas)
        torch.testing.assert_close(sample(host, used, batch=2, steps=3, side=16), wanted, rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="does not say how pictures differ"):
        sample(host, apply(host, model, kit.module(), diversity=1.0), batch=1, steps=1, side=16)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (torch.full((4, 4, 16, 16), torch.nan), "examples are not finite"),
        (torch.zeros(4, 16, 16, 16), "'examples' have 16 channels, but the model's latents have 4"),
        (torch.zeros(1, 4, 16, 16), "at least 2 example latents"),
        (torch.zeros(4, 4, 3, 16, 16), "at least 2 example latents"),
        (torch.zeros(4, 4, 2, 16), "2 latent pixels has no 3 frequencies"),
    ],
)
def test_examples_that_no_leak_can_come_of_are_refused_at_once(host, kit, examples, message):
    with pytest.raises(ValueError, match=message):
        host.call("AttuneSignalLeak", model=kit.toy(), examples={"samples": examples})


def test_areas_and_masks_of_the_prompt_rule_their_part_alone(host, kit):
    model, noise = kit.toy(PIXELS), noise_of(1234, (1, 4, 16, 16))
    (left,) = host.call("ConditioningSetArea", conditioning=text(2.0), width=64, height=128, x=0, y=0, strength=1.0)
    sigmas = levels(host, model, "simple", 2)
    ours = sample(host, apply(host, model, kit.module(), left), batch=1, steps=2, side=16)
    corrected = answer(PIXELS, first_state(2 * MU, noise, float(sigmas[0])), sigmas)
    stock = sample(host, model, batch=1, steps=2, side=16)
    torch.testing.assert_close(ours[..., :8], corrected[..., :8], rtol=0, atol=5e-5)
    torch.testing.assert_close(ours[..., 8:], stock[..., 8:], rtol=0, atol=1e-5)
    both = sample(host, apply(host, model, kit.module(), left + text(1.0)), batch=1, steps=2, side=16)
    half = answer(PIXELS, first_state(1.5 * MU, noise, float(sigmas[0])), sigmas)
    torch.testing.assert_close(both[..., :8], half[..., :8], rtol=0, atol=5e-5)


def test_a_second_node_replaces_the_first_and_neither_touches_the_model(host, kit):
    model = kit.toy()
    first = apply(host, model, kit.module(5 * MU))
    second = apply(host, first, kit.module())
    wanted = sample(host, apply(host, model, kit.module()), batch=1, steps=2, side=16)
    assert torch.equal(sample(host, second, batch=1, steps=2, side=16), wanted)
    assert not model.wrappers and not model.additional_models
    assert len(second.get_nested_additional_models()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_space": "SDXL"}, "trained on SDXL latents but the model uses SD1.x, SD2.x latents"),
        ({"positive": text(width=768)}, "needs 16-dim conditioning, but got 768 .CLIP-L, SD1.5."),
        ({"positive": []}, "'positive' is empty. Connect a CLIP Text Encode"),
        ({"cfg": 2.0}, "Connect an empty one to 'negative'"),
        ({"zsnr": True}, "already uses a zero-terminal-SNR schedule .sigma_max 4518"),
        ({"flow": True}, "SD3 is a flow-matching model"),
    ],
)
def test_what_does_not_belong_together_is_refused_at_once(host, kit, change, message):
    model, change = kit.toy(), dict(change)
    if change.pop("zsnr", False):
        (model,) = host.call("ModelSamplingDiscrete", model=model, sampling="eps", zsnr=True)
    if change.pop("flow", False):
        model = comfy_stub.tiny_model("SD3")
    module = kit.module(latent_space=change.pop("latent_space", "SD15"))
    inputs = {"model": model, "oms_model": module, "positive": text()} | change
    with pytest.raises(ValueError, match=message):
        host.call("AttuneOneMoreStep", **inputs)


@pytest.mark.parametrize("node", ["AttuneOneMoreStep", "AttuneSignalLeak"])
def test_no_node_takes_a_model_that_begins_at_pure_noise(host, kit, node):
    (zero,) = host.call("ModelSamplingDiscrete", model=kit.toy(), sampling="eps", zsnr=True)
    latent = {"samples": torch.randn(3, 4, 8, 8)}
    inputs = {
        "AttuneOneMoreStep": {"oms_model": kit.module(), "positive": text(), "latent": latent},
        "AttuneSignalLeak": {"examples": latent},
    }[node]
    for model, message in ((zero, "zero-terminal-SNR schedule"), (comfy_stub.tiny_model("SD3"), "flow-matching model")):
        with pytest.raises(ValueError, match=message):
            host.call(node, model=model, **inputs)


def test_a_schedule_changed_behind_the_node_is_refused_when_sampling_begins(host, kit):
    (changed,) = host.call(
        "ModelSamplingDiscrete", model=apply(host, kit.toy(), kit.module()), sampling="eps", zsnr=True
    )
    with pytest.raises(ValueError, match="zero-terminal-SNR schedule"):
        sample(host, changed, batch=1, steps=1, side=16)


def test_a_nearly_zero_terminal_snr_is_warned_of(host, kit, caplog):
    (model,) = host.call(
        "ModelSamplingContinuousEDM", model=kit.toy(), sampling="v_prediction", sigma_max=120.0, sigma_min=0.002
    )
    apply(host, model, kit.module())
    assert "terminal SNR is 6.9e-05, so the node will have little effect" in caplog.text


def test_values_that_are_no_numbers_and_latents_of_other_kinds_are_said(host, kit):
    with pytest.raises(ValueError, match="Set 'weight_dtype' to fp32"):
        sample(host, apply(host, kit.toy(), kit.module(MU * torch.nan)), batch=1, steps=1, side=16)
    plan = kit.oms.FirstState(kit.module(), text(), None)
    with pytest.raises(ValueError, match=r"expects 4-channel latents of pictures, .* but got \[1, 16, 8, 8\]"):
        kit.oms.check_latent(plan, torch.zeros(1, 16, 8, 8))


# The network and its files


def filled(shapes):
    """The seeded weights of the references: sines of the element's number, by the name's place in the alphabet."""
    found = {}
    for j, name in enumerate(sorted(shapes)):
        shape = torch.Size(shapes[name])
        n = shape.numel()
        t = torch.sin(torch.arange(n, dtype=torch.float64) * (0.7 + 0.013 * (j % 29)) + 0.31 * j).reshape(shape)
        if len(shape) == 1:
            t = 1 + 0.1 * t if name.endswith("weight") else 0.05 * t
        else:
            t = t * (2 / (n / shape[0])) ** 0.5
        found[name] = t.float()
    return found


def shapes_of(kit, architecture):
    names = kit.net.diffusers_names(architecture)
    with torch.device("meta"):
        own = kit.net.TimelessUNet(architecture, dtype=torch.float32).state_dict()
    return {theirs: tuple(own[ours].shape) for theirs, ours in names.items()}


@pytest.fixture(scope="module")
def tiny_file(kit, tmp_path_factory):
    path = tmp_path_factory.mktemp("modules") / "tiny_15.safetensors"
    save_file(filled(shapes_of(kit, kit.architecture)), path, metadata={"oms.head_dim": "32"})
    return path


@pytest.mark.parametrize("name", ["tiny", "base", "large"])
def test_names_and_shapes_are_those_of_the_published_files(kit, name):
    import hashlib

    from pack.models.one_more_step import Architecture, Header, architecture_of

    widths, text_width = {"base": ((160, 320, 640), 1024), "large": ((320, 640, 1280), 2048)}.get(
        name, ((32, 64, 128), 48)
    )
    depths = (0, 2, 10) if name == "large" else (0, 1, 1)
    architecture = Architecture(
        4, widths, (2, 2, 2), tuple(d for d in depths for _ in range(2)), depths[2],
        tuple(d for d in reversed(depths) for _ in range(3)), text_width, False, {"tiny": 32, "base": 32}.get(name, 64),
    )  # fmt: skip
    shapes, known = shapes_of(kit, architecture), KNOWN["manifests"][name]
    listed = "\n".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items()))
    assert hashlib.sha256(listed.encode()).hexdigest() == known["sha256"] and len(shapes) == known["tensors"]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == known["parameters"]
    header = Header(Path("x.safetensors"), shapes, {"oms.head_dim": "32"} if name == "tiny" else {})
    assert architecture_of(header) == architecture


@pytest.mark.parametrize("size", ["8x8", "16x12", "9x11"])
def test_the_loaded_network_says_what_the_authors_class_says(kit, tiny_file, size):
    module = kit.oms.load_module(tiny_file, "", "fp32", "", 0)
    h, w = map(int, size.split("x"))
    x = 1.4 * torch.sin(torch.arange(2 * 4 * h * w, dtype=torch.float64) * 1.7 + 0.2).float().reshape(2, 4, h, w)
    context = torch.cos(torch.arange(2 * 77 * 48, dtype=torch.float64) * 0.37 + 0.5).float().reshape(2, 77, 48)
    out, known = -module(x, context), KNOWN["tiny"][size]
    assert out.flatten()[:8].tolist() == pytest.approx(known["first"], abs=1e-5)
    assert out.flatten()[-4:].tolist() == pytest.approx(known["last"], abs=1e-5)
    assert float(out.std()) == pytest.approx(known["std"], abs=1e-5)
    if size == "8x8":
        other = -kit.oms.load_module(tiny_file, "", "fp32", "", 16)(x, context)
        assert float((other - out).abs().max()) == pytest.approx(KNOWN["tiny"]["wrong_head_dim"], rel=1e-3)
        half = -kit.oms.load_module(tiny_file, "", "bf16", "", 0)(x, context)
        assert 0 < float((half - out).abs().max()) < 0.05


def test_a_real_network_through_the_sampler_is_the_references(host, kit, tiny_file, monkeypatch):
    """The reference made its network's noise from the bits of the start, on one processor: it is given."""
    known, module = KNOWN["sampled"], kit.oms.load_module(tiny_file, "", "fp32", "", 0)
    context = torch.cos(torch.arange(2 * 77 * 48, dtype=torch.float64) * 0.37 + 0.5).float().reshape(2, 77, 48)[:1]
    model, positive = kit.toy(), [[context, {}]]
    seeds = [torch.Generator().manual_seed(seed) for seed in known["seeds_of_the_networks_noise"]]
    drawn = torch.stack([torch.randn(4, 16, 16, generator=seed) for seed in seeds])
    for module_of in (kit.oms, host.module("nodes._host.one_more_step")):
        monkeypatch.setattr(module_of, "keyed_noise", lambda _: drawn)
    empty = {"samples": torch.zeros(2, 4, 16, 16)}
    x0 = kit.oms.predicted_latent(model, kit.oms.FirstState(module, positive, None), empty, seed=11)
    means = (x0["samples"] * 0.18215).mean((2, 3))
    torch.testing.assert_close(means, torch.tensor(known["x0hat"]["per_channel_mean"]), rtol=0, atol=1e-4)
    out = sample(host, apply(host, model, module, positive), latent=empty, steps=6, seed=11)
    wanted = torch.tensor(known["out_model_space"]["per_channel_mean"])
    torch.testing.assert_close(out.mean((2, 3)), wanted, rtol=0, atol=1e-4)
    assert torch.equal(sample(host, apply(host, model, module, positive), latent=empty, steps=6, seed=11), out)

    from comfy import model_management

    def loaded():
        return any(one.model is module.patcher for one in model_management.current_loaded_models)

    assert loaded()
    model_management.free_memory(1e30, module.patcher.load_device)
    assert not loaded()


def test_the_published_network_says_what_the_authors_class_says(kit):
    architecture = replace(kit.architecture, channels=(160, 320, 640), context_dim=1024)
    names = kit.net.diffusers_names(architecture)
    network = kit.net.TimelessUNet(architecture, dtype=torch.float32).eval()
    network.load_state_dict({names[name]: value for name, value in filled(shapes_of(kit, architecture)).items()})
    x = 1.4 * torch.sin(torch.arange(4 * 256, dtype=torch.float64) * 1.7 + 0.2).float().reshape(1, 4, 16, 16)
    context = torch.cos(torch.arange(77 * 1024, dtype=torch.float64) * 0.37 + 0.5).float().reshape(1, 77, 1024)
    with torch.no_grad():
        out = network(x, context)
    assert out.flatten()[:3].tolist() == pytest.approx([-5.23298, -8.69556, -11.90842], rel=1e-4)
    assert float(out.std()) == pytest.approx(5.67616, rel=1e-4)


def test_files_that_are_something_else_are_refused_with_the_reason(kit, tiny_file, tmp_path):
    shapes = shapes_of(kit, kit.architecture)
    weights = filled(shapes)

    def load(change, stem="some_15", space=""):
        path = tmp_path / f"{stem}.safetensors"
        held = change(dict(weights))
        save_file({k: v.contiguous() for k, v in held.items()}, path, metadata={"oms.head_dim": "32"})
        return kit.oms.load_module(path, space, "", "", 0)

    extra = lambda name: lambda held: held | {name: torch.zeros(2)}
    without = lambda name: lambda held: {k: v for k, v in held.items() if k != name}
    with pytest.raises(ValueError, match="is an ordinary UNet"):
        load(extra("time_embedding.linear_1.weight"))
    with pytest.raises(ValueError, match="it has no weights of a diffusers UNet"):
        load(without("conv_in.weight"))
    with pytest.raises(ValueError, match=r"lacks conv_out.bias"):
        load(without("conv_out.bias"))
    with pytest.raises(ValueError, match="should not hold foreign"):
        load(extra("foreign"))
    with pytest.raises(ValueError, match=r"in the wrong shape conv_out.bias"):
        load(extra("conv_out.bias"))
    with pytest.raises(ValueError, match="set 'head_dim' to 0"):
        kit.oms.load_module(tiny_file, "", "", "", 24)
    with pytest.raises(ValueError, match="set 'latent_space'"):
        load(dict, "nothing_said")
    assert load(dict, "nothing_said", "SDXL").latent_space == "SDXL"
    assert load(dict, "module_xl").latent_space == "SDXL"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(tiny_file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        kit.oms.load_module(broken, "", "", "", 0)
    with pytest.raises(ValueError, match=r"The signal leak in .* is damaged"):
        load(lambda held: held | {"signal_leak.mean": torch.zeros(4, 3, 3)})


# Training


@pytest.fixture
def pictures(host, demo, tmp_path):
    """Six small latents of two kinds with captions, as SaveLatent writes them."""
    folder = Path(host.folders) / "output" / "examples"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for i in range(6):
        latent = torch.full((1, 4, 8, 8), 0.5 if i % 2 else -0.5) + 0.1 * torch.randn(1, 4, 8, 8)
        facts = {"latent_tensor": latent, "latent_format_version_0": torch.tensor([])}
        save_file(facts, folder / f"p{i}.latent")
        (folder / f"p{i}.txt").write_text("a cat on a white background" if i % 2 else "a cat on a black background")
    return folder


def train(host, demo, name, **more):
    inputs = {
        "folder": "examples",
        "size": "tiny (2.7 M weights)",
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 0.003,
    } | more
    return host.call("AttuneTrainOneMoreStep", model=demo[0], clip=demo[1], name=name, **inputs)


@contextlib.contextmanager
def stopped_at(step: int):
    """The user presses stop after so many steps."""
    import comfy.model_management as management
    import comfy.utils

    shown = comfy.utils.ProgressBar.update_absolute

    def press_stop(bar, value, *args, **more):
        shown(bar, value, *args, **more)
        if value == step:
            management.interrupt_current_processing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", press_stop)
        with pytest.raises(management.InterruptProcessingException):
            yield


def test_a_trained_module_is_used_loaded_and_continued_alike(host, demo, encode, pictures):
    from pack.nodes._host.folders import MODULES, folder_of

    module, report = train(host, demo, "straight")
    assert "12 steps on 6 latents" in report and module.latent_space == "DemoLatent" and module.leak is not None
    names = host.nodes.NODE_CLASS_MAPPINGS["AttuneLoadOneMoreStep"].GET_SCHEMA().inputs[0].options
    assert "straight.safetensors" in names and "attune_demo.safetensors" in names
    (loaded,) = host.call("AttuneLoadOneMoreStep", oms_name="straight.safetensors")
    noise, context = torch.randn(2, 4, 8, 8), encode("a cat")[0][0]
    assert torch.equal(loaded(noise, context), module(noise, context))
    given = {"samples": torch.randn(3, 4, 8, 8)}
    _, report = train(host, demo, "straight", latents=given, captions="a cat\n\na dog \na pig", steps=2)
    assert "straight (2).safetensors" in report and "2 steps on 3 latents" in report
    with pytest.raises(ValueError, match="'captions' has 2 lines for 3 latents"):
        train(host, demo, "straight", latents=given, captions="a cat\na dog")
    with stopped_at(5):
        train(host, demo, "stopped")
    unfinished = folder_of(MODULES) / "stopped.unfinished"
    assert unfinished.exists()
    again, _ = train(host, demo, "stopped")
    assert not unfinished.exists()
    torch.testing.assert_close(again(noise, context), module(noise, context), rtol=0, atol=1e-6)


def test_a_finished_module_is_returned_and_not_trained_again(host, demo, pictures, monkeypatch):
    """After a restart the host runs the node again: nothing of it is in its cache."""
    _, report = train(host, demo, "once")
    monkeypatch.setattr(
        host.module("nodes._host.train_one_more_step"), "_train", lambda *_: pytest.fail("trained again")
    )
    again, same = train(host, demo, "once")
    assert same == report and again.patcher.model is not None
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        train(host, demo, "once", seed=1)


def test_a_stopped_module_goes_on_with_the_same_pictures_seed_and_rate_alone(host, demo, pictures):
    with stopped_at(3):
        train(host, demo, "kept")
    for other, named in (
        ({"seed": 1}, r"seed 0 \(now 1\)"),
        ({"learning_rate": 0.002}, r"learning_rate 0\.003 \(now 0\.002\)"),
        ({"batch_size": 5}, r"batch_size 4 \(now 5\)"),
    ):
        with pytest.raises(
            ValueError, match=rf"kept\.unfinished is an unfinished training with {named}\. Set that back"
        ):
            train(host, demo, "kept", **other)
    caption = pictures / "p1.txt"
    told = caption.read_text()
    caption.write_text("a dog on a white background")
    with pytest.raises(ValueError, match=r"an unfinished training with pictures \w+ \(now \w+\), texts"):
        train(host, demo, "kept")
    caption.write_text(told)
    assert "12 steps on 6 latents" in train(host, demo, "kept")[1]


def test_a_preview_of_the_training_leaves_the_global_random_numbers_alone(host, kit, demo, pictures, monkeypatch):
    import comfy.utils

    shown = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda bar, done, total=None, preview=None: shown.append(preview)
    )
    before = torch.get_rng_state()
    train(host, demo, "seen", steps=41)
    assert [picture[1].size for picture in shown if picture] == [(8, 8)] * 2
    assert torch.equal(torch.get_rng_state(), before)


def test_folders_are_read_inside_input_and_output_alone(host, pictures, tmp_path):
    from pack.nodes._host.folders import find_folder

    outside = tmp_path / "elsewhere"
    outside.mkdir()
    hops = "/".join([".."] * 30)
    for name in (str(outside), f"{hops}{outside}", "../output/examples", "examples/../examples", "", " ", "/", "~"):
        with pytest.raises(ValueError, match=r"is not inside ComfyUI's|no folder '~'"):
            find_folder(name)
    assert find_folder("examples") == find_folder(str(pictures)) == pictures
    (pictures.parent / "link").symlink_to(outside)  # whoever may make one there may read what it leads to
    assert find_folder("link").resolve() == outside
    (pictures.parent / "link").unlink()


def test_what_cannot_be_trained_on_is_said_before_training(host, demo, pictures):
    with pytest.raises(ValueError, match="no folder 'nowhere' in ComfyUI's input or output"):
        train(host, demo, "bad", folder="nowhere")
    save_file({"latent_tensor": torch.zeros(1, 16, 8, 8)}, pictures / "q.latent")
    with pytest.raises(ValueError, match=r"'q.latent' holds latents of 16 channels"):
        train(host, demo, "bad")
    save_file({"latent_tensor": torch.full((1, 4, 8, 8), torch.nan)}, pictures / "q.latent")
    with pytest.raises(ValueError, match=r"'q.latent' does not hold finite latents"):
        train(host, demo, "bad")
    (pictures / "q.latent").unlink()
    with pytest.raises(ValueError, match="is no file name: use letters"):
        train(host, demo, "///")
    for path in pictures.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"There are no \.latent files"):
        train(host, demo, "bad")
    flow = host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")
    with pytest.raises(ValueError, match="is a flow-matching model"):
        train(host, (flow[0], demo[1]), "bad", latents={"samples": torch.zeros(1, 16, 8, 8)})


def test_the_shipped_module_knows_how_bright_each_background_is(host, demo, encode):
    (module,) = host.call("AttuneLoadOneMoreStep", oms_name="attune_demo.safetensors")
    empty = {"samples": torch.zeros(1, 4, 16, 16)}
    corner = {}
    for word in ("black", "gray", "white"):
        positive = encode(f"a panda on a {word} background")
        x0 = apply(host, demo[0], module, positive, latent=empty, output=1)
        (picture,) = host.call("VAEDecode", samples=x0, vae=demo[2])
        corner[word] = float(picture[0, :12, :12].mean())
    assert corner["black"] < 0.08 and corner["white"] > 0.9 and corner["gray"] == pytest.approx(0.5, abs=0.08)
