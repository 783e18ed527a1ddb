"""Propagation inside the host, on a UNet: exact where it must be, and never a stale feature."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import comfy_stub
from controlled import controlled
from nightly import daily
from real_size import FAMILIES, build, inputs, sample

REUSES = ["top level fresh", "one block fresh", "encoder reused", "two levels fresh"]


@pytest.fixture(scope="module")
def draw(host, demo, encode):
    """The stock KSampler's latents on the demo UNet: small, for speed; it draws what it was asked for from a side of 16."""

    def run(model=None, *, steps=10, sampler="euler", scheduler="normal", cfg=3.0, seed=0, batch=1, side=8, **inputs):
        given = {
            "positive": encode("a cat on a black background"), "negative": encode(""), "denoise": 1.0,
            "latent_image": {"samples": torch.zeros(batch, 4, side, side)}, **inputs,
        }  # fmt: skip
        (out,) = host.call(
            "KSampler", model=model or demo[0], seed=seed, steps=steps, cfg=cfg, sampler_name=sampler,
            scheduler=scheduler, **given,
        )  # fmt: skip
        return out["samples"]

    return run


@pytest.fixture(scope="module")
def stock(draw):
    """What the demo UNet draws without the node, once for all tests that measure how near to it something is."""
    return lru_cache(maxsize=None)(draw)


@pytest.fixture(scope="module")
def propagate(host, demo):
    """The node, with its default settings but for those given."""

    def apply(model=None, **changed):
        inputs = {
            "mode": "uniform", "interval": 3, "speed": 1.5, "reuse": "top level fresh", "forecast": True,
            "keep_last": 2, "start_percent": 0.0, "end_percent": 1.0, "parallel": "auto", "prior_noise": 0.0,
            "cache_dtype": "as computed", "cache_device": "as computed", "memory_limit": 0, **changed,
        }  # fmt: skip
        return host.call("AttunePropagation", model=model or demo[0], **inputs)[0]

    return apply


def psnr(a, b):
    return float(-10 * ((a - b).square().mean() / b.abs().max() ** 2).log10())


@pytest.fixture(scope="module")
def unet(demo):
    return demo[0].model.diffusion_model


def a_call(unet, rows=2):
    """Inputs of one call of the UNet."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return draw(rows, 4, 16, 16), torch.tensor([700.0] * rows), draw(rows, 16, 128), draw(rows, 128)


def residuals(unet, rows=2):
    """What a ControlNet gives: one residual per block a side, the host takes them from the ends."""
    _, _, found = features_of(unet, 0, 0, rows)
    make = lambda block: 0.1 * torch.ones_like(found["skip", block])
    return {"input": [None, make(0)], "middle": [], "output": [make(block) for block in range(6)]}


def free_u(h, skip, options):
    """An output patch that writes into what it is given, as FreeU does."""
    h[:, : h.shape[1] // 2] *= 1.3
    return h, skip * 0.9


def features_of(unet, fresh, cut, rows=2, control=None, patches=None):
    from pack.kernels.propagation import Reuse
    from pack.nodes._host.propagation.unet import control_features, recording

    reuse, found, options = Reuse(fresh, cut), {}, {"patches": patches or {}}
    x, t, context, y = a_call(unet, rows)
    kept = control_features(control, reuse, 6, rows)
    with torch.inference_mode():
        out = unet(x, t, context, y, control, recording(options, reuse, 6, found))
    return out, reuse, {**found, **kept}


# --- the network in parts ---


SHARES = [(fresh, cut) for fresh in range(7) for cut in range(6) if fresh + cut <= 6]


@pytest.mark.parametrize(("fresh", "cut"), daily(SHARES, *SHARES[1::5], names=2))
def test_a_step_with_its_own_features_is_the_whole_step_bit_for_bit(unet, fresh, cut):
    from pack.nodes._host.propagation.unet import UNetView

    seen: dict[str, list] = {"whole": [], "part": []}
    for control in (None, residuals(unet)):
        where = "whole"

        def watch(h, skip, options):
            seen[where].append((options["block"], options["transformer_index"]))  # noqa: B023
            return free_u(h, skip, options)

        patches = {"output_block_patch": [watch]}
        x, t, context, y = a_call(unet)
        mine = None if control is None else {k: list(v) for k, v in control.items()}
        with torch.inference_mode():
            stock = unet(x, t, context, y, mine, {"patches": patches})
            seen["whole"].clear()
        given = None if control is None else {k: list(v) for k, v in control.items()}
        recorded, reuse, features = features_of(unet, fresh, cut, control=given, patches=patches)
        assert torch.equal(recorded, stock)
        where = "part"
        call = lambda part, control, options: part._forward(x, t, context, y, control, options)  # noqa: B023
        for _ in range(2):  # twice: nothing may write into the features
            seen["part"].clear()
            with torch.inference_mode():
                out = UNetView(unet, reuse).run(call, features, x, {"patches": patches})
            assert torch.equal(out, stock)
        assert seen["part"] == seen["whole"][-len(seen["part"]) :] and len(seen["part"]) == 6 - cut
        seen["whole"].clear()


def test_work_per_block_is_what_torch_counts(unet):
    from torch.utils.flop_counter import FlopCounterMode

    from pack.nodes._host.propagation.unet import measure_unet

    x, t, _, y = a_call(unet)
    context = torch.randn(2, 77, 128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, t, context, y)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    costs = measure_unet(unet, 16, 16).costs

    def counted(block: str) -> float:
        """The layers of a block: the host runs them one by one."""
        of_block = [value for name, value in flops.items() if re.fullmatch(rf"UNetModel\.{block}\.\d+", name)]
        return sum(of_block) / flops["Global"]

    for i in range(6):
        assert costs.input[i] == pytest.approx(counted(f"input_blocks.{i}"), abs=0.005)
        assert costs.output[i] == pytest.approx(counted(f"output_blocks.{i}"), abs=0.005)
    assert costs.middle == pytest.approx(counted("middle_block"), abs=0.005)


def test_the_size_of_sd15_is_the_published_one(host):
    from pack.kernels.propagation import Reuse
    from pack.nodes._host.propagation.unet import levels_above, measure_unet

    sd15 = build("SD1.5", "meta").model.diffusion_model
    size = measure_unet(sd15, 64, 64)
    assert levels_above(sd15) == (3, 6, 9)
    assert size.kept_elements(Reuse(0, 0)) == 6_717_440  # 12 skips and the middle at 512 x 512
    assert 100 * sum(size.costs.output) == pytest.approx(67.5, abs=1.0)
    assert 100 * size.costs.of_step(Reuse(1, 11)) == pytest.approx(7.9, abs=0.3)


@pytest.mark.parametrize(("name", "side", "deep"), [("SD1.5", 64, False), ("SDXL", 128, True), ("SDXL", 64, True)])
def test_the_work_of_sdxl_lies_below_its_two_highest_levels(host, name, side, deep):
    lies_deep = host.module("nodes._host.propagation.unet").lies_deep
    assert lies_deep(build(name, "meta"), torch.empty(1, 4, side, side)) is deep


@pytest.mark.parametrize("name", daily(["SD1.5", "SDXL"], "SD1.5"))
def test_a_shorter_step_of_a_published_network_does_the_work_and_keeps_the_features_that_are_predicted(host, name):
    """At 512 and 1024 pixels, on tensors that have shapes but no storage."""
    from comfy.ldm.modules.attention import attention_pytorch
    from torch.utils.flop_counter import FlopCounterMode

    from pack.nodes._host.propagation.unet import UNetView, levels_above, measure_unet, recording
    from pack.nodes._plan.propagation import reuse_by_name

    unet, pixels = build(name, "meta").model.diffusion_model, FAMILIES[name].pixels
    given = inputs(FAMILIES[name], pixels, "meta", torch.float32)
    x, t, context, y = (given.get(part) for part in ("x", "timesteps", "context", "y"))
    options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
    size, n = measure_unet(unet, pixels // 8, pixels // 8), len(unet.output_blocks)

    def flops(run):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    whole = flops(lambda: unet(x, t, context, y, None, dict(options)))
    for reuse in (reuse_by_name(one, False, n, levels_above(unet)) for one in REUSES):
        found = {}
        with torch.no_grad():
            unet(x, t, context, y, None, recording(options, reuse, n, found))
        call = lambda part, control, options: part._forward(x, t, context, y, control, options)
        part = flops(lambda: UNetView(unet, reuse).run(call, found, x, options))  # noqa: B023
        assert part / whole == pytest.approx(size.costs.of_step(reuse), rel=0.01)
        assert sum(value.numel() for value in found.values()) == size.kept_elements(reuse)


# --- off is off ---

SOLVERS = ["euler", "dpmpp_2m", "heun", "dpm_2", "dpmpp_sde", "euler_ancestral", "uni_pc", "ddim"]


@pytest.mark.parametrize("sampler", daily(SOLVERS, "uni_pc"))
def test_with_key_steps_only_the_result_is_the_stock_one_bit_for_bit(draw, propagate, sampler):
    stock = draw(sampler=sampler, steps=8)
    assert torch.equal(draw(propagate(interval=1), sampler=sampler, steps=8), stock)
    assert torch.equal(draw(propagate(end_percent=0.0), sampler=sampler, steps=8), stock)


def test_until_the_first_reuse_every_evaluation_is_the_stock_one(host, demo, draw, propagate):
    """Features are being recorded on all of these steps."""
    late = {"scheduler": "karras", "steps": 12}
    inputs = {"start_percent": 0.9, "interval": 2, "keep_last": 0}
    watched, seen = watching(propagate(**inputs))
    draw(watched, **late)
    watched, stock = watching(demo[0])
    draw(watched, **late)
    same = [torch.equal(a, b) for a, b in zip(seen, stock, strict=True)]
    first = same.index(False)
    assert first >= 3 and all(same[:first])


def watching(model):
    """A clone, and the list its guided outputs are written to."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def watch(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        seen.append(out.clone())
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.watch", watch)
    return model, seen


