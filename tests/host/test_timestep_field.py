"""Films with a noise level for each frame, through the host's own sampling: small networks, and the demo video model."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from nightly import daily
from tiny_networks import TINY, conditioning, tiny_network

STEPS = 4
FAMILIES = ["WAN21_T2V", "LTXV"]
WAN22 = replace(
    TINY["WAN21_T2V"], settings={**TINY["WAN21_T2V"].settings, "in_dim": 48, "out_dim": 48}, latent=(1, 48, 2, 8, 8)
)  # its frames under a mask are told 0 and stay without noise

WAN = TINY["WAN21_T2V"]
CONTROLLED = replace(  # Wan Fun Control: the film that it follows stands beside the noise, in channels of its own
    WAN, settings={**WAN.settings, "in_dim": 48, "out_dim": 16}, extras={"concat_latent_image": (1, 32, 5, 8, 8)}
)
SHALLOW = replace(WAN, settings={**WAN.settings, "num_layers": 2})


@pytest.fixture(autouse=True)
def _more_networks(monkeypatch):
    monkeypatch.setitem(TINY, "WAN22_T2V", WAN22)
    monkeypatch.setitem(TINY, "WAN21_FunControl2V", CONTROLLED)


@pytest.fixture(scope="module")
def networks(host):
    """family -> a small network of it, built once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny_network(family)
        return made[family]

    return get


def film(family, frames=5, seed=1):
    _, c, _, h, w = TINY[family].latent
    return 0.5 * torch.randn(1, c, frames, h, w, generator=torch.Generator().manual_seed(seed))


def field(host, **wish):
    return host.call("AttuneTimestepField", **wish)[0]


def draw(host, model, family, sampler, latent, steps=STEPS, cfg=3.0, mask=None, denoise=1.0):
    """SamplerCustom's output for a small network."""
    (sigmas,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=denoise)
    samples = {"samples": latent} | ({} if mask is None else {"noise_mask": mask})
    return host.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=7, cfg=cfg, positive=conditioning(family, 1),
        negative=conditioning(family, 2), sampler=sampler, sigmas=sigmas, latent_image=samples,
    )[0]["samples"]  # fmt: skip


def stock(host, name="euler"):
    return host.call("KSamplerSelect", sampler_name=name)[0]


