"""Attune Fit Sampler with 'coefficients': from long runs to a profile that samples, proved on pictures it has not seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness import counting
from methods import METHODS
from nightly import daily
from pack.kernels.fitted_sampler import fidelity
from pack.models.calibration import SAMPLER
from pack.models.store import load_profile


def be_lenient(host, monkeypatch):
    """Few pictures, and a gate that keeps every gain, whatever chance says: what it lets pass is for test_gate.py."""
    presets, gate = host.module("nodes.fit_sampler").TUNER_PRESETS, host.module("kernels.gate")
    monkeypatch.setitem(presets, "mini", type(presets["mini"])(1, 2, 16, 3, 2))
    for name, value in (("FEWEST", 1), ("students_t", lambda *_: 0.0), ("sign_count", lambda *_: 0)):
        monkeypatch.setattr(gate, name, value)
    monkeypatch.setattr(host.module("nodes._host.fit_run"), "RIVALS", ())


@pytest.fixture
def lenient(host, monkeypatch):
    be_lenient(host, monkeypatch)


def schedule(kit, steps: int):
    return kit.host.call("BasicScheduler", model=kit.model, scheduler="beta", steps=steps, denoise=1.0)[0]


def fitted(kit, solver="euler", steps=4, long=12, **more):
    given = {
        "model": kit.model, "positive": kit.positive, "negative": kit.negative, "cfg": 3.0, "latent": kit.empty(),
        "sampler": kit.host.call("KSamplerSelect", sampler_name=solver)[0], "steps": steps, "coefficients": True,
        "sigmas": schedule(kit, long), "seed": 3, "budget_minutes": 0.0,
    }  # fmt: skip
    return kit.host.call("AttuneFitSampler", **{**given, **more})


def drawn(kit, sampler, sigmas, seed=11, **more):
    out, _ = kit.host.call(
        "SamplerCustom", **{
            "model": kit.model, "add_noise": True, "noise_seed": seed, "cfg": 3.0, "positive": kit.positive,
            "negative": kit.negative, "sampler": sampler, "sigmas": sigmas, "latent_image": kit.empty(2), **more,
        },
    )  # fmt: skip
    return out["samples"]


@pytest.fixture(scope="module")
def found(host, net, tmp_path_factory):
    """Profile and report of a fit, and copies of the files that it left, by their endings."""
    folder = tmp_path_factory.mktemp("found")
    with pytest.MonkeyPatch.context() as monkeypatch:
        be_lenient(host, monkeypatch)
        profile, _, _, report, shown = fitted(net)
    return profile, report, shown, {path.suffix: shutil.copy(path, folder) for path in host.profiles.iterdir()}


def test_a_fit_becomes_a_sampler_that_is_nearer_than_plain_steps(kit, host, lenient):
    profile, sigmas, _, report, _ = fitted(kit, steps=5, long=16, latent=kit.empty(4))
    assert profile.kind == SAMPLER and profile.runs[0].pictures == 8 and "kept" in report
    (file,) = host.profiles.glob("*.json")
    assert load_profile(file).fields() == profile.fields()
    with counting(kit.model) as calls:
        model, sampler, levels, said = host.call("AttuneApplyProfile", model=kit.model, profile=profile)
        short = drawn(kit, sampler, levels, model=model)
    assert calls[0] == 5 and torch.equal(levels, sigmas) and "Proved: 5 evaluations" in said
    (euler,) = host.call("KSamplerSelect", sampler_name="euler")
    long, plain = drawn(kit, euler, schedule(kit, 16)), drawn(kit, euler, schedule(kit, 5))
    assert fidelity(short, long) > fidelity(plain, long) + 1


def test_several_counts_from_the_same_long_runs(net, host, lenient):
    with counting(net.model) as calls:
        profile, sigmas, _, report, _ = fitted(net, more_steps="6, 3")
    assert [one.run.steps for one in profile.runs] == [3, 4, 6] and len(sigmas) == 7
    assert profile.runs[0].psnr < profile.runs[-1].psnr
    said = int(report.splitlines()[1].split("at most ")[1].split()[0])
    assert calls[0] <= said
    for steps, run in ((3, profile.runs[0]), (6, profile.runs[2])):
        levels = host.call("AttuneApplyProfile", model=net.model, profile=profile, steps=steps)[2]
        assert levels.tolist() == pytest.approx(list(run.run.sigmas))
    with pytest.raises(ValueError, match=r"fitted for 3, 4, 6 steps, not for 5"):
        host.call("AttuneApplyProfile", model=net.model, profile=profile, steps=5)
    with pytest.raises(ValueError, match=r"Set 'denoise' to 1, or let Attune Fast Sampler"):
        host.call("AttuneApplyProfile", model=net.model, profile=profile, denoise=0.5)


def test_the_exact_path_needs_no_schedule(unet, lenient):
    profile, _, _, report, _ = fitted(unet, to="exact path", sigmas=None, steps=5)
    assert "the exact path: 16 steps of dpmpp_2m" in report
    assert profile.steps == 16 and profile.solver == "dpmpp_2m"


def test_a_fit_for_a_solver_that_adds_noise_is_for_its_sibling(net, lenient):
    profile, _, _, report, _ = fitted(net, solver="euler_ancestral")
    assert profile.solver == "euler" and "euler_ancestral follows but for the noise" in report


def test_the_best_stock_runs_are_among_the_rivals(kit, host):
    """er_sde without noise is the host's own SamplerERSDE as an ordinary differential equation."""
    named = host.module("nodes._host.session").named_sampler
    assert {"lms", "er_sde without noise"} <= {*host.module("nodes._host.fit_run").RIVALS}
    (ode,) = host.call("SamplerER_SDE", solver_type="ODE", max_stage=3, eta=0.0, s_noise=0.0)
    ours, theirs = (drawn(kit, one, schedule(kit, 5)) for one in (named("er_sde without noise"), ode))
    assert torch.equal(ours, theirs) and not torch.equal(ours, drawn(kit, named("er_sde"), schedule(kit, 5)))