ASIDE = [("dpm_adaptive", 10), ("dpm_fast", 10), ("euler", 5)]


@pytest.mark.parametrize(("sampler", "steps"), daily(ASIDE, *ASIDE[1:], names=2))
def test_it_stands_aside_where_it_cannot_help_and_says_so(draw, propagate, caplog, sampler, steps):
    with caplog.at_level("INFO"):
        out = draw(propagate(), sampler=sampler, steps=steps)
    assert "Attune Propagation stands aside: " in caplog.text
    assert torch.equal(out, draw(sampler=sampler, steps=steps))


# --- what is reused, and when ---


def by_hand(unet, model_sampling, conds, sigmas, noise, keys, cfg):
    """The paper's algorithm, written once more with the network's own modules."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding

    x, kept = noise * torch.sqrt(1 + sigmas[0] ** 2), {}
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        denoised = []
        for name, (context, y) in conds.items():
            t = model_sampling.timestep(sigma[None]).float()
            emb = unet.time_embed(timestep_embedding(t, unet.model_channels)) + unet.label_emb(y)
            if i in keys:
                h, skips = model_sampling.calculate_input(sigma[None], x), []
                for block in unet.input_blocks:
                    h = forward_timestep_embed(block, h, emb, context, {})
                    skips.append(h)
                kept[name] = forward_timestep_embed(unet.middle_block, h, emb, context, {}), skips
            h, skips = kept[name]
            for n, block in enumerate(unet.output_blocks):
                size = skips[-2 - n].shape if n + 1 < len(skips) else None
                h = forward_timestep_embed(block, torch.cat([h, skips[-1 - n]], 1), emb, context, {}, size)
            denoised.append(model_sampling.calculate_denoised(sigma[None], unet.out(h), x))
        guided = denoised[1] + cfg * (denoised[0] - denoised[1])
        x = x + (x - guided) / sigma * (after - sigma)
    return x


@pytest.mark.parametrize("parallel", daily(["off", "auto", "6"], "6"))
def test_the_published_mode_is_the_papers_algorithm(demo, encode, draw, propagate, unet, parallel):
    from pack.kernels.propagation import published_keys

    ours = draw(propagate(mode="published keys", parallel=parallel), steps=20, seed=3)
    sampling = demo[0].get_model_object("model_sampling")
    sigmas = torch.cat([sampling.sigma(torch.linspace(999, 0, 20)), torch.zeros(1)])
    conds = {
        name: (encode(text)[0][0], encode(text)[0][1]["pooled_output"])
        for name, text in (("cond", "a cat on a black background"), ("uncond", ""))
    }
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
    keys = published_keys([(999 - 999 * i / 19) / 999 for i in range(20)])
    with torch.inference_mode():
        want = by_hand(unet, sampling, conds, sigmas, noise, keys, 3.0)
    torch.testing.assert_close(ours, want, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("sampler", daily(["euler", "dpmpp_2m", "heun", "uni_pc", "lms"], "heun"))
def test_decoding_several_steps_at_once_changes_nothing(draw, propagate, sampler, caplog):
    one, many = (propagate(reuse="encoder reused", interval=4, parallel=p) for p in ("off", "4"))
    one = draw(one, sampler=sampler, steps=12)
    with caplog.at_level("INFO"):
        many = draw(many, sampler=sampler, steps=12)
    torch.testing.assert_close(many, one, rtol=1e-3, atol=2e-4)
    (ready,) = re.findall(r"and (\d+) outputs were ready", caplog.text)
    assert int(ready) > 0


TWICE_A_STEP = [(sampler, reuse) for sampler in ("heun", "dpm_2") for reuse in ("top level fresh", "encoder reused")]
NOISY = ["dpmpp_2s_ancestral", "dpmpp_sde", "seeds_2", "dpmpp_2m_sde"]  # "encoder reused" becomes "top level fresh"


EVERY_KIND = TWICE_A_STEP + [(sampler, "encoder reused") for sampler in NOISY]
DAILY = [("dpmpp_sde", "encoder reused")]  # twice a step, and noise


@pytest.mark.parametrize(("sampler", "reuse"), daily(EVERY_KIND, *DAILY, names=2))
def test_every_kind_of_solver_stays_near_the_whole_run(draw, propagate, sampler, reuse):
    run = {"sampler": sampler, "steps": 24, "side": 16}
    stock, ours = draw(**run), draw(propagate(reuse=reuse, interval=2), **run)
    assert psnr(ours, stock) > (16 if sampler == "dpmpp_2m_sde" else 24) and not torch.equal(ours, stock)


def test_where_the_solver_adds_noise_something_fresh_must_see_it(draw, propagate, caplog):
    with caplog.at_level("INFO"):
        draw(propagate(reuse="encoder reused"), sampler="euler_ancestral", steps=8)
    assert "the solver adds noise, so the top level is computed afresh" in caplog.text


def test_the_list_of_solvers_with_one_evaluation_a_step_is_right(draw, propagate):
    """The clock counts for these and reads the noise level for the others: both must say the same."""
    from comfy.patcher_extension import WrappersMP

    from pack.nodes._plan.solvers import SOLVERS

    said = []

    def watch(executor, x, sigma, model_options, *args, **kwargs):
        run = model_options["transformer_options"]["attune.propagation.run"]
        said.append((run.clock.counts, run.clock.step, run.plan.step(float(sigma[0]))))
        return executor(x, sigma, model_options, *args, **kwargs)

    model = propagate(reuse="one block fresh")
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.watch", watch)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.model", lambda executor, x, *args, **kwargs: x / 2)
    small = {"samples": torch.zeros(1, 4, 4, 4)}
    for name in sorted(name for name, facts in SOLVERS.items() if facts.on_grid):
        said.clear()
        draw(model, sampler=name, latent_image=small, steps=8)
        assert said == [(True, i, i) for i in range(8)], name


def test_prior_noise_is_added_in_the_second_half(demo, encode, draw, propagate):
    """Against a stock run whose latent is changed by hand before each evaluation."""
    from comfy.patcher_extension import WrappersMP

    noise, sampling = (
        torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0)),
        demo[0].get_model_object("model_sampling"),
    )

    def add(executor, x, sigma, *args, **kwargs):
        if float(sampling.timestep(sigma)[0]) < 499.5:
            x += 0.01 * torch.sqrt(1 + sigma[0] ** 2) * noise
        return executor(x, sigma, *args, **kwargs)

    by_hand = demo[0].clone()
    by_hand.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.noise", add)
    ours = draw(propagate(interval=1, prior_noise=0.01), steps=10)
    torch.testing.assert_close(ours, draw(by_hand, steps=10), rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours, draw(steps=10))


def watching_x(model):
    """A clone, and a list of (noise level, latent) of every call of the guided model."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def watch(executor, x, sigma, *args, **kwargs):
        seen.append((float(sigma[0]), x.clone()))
        return executor(x, sigma, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.watch", watch)
    return model, seen


@pytest.mark.parametrize("masked", daily([False, True], True))
def test_prior_noise_stays_in_the_state_of_every_solver_or_is_refused(host, draw, propagate, monkeypatch, masked):
    """Added at one step: all of it is there when the model is asked, and much of it a step later; LCM keeps no state."""
    import comfy.samplers
    from comfy.patcher_extension import WrappersMP

    loaded = host.module("nodes._host.propagation")
    facts_of, at, begin = host.module("nodes._host.solvers").facts_of, 5, loaded.Propagation.__init__
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    inside = torch.zeros(1, 4, 8, 8) if masked else torch.ones(1, 4, 8, 8)
    inside[..., 2:6, 2:6] = 1
    latent = {"samples": torch.zeros(1, 4, 8, 8), **({"noise_mask": inside[0, :1]} if masked else {})}

    def states(name, step):
        def once(self, *args):
            begin(self, *args)
            self.noisy &= {step}
            sigmas[:] = self.plan.sigmas

        monkeypatch.setattr(loaded.Propagation, "__init__", once)
        model, seen = watching_x(propagate(interval=1, prior_noise=0.01))
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.model", lambda executor, x, *args, **kwargs: x / 2)
        draw(model, sampler=name, steps=8, latent_image=latent)
        return seen

    sigmas: list[float] = []
    share = lambda a, b, added: float(((b - a) * added).sum() / added.square().sum())
    for name in ["euler", "heun", "dpm_2", "dpmpp_2m"] if masked else comfy.samplers.KSampler.SAMPLERS:
        facts = facts_of(comfy.samplers.sampler_object(name))
        if facts.own_levels:
            continue  # the node stands aside
        if not facts.keeps_state:
            with pytest.raises(ValueError, match=f"cannot add 'prior_noise' with the sampler '{name}'"):
                states(name, at)
            continue
        pairs = list(zip(states(name, -1), states(name, at), strict=True))
        added = 0.01 * (1 + sigmas[at] ** 2) ** 0.5 * noise * inside
        here = [share(a, b, added) for (level, a), (_, b) in pairs if level == pytest.approx(sigmas[at], rel=1e-4)]
        after = [share(a, b, added) for (level, a), (_, b) in pairs if level == pytest.approx(sigmas[at + 1], rel=1e-4)]
        assert here[-1] == pytest.approx(1, abs=0.01) and not any(here[:-1]), name
        assert after[-1] > 0.3 or facts.jumps, name


# --- conditions never mix ---


@pytest.fixture
def one_by_one(demo, monkeypatch):
    """The host evaluates every condition in a call of its own, as it does when memory is short."""
    return lambda: monkeypatch.setattr(demo[0].model, "memory_required", lambda *args, **kwargs: 1e30)


@pytest.fixture
def conditionings(host, encode):
    """Conditionings that make the host batch in different ways."""
    area = lambda text, x: host.call(
        "ConditioningSetArea", conditioning=encode(text), width=64, height=128, x=x, y=0, strength=1.0
    )[0]
    both = lambda a, b: host.call("ConditioningCombine", conditioning_1=a, conditioning_2=b)[0]
    late = host.call("ConditioningSetTimestepRange", conditioning=encode("a red heart on white"), start=0.35, end=0.9)[
        0
    ]
    return {
        "areas": both(area("a red heart on white", 0), encode("a cat on a black background")),
        "several": both(encode("a red heart on white"), both(encode("a cat"), encode("a dog on a blue background"))),
        "long": encode("a cat " * 40),
        "late": both(encode("a cat on a black background"), late),
    }


MIXED = [(reuse, kind) for kind in ("areas", "several", "long", "late") for reuse in REUSES]


@pytest.mark.parametrize(("reuse", "kind"), daily(MIXED, MIXED[0], MIXED[-1], names=2))
def test_conditions_never_mix(draw, propagate, conditionings, one_by_one, reuse, kind):
    run, model = {"positive": conditionings[kind], "steps": 14, "side": 16}, propagate(reuse=reuse, interval=2)
    stock, ours = draw(**run), draw(model, **run)
    assert psnr(ours, stock) > 20
    if kind == "late":
        return  # where it begins its features are missing, and then all conditions of its call run whole
    one_by_one()
    torch.testing.assert_close(draw(model, **run), ours, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("reuse", daily(REUSES, "encoder reused"))
def test_conditions_may_be_evaluated_in_threads(demo, draw, propagate, conditionings, reuse):
    """As newer hosts do, one per GPU."""
    from concurrent.futures import ThreadPoolExecutor

    from comfy.patcher_extension import WrappersMP

    def in_threads(executor, model, conds, x, sigma, options):
        @torch.inference_mode()
        def alone(i):
            return executor(model, [side if j == i else None for j, side in enumerate(conds)], x, sigma, options)[i]

        with ThreadPoolExecutor(len(conds)) as pool:
            return list(pool.map(alone, range(len(conds))))

    threaded = demo[0].clone()
    threaded.add_wrapper(WrappersMP.CALC_COND_BATCH, in_threads)
    positive = conditionings["several"]
    apart, together = (draw(propagate(model, reuse=reuse), positive=positive) for model in (threaded, None))
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reuse", daily(REUSES, "one block fresh"))
def test_a_batch_is_its_pictures(draw, propagate, reuse):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(8))
    model = propagate(reuse=reuse)
    alone = [draw(model, latent_image={"samples": z[None]}, denoise=0.8) for z in noise]
    seeds = [draw(model, latent_image={"samples": noise, "batch_index": [0, 0]}, denoise=0.8)]
    torch.testing.assert_close(seeds[0], torch.cat(alone), rtol=1e-3, atol=5e-4)


def test_without_guidance_there_is_one_condition(draw, propagate):
    assert psnr(draw(propagate(interval=2), cfg=1.0, steps=16), draw(cfg=1.0, steps=16)) > 24


def test_a_batch_that_is_split_halfway_keeps_its_features(draw, propagate, demo, monkeypatch):
    model, calls = propagate(reuse="encoder reused", parallel="off"), []
    want = draw(model, steps=12)
    required = type(demo[0].model).memory_required

    def short_of_memory(self_shape, *args, **kwargs):
        calls.append(1)
        return 1e30 if len(calls) > 7 and len(calls) % 3 else required(demo[0].model, self_shape, *args, **kwargs)

    monkeypatch.setattr(demo[0].model, "memory_required", short_of_memory)
    torch.testing.assert_close(draw(model, steps=12), want, rtol=1e-3, atol=5e-4)


# --- other nodes on the same model ---


def with_controlnet(encode, weight=1.0):
    """A conditioning with a ControlNet for the demo UNet, and the list of the levels it was computed at."""

    def residuals(x):
        sides, widths = [8, 8, 4, 4, 2, 2], [32, 32, 32, 128, 128, 160]
        level = 0.1 * x.mean(dim=(1, 2, 3), keepdim=True) + weight
        make = lambda side, width: level.expand(len(x), width, side, side) * torch.linspace(-1, 1, side)
        return {"input": [], "middle": [make(2, 160)], "output": list(map(make, sides, widths))}

    return controlled(encode, residuals)


@pytest.mark.parametrize("reuse", daily(REUSES, "encoder reused"))
def test_a_controlnet_is_computed_only_where_it_is_used(draw, stock, propagate, encode, reuse):
    from comfy.patcher_extension import WrappersMP

    from pack.nodes._host.propagation import KEY

    positive, calls = with_controlnet(encode)
    whole = draw(positive=positive, steps=12)
    assert len(calls) == 12 and psnr(whole, stock(steps=12)) < 40
    model = propagate(reuse=reuse, interval=2)
    calls.clear()
    ours = draw(model, positive=positive, steps=12)
    assert len(calls) == 7 and psnr(ours, whole) > 20
    eager = model.clone()
    eager.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)
    calls.clear()
    assert torch.equal(draw(eager, positive=positive, steps=12), ours) and len(calls) == 12


