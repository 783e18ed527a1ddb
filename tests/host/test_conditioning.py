"""A conditioning map on a MODEL: the network hears another level, everybody else the true one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import comfy_stub
from nightly import daily

STEPS = 4
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "in_dim": 48, "out_dim": 48, "dim": 48, "ffn_dim": 32, "freq_dim": 16,
    "text_dim": 16, "num_heads": 2, "num_layers": 1, "patch_size": (1, 2, 2),
}  # fmt: skip
PLAIN = ["euler", "dpmpp_2m", "uni_pc", "heun", "dpm_2", "dpmpp_sde", "ddim", "dpm_fast"]


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")


@pytest.fixture(scope="module")
def kit(host):
    """What the tests use of the pack; its host part can be imported only when the host is up."""
    from pack.kernels.conditioning import ConditioningMap
    from pack.kernels.space import NoiseSpace
    from pack.nodes._host import conditioning

    return SimpleNamespace(
        through=ConditioningMap.through, space=NoiseSpace, remap=conditioning.Remap, put=conditioning.with_conditioning,
        timestep=conditioning.network_timestep,
    )  # fmt: skip


def ve_map(kit, strength=1.0):
    return kit.through(kit.space("ve"), [0.1, 1.0, 5.0, 14.0], [0.08, 0.7, 4.0, 13.0], strength)


def flow_map(kit, strength=1.0):
    return kit.through(kit.space("flow"), [0.1, 0.5, 0.9], [0.08, 0.4, 0.85], strength)


def told(model, run):
    """Every timestep that the network hears while `run()` runs."""
    heard = []

    def listen(module, args, kwargs):
        heard.append((args[1] if len(args) > 1 else kwargs["timesteps"]).float().cpu().clone())

    hook = model.model.diffusion_model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        return run(), heard
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def solve(host, encode):
    """Sample 4 steps on the demo latents, by any sampler, through the stock nodes."""

    def solve(model, sampler="euler", positive=None, cfg=3.0, node="SamplerCustomAdvanced", batch=1, seed=5, **more):
        sigmas = host.call("BasicScheduler", model=model, scheduler="beta", steps=STEPS, denoise=1.0)[0]
        channels = model.model.latent_format.latent_channels
        latent = more.pop("latent", {"samples": torch.zeros(batch, channels, 16, 16)})
        common = {"cfg": cfg, "positive": positive or encode("a cat on a black background"), "negative": encode("")}
        if node == "KSampler":
            return host.call(
                "KSampler", model=model, seed=seed, steps=STEPS, sampler_name=sampler, scheduler="beta", denoise=1.0,
                latent_image=latent, **common,
            )[0]["samples"]  # fmt: skip
        (solver,) = host.call("KSamplerSelect", sampler_name=sampler)
        (noise,) = host.call("RandomNoise", noise_seed=seed)
        (guider,) = host.call("CFGGuider", model=model, **common)
        return host.call(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=solver, sigmas=sigmas.clone(), latent_image=latent
        )[0]["samples"]  # fmt: skip

    return solve


def case(kit, demo, flow, name):
    return (demo[0], ve_map(kit)) if name == "unet" else (flow[0], flow_map(kit))


@pytest.mark.parametrize("name", ["unet", "flow"])
def test_the_network_hears_the_map_and_the_denoised_is_that_of_the_true_level(host, kit, demo, flow, name):
    """By hand: network at the told timestep, everything else at the true sigma."""
    import comfy.model_management

    model, a_map = case(kit, demo, flow, name)
    patched = kit.put(model, kit.remap("test", a_map))
    base = patched.model
    comfy.model_management.load_models_gpu([patched])
    channels = base.latent_format.latent_channels
    x = torch.randn(3, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.6, 0.8]) if name == "flow" else torch.tensor([0.3, 3.0, 14.6146])
    width = {"unet": base.model_config.unet_config.get("context_dim"), "flow": 0}[name]
    context = torch.randn(3, 8, width or base.diffusion_model.context_embedder.in_features)
    pooled = torch.randn(3, base.adm_channels)
    wrappers = {
        "wrappers": {k: dict(v) for k, v in patched.wrappers.items()},
        **patched.model_options["transformer_options"],
    }
    with torch.inference_mode():
        got, heard = told(
            patched, lambda: base.apply_model(x, sigma, c_crossattn=context, y=pooled, transformer_options=wrappers)
        )
        want_t = kit.timestep(base.model_sampling, a_map(sigma))
        out = base.diffusion_model(
            base.model_sampling.calculate_input(sigma, x), want_t, context=context, y=pooled, transformer_options={}
        )
    torch.testing.assert_close(heard[0], want_t, rtol=0, atol=0)
    assert torch.equal(got, base.model_sampling.calculate_denoised(sigma, out.float(), x))
    assert (want_t - base.model_sampling.timestep(sigma)).abs().max() > 1e-3


def test_an_eps_model_hears_it_too(host, kit):
    model = comfy_stub.tiny_model("SD15")
    patched = kit.put(model, kit.remap("test", ve_map(kit)))
    options = {"wrappers": patched.wrappers, **patched.model_options["transformer_options"]}
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 5.0])
    with torch.inference_mode():
        run = lambda: patched.model.apply_model(
            x, sigma, c_crossattn=torch.randn(2, 4, 16), transformer_options=options
        )
        _, heard = told(patched, run)
    sampling = patched.model.model_sampling
    torch.testing.assert_close(sampling.sigma(heard[0]), torch.tensor([0.7, 4.0]), rtol=1e-5, atol=0)


def test_a_video_model_keeps_the_zeros_of_its_given_frames(host, kit):
    """Wan 2.2: every frame has its own timestep, and 0 means that the frame is given, whatever the others are told."""
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.WAN22_T2V(WAN)
    config.set_inference_dtype(torch.float32, None)
    base = comfy.model_base.WAN22(config)
    for weight in base.diffusion_model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model = comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    patched = kit.put(model, kit.remap("test", flow_map(kit)))
    options = {"wrappers": patched.wrappers, **patched.model_options["transformer_options"]}
    x, sigma = torch.randn(2, 48, 3, 4, 4), torch.tensor([0.5, 0.9])
    mask = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 3, 1, 1).expand(2, 1, 3, 4, 4)
    text = torch.randn(2, 4, WAN["text_dim"])
    run = lambda: base.apply_model(x, sigma, c_crossattn=text, denoise_mask=mask, transformer_options=options)
    with torch.inference_mode():
        denoised, heard = told(SimpleNamespace(model=base), run)
    level = base.model_sampling.timestep(torch.tensor([0.4, 0.85]))
    assert torch.isfinite(denoised).all()
    torch.testing.assert_close(heard[0], level[:, None] * torch.tensor([0.0, 0.5, 1.0]), rtol=1e-5, atol=0)


NODES = ("KSampler", "SamplerCustomAdvanced")
RUNS = [(name, node, sampler) for name in ("unet", "flow") for node in NODES for sampler in PLAIN]
DAILY = [("unet", "KSampler", "dpmpp_sde"), ("flow", "SamplerCustomAdvanced", "heun"), ("flow", "KSampler", "dpmpp_2m")]


@pytest.mark.parametrize(("name", "node", "sampler"), daily(RUNS, *DAILY, names=3))
def test_a_map_works_in_every_solver_and_leaves_nothing_behind(kit, demo, flow, solve, name, sampler, node):
    model, a_map = case(kit, demo, flow, name)
    before = solve(model, sampler, node=node)
    patched = kit.put(model, kit.remap("test", a_map))
    changed, heard = told(patched, lambda: solve(patched, sampler, node=node))
    assert torch.isfinite(changed).all() and (changed - before).abs().mean() > 1e-4
    assert torch.equal(solve(model, sampler, node=node), before)
    assert "process_timestep" not in vars(model.model)
    if name == "unet":
        assert any((t != t.round()).any() for t in heard)  # levels between the model's whole timesteps


@pytest.mark.parametrize("name", ["unet", "flow"])
def test_the_identity_and_strength_zero_are_the_model_itself(kit, demo, flow, name):
    model, _ = case(kit, demo, flow, name)
    zero = ve_map(kit, 0.0) if name == "unet" else flow_map(kit, 0.0)
    assert kit.put(model, kit.remap("test", zero)) is model


def test_where_the_map_changes_nothing_the_result_is_bit_identical(kit, demo, solve):
    """Knots far above the levels of the run: the wrapper is there, the host's rounding stays."""
    far = kit.through(kit.space("ve"), [500.0], [700.0])
    patched = kit.put(demo[0], kit.remap("test", far))
    assert patched is not demo[0]
    assert torch.equal(solve(patched), solve(demo[0]))