def test_the_pages_tell_the_cost_of_a_fit(host, root):
    fit, plan = host.module("nodes._host.fit_run"), host.module("nodes._plan.fit_run")
    rivals, presets = len(fit.RIVALS) * fit.SCHEDULES, host.module("kernels.tuner").TUNER_PRESETS
    costs = [f"{plan.evaluations(preset, 30, [8], rivals):,}" for preset in presets.values()]
    for page in ("docs/fitted_sampler.md", "web/docs/AttuneFitSampler.md"):
        assert all(one in (root / page).read_text("utf-8") for one in costs), f"{page} lacks one of {costs}"
    about = [round(plan.evaluations(preset, 30, [8], rivals), -1) for preset in presets.values()]
    (tip,) = (
        one.tooltip for one in host.module("nodes.fit_sampler").NODES[0].define_schema().inputs if one.id == "preset"
    )
    assert f"about {about[0]}, {about[1]} or {about[2]}" in tip


@pytest.mark.nightly
def test_held_out_pictures_prove_it_against_every_rival(net):
    large = {"samples": torch.zeros(1, net.channels, 16, 16)}
    profile, _, _, report, _ = fitted(net, steps=8, long=30, latent=large)
    assert profile.runs[0].psnr > 38 and "100% of 6 pictures better" in report