def test_the_trained_controlnet_moves_the_object_and_runs_on_key_steps_only(host, demo, encode, draw, propagate):
    """The demo's own, by the stock nodes: white on the hint is where the object shall be."""
    (net,) = host.call("ControlNetLoader", control_net_name="attune_demo_controlnet.safetensors")
    hint = torch.zeros(1, 128, 128, 3)
    hint[:, 32:96, 64:120] = 1
    positive, negative = host.call(
        "ControlNetApplyAdvanced", positive=encode("a red apple on a black background"), negative=encode(""),
        control_net=net, image=hint, strength=1.0, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    calls = []
    net.control_model.register_forward_hook(lambda *_: calls.append(1))

    def run(model):
        calls.clear()
        return draw(model, positive=positive, negative=negative, steps=12, side=16)

    stock = run(demo[0])
    (picture,) = host.call("VAEDecode", samples={"samples": stock}, vae=demo[2])
    assert len(calls) == 12 and picture[:, :, 64:].mean() > 4 * picture[:, :, :64].mean() > 0
    assert torch.equal(run(propagate(interval=1)), stock) and len(calls) == 12
    for reuse in REUSES:
        assert psnr(run(propagate(reuse=reuse, interval=2)), stock) > 22 and len(calls) == 7


def test_where_a_controlnet_ends_there_is_a_key_step(draw, propagate, encode, caplog):
    positive, _ = with_controlnet(encode)
    positive[0][1]["control"].timestep_percent_range = (0.0, 0.5)
    with caplog.at_level("INFO"):
        draw(propagate(interval=12, keep_last=0), positive=positive, steps=10)
    assert "2 of 10 steps are key steps (0 5)" in caplog.text


def test_a_lora_is_in_the_whole_and_in_the_shorter_steps(demo, draw, stock, propagate):
    patched = demo[0].clone()
    key = "diffusion_model.output_blocks.5.0.in_layers.2.weight"
    weight = patched.model.state_dict()[key]
    patched.add_patches({key: (0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),)}, 0.5)
    whole, ours = draw(patched, steps=14), draw(propagate(patched, interval=2), steps=14)
    assert psnr(whole, stock(steps=14)) < psnr(ours, whole) - 5
    assert torch.equal(draw(propagate(patched, interval=1), steps=14), whole)


