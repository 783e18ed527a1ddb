"""Propagation inside the host, on a transformer: exact where it must be."""

from __future__ import annotations

import re

import pytest
import torch

from controlled import controlled
from nightly import daily


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")[0]


@pytest.fixture(scope="module")
def draw(host, flow, encode):
    def run(model=None, *, steps=10, sampler="euler", cfg=3.0, **inputs):
        given = {
            "positive": encode("a cat on a black background"), "negative": encode(""), "denoise": 1.0,
            "latent_image": {"samples": torch.zeros(1, 16, 16, 16)}, **inputs,
        }  # fmt: skip
        (out,) = host.call(
            "KSampler", model=model or flow, seed=0, steps=steps, cfg=cfg, sampler_name=sampler, scheduler="simple",
            **given,
        )  # fmt: skip
        return out["samples"]

    return run


@pytest.fixture(scope="module")
def propagate(host, flow):
    def apply(model=None, **changed):
        inputs = {
            "mode": "uniform", "interval": 2, "speed": 1.5, "reuse": "first block fresh", "forecast": True,
            "keep_last": 2, "start_percent": 0.0, "end_percent": 1.0, "prior_noise": 0.0,
            "cache_dtype": "as computed", "cache_device": "as computed", "memory_limit": 0, "parallel": "auto", **changed,
        }  # fmt: skip
        return host.call("AttunePropagation", model=model or flow, **inputs)[0]

    return apply


def psnr(a, b):
    return float(-10 * ((a - b).square().mean() / b.abs().max() ** 2).log10())


REUSES = ["first block fresh", "first and last blocks fresh", "first two thirds reused"]


@pytest.mark.parametrize("sampler", daily(["euler", "heun", "dpmpp_2m"], "heun"))
def test_with_key_steps_only_the_result_is_the_stock_one_bit_for_bit(draw, propagate, sampler):
    assert torch.equal(draw(propagate(interval=1), sampler=sampler), draw(sampler=sampler))


@pytest.mark.parametrize("reuse", REUSES)
def test_it_stays_near_the_whole_run(draw, propagate, reuse):
    stock, ours = draw(steps=20), draw(propagate(reuse=reuse), steps=20)
    assert psnr(ours, stock) > 24 and not torch.equal(ours, stock)


@pytest.mark.parametrize("fresh", [0, 1, 2])
def test_blocks_that_are_given_their_own_work_give_the_whole_result(flow, fresh):
    """On the very call that was recorded: the difference added to what went in is what came out, up to rounding."""
    from pack.nodes._host.propagation.transformer import _Recorded, _Reused

    network = flow.model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 16, 16, 16, generator=generator), torch.randn(2, 16, 128, generator=generator)
    y, t, indices, found = (
        torch.randn(2, 128, generator=generator),
        torch.tensor([500.0, 500.0]),
        list(range(fresh, 3)),
        {},
    )
    calls = []
    other = {("double_block", 2): lambda args, extra: calls.append(1) or extra["original_block"](args)}

    def run(patches):
        with torch.inference_mode():
            return network(x, t, context=context, y=y, transformer_options={"patches_replace": {"dit": patches}})

    stock = run({})
    assert torch.equal(run(_Recorded(found, fresh > 0).patches("double_block", indices, other)), stock) and calls == [1]
    calls.clear()
    for _ in range(2):
        again = run({**other, **_Reused(found, fresh > 0).patches("double_block", indices, other)})
        torch.testing.assert_close(again, stock, rtol=1e-4, atol=1e-5)
    assert not calls


def test_a_short_step_skips_the_blocks(flow, draw, propagate):
    calls = []

    def watch(args, extra):
        calls.append(1)
        return extra["original_block"](args)

    model = flow.clone()
    model.set_model_patch_replace(watch, "dit", "double_block", 1)
    stock = draw(model, steps=10)
    assert len(calls) == 10
    calls.clear()
    assert not torch.equal(draw(propagate(model), steps=10), stock) and len(calls) == 6  # 0 2 4 6 8 9


def test_torch_compile_makes_no_more_graphs_and_the_same_picture(flow, draw, propagate):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    graphs = []

    def compiled(model):
        torch._dynamo.reset()
        graphs.clear()
        set_torch_compile_wrapper(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        out = draw(model, steps=8, latent_image={"samples": torch.zeros(1, 16, 8, 8)})
        return len(graphs), out

    stock, _ = compiled(flow.clone())
    count, ours = compiled(propagate())
    assert 0 < count <= stock  # in a process that has compiled other models the first makes one more
    want = draw(propagate(), steps=8, latent_image={"samples": torch.zeros(1, 16, 8, 8)})
    torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4)