@pytest.mark.parametrize("family", [*FAMILIES, "WAN22_T2V"])
def test_equal_levels_are_the_stock_euler(host, networks, family):
    """Also from a picture, and under a mask that changes within the frames."""
    model, latent = networks(family), film(family)
    mask = torch.zeros(5, *latent.shape[-2:])
    mask[..., latent.shape[-1] // 2 :] = 1
    equal = field(host, preset="free", levels="1", solver="euler")
    for changed in ({}, {"denoise": 0.6}, {"mask": mask}):
        want = draw(host, model, family, stock(host), latent, **changed)
        got = draw(host, model, family, equal, latent, **changed)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("family", daily(FAMILIES, "WAN21_T2V"))
@pytest.mark.parametrize(
    ("preset", "more", "given"),
    [
        ("first frame given", {}, [0]), ("first and last given", {}, [0, 4]), ("extend", {"given_frames": 3}, [0, 1, 2]),
        ("staircase", {"given_frames": 2, "window": 3}, [0, 1]), ("free", {"levels": "0, 0.5, 1"}, [0]),
    ],
)  # fmt: skip
def test_given_frames_are_unchanged_and_the_others_are_not(host, networks, family, preset, more, given):
    latent = film(family)
    out = draw(host, networks(family), family, field(host, preset=preset, given_noise=0.05, **more), latent)
    moved = (out - latent).abs().amax(dim=(0, 1, 3, 4))
    assert out.isfinite().all() and float(moved[given].max()) <= 1e-6
    assert float(moved[[i for i in range(5) if i not in given]].min()) > 0.1


def told_to(model, calls):
    """A clone of MODEL that notes what each call of its network is told, and the sigma that the host gives."""
    clone = model.clone()

    def note(executor, x, timestep, *args, **kwargs):
        options = next(one for one in [*args, *kwargs.values()] if isinstance(one, dict) and "sigmas" in one)
        calls.append((x.shape[2], timestep.clone(), float(options["sigmas"][0])))
        return executor(x, timestep, *args, **kwargs)

    clone.add_wrapper_with_key("diffusion_model", "test", note)
    return clone


def test_the_network_is_told_every_frames_own_timestep(host, networks):
    calls, model = [], networks("WAN21_T2V")
    draw(host, told_to(model, calls), "WAN21_T2V", field(host, preset="free", levels="0, 0.5, 1"), film("WAN21_T2V"))
    assert len(calls) == STEPS
    for frames, told, sigma in calls:
        want = 1000 * sigma * torch.tensor([0, 0.25, 0.5, 0.75, 1])
        assert frames == 5
        torch.testing.assert_close(told, want.expand(2, -1), rtol=1e-5, atol=1e-3)


def test_a_staircase_sees_one_window_at_a_time_and_costs_what_it_says(host, networks, caplog):
    calls, model, latent = [], networks("WAN21_T2V"), torch.zeros(1, 16, 9, 8, 8)
    sampler = field(host, preset="staircase", given_frames=0, window=4, overlap=2, solver="euler")
    with caplog.at_level("INFO"):
        out = draw(host, told_to(model, calls), "WAN21_T2V", sampler, latent)
    assert out.isfinite().all() and {frames for frames, *_ in calls} == {4}
    assert len(calls) == STEPS + 2 * 8 and f"{len(calls)} evaluations" in caplog.text
    assert any(int((told[0] == 0).sum()) >= 2 for _, told, _ in calls[-3:])  # finished frames stay in sight


def test_regions_of_an_ltx_film_have_levels_of_their_own(host, networks):
    """A token's level is the mask's: the black half stays, which a frame-wise network is not asked for."""
    latent, mask = film("LTXV", 3), torch.ones(3, 4, 4)
    mask[..., :2] = 0
    out = draw(host, networks("LTXV"), "LTXV", field(host, preset="free", mask=mask), latent)
    torch.testing.assert_close(out[..., :2], latent[..., :2], rtol=0, atol=1e-6)
    assert float((out - latent)[..., 2:].abs().min(dim=1).values.max()) > 0.01
    wan = torch.ones(5, 8, 8)
    wan[..., :4] = 0
    with pytest.raises(ValueError, match="one noise level for each frame, but 'mask' differs within a frame"):
        draw(host, networks("WAN21_T2V"), "WAN21_T2V", field(host, preset="free", mask=wan), film("WAN21_T2V"))


def test_a_cosmos_film_goes_the_way_of_its_own_arithmetic(host):
    """Levels above 1, an input that is scaled: equal levels are the stock euler, a given frame stays."""
    from comfy.supported_models import CosmosT2IPredict2  # noqa: F401 - the host has the family

    model, family = tiny_network("CosmosT2IPredict2"), "CosmosT2IPredict2"
    latent = 0.5 * torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    want = draw(host, model, family, stock(host), latent)
    got = draw(host, model, family, field(host, preset="free", levels="1", solver="euler"), latent)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    out = draw(host, model, family, field(host), latent)
    torch.testing.assert_close(out[:, :, 0], latent[:, :, 0], rtol=0, atol=1e-6)


def test_hunyuans_first_frame_has_a_level_of_its_own(host, networks):
    """Its network reads one timestep for the first frame and one for the others: equal, given, and in between."""
    family = "HunyuanVideo"
    model, latent = networks(family), film(family)
    want = draw(host, model, family, stock(host), latent)
    got = draw(host, model, family, field(host, preset="free", levels="1", solver="euler"), latent)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    told, clone = [], model.clone()
    forward = inspect.signature(model.model.diffusion_model._forward)

    def note(executor, x, timestep, *args, **kwargs):
        given = forward.bind(x, timestep, *args, **kwargs).arguments
        told.append((timestep.tolist(), given.get("guiding_frame_index")))
        return executor(x, timestep, *args, **kwargs)

    clone.add_wrapper_with_key("diffusion_model", "test", note)
    out = draw(host, clone, family, field(host, given_noise=0.05), latent)
    assert out.isfinite().all() and float((out - latent)[:, :, 0].abs().max()) <= 1e-6
    assert float((out - latent)[:, :, 1:].abs().amax(dim=(0, 1, 3, 4)).min()) > 0.1
    assert len(told) == 2 * STEPS and {len(one) for one, _ in told} == {1}  # the host's code for it takes one
    assert all(float(first) == pytest.approx(50) for _, first in told)  # 0.05, as it is shown
    assert [one[0] for one, _ in told[:2]] == [1000, 1000] and all(one[0] > 100 for one, _ in told)
    half = draw(host, model, family, field(host, preset="free", levels="0.5, 1, 1, 1, 1"), latent)
    assert half.isfinite().all() and not torch.equal(half, out)
    for wish in ({"preset": "first and last given"}, {"preset": "staircase", "given_frames": 1, "window": 3}):
        with pytest.raises(ValueError, match="reads one noise level for the first frame and one for all others"):
            draw(host, model, family, field(host, **wish), latent)


def test_what_cannot_be_sampled_is_said_before_the_first_call(host, networks):
    wan, refused = networks("WAN21_T2V"), []
    model, latent = told_to(wan, refused), film("WAN21_T2V")

    def says(text, wish, latent=latent, family="WAN21_T2V", model=model, **more):
        with pytest.raises(ValueError, match=text):
            draw(host, model, family, field(host, **wish), latent, **more)

    says("takes given frames from the latent, but that is empty", {}, torch.zeros_like(latent))
    says("Of 5 frames 5 at the start", {"preset": "extend", "given_frames": 5})
    says("set 'given_frames' to 1 or more", {"preset": "extend", "given_frames": 0})
    says("'free' takes the frames' levels from 'levels'", {"preset": "free"})
    says("it is '0, x'", {"preset": "free", "levels": "0, x"})
    says("no room for a block of 3", {"preset": "staircase", "window": 4, "block": 3, "overlap": 2})
    (differential,) = host.call("DifferentialDiffusion", model=model)
    says("Differential Diffusion reads a mask by one", {}, model=differential, mask=torch.ones(5, 8, 8))
    assert not refused
    vace = "WAN21_Vace"  # its network reads a film's timestep in its own way
    says("reads one noise level for all it samples", {}, film(vace), vace, tiny_network(vace))
    (sigmas,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=4, denoise=1.0)
    with pytest.raises(ValueError, match="must fall throughout and end in 0"):
        host.call(
            "SamplerCustom", model=model, add_noise=True, noise_seed=7, cfg=1.0, positive=conditioning("WAN21_T2V", 1),
            negative=[], sampler=field(host), sigmas=sigmas[:3], latent_image={"samples": latent},
        )  # fmt: skip


def test_nothing_is_left_behind(host, networks):
    """Another run of the same MODEL is bit for bit what it was, also after an error inside the network."""
    model, latent = networks("WAN21_T2V"), film("WAN21_T2V")
    before = draw(host, model, "WAN21_T2V", stock(host), latent)
    draw(host, model, "WAN21_T2V", field(host), latent)
    broken = model.clone()

    def fail(executor, *args, **kwargs):
        raise RuntimeError("broken")

    broken.add_wrapper_with_key("diffusion_model", "test", fail)
    with pytest.raises(RuntimeError, match="broken"):
        draw(host, broken, "WAN21_T2V", field(host), latent)
    assert "process_timestep" not in model.model.__dict__
    assert torch.equal(draw(host, model, "WAN21_T2V", stock(host), latent), before)


def with_lora(model):
    """MODEL with a LoRA of rank 2 on a block's attention, by the host's own loader."""
    import comfy.sd

    generator, name = torch.Generator().manual_seed(5), "diffusion_model.blocks.1.self_attn.q"
    lora = {
        f"{name}.lora_down.weight": torch.randn(2, 48, generator=generator),
        f"{name}.lora_up.weight": torch.randn(48, 2, generator=generator),
    }
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def test_a_lora_acts_as_in_the_stock_run(host, networks):
    model, latent = networks("WAN21_T2V"), film("WAN21_T2V")
    adapted, plain = with_lora(model), draw(host, model, "WAN21_T2V", stock(host), latent)
    want = draw(host, adapted, "WAN21_T2V", stock(host), latent)
    got = draw(host, adapted, "WAN21_T2V", field(host, preset="free", levels="1", solver="euler"), latent)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    given = draw(host, adapted, "WAN21_T2V", field(host), latent)
    assert float((given - latent)[:, :, 0].abs().max()) <= 1e-6 and float((want - plain).abs().max()) > 1e-2
    assert float((given - draw(host, model, "WAN21_T2V", field(host), latent)).abs().max()) > 1e-2


def test_a_film_to_follow_acts_as_in_the_stock_run_and_cannot_be_cut(host):
    family = "WAN21_FunControl2V"
    model, latent = tiny_network(family), film("WAN21_T2V")
    want = draw(host, model, family, stock(host), latent)
    got = draw(host, model, family, field(host, preset="free", levels="1", solver="euler"), latent)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    stairs = {"preset": "staircase", "given_frames": 2}
    out = draw(host, model, family, field(host, **stairs), latent)
    assert float((out - latent)[:, :, :2].abs().max()) <= 1e-6
    with pytest.raises(ValueError, match="the prompt carries pictures for all of it"):
        draw(host, model, family, field(host, **stairs, window=3), latent)


def test_a_controlnet_is_asked_as_in_the_stock_run_and_cannot_be_cut(host, networks, monkeypatch):
    """None of these networks reads its answer in this host; what is asked is the run's level, not a frame's."""
    from comfy.controlnet import ControlBase

    asked = []

    class Control(ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            asked.append((tuple(x_noisy.shape), [round(float(one), 6) for one in t]))
            return {}

    plain = conditioning
    with_control = lambda *of: [
        [context, {**extras, "control": control, "control_apply_to_uncond": True}] for context, extras in plain(*of)
    ]
    control, model, latent = Control(), networks("WAN21_T2V"), film("WAN21_T2V")
    monkeypatch.setitem(globals(), "conditioning", with_control)
    draw(host, model, "WAN21_T2V", stock(host), latent)
    want = asked.copy()
    asked.clear()
    draw(host, model, "WAN21_T2V", field(host), latent)
    assert asked == want and len(want) >= STEPS
    with pytest.raises(ValueError, match=r"the prompt carries pictures for all of it \(ControlNet\)"):
        draw(host, model, "WAN21_T2V", field(host, preset="staircase", window=3), latent)


@pytest.mark.nightly  # compiled networks of our own: test_propagation_transformer.py
def test_a_compiled_network_draws_the_same_film(host, monkeypatch):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    monkeypatch.setitem(TINY, "WAN21_T2V", SHALLOW)
    model, graphs = tiny_network("WAN21_T2V"), []
    compiled, sampler, latent = model.clone(), field(host, preset="staircase", window=3, overlap=1), film("WAN21_T2V")
    set_torch_compile_wrapper(compiled, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    got = draw(host, compiled, "WAN21_T2V", sampler, latent, steps=2)
    torch.compiler.reset()
    want = draw(host, model, "WAN21_T2V", sampler, latent, steps=2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert 1 <= len(graphs) <= 2  # whatever the levels are


def test_without_guidance_a_step_is_one_film_through_the_network(host, networks):
    calls, model, latent = [], networks("WAN21_T2V"), film("WAN21_T2V")
    out = draw(host, told_to(model, calls), "WAN21_T2V", field(host), latent, cfg=1.0)
    assert [told.shape for _, told, _ in calls] == [(1, 5)] * STEPS and float(
        (out - latent)[:, :, 0].abs().max()
    ) <= 1e-6
    want = draw(host, model, "WAN21_T2V", stock(host), latent, cfg=1.0)
    got = draw(host, model, "WAN21_T2V", field(host, preset="free", levels="1", solver="euler"), latent, cfg=1.0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_two_films_in_a_batch_are_what_each_is_alone(host, networks):
    model, pair = networks("WAN21_T2V"), torch.cat([film("WAN21_T2V", seed=1), film("WAN21_T2V", seed=2)])
    noise = torch.randn(1, *pair.shape[1:], generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1, -1)
    given_noise = lambda n: type("Noise", (), {"seed": 3, "generate_noise": lambda self, latent: noise[:n].clone()})()
    (sigmas,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)
    positive, negative = conditioning("WAN21_T2V", 1), conditioning("WAN21_T2V", 2)
    (guider,) = host.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)

    def drawn(latent):
        return host.call(
            "SamplerCustomAdvanced", noise=given_noise(len(latent)), guider=guider,
            sampler=field(host, preset="staircase", window=4, overlap=2), sigmas=sigmas, latent_image={"samples": latent},
        )[0]["samples"]  # fmt: skip

    both, each = drawn(pair), torch.cat([drawn(one) for one in pair.split(1)])
    torch.testing.assert_close(both, each, rtol=0, atol=1e-5 * float(each.abs().max()))
    assert float((both - pair)[:, :, 0].abs().max()) <= 1e-6 and not torch.equal(both[0], both[1])


def test_stop_ends_the_run_at_the_next_call_and_leaves_nothing(host, networks):
    import comfy.model_management as management

    model, latent, calls = networks("WAN21_T2V"), film("WAN21_T2V"), []
    before, stopped = draw(host, model, "WAN21_T2V", field(host), latent), model.clone()

    def press(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing(True)
        return executor(*args, **kwargs)

    stopped.add_wrapper_with_key("diffusion_model", "test", press)
    with pytest.raises(management.InterruptProcessingException):
        draw(host, stopped, "WAN21_T2V", field(host), latent)
    assert len(calls) == 2 and "process_timestep" not in model.model.__dict__
    assert torch.equal(draw(host, model, "WAN21_T2V", field(host), latent), before)


def test_a_film_takes_frames_at_its_ends_and_comes_apart(host):
    empty, frames = (
        {"samples": torch.zeros(2, 3, 5, 4, 4)},
        {"samples": torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 4) + 1},
    )
    whole, batch = host.call("AttuneFilm", film=empty, start=frames, end={"samples": torch.full((2, 3, 1, 4, 4), 9.0)})
    assert whole["samples"][:, 0, :, 0, 0].tolist() == [[1, 2, 0, 0, 9]] * 2 and not empty["samples"].any()
    assert batch["samples"].shape == (10, 3, 4, 4) and batch["samples"][:, 0, 0, 0].tolist() == [1, 2, 0, 0, 9] * 2
    for film, start, text in (
        ({"samples": torch.zeros(1, 3, 4, 4)}, None, "must be a latent of a film"),
        (empty, {"samples": torch.zeros(1, 4, 4, 4)}, "encode a picture of the film's size with the same VAE"),
        (empty, {"samples": torch.zeros(6, 3, 4, 4)}, "The film has 5 frames, but 'start' and 'end' have 6 and 0"),
        (empty, {"samples": torch.zeros(3, 3, 1, 4, 4)}, "'start' holds 3 films, but 'film' holds 2"),
    ):
        with pytest.raises(ValueError, match=text):
            host.call("AttuneFilm", film=film, start=start)