@pytest.mark.parametrize("first", daily([True, False], True))
def test_free_u_works_before_and_after(host, demo, draw, propagate, first):
    scale = lambda model: host.call("FreeU_V2", model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)[0]
    stock = draw(scale(demo[0]), steps=14)
    ours = propagate(scale(demo[0]), interval=2) if first else scale(propagate(interval=2))
    assert psnr(draw(ours, steps=14), stock) > 22


PARTS = [(0.0, 0.35), (0.2, 0.6)]
SHRUNK = [(reuse, part) for reuse in REUSES for part in PARTS]


@pytest.mark.parametrize(("reuse", "part"), daily(SHRUNK, SHRUNK[3], names=2))
def test_where_deep_shrink_begins_and_ends_the_network_runs_whole(host, demo, draw, propagate, caplog, reuse, part):
    """Its features have other shapes. Beside a run without any node in its part every shorter step is as it was."""
    start, end = part
    (shrunk,) = host.call(
        "PatchModelAddDownscale", model=demo[0], block_number=3, downscale_factor=2.0, start_percent=start,
        end_percent=end, downscale_after_skip=True, downscale_method="bicubic", upscale_method="bicubic",
    )  # fmt: skip
    stock = draw(shrunk, steps=20)
    with caplog.at_level("INFO"):
        ours = draw(propagate(shrunk, reuse=reuse, interval=2, parallel="off"), steps=20)
    sampling = demo[0].get_model_object("model_sampling")
    edges = [end] if start == 0 else [start, end]
    first = [float(sampling.timestep(sampling.percent_to_sigma(at) * torch.ones(1))) for at in edges]
    steps = [999 - 999 * i / 19 for i in range(20)]
    after = [next(i for i, t in enumerate(steps) if t < edge) for edge in first]
    whole = {*range(0, 20, 2), 18, 19, *after, *(i + 1 for i in after)}
    assert f"the network ran whole {len(whole)} times" in caplog.text
    assert psnr(ours, stock) > 34