def test_what_is_not_better_is_no_profile_and_the_graph_behind_does_not_run(net, host, monkeypatch, lenient):
    gate = host.module("kernels.gate")
    refuse = lambda before, after, *_: gate.judge(before, after, least=2.0)
    monkeypatch.setattr(host.module("kernels.fitted_sampler"), "judge", refuse)
    profile, sigmas, plot, report, card = fitted(net)
    assert {type(one).__name__ for one in (profile, sigmas, card)} == {"ExecutionBlocker"} and plot.ndim == 4
    assert card.message is None and "there is no profile" in profile.message  # said once
    assert "refused" in report and "there is no profile" in report and not list(host.profiles.glob("*"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sigmas": None}, "'sigmas' is not connected"),
        ({"sigmas": torch.linspace(5, 0, 20)}, "Connect a whole schedule: 'denoise' 1, no SplitSigmas"),
        ({"sigmas": torch.linspace(14.6146, 1, 20)}, "goes from 14.61 to 1"),
        ({"more_steps": "5, 6, 7"}, "6 held-out pictures can prove 3 at most"),
        ({"steps": 12}, "needs a longer run to follow"),
        ({"more_steps": "6, many"}, "must list numbers of steps from 2 to 100"),
        ({"more_steps": ", ".join(map(str, range(2, 40)))}, "at most 10 are fitted"),
        ({"solver": "lcm"}, "no path that more steps would follow"),
    ],
)
def test_bad_input_gets_a_sentence_before_the_first_model_call(unet, given, said):
    with counting(unet.model) as calls, pytest.raises(ValueError, match=said):
        fitted(unet, **given)
    assert calls[0] == 0


def test_other_sigmas_than_the_fits_own_are_refused(net, host, found):
    profile, *_ = found
    _, sampler, _, _ = host.call("AttuneApplyProfile", model=net.model, profile=profile)
    with pytest.raises(ValueError, match="Connect the SIGMAS of the same Attune Apply Profile"):
        drawn(net, sampler, schedule(net, 5)[1:])


def test_a_card_to_share_lies_beside_the_profile(found):
    _, report, shown, files = found
    assert set(files) == {".json", ".png"} and "To share" in report
    assert Path(files[".png"]).stem == Path(files[".json"]).stem
    with Image.open(files[".png"]) as card:
        assert card.width > 1200 and card.height > 600
        pixels = np.asarray(card.convert("RGB"))
        right = pixels[:, -320:]
    assert np.array_equal((shown[0].numpy() * 255).round(), pixels)  # the output is that card
    assert len(np.unique(right.reshape(-1, 3), axis=0)) > 50  # the two pictures


def test_what_was_proved_before_a_stop_is_kept(net, host, lenient, monkeypatch):
    import comfy.model_management as management

    network, seen = type(net.model.model.diffusion_model), []
    whole = network.forward

    def forward(self, x, *args, **kwargs):
        if any("held-out" in stage for stage in seen) and seen[-1].startswith("fitting 6"):
            raise management.InterruptProcessingException
        return whole(self, x, *args, **kwargs)

    node = host.module("nodes.fit_sampler")
    follow = node._followed

    def noting(fit, *given):
        def noted():
            for now in fit:
                seen.append(now.stage)
                yield now

        return follow(noted(), *given)

    monkeypatch.setattr(node, "_followed", noting)
    monkeypatch.setattr(network, "forward", forward)
    with pytest.raises(management.InterruptProcessingException):
        fitted(net, steps=4, more_steps="6")
    (file,) = host.profiles.glob("*.json")
    assert [one.run.steps for one in load_profile(file).runs] == [4]


def test_the_fast_sampler_takes_a_fit_to_the_users_own_run_by_itself(kit, host, lenient):
    """Fitted, kept, found: the picture is that of Attune Apply Profile. Another set-up makes its own run in full."""
    (rescaled,) = host.call("RescaleCFG", model=kit.model, multiplier=0.7)
    profile, *_ = fitted(kit, model=rescaled)
    said: list[str] = []

    def fast(**changed):
        (euler,) = host.call("KSamplerSelect", sampler_name="euler")
        (sampler,) = host.call("AttuneFastSampler", sampler=euler, use="auto", evaluations=4, fidelity=1.0)
        sampler._say = said.append
        with counting(kit.model) as calls:
            latent = drawn(kit, sampler, changed.pop("sigmas", schedule(kit, 12)), **{"model": rescaled, **changed})
        return latent, calls[0]

    latent, calls = fast()
    (file,) = host.profiles.glob("*.json")
    assert calls == 4 and f"('{file.name}')" in said[-1] and "2 other pictures" in said[-1]
    _, sampler, levels, _ = host.call("AttuneApplyProfile", model=rescaled, profile=profile)
    assert torch.equal(latent, drawn(kit, sampler, levels, model=rescaled))
    for changed in ({"model": kit.model}, {"sigmas": schedule(kit, 11)}, {"cfg": 4.0}, {"latent_image": larger(kit)}):
        fast(**changed)
        assert said[-1].startswith("A full run"), changed


