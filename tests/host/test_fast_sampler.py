"""Attune Fast Sampler in the host: the first run is the user's own, the next ones are short, and nothing else changes."""

from __future__ import annotations

import json
import time

import pytest
import torch

from harness import counting
from nightly import daily
from pack.kernels.fitted_sampler import fidelity
from pack.models.calibration import SAMPLER
from pack.models.store import load_profile

STEPS, SHORT = 9, 4


class Drawn:
    """A picture, how often the network was asked for it, and what the node said."""

    def __init__(self, kit, seed=1, steps=STEPS, cfg=3.0, solver="euler", denoise=1.0, model=None, latent=None, stock=False,
                 positive=None, sigmas=None, noise=True, **wish):  # fmt: skip
        model = model or kit.model
        (sampler,) = kit.host.call("KSamplerSelect", sampler_name=solver)
        self.said: list[str] = []
        self.meanwhile: list[str] = []
        if not stock:
            given = {"use": "auto", "evaluations": SHORT, "fidelity": 5.0, "check_every": 0, **wish}
            (sampler,) = kit.host.call("AttuneFastSampler", sampler=sampler, **given)
            sampler._say, sampler.progress = self.said.append, self.meanwhile.append
        if sigmas is None:
            (sigmas,) = kit.host.call("BasicScheduler", model=model, scheduler="beta", steps=steps, denoise=denoise)
        with counting(model) as calls:
            out, _ = kit.host.call(
                "SamplerCustom", model=model, add_noise=noise, noise_seed=seed, cfg=cfg,
                positive=positive or kit.positive, negative=kit.negative, sampler=sampler, sigmas=sigmas,
                latent_image=latent or kit.empty(),
            )  # fmt: skip
        self.latent, self.calls = out["samples"], calls[0]

    @property
    def text(self) -> str:
        (said,) = self.said
        return said

    @property
    def full(self) -> bool:
        return self.text.startswith("A full run")

    @property
    def learned(self) -> bool:
        return "Learned" in self.text


@pytest.mark.parametrize("kit", ["unet", "flow"], indirect=True)
def test_the_first_picture_is_the_users_own_to_the_bit_and_the_second_is_short(kit, host):
    first, stock = Drawn(kit), Drawn(kit, stock=True)
    assert torch.equal(first.latent, stock.latent)
    assert first.full and first.learned and first.calls == STEPS + 2 * SHORT
    second = Drawn(kit, seed=2)
    assert second.calls == SHORT and not second.full
    assert not torch.equal(second.latent, Drawn(kit, seed=2, stock=True).latent)
    assert torch.equal(second.latent, Drawn(kit, seed=2).latent)
    (file,) = host.profiles.glob("*.json")
    kept = load_profile(file)
    assert kept.kind == SAMPLER and kept.steps == STEPS and [one.run.steps for one in kept.runs] == [SHORT]


def test_the_short_run_is_nearer_than_as_many_plain_steps(net):
    def deviation(one):
        return float((one.latent - Drawn(net, seed=4, steps=30, latent=large, stock=True).latent).square().mean())

    large = {"samples": torch.zeros(1, net.channels, 16, 16)}
    Drawn(net, seed=3, steps=30, latent=large, evaluations=8)
    short = Drawn(net, seed=4, steps=30, latent=large, evaluations=8)
    assert short.calls == 8
    assert deviation(short) < deviation(Drawn(net, seed=4, steps=8, latent=large, stock=True)) / 2


SHAPE = {"latent": {"samples": torch.zeros(1, 4, 16, 8)}}
CHANGES = [{"cfg": 3.8}, {"cfg": 1.4}, {"steps": STEPS + 2}, {"denoise": 0.7}, {"solver": "dpmpp_2m"}, SHAPE]


@pytest.mark.parametrize("change", daily(CHANGES, CHANGES[0], SHAPE), ids=lambda change: next(iter(change)))
def test_what_was_not_learned_is_run_in_full_and_learned_beside_it(net, host, change):
    Drawn(net)
    other = Drawn(net, seed=2, **change)
    assert other.full and other.learned
    assert torch.equal(other.latent, Drawn(net, seed=2, stock=True, **change).latent)
    assert len(list(host.profiles.glob("*.json"))) == 2
    assert Drawn(net, seed=3).calls == SHORT and Drawn(net, seed=3, **change).calls == SHORT


def test_other_weights_loras_prompts_and_seeds(net):
    Drawn(net)
    key, weight = net.weight(net.model)
    other = net.model.clone()
    other.add_patches({key: (torch.full_like(weight, 1e-3),)}, 1.0)
    assert Drawn(net, model=other).full
    assert Drawn(net, seed=9, positive=net.encode("a red apple on a white background")).calls == SHORT
    assert Drawn(net, seed=9, latent=net.empty(2)).calls == SHORT