def test_another_pack_may_deep_copy_the_options_and_evaluate_once_more(host, demo, draw, propagate, encode):
    import copy

    import comfy.samplers

    def once_more(args):
        options = copy.deepcopy(args["model_options"])
        comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"]

    def asked_twice(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(once_more)
        return model

    positive, _ = with_controlnet(encode)
    copy.deepcopy(host.module("nodes._host.propagation").DeferredControl(positive[0][1]["control"]))
    for given in ({}, {"positive": positive}):
        ours = propagate(interval=2)
        assert torch.equal(draw(asked_twice(ours), **given), draw(ours, **given))


TILES = [(reuse, sampler, moving) for reuse in REUSES for sampler in ("euler", "euler_ancestral") for moving in (0, 1)]


@pytest.mark.parametrize(
    ("reuse", "sampler", "moving"),
    daily(TILES, (REUSES[1], "euler_ancestral", 1), names=3),
)
def test_tiles_that_move_never_reuse_features_of_another_place(demo, draw, propagate, caplog, reuse, sampler, moving):
    """As SpotDiffusion does it: the network sees the latent rolled and in halves, the answer is rolled back."""

    def tiled(model):
        model, calls = model.clone(), []

        def wrapper(apply_model, args):
            by = (7 * len(calls)) % 32 if moving else 0
            calls.append(1)
            halves = torch.roll(args["input"], by, -1).split(16, -1)
            parts = [apply_model(part, args["timestep"], **args["c"]) for part in halves]
            return torch.roll(torch.cat(parts, -1), -by, -1)

        model.set_model_unet_function_wrapper(wrapper)
        return model

    wide = {"latent_image": {"samples": torch.zeros(1, 4, 16, 32)}, "steps": 16, "sampler": sampler}
    stock = draw(tiled(demo[0]), **wide)
    with caplog.at_level("INFO"):
        ours = draw(tiled(propagate(reuse=reuse, interval=2)), **wide)
    if moving:
        assert torch.equal(ours, stock) and "tiles moved, so 14 calls of the network ran whole" in caplog.text
    else:
        assert "tiles moved" not in caplog.text
        assert psnr(ours, stock) > (30 if sampler == "euler" else 20)


def test_where_another_node_asks_in_its_own_way_the_user_is_told(demo, draw, propagate, caplog):
    """Each condition in a call of its own, with the options of all: which one a call is of cannot be known."""

    def one_by_one(model):
        def wrapper(apply_model, args):
            row = lambda i, one: one[i : i + 1] if torch.is_tensor(one) and len(one) == len(args["input"]) else one
            given = {**args["c"], "x": args["input"], "t": args["timestep"]}
            return torch.cat([apply_model(**{k: row(i, v) for k, v in given.items()}) for i in range(len(given["x"]))])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model

    stock = draw(one_by_one(demo[0]))
    with caplog.at_level("WARNING"):
        assert torch.equal(draw(one_by_one(propagate(interval=2))), stock)
    assert "in a way that cannot be followed, so every step ran whole and nothing was saved" in caplog.text


CACHES = [(other, first) for other in ("EasyCache", "LazyCache") for first in (True, False)]


@pytest.mark.parametrize(("other", "first"), daily(CACHES, CACHES[3], names=2))
def test_another_cache_on_the_same_model_does_no_harm(host, demo, draw, stock, propagate, other, first):
    theirs = lambda model: host.call(
        other, model=model, reuse_threshold=0.1, start_percent=0.15, end_percent=0.95, verbose=False
    )[0]
    model = propagate(theirs(demo[0])) if first else theirs(propagate())
    alone = psnr(draw(theirs(demo[0]), steps=16), stock(steps=16))  # 12.4 dB of ComfyUI 0.3.64's EasyCache
    assert psnr(draw(model, steps=16), stock(steps=16)) > min(12, alone - 5)


def test_an_attention_patch_that_adds_to_one_condition_sees_the_same_blocks_and_rows(demo, draw, stock, propagate):
    """As IP-Adapter does it: more keys and values for the prompt, none for the negative prompt."""
    from comfy.ldm.modules.attention import optimized_attention

    seen = []

    def adapter(q, k, v, options):
        seen.append((options["block"], options["transformer_index"]))
        out = optimized_attention(q, k, v, options["n_heads"])
        rows = out.chunk(len(options["cond_or_uncond"]))
        return torch.cat([
            part + (1.0 * part.roll(7, dims=-1) if kind == 0 else 0)
            for part, kind in zip(rows, options["cond_or_uncond"], strict=True)
        ])  # fmt: skip

    model = demo[0].clone()
    for block in [("input", 3), ("input", 5), ("middle", 0), *(("output", i) for i in range(4))]:
        model.set_model_attn2_replace(adapter, *block)
    whole, blocks = draw(model, steps=14, side=16), set(seen)
    without = psnr(stock(steps=14, side=16), whole)
    assert len(blocks) == 7 and without < 28
    for reuse in ("top level fresh", "encoder reused"):
        seen.clear()
        assert psnr(draw(propagate(model, reuse=reuse, interval=2), steps=14, side=16), whole) > without + 5
        assert set(seen) == blocks
    assert torch.equal(draw(propagate(model, interval=1), steps=14, side=16), whole)


@pytest.fixture(scope="module")
def boxed(host, demo, encode):
    """A conditioning with a box by the host's own GLIGEN, of random weights, and another without."""
    from comfy.gligen import GatedSelfAttentionDense, Gligen, PositionNet
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.model_patcher import ModelPatcher

    unet = demo[0].model.diffusion_model
    widths = [layer.in_channels for layer in unet.modules() if isinstance(layer, SpatialTransformer)]
    net = Gligen([GatedSelfAttentionDense(width, 128, 4, 32) for width in widths], PositionNet(128, 128), 128)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.15 if parameter.ndim else 4.0)
    (positive,) = host.call(
        "GLIGENTextBoxApply", conditioning_to=encode("a cat on a black background"), clip=demo[1], text="a red heart",
        gligen_textbox_model=ModelPatcher(net, torch.device("cpu"), torch.device("cpu")), width=64, height=64, x=0, y=0,
    )  # fmt: skip
    return positive


def test_gligen_works(draw, stock, propagate, boxed):
    whole = draw(positive=boxed, steps=14, side=16)
    without = psnr(stock(steps=14, side=16), whole)
    assert without < 30
    for reuse in ("top level fresh", "encoder reused"):
        assert psnr(draw(propagate(reuse=reuse, interval=2), positive=boxed, steps=14, side=16), whole) > without + 3
    assert torch.equal(draw(propagate(interval=1), positive=boxed, steps=14, side=16), whole)