@pytest.mark.parametrize("sampler", ["euler", "dpm_2"])
def test_two_maps_give_the_same_bits_in_both_orders(kit, demo, solve, sampler):
    first, second = (
        kit.remap("align", ve_map(kit)),
        kit.remap("shift", kit.through(kit.space("ve"), [0.5, 8.0], [0.6, 9.0])),
    )
    one = solve(kit.put(kit.put(demo[0], first), second), sampler)
    other = solve(kit.put(kit.put(demo[0], second), first), sampler)
    assert torch.equal(one, other)
    assert not torch.equal(one, solve(kit.put(demo[0], first), sampler))


def test_a_map_for_another_solver_stands_aside_and_says_so(kit, demo, solve, caplog):
    patched = kit.put(demo[0], kit.remap("my profile", ve_map(kit), "euler"))
    with caplog.at_level("WARNING"):
        other = solve(patched, "dpmpp_2m")
    assert "my profile: timestep alignment skipped: made for euler, but this run uses dpmpp_2m" in caplog.text
    assert torch.equal(other, solve(demo[0], "dpmpp_2m"))
    caplog.clear()
    assert not torch.equal(solve(patched, "euler"), solve(demo[0], "euler"))
    assert not torch.equal(solve(patched, "ddim"), solve(demo[0], "ddim"))  # the host's ddim is euler
    assert "skipped" not in caplog.text