def test_another_kind_of_conditioning_or_guidance_is_a_full_run(net, host):
    Drawn(net)
    (areas,) = host.call("ConditioningSetAreaPercentage", conditioning=net.positive, width=0.5, height=1.0, x=0.0, y=0.0,
                         strength=1.0)  # fmt: skip
    assert Drawn(net, positive=areas).full
    (rescaled,) = host.call("RescaleCFG", model=net.model, multiplier=0.7)
    assert Drawn(net, model=rescaled).full
    (more,) = host.call("RescaleCFG", model=net.model, multiplier=0.3)
    assert Drawn(net, model=more).full
    assert Drawn(net, model=rescaled, seed=5).calls == SHORT


class Counting:
    """Another pack's function on the MODEL, which counts its calls."""

    def __init__(self, scale: float):
        self.scale, self.step = scale, 0

    def __call__(self, args):
        self.step += 1
        return args["denoised"] * self.scale


def numbered(scale):
    step = 0

    def function(args):
        nonlocal step
        step += 1
        return args["denoised"] * scale

    return function


@pytest.mark.parametrize("made", [Counting, lambda scale: Counting(scale).__call__, numbered])
def test_what_another_node_counts_makes_no_other_run_and_its_numbers_do(net, made):
    def behind(scale):
        model = net.model.clone()
        model.set_model_sampler_post_cfg_function(made(scale))
        return model

    model = behind(1.0)
    assert Drawn(net, model=model).learned
    assert Drawn(net, seed=2, model=model).calls == Drawn(net, seed=2, model=behind(1.0)).calls == SHORT
    assert Drawn(net, seed=2, model=behind(0.99)).full


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_beside_a_cache_of_the_hosts_every_run_is_the_users_own(net, host, name):
    cache = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    model = host.call(name, model=net.model, **cache)[0]
    drawn = Drawn(net, model=model)
    assert drawn.full and f"{name} is on this MODEL and counts its steps" in drawn.text
    assert torch.equal(drawn.latent, Drawn(net, model=model, stock=True).latent)


def test_no_fault_of_another_node_while_a_run_is_learned_costs_the_picture(net):
    def once(args):
        if len(levels) == STEPS:
            raise TypeError("of another pack")
        levels.append(args["sigma"])
        return args["denoised"]

    model, levels = net.model.clone(), []
    model.set_model_sampler_post_cfg_function(once)
    drawn = Drawn(net, model=model)
    assert "Nothing was learned: of another pack" in drawn.text
    assert torch.equal(drawn.latent, Drawn(net, stock=True).latent)


@pytest.mark.parametrize("solver", daily(["dpmpp_2m", "heun", "uni_pc", "lms", "res_multistep"], "heun", "uni_pc"))
def test_every_solver_that_adds_no_noise_is_learned(net, solver):
    assert Drawn(net, solver=solver).learned
    assert Drawn(net, solver=solver, seed=2).calls == SHORT


@pytest.mark.parametrize(
    "solver", daily(["euler_ancestral", "dpmpp_2m_sde", "lcm", "dpm_adaptive"], "euler_ancestral", "dpm_adaptive")
)
def test_solvers_that_cannot_be_learned_run_as_they_are(net, host, solver):
    drawn = Drawn(net, solver=solver)
    assert drawn.full and not drawn.learned and solver in drawn.text
    assert torch.equal(drawn.latent, Drawn(net, solver=solver, stock=True).latent)
    assert not list(host.profiles.glob("*.json"))


def test_a_run_that_stops_early_or_starts_from_a_picture_is_learned_for_itself(net, host):
    (sigmas,) = host.call("BasicScheduler", model=net.model, scheduler="beta", steps=20, denoise=1.0)
    high, low = host.call("SplitSigmas", sigmas=sigmas, step=10)
    for half, noise, latent in ((high, True, None), (low, False, net.picture())):
        given = {"sigmas": half, "noise": noise, "latent": latent}
        first = Drawn(net, **given)
        assert first.learned and torch.equal(first.latent, Drawn(net, stock=True, **given).latent)
        short, stock = Drawn(net, seed=2, **given), Drawn(net, seed=2, stock=True, **given)
        assert short.calls == SHORT
        assert float((short.latent - stock.latent).square().mean()) < 0.05 * float(stock.latent.square().mean())