def test_the_step_on_which_skip_layer_guidance_begins_is_a_whole_one(flow, draw, host, propagate, caplog):
    """Its answer would be whole and the others reused, and it multiplies their difference."""
    guided = host.call(
        "SkipLayerGuidanceDiT", model=flow, scale=3.0, start_percent=0.3, end_percent=0.8, double_layers="1",
        single_layers="", rescaling_scale=0.0,
    )[0]  # fmt: skip
    with caplog.at_level("INFO"):
        ours = draw(propagate(guided), steps=20)
    keys = {int(key) for key in re.search(r"key steps \(([\d ]+)\)", caplog.text)[1].split()}
    sigmas = host.call("BasicScheduler", model=flow, scheduler="simple", steps=20, denoise=1.0)[0].tolist()
    level = flow.get_model_object("model_sampling").percent_to_sigma
    assert {next(i for i, s in enumerate(sigmas) if s <= level(percent)) for percent in (0.3, 0.8)} <= keys
    assert len(keys) < 20 and psnr(ours, draw(guided, steps=20)) > 40


def test_shorter_steps_of_several_threads_leave_the_compiler_as_it_was(host):
    """On several GPUs a step begins before another one's ends, and ends after it."""
    steps, compiled = host.module("nodes._host.propagation.transformer")._not_compiled, []
    torch._dynamo.reset()  # and imports it: without it there is no compiler to leave alone

    def graphs() -> int:
        compiled.clear()
        torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph.forward)(torch.ones(2))
        return len(compiled)

    first, second = steps(), steps()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert graphs() == 0
    second.__exit__(None, None, None)
    assert graphs() == 1


# What a ControlNet adds after each of the three blocks, of every size along the channels.
PATTERNS = [weight * torch.linspace(-1, 1, 192).expand(2, 64, 192) for weight in (1.0, 0.5, 2.0)]


def with_controlnet(encode):
    """A conditioning with a ControlNet for the demo flow model, and the list of the levels it was computed at."""

    def residuals(x):
        level = 0.2 * x.mean(dim=(1, 2, 3)).reshape(-1, 1, 1) + 0.5
        return {"output": [level * value for value in PATTERNS]}

    return controlled(encode, residuals)


@pytest.mark.parametrize("reuse", daily(REUSES, REUSES[0]))
def test_a_controlnet_is_computed_only_where_it_is_used(draw, propagate, encode, reuse):
    positive, calls = with_controlnet(encode)
    stock = draw(positive=positive, steps=20)
    assert len(calls) == 20 and psnr(stock, draw(steps=20)) < 30
    calls.clear()
    ours = draw(propagate(reuse=reuse), positive=positive, steps=20)
    assert len(calls) == 11 and psnr(ours, stock) > 24


@pytest.mark.parametrize("reuse", REUSES)
def test_with_the_same_residuals_on_every_step_none_is_lost(draw, propagate, encode, reuse, monkeypatch):
    """With a constant ControlNet the kept residuals are exact, so the fidelity is that of a run without one."""
    positive, _ = with_controlnet(encode)
    monkeypatch.setattr(positive[0][1]["control"], "get_control", lambda *_: {"output": PATTERNS})
    stock, ours = draw(positive=positive, steps=20), draw(propagate(reuse=reuse), positive=positive, steps=20)
    assert psnr(ours, stock) > 24


def test_conditions_of_different_lengths_and_batches_never_mix(flow, draw, propagate, encode, monkeypatch):
    model = propagate()
    ours = draw(model, positive=encode("a cat " * 40), latent_image={"samples": torch.zeros(2, 16, 16, 16)})
    monkeypatch.setitem(vars(flow.model), "memory_required", lambda *args, **kwargs: 1e30)
    alone = draw(model, positive=encode("a cat " * 40), latent_image={"samples": torch.zeros(2, 16, 16, 16)})
    torch.testing.assert_close(alone, ours, rtol=1e-3, atol=5e-4)


def test_a_profile_of_a_transformer_is_measured_and_used(host, flow, draw, encode, propagate, caplog):
    profile, plot, report = host.call(
        "AttuneFitPropagation", model=flow, positive=encode("a cat on a black background"), negative=encode(""),
        latent_image={"samples": torch.zeros(1, 16, 16, 16)}, seed=0, steps=10, cfg=3.0, sampler_name="euler",
        scheduler="simple", reuse="first block fresh", fastest=1.75, longest=3,
    )  # fmt: skip
    assert profile.kind == "block_propagation" and profile.key_steps.blocks == 3 and "dB" in report
    assert plot.ndim == 4 and plot.shape[-1] == 3
    best = profile.key_steps.points[0]
    ours = draw(propagate(mode="speed target", speed=best.speed, profile=profile), steps=10)
    peak = float(draw(steps=10).max() - draw(steps=10).min())
    measured = float(10 * (peak**2 / (ours - draw(steps=10)).square().mean()).log10())
    assert measured == pytest.approx(best.psnr, abs=0.1)