@pytest.mark.parametrize(
    "name", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde_gpu", "uni_pc", "uni_pc_bh2", "dpm_fast", "heun"]
)
def test_solvers_are_named_as_in_the_stock_list(host, name):
    from pack.nodes._host.solvers import solver_name

    assert solver_name(host.call("KSamplerSelect", sampler_name=name)[0]) == name.removesuffix("_gpu")


@pytest.mark.parametrize("call", [1, 3])
def test_an_exception_in_the_network_leaves_no_trace_and_the_next_run_is_the_same(kit, demo, solve, call):
    import comfy.model_management

    patched = kit.put(demo[0], kit.remap("test", ve_map(kit)))
    want, calls = solve(patched), []

    def stop(module, args):
        calls.append(1)
        if len(calls) == call:
            raise comfy.model_management.InterruptProcessingException

    hook = patched.model.diffusion_model.register_forward_pre_hook(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        solve(patched)
    hook.remove()
    assert "process_timestep" not in vars(demo[0].model)
    assert "attune.conditioning.chosen" not in patched.model_options["transformer_options"]
    assert torch.equal(solve(patched), want)


def test_a_batch_gives_every_picture_what_it_gets_alone(kit, demo, solve):
    patched = kit.put(demo[0], kit.remap("test", ve_map(kit)))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    both = solve(patched, latent={"samples": noise})
    assert both.shape == (2, 4, 16, 16) and not torch.equal(both[0], both[1])
    single = solve(patched, batch=1)
    torch.testing.assert_close(solve(patched, batch=2)[:1], single, rtol=0, atol=1e-4)


def test_cond_areas_masks_and_a_weight_patch_run_with_it(host, kit, demo, solve, encode):
    weights = {k: v for k, v in demo[0].model.state_dict().items() if k.endswith("out.2.weight")}
    assert weights
    lora = demo[0].clone()
    lora.add_patches({k: ("diff", (torch.full_like(v, 1e-2),)) for k, v in weights.items()}, 1.0)
    left = host.call("ConditioningSetArea", conditioning=encode("a cat"), width=64, height=128, x=0, y=0, strength=1.0)[
        0
    ]
    both = host.call("ConditioningCombine", conditioning_1=left, conditioning_2=encode("star"))[0]
    latent = {"samples": torch.zeros(1, 4, 16, 16), "noise_mask": torch.ones(1, 1, 128, 128)}
    plain = solve(lora, positive=both, latent=dict(latent))
    changed = solve(kit.put(lora, kit.remap("test", ve_map(kit))), positive=both, latent=dict(latent))
    assert torch.isfinite(changed).all() and not torch.equal(plain, changed)
    # The order of the two nodes does not matter.
    after = kit.put(demo[0], kit.remap("test", ve_map(kit)))
    after.add_patches({k: ("diff", (torch.full_like(v, 1e-2),)) for k, v in weights.items()}, 1.0)
    assert torch.equal(solve(after, positive=both, latent=dict(latent)), changed)


def test_schedulers_and_other_nodes_see_the_models_own_levels(host, kit, demo):
    patched = kit.put(demo[0], kit.remap("test", ve_map(kit)))
    for scheduler in ("normal", "sgm_uniform", "karras", "beta"):
        a, b = (
            host.call("BasicScheduler", model=m, scheduler=scheduler, steps=6, denoise=1.0)[0]
            for m in (demo[0], patched)
        )
        assert torch.equal(a, b)


def test_a_model_sampling_node_works_before_and_after_ours(host, kit, demo, solve):
    remap = kit.remap("test", ve_map(kit))
    (before,) = host.call("ModelSamplingDiscrete", model=demo[0], sampling="v_prediction", zsnr=True)
    (after,) = host.call("ModelSamplingDiscrete", model=kit.put(demo[0], remap), sampling="v_prediction", zsnr=True)
    assert torch.equal(solve(kit.put(before, remap)), solve(after))


def test_the_fractional_timestep_inverts_the_hosts_own_conversion(kit, demo):
    sampling = demo[0].get_model_object("model_sampling")
    t = torch.tensor([0.0, 0.25, 1.0, 17.5, 500.75, 998.9, 999.0])
    torch.testing.assert_close(kit.timestep(sampling, sampling.sigma(t)), t, rtol=0, atol=2e-2)
    beyond = kit.timestep(sampling, torch.tensor([0.0, 1e-9, 1e4]))
    assert beyond.tolist() == [0.0, 0.0, 999.0]


def test_the_model_is_freed_without_a_garbage_collection(kit):
    import gc
    import weakref

    model = comfy_stub.tiny_model("SD15")
    patched = kit.put(model, kit.remap("test", ve_map(kit)))
    options = {"wrappers": patched.wrappers, **patched.model_options["transformer_options"]}
    with torch.inference_mode():
        patched.model.apply_model(
            torch.zeros(1, 4, 8, 8), torch.ones(1), c_crossattn=torch.zeros(1, 4, 16), transformer_options=options
        )
    alive = weakref.ref(model.model)
    gc.disable()
    try:
        del model, patched, options
        assert alive() is None
    finally:
        gc.enable()