def test_an_inpainting_network_works_and_keeps_no_picture(host, demo, encode, draw, propagate):
    """The demo UNet with five more input channels, for the mask and the masked picture."""
    import comfy.sd
    import comfy.utils
    import folder_paths

    weights = comfy.utils.load_torch_file(folder_paths.get_full_path("checkpoints", "attune_demo.safetensors"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    more = 0.03 * torch.randn(32, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weights[first] = torch.cat([weights[first], more.to(weights[first])], 1)
    network = comfy.sd.load_state_dict_guess_config(weights, output_vae=False, output_clip=False)[0]
    network.model.set_inpaint()
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1

    def inpainted(model, grey):
        positive, negative, latent = host.call(
            "InpaintModelConditioning", positive=encode("a cat on a black background"), negative=encode(""),
            vae=demo[2], pixels=torch.full((1, 128, 128, 3), grey), mask=mask, noise_mask=False,
        )  # fmt: skip
        return draw(model, positive=positive, negative=negative, latent_image=latent, steps=12)

    stock = inpainted(network, 0.2)
    assert psnr(inpainted(network, 0.9), stock) < 40
    model = propagate(network, interval=2)
    ours = inpainted(model, 0.2)
    assert psnr(ours, stock) > 22
    inpainted(model, 0.9)
    assert torch.equal(inpainted(model, 0.2), ours)
    assert torch.equal(inpainted(propagate(network, interval=1), 0.2), stock)


def test_a_patched_forward_is_left_alone(demo, draw, propagate, unet, monkeypatch):
    stock = draw(steps=8)
    monkeypatch.setitem(vars(unet), "_forward", unet._forward)
    assert torch.equal(draw(propagate(), steps=8), stock)


@pytest.mark.nightly  # each day of a transformer: test_propagation_transformer.py
def test_torch_compile_makes_no_more_graphs(host, propagate):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    config = {
        "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [0, 1],
        "transformer_depth_output": [0, 0, 1, 1], "num_heads": 2,
    }  # fmt: skip
    family = replace(FAMILIES["SD1.5"], unet_config=FAMILIES["SD1.5"].unet_config | config)
    graphs = []

    def compiled(model):
        """How many graphs two runs of a model make."""
        torch._dynamo.reset()
        graphs.clear()
        set_torch_compile_wrapper(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        for _ in range(2):
            sample(host, model, family, 128, steps=8)
        return len(graphs)

    model = build(family)
    stock = compiled(model.clone())  # first: in a process that has compiled other models it makes one more than later
    assert 0 < compiled(propagate(model)) <= stock


# --- nothing is left behind ---


def test_sizes_and_batches_in_a_row_do_not_disturb_each_other(draw, propagate):
    shapes = [(1, 16, 16), (1, 9, 13), (3, 16, 16)]
    empty = lambda b, h, w: {"samples": torch.zeros(b, 4, h, w)}
    model = propagate(reuse="top level fresh")
    alone = [draw(propagate(), latent_image=empty(*shape), steps=8) for shape in shapes]
    assert all(
        torch.equal(draw(model, latent_image=empty(*shape), steps=8), want)
        for shape, want in zip(shapes, alone, strict=True)
    )


def test_a_second_pass_over_an_enlarged_latent_is_its_own_run(host, draw, propagate):
    model = propagate()
    (large,) = host.call(
        "LatentUpscale", samples={"samples": draw(model, steps=8)}, upscale_method="bilinear", width=192, height=192,
        crop="disabled",
    )  # fmt: skip
    second = draw(model, latent_image=large, denoise=0.5, steps=8)
    assert second.shape == (1, 4, 24, 24) and torch.equal(
        second, draw(propagate(), latent_image=large, denoise=0.5, steps=8)
    )


def test_an_interrupted_run_leaves_nothing(draw, propagate):
    from comfy.model_management import InterruptProcessingException
    from comfy.patcher_extension import WrappersMP

    model = propagate(reuse="encoder reused", parallel="4")
    want = draw(model, steps=8)
    for stop in (0, 1, 4, 7):  # of a whole step, of one that others wait for; all of them: test_compatibility.py
        calls = []

        def interrupt(executor, *args, **kwargs):
            calls.append(1)  # noqa: B023
            if len(calls) > stop:  # noqa: B023
                raise InterruptProcessingException
            return executor(*args, **kwargs)

        stopped = model.clone()
        stopped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.stop", interrupt)
        with pytest.raises(InterruptProcessingException):
            draw(stopped, steps=8)
        assert torch.equal(draw(model, steps=8), want)


def test_clones_keep_their_own_settings_and_the_model_its_own(demo, draw, propagate):
    stock, before = draw(steps=9), dict(demo[0].model_options["transformer_options"])
    a, b = propagate(interval=2), propagate(interval=3)
    first = draw(a, steps=9), draw(b, steps=9)
    assert torch.equal(draw(a.clone(), steps=9), first[0]) and torch.equal(draw(b, steps=9), first[1])
    assert not torch.equal(*first) and torch.equal(draw(steps=9), stock)
    assert demo[0].model_options["transformer_options"] == before


def test_applied_twice_the_later_settings_count(draw, propagate):
    assert torch.equal(
        draw(propagate(propagate(interval=2), interval=4), steps=9), draw(propagate(interval=4), steps=9)
    )


def test_the_features_are_freed_with_the_run(host, draw, propagate, monkeypatch):
    node = host.nodes.NODE_CLASS_MAPPINGS["AttunePropagation"]
    loaded = sys.modules[node.__module__.replace("nodes.propagation", "nodes._host.propagation")]
    kept, store = [], loaded.FeatureCache.store

    def watch(self, keys, step, time, signature, features):
        kept.extend(weakref.ref(value) for value in features.values())
        store(self, keys, step, time, signature, features)

    monkeypatch.setattr(loaded.FeatureCache, "store", watch)
    gc.collect()
    gc.disable()
    try:
        draw(propagate(reuse="encoder reused"), steps=9)
        assert kept and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


class Reads(TorchDispatchMode):
    """Counts the reads of single values, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reuse", daily(REUSES, "encoder reused"))
def test_no_step_waits_for_the_device(draw, propagate, reuse):
    def per_step(model):
        counts = []
        for steps in (8, 12):
            with Reads() as reads:
                draw(model, steps=steps)
            counts.append(reads.count)
        return counts[1] - counts[0]

    assert per_step(propagate(reuse=reuse, parallel="off")) == per_step(None)


KEPT = [(reuse, dtype) for reuse in REUSES for dtype in ("as computed", "half")]


@pytest.mark.parametrize(("reuse", "dtype"), daily(KEPT, KEPT[3], names=2))
def test_memory_is_predicted_to_the_byte(draw, propagate, caplog, reuse, dtype):
    with caplog.at_level("INFO"):
        draw(propagate(reuse=reuse, cache_dtype=dtype), steps=12, batch=4)
    predicted = caplog.text.partition("features take up to ")[2].split()[0]
    assert predicted == caplog.text.partition("features took ")[2].split()[0] and float(predicted) > 0


def test_a_memory_limit_is_kept(draw, propagate, caplog):
    with caplog.at_level("INFO"):
        draw(propagate(reuse="encoder reused", memory_limit=1), steps=12, batch=8)
    took = float(caplog.text.partition("features took ")[2].split()[0])
    assert "for the memory limit" in caplog.text and 0 < took <= 1.0


# --- words ---


def test_a_part_of_the_other_kind_of_network_is_refused(host, demo):
    said = r"'first block fresh' is a part of a transformer, but this MODEL is a UNet: set 'reuse' to one of 'automatic', 'top"
    with pytest.raises(ValueError, match=said):
        host.call("AttunePropagation", model=demo[0], mode="uniform", reuse="first block fresh")
    flow = host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")[0]
    with pytest.raises(ValueError, match="'encoder reused' is a part of a UNet, but this MODEL is a transformer"):
        host.call("AttunePropagation", model=flow, mode="uniform", reuse="encoder reused")
    with pytest.raises(ValueError, match=r"a transformer .* of at least 2 blocks, but this MODEL is a OpenAISig"):
        host.call("AttunePropagation", model=comfy_stub.tiny_model("SD3"), mode="uniform")


def test_a_profile_that_is_not_there_and_a_speed_out_of_reach_are_said(draw, propagate):
    with pytest.raises(ValueError, match="'calibrated profile' needs a profile"):
        propagate(mode="calibrated profile")
    with pytest.raises(ValueError, match=r"cannot run 3 times faster over 10 steps.*Lower 'speed'"):
        draw(propagate(mode="speed target", speed=3.0, reuse="encoder reused"), steps=10)


def test_a_speed_target_is_reached_by_the_count_of_blocks(draw, propagate, caplog):
    with caplog.at_level("INFO"):
        draw(propagate(mode="speed target", speed=1.5), steps=20)
    speed = float(caplog.text.partition(" times less computing")[0].split()[-1])
    assert 1.5 <= speed < 1.65


# --- calibration ---


@pytest.fixture(scope="module")
def fitted(host, demo, encode):
    return host.call(
        "AttuneFitPropagation", model=demo[0], positive=encode("a cat on a black background"),
        negative=encode(""), latent_image={"samples": torch.zeros(1, 4, 16, 16)}, seed=0, steps=12, cfg=3.0,
        sampler_name="euler", scheduler="normal", reuse="one block fresh", fastest=1.75, longest=3,
    )  # fmt: skip


@pytest.mark.parametrize("deep", [True, False])
def test_where_a_solver_adds_noise_automatic_measures_features_on_every_prompt(host, demo, encode, monkeypatch, deep):
    """Of a network most of whose work lies deep; forecasts of any other."""
    monkeypatch.setattr(host.module("nodes._host.propagation.fit"), "lies_deep", lambda *_: deep)
    given = {
        "positive": encode("a cat on a black background"), "negative": encode(""), "seed": 0, "steps": 8, "cfg": 3.0,
        "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}, "sampler_name": "euler_ancestral", "longest": 2,
        "scheduler": "normal", "fastest": 1.25, "reuse": "automatic", "positive_2": encode("a red ball"),
    }  # fmt: skip
    profile, _, report = host.call("AttuneFitPropagation", model=demo[0], **given)
    assert profile.kind == ("encoder_propagation" if deep else "step_forecast")
    assert profile.provenance["pictures"] == 2
    if deep:
        shares = {point.reuse.fresh for point in profile.key_steps.points}
        assert shares <= {1, 2} and "key steps" in report  # two levels cost more than half of this network


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "euler_ancestral"])
def test_two_levels_see_most_of_what_a_solver_adds(draw, propagate, sampler):
    """The deepest features alone are an old step's: new noise is averaged over them."""
    run = {"sampler": sampler, "steps": 24}
    stock = draw(**run)
    near = {
        part: psnr(draw(propagate(reuse=part, interval=2, keep_last=4), **run), stock)
        for part in ("two levels fresh", "top level fresh")
    }
    assert near["two levels fresh"] > near["top level fresh"] + 2


def test_a_part_that_saves_little_is_tried_at_more_speeds(host, demo, encode):
    profile, *_ = host.call(
        "AttuneFitPropagation", model=demo[0], positive=encode("a cat"), negative=encode(""), seed=0, steps=16, cfg=3.0,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)}, sampler_name="euler", scheduler="normal", longest=3,
        reuse="two levels fresh", fastest=1.5,
    )  # fmt: skip
    speeds = [point.speed for point in profile.key_steps.points]
    assert len(speeds) > 2 and min(speeds) < 1.25 < max(speeds)


def test_one_picture_of_a_solver_that_adds_noise_is_too_few_and_the_report_says_so(host, fitted):
    measures_too_few = host.module("nodes._host.propagation.fit").measures_too_few
    report_of, fit = host.module("nodes.propagation").report_of, fitted[0].key_steps
    chosen = host.module("nodes._plan.propagation").calibrated_point(fit)
    latents = {n: {"samples": torch.zeros(n, 4, 16, 16)} for n in (1, 4)}
    assert measures_too_few("euler_ancestral", latents[1]) and measures_too_few("dpmpp_2m_sde", latents[1])
    assert not measures_too_few("euler_ancestral", latents[4]) and not measures_too_few("euler", latents[1])
    assert "connect a latent of 4 pictures" in report_of("name", fit, chosen, True)
    assert report_of(fitted[0].name, fit, chosen) in fitted[2]


def test_a_calibration_predicts_what_its_settings_give(draw, propagate, fitted, caplog):
    profile, plot, report = fitted
    points = profile.key_steps.points
    assert profile.kind == "encoder_propagation" and [p.speed for p in points] == sorted(p.speed for p in points)
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and f"{points[0].psnr:.1f} dB" in report
    stock = draw(steps=12, side=16)
    with caplog.at_level("INFO"):
        ours = draw(propagate(mode="speed target", speed=points[-1].speed, profile=profile), steps=12, side=16)
    peak = float(stock.max() - stock.min())
    assert float(10 * (peak**2 / (ours - stock).square().mean()).log10()) == pytest.approx(points[-1].psnr, abs=0.05)
    assert f"{points[-1].speed:.2f}x at {points[-1].psnr:.1f} dB" in caplog.text
    assert torch.isfinite(draw(propagate(mode="calibrated profile", profile=profile), steps=20)).all()


def test_calibrated_key_steps_are_better_than_even_ones(draw, stock, propagate, fitted):
    profile, whole = fitted[0], stock(steps=12)
    point = profile.key_steps.points[-1]
    calibrated = draw(propagate(mode="speed target", speed=point.speed, profile=profile), steps=12)
    even = draw(propagate(mode="speed target", speed=point.speed, keep_last=0), steps=12)
    assert psnr(calibrated, whole) > psnr(even, whole)


def test_even_key_steps_are_kept_where_those_of_the_sums_end_farther_off(host, demo, encode, monkeypatch):
    import sys

    fit = sys.modules[host.module("nodes._host.propagation.fit").__name__]
    chosen = fit.optimal_keys
    in_a_row = lambda steps, count: (0.0, frozenset([0, *range(steps - count + 1, steps)]))
    blind = lambda errors, weights: {count: in_a_row(errors.shape[-1], count) for count in chosen(errors, weights)}
    monkeypatch.setattr(fit, "optimal_keys", blind)
    profile, *_ = host.call(
        "AttuneFitPropagation", model=demo[0], positive=encode("a cat on a black background"),
        negative=encode(""), latent_image={"samples": torch.zeros(1, 4, 8, 8)}, seed=0, steps=12, cfg=3.0,
        sampler_name="euler", scheduler="normal", reuse="one block fresh", fastest=1.75, longest=3,
    )  # fmt: skip
    assert profile.key_steps.points[0].keys == (0, 2, 4, 6, 8, 9, 10, 11)


def test_a_calibration_survives_its_file(host, fitted, tmp_path):
    from pack.models.store import load_profile

    saved = host.module("models.store").save_profile(fitted[0], tmp_path)
    assert vars(load_profile(saved).key_steps)["sigmas"] == fitted[0].key_steps.sigmas
    assert load_profile(saved).key_steps.points[0].keys == fitted[0].key_steps.points[0].keys


def test_a_profile_of_another_kind_or_network_is_refused(host, demo, draw, propagate, fitted):
    from dataclasses import replace

    profile = fitted[0]
    with pytest.raises(ValueError, match="holds no key steps for a UNet: it is a block propagation"):
        propagate(profile=replace(profile, kind="block_propagation"), mode="calibrated profile")
    other = replace(profile, key_steps=replace(profile.key_steps, blocks=12))
    with pytest.raises(ValueError, match="for a network of 12 blocks, but this MODEL has 6"):
        propagate(profile=other, mode="calibrated profile")
    with pytest.raises(ValueError, match="fastest setting is"):
        draw(propagate(profile=profile, mode="speed target", speed=9.0), steps=10)


def test_there_is_nothing_to_calibrate_in_a_short_run(host, demo, encode):
    with pytest.raises(ValueError, match="nothing to calibrate: dpm_adaptive chooses"):
        host.call(
            "AttuneFitPropagation", model=demo[0], positive=encode("a cat"), negative=encode(""),
            latent_image={"samples": torch.zeros(1, 4, 16, 16)}, seed=0, steps=8, cfg=3.0, sampler_name="dpm_adaptive",
            scheduler="normal", reuse="automatic", fastest=1.5, longest=2,
        )  # fmt: skip


def test_a_fit_names_its_network_and_weights_and_auto_takes_it(host, demo, fitted):
    identity = host.module("nodes._host.identity").identify(demo[0], weights=True)
    profile = fitted[0]
    assert identity.config_hash and identity.weights_hash
    for name in ("config_hash", "weights_hash", "prediction"):
        assert getattr(profile, name) == getattr(identity, name)
    assert profile.families == identity.families[:1] and profile.patches == identity.patches
    host.module("nodes._host.folders").keep_fit(profile)
    *_, report = host.call(
        "AttuneAuto", model=demo[0], latent={"samples": torch.zeros(1, 4, 16, 16)}, steps=12, sampler_name="euler",
        cfg=3.0, denoise=1.0, scheduler="normal", schedule="off", one_more_step="off", noise_shift="off",
        golden_noise="off", speed="fast",
    )  # fmt: skip
    assert f"propagation: {profile.name}" in report and "Calibrated on this network" in report


def test_a_fit_behind_the_node_measures_whole_runs(host, demo, encode, propagate, fitted):
    """The calibration is the one without it, and so is that of any other fit: a session counts whole evaluations."""
    behind = host.call(
        "AttuneFitPropagation", model=propagate(interval=4), positive=encode("a cat on a black background"),
        negative=encode(""), latent_image={"samples": torch.zeros(1, 4, 16, 16)}, seed=0, steps=12, cfg=3.0,
        sampler_name="euler", scheduler="normal", reuse="one block fresh", fastest=1.75, longest=3,
    )  # fmt: skip
    assert behind[0].key_steps == fitted[0].key_steps
    session, space = host.module("nodes._host.session"), host.module("kernels.space").NoiseSpace("ve")
    solver = session.solver_of(session.named_sampler("euler"), demo[0])
    sigmas = torch.linspace(14, 0, 13)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    calls = []

    def ends(model):
        hook = model.model.diffusion_model.middle_block[0].register_forward_hook(lambda *_: calls.append(1))
        try:
            return session.run_session(
                model, encode("a cat"), encode(""), 3.0, solver, sigmas, torch.zeros(1, 4, 16, 16), 0, space,
                lambda solves: solves.solve(sigmas, noise),
            )  # fmt: skip
        finally:
            hook.remove()

    assert torch.equal(ends(propagate(interval=4)), ends(demo[0])) and len(calls) == 24


def test_a_fit_refuses_a_sampler_that_the_table_does_not_know(host, demo, encode, monkeypatch):
    import comfy.samplers

    def sample_of_tomorrow(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda name: comfy.samplers.KSAMPLER(sample_of_tomorrow))
    monkeypatch.setattr(comfy.samplers.KSampler, "SAMPLERS", [*comfy.samplers.KSampler.SAMPLERS, "of_tomorrow"])
    with pytest.raises(ValueError, match=r"does not know the sampler 'of_tomorrow'.*choose one of euler"):
        host.call(
            "AttuneFitPropagation", model=demo[0], positive=encode("a cat"), negative=encode(""),
            latent_image={"samples": torch.zeros(1, 4, 16, 16)}, seed=0, steps=8, cfg=3.0, sampler_name="of_tomorrow",
            scheduler="normal",
        )  # fmt: skip


def test_a_calibration_is_applied_in_one_call(host, demo, draw, propagate, fitted):
    with_calibration, profile = host.module("nodes._host.propagation").with_calibration, fitted[0]
    model, _, said = with_calibration(demo[0], profile)
    assert torch.equal(draw(model, steps=12), draw(propagate(mode="calibrated profile", profile=profile), steps=12))
    assert "calibrated with euler over 12 steps: " in said[0]
    fastest = profile.key_steps.points[-1]
    model, _, said = with_calibration(demo[0], profile, fastest.speed)
    ours = draw(propagate(mode="speed target", speed=fastest.speed, profile=profile), steps=12)
    assert torch.equal(draw(model, steps=12), ours) and f"{fastest.speed:.2f}x at {fastest.psnr:.1f} dB" in said[0]


@pytest.mark.parametrize("scheduler", ["normal", "sgm_uniform", "simple", "ddim_uniform"])
def test_published_keys_of_50_steps_are_the_papers_on_the_hosts_own_schedules(host, demo, scheduler):
    import comfy.samplers

    from pack.kernels.propagation import published_keys

    sampling = demo[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 50)
    times, top = host.module("nodes._host.clock").step_times(sampling, sigmas)
    assert {k for k in published_keys([t / top for t in times]) if k < 50} == {0, 1, 2, 3, 5, 10, 15, 25, 35}


def test_the_levels_at_which_other_nodes_begin_and_end_are_seen_in_their_functions(host, demo):
    class Patch:
        sigma_start, sigma_end = 0.0, 0.0  # of the class: no patch's own

        def __init__(self, start, end):
            self.sigma_start, self.sigma_end = start, end

        def __call__(self, x):
            return x

    sampling = demo[0].get_model_object("model_sampling")
    shrunk = host.call(
        "PatchModelAddDownscale", model=demo[0], block_number=2, downscale_factor=2.0, start_percent=0.1,
        end_percent=0.4, downscale_after_skip=True, downscale_method="bicubic", upscale_method="bicubic",
    )[0]  # fmt: skip
    changes = host.module("nodes._host.clock").patch_changes
    own = [float(sampling.percent_to_sigma(percent)) for percent in (0.1, 0.4)]
    assert sorted(changes(shrunk.model_options), reverse=True) == own and changes(demo[0].model_options) == []
    options = {"transformer_options": {"patches": {"double_block": [Patch(5.0, torch.tensor([2.0]))]}}}
    assert changes(options | {"model_function_wrapper": Patch(7.0, "none").__call__}) == [5.0, 2.0, 7.0]
    early = {"sampler_post_cfg_function": [lambda args: args if args else sigma_start]}
    assert changes(early) == []  # a variable that is not filled yet
    sigma_start = 3.0
    assert changes(early) == [sigma_start]


# --- what a prompt may hold ---

ODD = {"missing": ..., "null": None, "a word": "many", "a list": [], "a mapping": {}, "a negative number": -5}


@pytest.mark.parametrize("node", ["AttunePropagation", "AttuneFitPropagation"])
@pytest.mark.parametrize("odd", ODD)
def test_a_prompt_with_odd_values_is_refused_by_the_host_or_in_a_sentence(host, node, odd):
    """Never a Python error: the host names the input, or the node does before it runs."""
    import json
    from pathlib import Path

    name = {"AttunePropagation": "propagation", "AttuneFitPropagation": "fit_propagation"}[node]
    prompt = json.loads((Path(__file__).parents[1] / f"prompts/{name}.json").read_text("utf-8"))
    (number,) = (key for key, one in prompt.items() if one["class_type"] == node)
    widgets = [key for key, value in prompt[number]["inputs"].items() if not isinstance(value, list)]
    for widget in [*widgets, "profile"] if node == "AttunePropagation" else widgets:
        changed = json.loads(json.dumps(prompt))
        if ODD[odd] is ...:
            changed[number]["inputs"].pop(widget, None)
        else:
            changed[number]["inputs"][widget] = ODD[odd]
        said = refusal(host, changed)
        assert "Error" not in said and "Traceback" not in said and "object has no" not in said, (widget, said)


def refusal(host, prompt) -> str:
    """What the host's validation says to a prompt, "" where it lets it pass."""
    import asyncio

    import execution

    given = execution.validate_prompt("test", prompt, None)
    valid, _, _, errors = asyncio.run(given) if asyncio.iscoroutine(given) else given
    if valid:
        return ""
    return " ".join(f"{one['message']} {one['details']}" for node in errors.values() for one in node["errors"])