def test_a_fit_to_two_prompts_is_one_to_their_batch_and_serves_a_run_of_one(net, host, lenient):
    apple = net.encode("a red apple on a light blue background")
    profile, *_ = fitted(net, positive_2=apple)
    both = lambda of: torch.cat([of(net.positive[0]), of(apple[0])])
    facts = {**net.positive[0][1], "pooled_output": both(lambda one: one[1]["pooled_output"])}
    batch, *_ = fitted(net, positive=[[both(lambda one: one[0]), facts]], latent=net.empty(2))
    assert profile.runs == batch.runs != fitted(net)[0].runs
    (euler,) = host.call("KSamplerSelect", sampler_name="euler")
    (sampler,) = host.call("AttuneFastSampler", sampler=euler, use="auto", evaluations=4, fidelity=1.0)
    said: list[str] = []
    sampler._say = said.append
    with counting(net.model) as calls:
        drawn(net, sampler, schedule(net, 12))
    assert calls[0] == 4, said
    areas = [*net.positive, *apple]
    with pytest.raises(ValueError, match="Attune Fit Sampler needs in 'positive' and 'positive_2' one plain prompt"):
        fitted(net, positive_2=areas)


@pytest.mark.parametrize(
    "method", daily([name for name, one in METHODS.items() if one.model == "unet"], "golden noise")
)
def test_a_fit_on_a_model_with_nodes_of_ours_is_for_the_model_without_them(unet, lenient, method):
    """They stand aside while it measures, so that it would be wrong beside them."""
    profile, *_ = fitted(unet, steps=2, long=4, model=METHODS[method].on(unet)(unet.model))
    assert profile.setting == fitted(unet, steps=2, long=4)[0].setting != ""


def larger(kit) -> dict:
    return {"samples": torch.zeros(1, kit.channels, 12, 8)}


@pytest.mark.parametrize("coefficients", [True, False])
def test_the_node_says_what_it_does_and_how_long_that_takes(net, host, lenient, monkeypatch, coefficients):
    said: list[str] = []
    monkeypatch.setattr(host.module("nodes.fit_sampler"), "text_on", lambda _: said.append)
    monkeypatch.setattr(host.module("nodes._plan.time_left"), "OFTEN", 0.0)
    with counting(net.model) as calls:
        fitted(net, coefficients=coefficients, sigmas=schedule(net, 12 if coefficients else 4))
    *meanwhile, end = said
    counted = [int(text.split(": ")[1].split(" of ")[0]) for text in meanwhile]
    assert counted == list(range(1, calls[0] - 1)) and " left" in meanwhile[0]
    assert "Kept: 4 evaluations, " in end if coefficients else end.endswith(" s.")


def test_the_card_names_the_processor_where_the_host_says_cpu(host, monkeypatch):
    card = host.module("nodes._host.card")
    for threads, said in ((1, "1 thread"), (4, "4 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert card.machine() == f"{card.processor()}, {said}"
    assert len(card.processor()) > 3
    monkeypatch.setattr(card, "Path", lambda _: Path("/of/another/system"))
    monkeypatch.setattr(card.platform, "processor", lambda: "")
    assert card.processor() == card.platform.machine()