def test_a_mask_uses_what_was_learned_but_teaches_nothing(net, host):
    masked = {**net.picture(), "noise_mask": torch.cat([torch.ones(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)], dim=3)}
    first = Drawn(net, latent=masked, denoise=0.8)
    assert first.full and "mask" in first.text and not list(host.profiles.glob("*.json"))
    Drawn(net, latent=net.picture(), denoise=0.8)
    short = Drawn(net, latent=masked, denoise=0.8)
    assert short.calls == SHORT
    torch.testing.assert_close(short.latent[..., 4:], masked["samples"][..., 4:], rtol=1e-3, atol=1e-3)


def test_what_was_not_proved_is_not_used_and_not_learned_again(net):
    first = Drawn(net, fidelity=99.0)
    assert "less than" in first.text and first.calls == STEPS + 2 * SHORT
    second = Drawn(net, fidelity=99.0, seed=2)
    assert second.full and second.calls == STEPS and "allow more evaluations" in second.text
    assert Drawn(net, fidelity=5.0, seed=2).calls == SHORT


def test_the_fewest_evaluations_that_are_faithful_enough(net, host):
    Drawn(net, evaluations=0, fidelity=25.0)
    (file,) = host.profiles.glob("*.json")
    *short_of, enough = load_profile(file).runs
    assert enough.psnr >= 25 and all(one.psnr < 25 for one in short_of)
    assert Drawn(net, evaluations=0, fidelity=25.0, seed=2).calls == enough.run.steps


def test_more_evaluations_are_learned_beside_the_fewer(net, host):
    Drawn(net)
    more = Drawn(net, evaluations=8)
    assert more.learned and Drawn(net, evaluations=8, seed=3).calls == 8 and Drawn(net, seed=3).calls == SHORT
    (file,) = host.profiles.glob("*.json")
    assert [one.run.steps for one in load_profile(file).runs] == [SHORT, 8]


def test_full_run_learn_again_and_forget(net, host):
    stock = Drawn(net, stock=True)
    Drawn(net)
    full = Drawn(net, use="full run")
    assert full.calls == STEPS and torch.equal(full.latent, stock.latent)
    again = Drawn(net, use="learn again", seed=7)
    assert again.learned and len(list(host.profiles.glob("*.json"))) == 1
    gone = Drawn(net, use="forget")
    assert (
        torch.equal(gone.latent, stock.latent) and "forgotten" in gone.text and not list(host.profiles.glob("*.json"))
    )
    assert "nothing to forget" in Drawn(net, use="forget").text
    assert Drawn(net).learned


def test_a_picture_in_full_now_and_then_checks_the_short_run(net, host):
    Drawn(net)
    texts = [Drawn(net, seed=seed, check_every=2).text for seed in range(2, 7)]
    full = ["checked" in text for text in texts]
    assert full == [False, False, True, False, False]
    (file,) = host.profiles.glob("*.json")
    assert load_profile(file).runs[0].pictures == 1


def test_a_named_calibration_is_used_or_refused_with_the_reason(net, host):
    Drawn(net)
    (file,) = host.profiles.glob("*.json")
    assert Drawn(net, use=file.name, seed=2).calls == SHORT
    with pytest.raises(ValueError, match=r"fitted at cfg 3, but the run has 8.*Set 'use'.*to 'auto'"):
        Drawn(net, use=file.name, cfg=8.0)


@pytest.mark.parametrize("base", [Exception, BaseException])  # as the hosts' interrupt is, and the newer ones'
def test_a_run_that_is_stopped_leaves_nothing_and_one_stopped_while_learning_gives_its_picture(
    net, host, monkeypatch, base
):
    import comfy.model_management as management

    stop = type("Interrupt", (base,), {})
    monkeypatch.setattr(management, "InterruptProcessingException", stop)
    seen = []

    def at(call):
        def forward(self, x, *args, **kwargs):
            seen.append(1)
            if len(seen) == call:
                raise stop
            return whole(self, x, *args, **kwargs)

        return forward

    network = type(net.model.model.diffusion_model)
    whole = network.forward
    monkeypatch.setattr(network, "forward", at(4))
    with pytest.raises(stop):
        Drawn(net)
    assert not list(host.profiles.glob("*.json"))
    monkeypatch.setattr(network, "forward", whole)
    stock = Drawn(net, stock=True)
    seen.clear()
    monkeypatch.setattr(network, "forward", at(STEPS + 3))
    drawn = Drawn(net)
    assert torch.equal(drawn.latent, stock.latent) and "Nothing was learned" in drawn.text
    assert not list(host.profiles.glob("*.json"))


