"""Tuning on the demo models, inside one run of the host's sampling."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from live_memory import LiveMemory
from nightly import daily
from pack.kernels.space import NoiseSpace
from pack.kernels.timestep_aligner import block_norm

ROOT = Path(__file__).resolve().parents[2]
SIDE = 8  # of the latents: small, for speed


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")


@pytest.fixture(scope="module")
def kit(host):
    """The module of the nodes as the host loaded it, for what tests replace in it."""
    return sys.modules[host.nodes.NODE_CLASS_MAPPINGS["AttuneFitSampler"].__module__]


@pytest.fixture
def lenient(kit, monkeypatch):
    """A gate that keeps every gain, whatever chance says: there are few pictures here, of few blocks (test_gate.py)."""
    tuner = sys.modules[kit.tune.__module__]
    gate = sys.modules[tuner.judge.__module__]
    monkeypatch.setattr(gate, "FEWEST", 1)
    monkeypatch.setattr(gate, "students_t", lambda *_: 0.0)
    monkeypatch.setattr(gate, "sign_count", lambda *_: 0)
    monkeypatch.setattr(tuner, "judge", lambda before, after, *_, **__: gate.judge(before, after, least=0.0))


@pytest.fixture
def tiny(kit, monkeypatch, lenient):
    """A preset for tests: a few dozen evaluations."""
    monkeypatch.setitem(kit.TUNER_PRESETS, "mini", type(kit.TUNER_PRESETS["mini"])(1, 1, 12, 2, 1))


@pytest.fixture
def counted(host):
    """How often the network of a MODEL is called (a batch of cond and uncond is one call of the guided model)."""

    def count(model, run):
        calls = []
        hook = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(1))
        try:
            return run(), len(calls)
        finally:
            hook.remove()

    return count


def setting(host, demo, encode, sampler="euler", **more):
    channels = demo[0].model.latent_format.latent_channels
    return {
        "model": demo[0], "positive": encode("a cat on a black background"), "negative": encode(""), "cfg": 3.0,
        "sampler": host.call("KSamplerSelect", sampler_name=sampler)[0],
        "latent": {"samples": torch.zeros(2, channels, SIDE, SIDE)}, "seed": 3, **more,
    }  # fmt: skip


def tuned(host, demo, encode, sampler="euler", **more):
    options = {"steps": 4, "preset": "mini", "budget_minutes": 0.0, "coefficients": False} | more
    return host.call("AttuneFitSampler", **setting(host, demo, encode, sampler, **options))


@pytest.mark.nightly  # by what it is multiplied: tests/test_gate.py, 772 of mini at eight steps
def test_mini_needs_at_most_800_evaluations_at_eight_steps(host, demo, encode, counted, lenient):
    profile, calls = fitted(host, demo, encode, counted, steps=8)
    assert 600 < calls <= 800
    held = profile.metrics["held_out"]
    assert min(held.values()) <= 0.9 * held["start"]


def test_a_fit_evaluates_what_it_says_and_says_what_it_found(host, demo, encode, counted, tiny):
    profile, calls = fitted(host, demo, encode, counted, steps=4)
    held = profile.metrics["held_out"]
    assert min(held.values()) < held["start"] and calls < 200


def fitted(host, demo, encode, counted, steps):
    seen = set()
    network = demo[0].model.diffusion_model
    hook = network.register_forward_pre_hook(lambda _, args: seen.add((len(args[0]), torch.is_grad_enabled())))
    (profile, sigmas, plot, report, _), calls = counted(demo[0], lambda: tuned(host, demo, encode, steps=steps))
    hook.remove()
    assert seen == {(4, False)}  # two pictures with and without the prompt, one noise at a time, no gradients
    assert profile.provenance["evaluations"] <= calls <= profile.provenance["evaluations"] + 2  # two measure the time
    assert len(sigmas) == steps + 1 and float(sigmas[-1]) == 0 and bool((sigmas.diff() < 0).all())
    assert plot.shape == (1, 600, 960, 3) and float(plot.min()) >= 0 and float(plot.max()) <= 1
    assert f"{profile.metrics['held_out']['start']:.4f}" in report and str(calls - 2) in report
    assert profile.solver == "euler" and profile.prediction == "v" and profile.cfg == 3.0
    return profile, calls


@pytest.mark.nightly  # 400 evaluations under a counter of every tensor
def test_mini_needs_no_more_memory_than_one_sampling_and_the_latents_that_it_keeps(host, demo, encode, lenient):
    needs_little_memory(host, demo, encode, reference_steps=40)


def test_a_fit_needs_no_more_memory_than_one_sampling_and_the_latents_that_it_keeps(host, flow, encode, tiny):
    needs_little_memory(host, flow, encode, reference_steps=12)


def needs_little_memory(host, demo, encode, reference_steps):
    inputs = setting(host, demo, encode)
    with LiveMemory() as sampling:
        host.call(
            "KSampler", model=demo[0], seed=0, steps=5, cfg=3.0, sampler_name="euler", scheduler="normal", denoise=1.0,
            positive=inputs["positive"], negative=inputs["negative"], latent_image=inputs["latent"],
        )  # fmt: skip
    with LiveMemory() as tuning:
        tuned(host, demo, encode, steps=3)
    # x and denoised of the fitted reference, of one at half the steps, and of a held-out one; slopes
    kept = inputs["latent"]["samples"].nbytes * 2 * (reference_steps + reference_steps // 2 + 2 * reference_steps)
    assert 5e5 < sampling.most < tuning.most < sampling.most + kept  # bytes


def test_the_error_on_the_report_is_what_the_stock_sampler_shows(host, demo, encode, kit, tiny):
    """Applied through the stock nodes, the profile is as near to the reference as was measured while fitting."""
    profile, sigmas, *_ = tuned(host, demo, encode)
    model, _, applied, _ = host.call(
        "AttuneApplyProfile", model=demo[0], profile=profile, steps=0, denoise=1.0, denoise_mode="exact",
        resolution_policy="ignore", strength=1.0,
    )  # fmt: skip
    assert torch.equal(applied, sigmas)
    inputs = setting(host, demo, encode)

    def end(model, sampler, sigmas):
        (solver,) = host.call("KSamplerSelect", sampler_name=sampler)
        (noise,) = host.call("RandomNoise", noise_seed=4)  # the held-out one: the second
        (guider,) = host.call(
            "CFGGuider", model=model, positive=inputs["positive"], negative=inputs["negative"], cfg=3.0
        )
        out = host.call(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=solver,
            sigmas=sigmas,
            latent_image=inputs["latent"],
        )
        return out[0]["samples"]

    sampling = demo[0].get_model_object("model_sampling")
    levels = kit.reference_levels(12, NoiseSpace("ve"), float(sampling.sigma_min), float(sampling.sigma_max)).float()
    exact = end(demo[0], "dpmpp_2m", levels)
    error = block_norm(end(model, "euler", applied) - exact) / block_norm(exact)
    assert error == pytest.approx(min(profile.metrics["held_out"].values()), rel=1e-3)


@pytest.mark.parametrize(
    "sampler", daily(["dpmpp_2m", "uni_pc", "heun", "dpmpp_2m_sde", "euler_ancestral"], "dpmpp_2m_sde")
)
def test_other_samplers_get_levels_without_an_alignment(host, flow, encode, tiny, counted, sampler):
    (profile, sigmas, _, report, _), calls = counted(flow[0], lambda: tuned(host, flow, encode, sampler))
    assert profile.alignments == () and profile.solver == sampler
    assert calls <= profile.provenance["evaluations"] + 2
    sibling = {"dpmpp_2m_sde": "dpmpp_2m", "euler_ancestral": "euler"}.get(sampler)
    assert (sibling is not None) == ("Fitted with" in report) and profile.provenance["ran"] == (sibling or sampler)
    assert torch.equal(tuned(host, flow, encode, sampler)[1], sigmas)  # nothing is left over from the run before


def test_a_batch_of_latents_is_fitted_together_with_a_prompt_each(host, flow, encode, tiny, counted):
    texts = ["a cat on a black background", "a rose on a white background"]
    both = [[torch.cat([encode(text)[0][0] for text in texts]), encode(texts[0])[0][1]]]
    (profile, *_), calls = counted(flow[0], lambda: tuned(host, flow, encode, positive=both))
    assert profile.provenance["evaluations"] <= calls <= profile.provenance["evaluations"] + 2
    alone = {"samples": torch.zeros(1, 4, SIDE, SIDE)}
    other, *_ = tuned(host, flow, encode, latent=alone, timesteps=False)
    assert other.metrics["known_schedules"] != profile.metrics["known_schedules"]


@pytest.mark.parametrize("sampler", daily(["euler", "uni_pc"], "uni_pc"))
def test_a_flow_model_and_a_schedule_of_the_users(host, flow, encode, tiny, sampler):
    """uni_pc writes into the levels that it is given: those of the user stay as they are."""
    own = torch.tensor([1.0, 0.93, 0.8, 0.5, 0.0])
    before = own.clone()
    profile, sigmas, _, report, _ = tuned(host, flow, encode, sampler, sigmas=own)
    assert profile.space == "flow" and float(sigmas[0]) == 1.0 and "your sigmas" in report
    assert torch.equal(own, before)
    assert next(iter(profile.metrics["known_schedules"])) == "your sigmas"


def aligned(host, demo, encode, sigmas, **more):
    steps = len(sigmas) - 1
    return tuned(host, demo, encode, sigmas=sigmas, levels=False, steps=steps, **more)


def test_alignment_alone_keeps_the_levels(host, demo, encode, counted, tiny):
    own = host.call("BasicScheduler", model=demo[0], scheduler="karras", steps=4, denoise=1.0)[0]
    (profile, sigmas, _, report, _), calls = counted(demo[0], lambda: aligned(host, demo, encode, own))
    assert list(profile.sigmas) == own.tolist() == sigmas.tolist()
    assert calls <= profile.provenance["evaluations"] + 2
    assert list(profile.metrics["known_schedules"]) == ["your sigmas"]  # nothing else is in the contest
    held = profile.metrics["held_out"]
    assert held["aligned"] < held["start"] and "refined" not in held and profile.alignments[0].solver == "euler"
    assert len(profile.alignments[0].sigma) == 4 and f"{held['aligned']:.4f}" in report and "'levels' is off" in report


def test_levels_alone_tell_the_network_the_truth(host, demo, encode, tiny):
    own = torch.tensor([14.6146, 14.0, 13.0, 12.0, 0.0])  # much is to be gained
    profile, _, _, report, _ = tuned(host, demo, encode, sigmas=own, timesteps=False)
    assert profile.alignments == () and "aligned" not in profile.metrics["held_out"]
    assert "Aligned timesteps" not in report and "aligned timesteps were not kept" not in report


def test_with_both_switches_off_there_is_nothing_to_fit(host, demo, encode, counted):
    def run():
        with pytest.raises(ValueError, match="switch on 'levels', 'timesteps' or both"):
            tuned(host, demo, encode, levels=False, timesteps=False)

    assert counted(demo[0], run)[1] == 0


def test_what_is_found_is_in_the_loader_at_once(host, demo, encode, tiny, monkeypatch):
    """Once, however often it is found; without room the profile is still handed on."""
    own = host.call("BasicScheduler", model=demo[0], scheduler="karras", steps=2, denoise=1.0)[0]
    run = lambda: aligned(host, demo, encode, own, latent={"samples": torch.zeros(1, 4, SIDE, SIDE)})
    for _ in range(2):
        profile, _, _, report, _ = run()
        (path,) = host.profiles.iterdir()
        assert f"Saved as '{path.name}' in {path.parent}" in report
        assert host.call("AttuneLoadProfile", profile_name=path.name)[0].id == profile.id

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    path.unlink()
    monkeypatch.setattr(sys.modules[f"{host.root}.models.store"], "written_whole", full)
    again, _, _, report, _ = run()
    assert again.id == profile.id and "No space left on device. Make room" in report


@pytest.mark.parametrize("at", daily([1, 20, 60], 20))
def test_stopping_anywhere_leaves_nothing_behind_but_the_best_so_far(host, demo, encode, tiny, at, caplog):
    import comfy.model_management

    before = {key: id(value) for key, value in vars(demo[0].model).items()}
    options, calls = str(sorted(demo[0].model_options["transformer_options"])), []

    def stop(module, args):
        calls.append(1)
        if len(calls) == at:
            comfy.model_management.interrupt_current_processing()

    hook = demo[0].model.diffusion_model.register_forward_pre_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tuned(host, demo, encode)
    finally:
        hook.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == at
    assert {key: id(value) for key, value in vars(demo[0].model).items()}.keys() == before.keys()
    assert str(sorted(demo[0].model_options["transformer_options"])) == options
    assert ("Best levels so far" in caplog.text) == (at == 60)
    kept = list(host.profiles.glob("*"))
    assert bool(kept) == ("not proved on held-out noises" in caplog.text)
    for path in kept:
        profile, *_ = host.call("AttuneLoadProfile", profile_name=path.name)
        assert path.stem.endswith("stopped") and f"{profile.sigmas[1]:.4f}" in caplog.text


def test_the_best_of_a_stopped_search_is_kept(kit, demo, host, caplog):
    """A known schedule needs no keeping."""
    stopped = lambda: list(host.profiles.glob("*stopped.json"))
    known = kit.known_schedules(demo[0], 4)
    about = kit.Setting(kit.identify(demo[0], weights=True), "euler", "euler", 3.0, (128, 128), 3)
    found = torch.tensor([14.6146, 5.0, 2.0, 0.5, 0.0])
    kit._stopped(kit.Progress("refining", 90, 392, found, 0.1), found, known, about)
    (path,) = stopped()
    profile, *_ = host.call("AttuneLoadProfile", profile_name=path.name)
    path.unlink()
    assert torch.equal(torch.tensor(profile.sigmas), found) and f"kept as {path.name}" in caplog.text
    kit._stopped(kit.Progress("known schedules", 90, 392, known["karras"], 0.1), known["karras"], known, about)
    assert "a known schedule" in caplog.text and not stopped()


def test_the_budget_shrinks_the_preset_or_refuses(host, flow, encode, kit, tiny, monkeypatch, counted):
    monkeypatch.setattr(kit.Solves, "seconds_per_evaluation", lambda *args: 1.0)
    needed = kit.TUNER_PRESETS["mini"].evaluations(4, 3, 1, True)
    _, _, _, report, _ = tuned(host, flow, encode, preset="standard", budget_minutes=needed / 60 + 0.1)
    assert "'standard' would take longer than the budget. Preset 'mini'" in report
    monkeypatch.setattr(kit.Solves, "seconds_per_evaluation", lambda *args: 100.0)
    with pytest.raises(ValueError, match="Allow more minutes, take fewer steps"):
        tuned(host, flow, encode, budget_minutes=1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "lcm"}, "LCM, Turbo and Lightning"),
        ({"sampler": "dpm_fast"}, "'dpm_fast' chooses its own noise levels"),
        ({"sigmas": torch.tensor([14.0, 3.0, 0.0])}, "'steps' is 4, but 'sigmas' has 2 steps"),
        ({"sigmas": torch.tensor([14.0, 9.0, 6.0, 4.0, 3.0])}, "must end in 0"),
        ({"sigmas": torch.tensor([14.0, 9.0, 9.0, 4.0, 0.0])}, "must decrease"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_any_evaluation(host, demo, encode, counted, change, words):
    def run():
        with pytest.raises(ValueError, match=words):
            tuned(host, demo, encode, **change)

    assert counted(demo[0], run)[1] == 0


def test_a_distilled_model_and_an_alignment_for_another_sampler_are_refused(host, demo, encode):
    (lcm,) = host.call("ModelSamplingDiscrete", model=demo[0], sampling="lcm", zsnr=False)
    with pytest.raises(ValueError, match="LCM, Turbo and Lightning"):
        tuned(host, (lcm, *demo[1:]), encode)
    own = torch.tensor([14.0, 9.0, 6.0, 0.0])
    with pytest.raises(ValueError, match="but the sampler is 'dpmpp_2m'"):
        aligned(host, demo, encode, own, sampler="dpmpp_2m")


def test_the_contest_knows_the_hosts_schedules_and_ours(demo, flow, kit):
    names = list(kit.known_schedules(demo[0], 8))
    assert names[:2] == ["karras", "exponential"] and "GITS" in names
    assert "karras, penultimate level dropped" in names and "Attune KL-optimal" in names
    assert not [name for name in kit.known_schedules(demo[0], 20) if "dropped" in name]
    for model in (demo[0], flow[0]):
        for steps in (2, 5, 20):
            for sigmas in kit.known_schedules(model, steps).values():
                assert len(sigmas) == steps + 1 and float(sigmas[-1]) == 0 and bool((sigmas.diff() < 0).all())
    assert "GITS" not in kit.known_schedules(flow[0], 8)


@pytest.mark.parametrize("name", daily(["fit_sampler", "align_timesteps"], "fit_sampler"))
def test_the_prompts_run(host, tiny, name):
    outputs = host.run(json.loads((ROOT / "tests/prompts" / f"{name}.json").read_text("utf-8")))
    assert any(output.get("images") for output in outputs.values())