def test_a_full_disk_costs_no_picture(net, host, monkeypatch):
    store = host.module("models.store")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    drawn = Drawn(net)
    assert "No space left" in drawn.text and torch.equal(drawn.latent, Drawn(net, stock=True).latent)
    assert not list(host.profiles.glob("*.json"))


def test_beside_propagation_it_steps_back(unet, host):
    from methods import REUSE

    (reused,) = host.call(
        "AttunePropagation", model=unet.model, **{**REUSE, "reuse": "encoder reused", "parallel": "off"}
    )
    drawn = Drawn(unet, model=reused)
    assert drawn.full and "Propagation" in drawn.text
    assert torch.equal(drawn.latent, Drawn(unet, model=reused, stock=True).latent)


def test_a_fit_that_measures_is_left_alone(net, host):
    Drawn(net)
    calibrating = host.module("nodes._host.calibrating")
    assert Drawn(net, model=calibrating.calibrating(net.model), seed=2).calls == STEPS


def test_the_ksampler_of_the_pack_learns_too(net, host):
    given = {
        "model": net.model, "steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "schedule": "KL-optimal",
        "positive": net.positive, "negative": net.negative, "latent_image": net.empty(),
    }  # fmt: skip

    def drawn(seed, **more):
        with counting(net.model) as calls:
            (out,) = host.call("AttuneKSampler", seed=seed, **given, **more)
        return out["samples"], calls[0]

    wish = host.module("nodes._plan.fitted_sampler").Wish()
    given["steps"] = wish.evaluations + 2
    stock, _ = drawn(1)
    first, calls = drawn(1, fast="auto")
    assert torch.equal(first, stock) and calls == given["steps"] + 2 * wish.evaluations
    (file,) = host.profiles.glob("*.json")
    least = load_profile(file).runs[0].psnr
    assert drawn(2, fast="auto")[1] == (wish.evaluations if least >= wish.fidelity else given["steps"])
    assert drawn(2)[1] == given["steps"]


@pytest.mark.parametrize(("node", "widget", "place"), [("AttuneFastSampler", "use", 0), ("AttuneKSampler", "fast", 7)])
def test_where_a_widgets_value_stands_in_a_workflow(host, node, widget, place):
    """As in the files of workflows/: required widgets first, and behind a seed what becomes of it."""
    found = host.module("nodes._host.api").widget_place(host.nodes.NODE_CLASS_MAPPINGS[node], widget)
    assert found == place


def test_of_several_fits_the_one_of_the_nearest_guidance_serves(net, host):
    Drawn(net, cfg=3.0)
    Drawn(net, cfg=5.0)
    by_cfg = {load_profile(file).cfg: file.name for file in host.profiles.glob("*.json")}
    assert f"('{by_cfg[3.0]}')" in Drawn(net, cfg=3.2, seed=2).text
    assert f"('{by_cfg[5.0]}')" in Drawn(net, cfg=4.6, seed=2).text


def test_a_check_waits_for_a_run_that_can_be_checked_and_a_named_calibration_is_never_checked(net, host):
    masked = {**net.picture(), "noise_mask": torch.ones(1, 1, 8, 8)}
    given = {"latent": net.picture(), "denoise": 0.8, "check_every": 1}
    Drawn(net, **given)
    (file,) = host.profiles.glob("*.json")
    was = load_profile(file).id
    assert Drawn(net, seed=2, **given).calls == SHORT
    assert Drawn(net, seed=3, **{**given, "latent": masked}).calls == SHORT
    assert Drawn(net, seed=4, use=file.name, **given).calls == SHORT
    assert "checked" in Drawn(net, seed=5, **given).text
    assert load_profile(file).runs[0].pictures == 1 and load_profile(file).id == was


def test_numbers_of_the_conditioning_count_and_words_do_not(net, host):
    guided = lambda text, guidance: host.call("FluxGuidance", conditioning=net.encode(text), guidance=guidance)[0]
    Drawn(net, positive=guided("a cat on a black background", 3.5))
    assert Drawn(net, seed=2, positive=guided("two words", 3.5)).calls == SHORT
    assert Drawn(net, seed=2, positive=guided("a cat on a black background", 2.0)).full


def test_weights_that_have_no_name_are_never_taken_for_others(net, host, monkeypatch):
    """As those packed in an unknown form, of which any two would match."""
    Drawn(net)
    identity = host.module("nodes._host.identity")
    monkeypatch.setattr(identity, "weights_hash", lambda model: "")
    drawn = Drawn(net, seed=2)
    assert drawn.full and "packed" in drawn.text and drawn.calls == STEPS


def test_a_picture_that_leaves_the_fitted_range_is_made_in_full(net, host):
    """The sign is read off the short run itself: here a calibration whose fit is said to have bent hardly at all."""
    Drawn(net)
    (file,) = host.profiles.glob("*.json")
    fields = json.loads(file.read_text())
    fields["runs"][0]["shares"] = [share / 10 for share in fields["runs"][0]["shares"]]
    file.write_text(json.dumps(fields))
    drawn, stock = Drawn(net, seed=2), Drawn(net, seed=2, stock=True)
    assert torch.equal(drawn.latent, stock.latent) and "is not trusted here" in drawn.text
    assert drawn.calls == SHORT + STEPS
    assert Drawn(net, seed=2, use=file.name).calls == SHORT  # named, so that a picture comes out again as it was


def test_while_it_learns_it_says_how_long_that_takes(net):
    first, *later = Drawn(net, check_every=1).meanwhile
    assert first == f"A full run of {STEPS} steps, to learn from"
    assert later[0].startswith(f"Learning: 0 of at most {2 * SHORT} evaluations, about ") and later[0].endswith(" left")
    assert Drawn(net, seed=2, check_every=1).meanwhile == []
    assert "Checking the short run, 1 s" in Drawn(net, seed=3, check_every=1).meanwhile


def test_the_seconds_on_the_card_are_those_of_the_evaluations_alone(net, host, monkeypatch):
    """Not those of the search on paper, which the short run does not make again."""
    kernel, facts = host.module("kernels.fitted_sampler"), []
    search = kernel.search_levels
    monkeypatch.setattr(kernel, "search_levels", lambda *given: (time.sleep(2), search(*given))[1])
    monkeypatch.setattr(host.module("nodes.fast_sampler"), "draw_card", lambda _, said, __: facts.extend(said))
    Drawn(net)
    (short,) = (fact for fact in facts if fact.startswith(f"{SHORT} evaluations: "))
    assert float(short.split()[2]) < 1.0


@pytest.mark.parametrize("dtype", daily([torch.bfloat16, torch.float16], torch.bfloat16), ids=str)
def test_latents_in_half_precision(kit, dtype):
    """The host samples in the precision of the latent; its output is what it is without the node."""
    given = {"latent": {"samples": kit.empty()["samples"].to(dtype)}}
    first, stock = Drawn(kit, **given), Drawn(kit, stock=True, **given)
    assert first.learned and torch.equal(first.latent, stock.latent), first.said
    second, other = Drawn(kit, seed=2, **given), Drawn(kit, seed=2, stock=True, **given)
    assert second.calls == SHORT and second.latent.dtype == other.latent.dtype and second.latent.isfinite().all()
    assert fidelity(second.latent, other.latent) > fidelity(
        Drawn(kit, seed=2, steps=SHORT, stock=True, **given).latent, other.latent
    )


@pytest.mark.parametrize("solver", ["euler", "heun", "heunpp2", "dpm_2", "dpmpp_2m"])
def test_what_is_recorded_is_where_the_solver_was_and_not_where_it_tried(host, unet, solver):
    """Solvers of second order ask at the next level before they are there."""
    import comfy.k_diffusion.sampling as stock

    from pack.nodes._host.recorder import Recorder

    class Guider:
        model_patcher = unet.model

        def __call__(self, x, sigma, **_):
            return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)  # the path is no straight line

    sigmas, been = torch.tensor([10.0, 4.0, 1.5, 0.5, 0.0]), []
    recorder = Recorder(Guider(), sigmas)
    x = 10 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    end = getattr(stock, f"sample_{solver}")(recorder, x, sigmas, callback=lambda now: been.append(now["x"].clone()))
    path = recorder.path(end)
    torch.testing.assert_close(path.states, torch.stack([*been, end]))
    torch.testing.assert_close(path.slopes[0], (x - x / 101) / 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_that_a_half_cannot_tell_apart_are_recorded_in_turn(net, dtype):
    """A long run of a shifted flow model begins with levels that all round to 1."""
    import comfy.k_diffusion.sampling as stock

    from pack.nodes._host.recorder import Recorder

    class Guider:
        model_patcher = net.model

        def __call__(self, x, sigma, **_):
            return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    even = torch.linspace(1, 0, 51)
    sigmas, been = 8 * even / (1 + 7 * even), []
    assert len(sigmas.to(dtype).unique()) < 51 or dtype == torch.float16
    recorder = Recorder(Guider(), sigmas)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    end = stock.sample_euler(recorder, x, sigmas, callback=lambda now: been.append(now["x"].clone()))
    path = recorder.path(end)
    assert path is not None
    torch.testing.assert_close(path.states[:-1], torch.stack(been).float())
