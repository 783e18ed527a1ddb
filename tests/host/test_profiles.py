"""Profile nodes inside the host: kept, found, applied and sampled with, through the stock samplers."""

from __future__ import annotations

import copy
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import hostile
from nightly import daily
from pack.kernels.propagation import Reuse
from pack.models.calibration import Calibration, CondLevels, KeySteps, Point
from pack.models.profile_format import spell_profile
from pack.models.store import save_profile, shipped_profiles, update_profile

VE_KNOTS = CondLevels("euler", (128, 128), (0.4, 1.4, 4.0, 14.0), (0.33, 1.1, 3.3, 13.0))
VE = Calibration(
    "demo 4 steps", "by hand", "ve", ("AttuneDemo",), (128, 128), (14.6146, 4.0, 1.4, 0.4, 0.0), "a test",
    solver="euler", prediction="v", cfg=3.0, alignments=(VE_KNOTS,),
)  # fmt: skip
FLOW = Calibration(
    "flow 4 steps", "by hand", "flow", ("SD3",), (128, 128), (1.0, 0.9, 0.7, 0.4, 0.0), "a test", prediction="flow",
    alignments=(CondLevels("", (128, 128), (0.4, 0.7, 0.9), (0.35, 0.62, 0.88)),),
)  # fmt: skip


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")


@pytest.fixture
def folder(host):
    """The user's models/attune, empty."""
    host.profiles.mkdir(parents=True, exist_ok=True)
    return host.profiles


def sample(host, encode, model, sigmas, sampler="euler", latent=None, seed=3, node="SamplerCustomAdvanced"):
    channels = model.model.latent_format.latent_channels
    latent = latent or {"samples": torch.zeros(1, channels, 16, 16)}
    common = {"model": model, "cfg": 3.0, "positive": encode("a cat on a black background"), "negative": encode("")}
    (solver,) = host.call("KSamplerSelect", sampler_name=sampler)
    if node == "SamplerCustom":
        out = host.call(
            "SamplerCustom",
            add_noise=True,
            noise_seed=seed,
            sampler=solver,
            sigmas=sigmas,
            latent_image=latent,
            **common,
        )
        return out[0]["samples"]
    (noise,) = host.call("RandomNoise", noise_seed=seed)
    (guider,) = host.call("CFGGuider", **common)
    out = host.call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=solver, sigmas=sigmas, latent_image=latent
    )
    return out[0]["samples"]


def test_the_folder_is_in_the_users_models_and_lists_json_only(host, folder):
    import folder_paths

    assert folder == Path(folder_paths.models_dir) / "attune"
    (folder / "notes.txt").write_text("no profile")
    save_profile(VE, folder)
    assert folder_paths.get_filename_list("attune") == ["demo 4 steps.json"]


def test_extra_model_paths_are_honoured_and_registering_twice_changes_nothing(host, tmp_path):
    import folder_paths

    from pack.nodes._host.folders import find_profile, register_folders

    before = folder_paths.folder_names_and_paths["attune"]
    try:
        folder_paths.folder_names_and_paths["attune"] = ([str(tmp_path)], set())
        register_folders()
        register_folders()
        paths, suffixes = folder_paths.folder_names_and_paths["attune"]
        assert paths == [str(tmp_path), before[0][-1]] and suffixes == {".json"}
        save_profile(VE, tmp_path, "elsewhere")
        assert find_profile("elsewhere.json") == VE
    finally:
        folder_paths.folder_names_and_paths["attune"] = before


def test_what_is_saved_is_in_the_loader_and_the_scheduler_at_once(host, folder):
    _, path = host.call("AttuneSaveProfile", profile=VE, name="mine: v1/test")
    assert Path(path) == folder / "mine_ v1_test.json"
    for node, widget in (
        ("AttuneLoadProfile", "profile_name"),
        ("AttuneScheduler", "schedule"),
        ("AttuneKSampler", "schedule"),
    ):
        inputs = host.nodes.NODE_CLASS_MAPPINGS[node].GET_SCHEMA().inputs
        assert "mine_ v1_test.json" in next(one for one in inputs if one.id == widget).options
    profile, info, _ = host.call("AttuneLoadProfile", profile_name="mine_ v1_test.json")
    assert profile.sigmas == VE.sigmas and profile.id == VE.id and "schedule for AttuneDemo, 128x128, euler" in info


def test_a_loaded_profile_says_itself_on_the_node_and_the_list_is_an_output_alone(host, monkeypatch):
    """Some pages make a node as high as what it says, and the list has a line for each of some sixty files."""
    said = []
    monkeypatch.setattr(host.module("nodes.profiles"), "say_on_node", lambda _, text: said.append(text))
    name = "Attune demo unet, euler, 8 steps"
    _, info, listed = host.call("AttuneLoadProfile", profile_name=name)
    assert said == [info] and info.startswith(name) and "\n- AYS SDXL: " in listed and "AYS SDXL" not in info


def test_a_folder_that_is_deleted_while_the_host_runs_is_an_empty_one(host, folder):
    """The host remembers when it listed a folder, and fails where that is gone: the page would have no node of ours."""
    import shutil

    _, path = host.call("AttuneSaveProfile", profile=VE, name="mine")
    scheduler = host.nodes.NODE_CLASS_MAPPINGS["AttuneScheduler"]
    listed = lambda: next(one for one in scheduler.GET_SCHEMA().inputs if one.id == "schedule").options
    assert "mine.json" in listed()
    shutil.rmtree(folder)
    assert listed() and "mine.json" not in listed()
    assert Path(host.call("AttuneSaveProfile", profile=VE, name="mine")[1]) == Path(path)
    assert "mine.json" in listed()


def test_a_changed_file_is_loaded_again(host, folder):
    save_profile(VE, folder)
    node = host.nodes.NODE_CLASS_MAPPINGS["AttuneLoadProfile"]
    before = node.fingerprint_inputs(profile_name="demo 4 steps.json")
    assert before == node.fingerprint_inputs(profile_name="demo 4 steps.json")
    update_profile(folder / "demo 4 steps.json", VE, replace(VE, cfg=5.0))
    assert before != node.fingerprint_inputs(profile_name="demo 4 steps.json")
    assert host.call("AttuneLoadProfile", profile_name="demo 4 steps.json")[0].cfg == 5.0
    assert len({node.fingerprint_inputs(profile_name=name) for name in ("AYS SDXL", "AYS SD 1.5")}) == 2


@pytest.mark.parametrize("name", ["gone.json", "../../../etc/passwd", "../outside.json", "nonsense"])
def test_a_missing_profile_is_refused_with_the_folder_and_the_choices(host, folder, name):
    save_profile(VE, folder.parent, "outside")
    with pytest.raises(ValueError, match=r"no profile '.*' in .*attune.*AYS SDXL"):
        host.call("AttuneLoadProfile", profile_name=name)
    (folder.parent / "outside.json").unlink()


def test_a_folder_that_cannot_be_written_is_said(host, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match=r"could not be saved in .*No space left on device. Make room"):
        host.call("AttuneSaveProfile", profile=VE, name="")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("node", ["SamplerCustom", "SamplerCustomAdvanced"])
@pytest.mark.parametrize("kind", ["unet", "flow"])
def test_an_applied_profile_samples_on_its_levels_and_tells_its_map(host, demo, flow, encode, node, kind):
    model, profile = (demo[0], VE) if kind == "unet" else (flow[0], FLOW)
    patched, _, sigmas, report = host.call("AttuneApplyProfile", model=model, profile=profile)
    assert torch.equal(sigmas, torch.tensor(profile.sigmas)) and "Timestep alignment" in report
    with_map = sample(host, encode, patched, sigmas, node=node)
    without = sample(host, encode, model, sigmas, node=node)
    assert torch.isfinite(with_map).all() and (with_map - without).abs().mean() > 1e-3
    assert torch.equal(sample(host, encode, patched, sigmas, node=node), with_map)
    assert torch.equal(sample(host, encode, model, sigmas, node=node), without)


def test_strength_zero_is_the_graph_without_the_node(host, demo, encode):
    patched, _, _, report = host.call("AttuneApplyProfile", model=demo[0], profile=VE, strength=0.0)
    assert patched is demo[0] and "'strength' is 0" in report


def test_half_strength_lies_between(host, demo, encode):
    results = []
    for strength in (0.0, 0.5, 1.0):
        patched, _, sigmas, _ = host.call("AttuneApplyProfile", model=demo[0], profile=VE, strength=strength)
        results.append(sample(host, encode, patched, sigmas))
    none, half, whole = results
    assert (half - none).norm() < (whole - none).norm() and (whole - half).norm() < (whole - none).norm()


def test_another_sampler_runs_with_the_schedule_and_without_the_map(host, demo, encode, caplog):
    patched, _, sigmas, _ = host.call("AttuneApplyProfile", model=demo[0], profile=VE)
    got = sample(host, encode, patched, sigmas, "dpmpp_2m")
    assert "timestep alignment skipped: made for euler, but this run uses dpmpp_2m" in caplog.text
    assert torch.equal(got, sample(host, encode, demo[0], sigmas, "dpmpp_2m"))


def test_guidance_far_from_the_fits_is_said(host, demo, encode, caplog):
    for cfg, said in ((1.0, True), (2.0, False), (3.0, False), (10.0, True)):
        patched, _, sigmas, _ = host.call("AttuneApplyProfile", model=demo[0], profile=replace(VE, cfg=cfg))
        caplog.clear()
        sample(host, encode, patched, sigmas)
        assert (f"fitted at cfg {cfg:g}, but this run has 3" in caplog.text) == said


def test_a_mask_on_the_latent_is_allowed_and_noted(host, demo):
    latent = {"samples": torch.zeros(1, 4, 16, 16), "noise_mask": torch.ones(1, 128, 128)}
    assert "has a mask" in host.call("AttuneApplyProfile", model=demo[0], profile=VE, latent=latent)[3]
    del latent["noise_mask"]
    assert "has a mask" not in host.call("AttuneApplyProfile", model=demo[0], profile=VE, latent=latent)[3]


def test_a_controlnet_hears_the_true_level_and_the_network_the_map(host, demo, encode):
    import comfy.controlnet

    heard = []

    class Net(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            heard.append(float(t[0]))
            return {"input": [], "middle": [torch.full((len(x_noisy), 160, 4, 4), 0.1)], "output": []}

        def pre_run(self, *args):
            pass

        def get_models(self):
            return []

        def copy(self):
            return self

    def controlled(text):
        [[context, extra]] = encode(text)
        return [[context, {**extra, "control": Net(), "control_apply_to_uncond": True}]]

    patched, _, sigmas, _ = host.call("AttuneApplyProfile", model=demo[0], profile=VE)
    got = sample(host, controlled, patched, sigmas)
    assert sorted(set(heard), reverse=True) == sigmas[:-1].tolist()
    assert not torch.equal(got, sample(host, controlled, demo[0], sigmas))
    assert not torch.equal(got, sample(host, encode, patched, sigmas))


@pytest.mark.nightly  # compiled networks of our own: test_propagation.py, test_propagation_transformer.py
def test_torch_compile_after_the_profile_gives_the_same_picture(host, demo, encode):
    """Before it: test_compatibility.py."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model):
        clone = model.clone()
        set_torch_compile_wrapper(clone, backend="eager")
        return clone

    applied = lambda model: host.call("AttuneApplyProfile", model=model, profile=VE)[0]
    sigmas = torch.tensor(VE.sigmas)
    torch.testing.assert_close(
        sample(host, encode, compiled(applied(demo[0])), sigmas),
        sample(host, encode, applied(demo[0]), sigmas),
        rtol=1e-3,
        atol=1e-4,
    )
    torch.compiler.reset()


def test_another_parameterisation_is_refused_for_the_map_alone(host, demo):
    model, _, sigmas, report = host.call("AttuneApplyProfile", model=demo[0], profile=replace(VE, prediction="eps"))
    assert model is demo[0] and torch.equal(sigmas, torch.tensor(VE.sigmas))
    assert "Schedule applied, timestep alignment skipped: made for eps prediction, but this MODEL has v." in report


def test_a_profile_of_another_architecture_is_refused(host, demo, flow):
    for profile, model in ((FLOW, demo[0]), (VE, flow[0]), (replace(VE, families=("SDXL",)), demo[0])):
        with pytest.raises(ValueError, match=r"'(demo|flow) 4 steps'"):
            host.call("AttuneApplyProfile", model=model, profile=profile)


def test_uni_pc_cannot_spoil_the_levels_of_the_next_run(host, demo, encode):
    """It writes into the levels it is given."""
    _, _, sigmas, _ = host.call("AttuneApplyProfile", model=demo[0], profile=VE)
    sample(host, encode, demo[0], sigmas, "uni_pc")
    _, _, again, _ = host.call("AttuneApplyProfile", model=demo[0], profile=VE)
    assert torch.equal(again, torch.tensor(VE.sigmas))


MODES = [(kind, *how) for kind in ("unet", "flow") for how in (("exact", 6), ("comfy", 6), ("ays", 3))]


@pytest.mark.parametrize(("kind", "mode", "steps"), daily(MODES, *MODES[::2], names=3))
def test_img2img_in_every_denoise_mode_keeps_part_of_the_picture(host, demo, flow, encode, mode, steps, kind):
    model, profile = (demo[0], VE) if kind == "unet" else (flow[0], FLOW)
    patched, _, whole, _ = host.call("AttuneApplyProfile", model=model, profile=profile, steps=6)
    picture = sample(host, encode, patched, whole, seed=11)
    _, _, sigmas, _ = host.call(
        "AttuneApplyProfile", model=model, profile=profile, steps=6, denoise=0.45, denoise_mode=mode
    )
    assert len(sigmas) == steps + 1
    again = sample(host, encode, patched, sigmas, latent={"samples": picture})
    from_noise = sample(host, encode, patched, whole)
    assert 0 < (again - picture).norm() < (from_noise - picture).norm()


def test_too_little_denoise_returns_the_latent(host, demo, encode):
    model, _, sigmas, report = host.call(
        "AttuneApplyProfile", model=demo[0], profile=VE, steps=4, denoise=0.05, denoise_mode="ays"
    )
    latent = {"samples": torch.randn(1, 4, 16, 16)}
    assert sigmas.numel() == 0 and "the latent comes back as it is" in report
    assert torch.equal(sample(host, encode, model, sigmas, latent=latent), latent["samples"])


def test_an_interrupt_in_the_middle_leaves_nothing_and_the_next_run_is_the_same(host, demo, encode):
    import comfy.model_management

    patched, _, sigmas, _ = host.call("AttuneApplyProfile", model=demo[0], profile=VE)
    want, calls = sample(host, encode, patched, sigmas), []

    def stop(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException

    hook = demo[0].model.diffusion_model.register_forward_pre_hook(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(host, encode, patched, sigmas)
    hook.remove()
    assert "process_timestep" not in vars(demo[0].model)
    assert torch.equal(sample(host, encode, patched, sigmas), want)


def test_a_second_pass_at_twice_the_size_follows_the_policy(host, demo, encode):
    patched, _, sigmas, _ = host.call("AttuneApplyProfile", model=demo[0], profile=VE)
    (large,) = host.call(
        "LatentUpscale", samples={"samples": sample(host, encode, patched, sigmas)}, upscale_method="nearest-exact",
        width=256, height=256, crop="disabled",
    )  # fmt: skip
    second = {"model": demo[0], "profile": VE, "steps": 4, "denoise": 0.5, "latent": large}
    with pytest.raises(ValueError, match="made at 128x128, but the latent is 256x256"):
        host.call("AttuneApplyProfile", **second, resolution_policy="strict")
    _, _, plain, noted = host.call("AttuneApplyProfile", **second)
    model, _, shifted, said = host.call("AttuneApplyProfile", **second, resolution_policy="shift")
    assert "used unchanged" in noted and "shifted by 2 from 128x128 to 256x256" in said
    assert (shifted[:-1] > plain[:-1]).all()
    out = sample(host, encode, model, shifted, latent=large)
    assert out.shape == (1, 4, 32, 32) and torch.isfinite(out).all()


def test_a_model_shift_before_and_after_gives_the_same_run(host, flow, encode):
    (shifted,) = host.call("ModelSamplingSD3", model=flow[0], shift=3.0)
    before, _, sigmas, _ = host.call("AttuneApplyProfile", model=shifted, profile=FLOW)
    model, _, same, _ = host.call("AttuneApplyProfile", model=flow[0], profile=FLOW)
    (after,) = host.call("ModelSamplingSD3", model=model, shift=3.0)
    assert torch.equal(sigmas, same)
    assert torch.equal(sample(host, encode, before, sigmas), sample(host, encode, after, same))


def test_two_applied_profiles_give_the_same_bits_in_both_orders(host, demo, encode):
    other = replace(
        VE, name="shift", kind="noise_shift", sigmas=(), solver="",
        alignments=(replace(VE_KNOTS, solver="", sigma_cond=(0.42, 1.5, 4.3, 14.2)),),
    )  # fmt: skip
    apply = lambda model, profile: host.call("AttuneApplyProfile", model=model, profile=profile)[0]
    sigmas = torch.tensor(VE.sigmas)
    one = sample(host, encode, apply(apply(demo[0], VE), other), sigmas)
    assert torch.equal(one, sample(host, encode, apply(apply(demo[0], other), VE), sigmas))


def test_the_scheduler_and_our_ksampler_run_a_users_profile_by_its_file_name(host, demo, encode, folder):
    save_profile(VE, folder)
    inputs = {"model": demo[0], "steps": 4, "denoise": 1.0, "schedule": "demo 4 steps.json"}
    (sigmas,) = host.call("AttuneScheduler", **inputs)
    assert torch.equal(sigmas, torch.tensor(VE.sigmas))
    (out,) = host.call(
        "AttuneKSampler", **inputs, seed=3, cfg=3.0, sampler_name="euler", positive=encode("a cat on a black background"),
        negative=encode(""), latent_image={"samples": torch.zeros(1, 4, 16, 16)},
    )  # fmt: skip
    assert torch.equal(out["samples"], sample(host, encode, demo[0], sigmas))


SHIFT = replace(
    VE, name="shift", kind="noise_shift", sigmas=(), solver="", config_hash="", cfg=None,
    alignments=(replace(VE_KNOTS, solver=""),),
)  # fmt: skip
REUSE = replace(
    VE, name="reuse", kind="encoder_propagation", alignments=(),
    key_steps=KeySteps(6, "euler", VE.sigmas, (Point(Reuse(1, 5, False), (0, 2), 1.5, 50.0),)),
)  # fmt: skip


@pytest.mark.parametrize("profile", [SHIFT, REUSE], ids=lambda one: one.kind)
def test_what_is_no_schedule_is_not_offered_as_one_and_refused_where_it_is_typed(host, demo, encode, folder, profile):
    save_profile(profile, folder, "typed")
    save_profile(VE, folder, "real")
    inputs = {"model": demo[0], "steps": 4, "denoise": 1.0, "schedule": "typed.json"}
    sampling = {"seed": 3, "cfg": 3.0, "sampler_name": "euler", "positive": encode("a cat"), "negative": encode(""),
                "latent_image": {"samples": torch.zeros(1, 4, 8, 8)}}  # fmt: skip
    kind = "noise shift" if profile is SHIFT else "calibration of propagation"
    for node, more in (("AttuneScheduler", {}), ("AttuneKSampler", sampling)):
        schema = host.nodes.NODE_CLASS_MAPPINGS[node].GET_SCHEMA()
        options = next(one for one in schema.inputs if one.id == "schedule").options
        assert "real.json" in options and "typed.json" not in options
        with pytest.raises(ValueError, match=f"'{profile.name}' is a {kind}, but a schedule is needed here"):
            host.call(node, **inputs, **more)


@pytest.mark.parametrize("profile", [VE, SHIFT, REUSE], ids=lambda one: one.kind)
def test_apply_profile_serves_every_kind_with_all_that_a_sampler_needs(host, demo, encode, profile):
    model, sampler, sigmas, report = host.call("AttuneApplyProfile", model=demo[0], profile=profile, steps=8)
    assert model is not demo[0] and len(sigmas) == 9 and float(sigmas[-1]) == 0 and f"'{profile.name}'" in report
    assert sampler.sampler_function.__name__ == "sample_euler"
    common = {"add_noise": True, "noise_seed": 3, "cfg": 3.0, "positive": encode("a cat"), "negative": encode(""),
              "sampler": sampler, "sigmas": sigmas, "latent_image": {"samples": torch.zeros(1, 4, 16, 16)}}  # fmt: skip
    with_it, without = (host.call("SamplerCustom", model=m, **common)[0]["samples"] for m in (model, demo[0]))
    assert torch.isfinite(with_it).all() and not torch.equal(with_it, without)


def test_the_plot_shows_every_schedule_and_the_profile(host, demo):
    one, other = (host.call("AttuneScheduler", model=demo[0], steps=n, denoise=1.0, schedule="auto")[0] for n in (5, 9))
    (image,) = host.call("AttunePlotSigmas", sigmas_1=one, sigmas_3=other, profile=VE, labels="five")
    (empty,) = host.call("AttunePlotSigmas")
    assert image.shape == (1, 600, 960, 3) and not torch.equal(image, empty)
    assert float(image.min()) >= 0 and float(image.max()) <= 1


def test_the_shipped_prompt_runs_in_the_hosts_executor(host, folder):
    prompt = json.loads((host.root / "tests/prompts/apply_profile.json").read_text())
    outputs = host.run(prompt)
    assert len([1 for out in outputs.values() if out.get("images")]) == 3  # the pictures, the plot, the node's own plot


class GGMLTensor(torch.Tensor):
    """As in ComfyUI-GGUF: bytes of one shape that stand for numbers of another, which it claims to have."""

    def __new__(cls, *args, **_):
        return super().__new__(cls, *args)

    def __init__(self, *_, tensor_type, tensor_shape):
        super().__init__()
        self.tensor_type, self.tensor_shape = tensor_type, tensor_shape

    @property
    def shape(self):
        return self.tensor_shape

    def detach(self):
        return self


def packed(network: torch.nn.Module, kind: str = "Q8_0") -> torch.nn.Module:
    """A copy whose matrices of the blocks are packed: whole numbers in bytes, one scale in front of 32 of them."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or weight.numel() % 32:
            continue
        blocks = weight.detach().reshape(-1, 32)
        scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
        numbers = (blocks / scale.float().clamp(min=1e-8)).round().to(torch.int8)
        stored = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1)
        held = GGMLTensor(stored, tensor_type=kind, tensor_shape=weight.shape)
        module.weight = torch.nn.Parameter(held, requires_grad=False)
    return copied


def test_packed_weights_have_a_name_too(demo):
    """They are only read: nothing of the class that unpacks is called, and its bytes stay."""
    from pack.nodes._host import identity

    network = demo[0].model.diffusion_model

    def name(held):
        return identity.weights_hash(SimpleNamespace(backup={}, get_model_object=lambda _: held))

    held = packed(network)
    assert sum(isinstance(one, GGMLTensor) for one in held.parameters()) > 20
    before = [one.as_subclass(torch.Tensor).clone() for one in held.parameters()]
    named = name(held)
    assert (
        len(named) == 16 and named == name(packed(network)) != name(network) and named != name(packed(network, "Q8_1"))
    )
    assert all(
        torch.equal(one, two.as_subclass(torch.Tensor)) for one, two in zip(before, held.parameters(), strict=True)
    )
    tuned = copy.deepcopy(network)
    for weight in tuned.parameters():
        weight.data += 1e-3 * weight.detach().std() * torch.randn_like(weight) if weight.ndim > 1 else 0
    assert name(packed(tuned)) != named
    mixed = packed(network)  # the same plain weights beside other packed ones
    for module, other in zip(mixed.modules(), packed(tuned).modules(), strict=True):
        if isinstance(getattr(module, "weight", None), GGMLTensor):
            module.weight = other.weight
    assert name(mixed) != named


def test_the_weights_have_a_name_that_precision_and_loras_do_not_change(host, demo, flow, encode):
    from pack.nodes._host import identity

    name = identity.weights_hash(demo[0])
    assert len(name) == 16 and name != identity.weights_hash(flow[0])
    network = demo[0].model.diffusion_model
    assert (
        identity.identify(demo[0]).weights_hash == "" and identity.identify(demo[0], weights=True).weights_hash == name
    )

    name_of = lambda held: identity.weights_hash(SimpleNamespace(backup={}, get_model_object=lambda _: held))
    assert name_of(copy.deepcopy(network).to(torch.bfloat16)) == name
    tuned = copy.deepcopy(network)
    for weight in tuned.parameters():
        weight.data += 1e-3 * weight.detach().std() * torch.randn_like(weight) if weight.ndim > 1 else 0
    assert name_of(tuned) != name
    assert name_of(torch.nn.Module()) == ""

    lora = demo[0].clone()
    keys = [
        key
        for key, value in demo[0].model.state_dict().items()
        if key.startswith("diffusion_model.") and value.ndim > 1
    ]
    lora.add_patches({key: ("diff", (torch.randn_like(demo[0].model.state_dict()[key]),)) for key in keys}, 1.0)
    sample(host, encode, lora, torch.tensor([14.6, 1.0, 0.0]))  # its weights are now in the network
    assert identity.weights_hash(lora) == identity.weights_hash(demo[0]) == name
    known = [identity.identify(model, weights=True).patches for model in (lora, demo[0])]
    assert len(known[0]) == 16 and known[1] == "none"
    sample(host, encode, demo[0], torch.tensor([14.6, 1.0, 0.0]))  # and now no longer


def test_the_name_of_loras_changes_with_strength_and_file_and_not_with_the_order(host, demo):
    from pack.nodes._host.identity import patches_hash

    state = demo[0].model.state_dict()
    keys = [key for key, value in state.items() if key.startswith("diffusion_model.") and value.ndim > 1][:40]
    drawn = torch.Generator().manual_seed(0)
    files = [{key: torch.randn(state[key].shape, generator=drawn) for key in keys} for _ in range(2)]

    def named(*loras):
        model = demo[0].clone()
        for file, strength in loras:
            model.add_patches({key: ("diff", (file[key],)) for key in keys}, strength)
        return patches_hash(model)

    one, other = files
    assert named() == "none" and named((one, 1.0)) == named((one, 1.0))
    assert (
        len({named(), named((one, 1.0)), named((one, 0.8)), named((other, 1.0)), named((one, 1.0), (other, 1.0))}) == 5
    )
    few = demo[0].clone()
    few.add_patches({key: ("diff", (one[key],)) for key in keys[:7]}, 1.0)
    assert patches_hash(few) != named((one, 1.0))


def test_a_lora_file_of_the_hosts_own_loader_has_a_name_for_each_strength(host, flow):
    import folder_paths

    from pack.nodes._host.identity import patches_hash

    load = lambda strength: host.call(
        "LoraLoaderModelOnly",
        model=flow[0],
        lora_name=folder_paths.get_filename_list("loras")[0],
        strength_model=strength,
    )[0]
    assert len({patches_hash(load(strength)) for strength in (0.5, 1.0)} | {patches_hash(flow[0])}) == 3
    (sizes,) = (one for one in shipped_profiles().values() if one.kind == "noise_shift" and one.patches != "none")
    assert sizes.patches == patches_hash(load(1.0))  # the one that was fitted with it


def test_every_shipped_calibration_names_its_weights(demo, flow):
    from pack.nodes._host import identity

    known = {
        identity.config_hash(m[0].model.model_config.unet_config): identity.weights_hash(m[0]) for m in (demo, flow)
    }
    ours = [one for one in shipped_profiles().values() if one.config_hash]
    assert len(ours) == 35
    for one in ours:
        assert one.weights_hash == known[one.config_hash]


def test_the_shipped_fits_are_of_the_shipped_weights(demo, flow):
    from pack.nodes._host import identity

    known = {identity.weights_hash(model[0]) for model in (demo, flow)}
    fits = [one for one in shipped_profiles().values() if one.is_fitted and one.solver]
    assert len(fits) == 32 and {one.weights_hash for one in fits} == known


def test_other_weights_of_the_same_architecture_are_noted(host, demo):
    from pack.nodes._host import identity

    for made, noted in ((identity.weights_hash(demo[0]), False), ("0" * 16, True)):
        profile = replace(VE, weights_hash=made, config_hash=identity.identify(demo[0]).config_hash)
        *_, report = host.call("AttuneApplyProfile", model=demo[0], profile=profile)
        assert ("fitted on other weights of the same architecture" in report) == noted


def queued(*names, **carried):
    """What the page queues: nodes that name profiles, and a workflow that carries some."""
    prompt = {str(i): {"class_type": "AttuneLoadProfile", "inputs": {"profile_name": n}} for i, n in enumerate(names)}
    return {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": {"extra": {"attune_profiles": carried}}}}}


def carried_by(queue) -> dict:
    return queue["extra_data"]["extra_pnginfo"]["workflow"]["extra"].get("attune_profiles", {})


def named_by(queue) -> str:
    return queue["prompt"]["0"]["inputs"]["profile_name"]


@pytest.fixture
def carried(host, folder):
    """The module that the host loaded, with nothing in memory."""
    nodes = host.nodes.NODE_CLASS_MAPPINGS["AttuneLoadProfile"].__module__.removesuffix(".profiles")
    module = sys.modules[f"{nodes}._host.workflow_profiles"]
    module.CARRIED.clear()
    yield module
    module.CARRIED.clear()


@pytest.fixture
def exchange(carried):
    return carried.exchange


def test_the_host_calls_the_exchange_with_every_prompt(exchange):
    import server

    assert exchange in server.PromptServer.instance.on_prompt_handlers


@pytest.mark.parametrize("file", ["mine.json", "mine@home.json"])
def test_a_profile_travels_inside_the_workflow_to_a_machine_without_its_file(host, folder, exchange, caplog, file):
    path = save_profile(VE, folder, "mine").rename(folder / file)
    assert host.call("AttuneLoadProfile", profile_name=file)[0].id == VE.id
    sent = json.loads(json.dumps(carried_by(exchange(queued(file, "AYS SDXL")))))
    assert list(sent) == [file]
    assert carried_by(exchange(queued(file, **sent))) == sent and "carries another" not in caplog.text
    path.unlink()
    node = host.nodes.NODE_CLASS_MAPPINGS["AttuneLoadProfile"]
    assert f"There is no profile '{file}'" in node.validate_inputs(profile_name=file)
    sent_on = exchange(queued(file, **sent))
    name = named_by(sent_on)
    assert carried_by(sent_on) == sent and name == f"{file}@{VE.id}"
    assert node.validate_inputs(profile_name=name) is True
    assert host.call("AttuneLoadProfile", profile_name=name)[0].id == VE.id
    assert named_by(exchange(queued(file))) == name  # queued again from a page that kept nothing


def sampled_with(profile: str) -> dict:
    """A prompt that samples with a profile's schedule and map, and keeps the latent."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "4": node("AttuneLoadProfile", profile_name=profile),
        "5": node("AttuneApplyProfile", model=["1", 0], profile=["4", 0], steps=0, denoise=1.0, denoise_mode="exact",
                  resolution_policy="ignore", strength=1.0, speed=0.0),
        "6": node("SamplerCustom", model=["5", 0], add_noise=True, noise_seed=3, cfg=3.0, positive=["2", 0],
                  negative=["2", 0], sampler=["5", 1], sigmas=["5", 2], latent_image=["3", 0]),
        "7": node("AttunePlotSigmas", sigmas_1=["5", 2], labels=""),
        "8": node("SaveLatent", samples=["6", 0], filename_prefix=profile.partition(".")[0]),
        "9": node("PreviewAny", source=["5", 3]),
    }  # fmt: skip


def latent_of(host, outputs: dict) -> torch.Tensor:
    (saved,) = outputs["8"]["latents"]
    file = Path(host.folders) / saved["type"] / saved["subfolder"] / saved["filename"]
    with safe_open(file, framework="pt") as content:
        return content.get_tensor("latent_tensor")


def test_two_queued_prompts_with_different_profiles_under_one_name_each_sample_with_their_own(host, carried):
    """Both are queued, and so exchanged, before either runs."""
    other = replace(VE, name="other", sigmas=(14.6146, 9.0, 6.0, 2.0, 0.5, 0.0), alignments=())
    queue = []
    for profile in (VE, other):
        workflow = {"extra": {"attune_profiles": {"mine.json": spell_profile(profile)}}}
        one = {"prompt": sampled_with("mine.json"), "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        queue.append(carried.exchange(one)["prompt"])
    ends, reports = [], []
    for prompt in queue:
        outputs = host.run(prompt)
        ends.append(latent_of(host, outputs))
        reports += outputs["9"]["text"]
    assert f"'{VE.name}'" in reports[0] and f"'{other.name}'" in reports[1]
    for profile, end in zip((VE, other), ends, strict=True):
        save_profile(profile, host.profiles, profile.name)
        assert torch.equal(latent_of(host, host.run(sampled_with(f"{profile.name}.json"))), end)
    assert not torch.equal(*ends)


def test_several_profiles_under_one_name_are_not_guessed_at(host, carried):
    for cfg in (1.0, 2.0):
        carried.exchange(queued("mine.json", **{"mine.json": spell_profile(replace(VE, cfg=cfg))}))
    name = named_by(carried.exchange(queued("mine.json")))
    assert name == "mine.json"
    with pytest.raises(ValueError, match=r"There is no profile 'mine\.json'"):
        host.call("AttuneLoadProfile", profile_name=name)


def test_a_workflow_holds_only_what_its_prompt_names(folder, exchange):
    save_profile(VE, folder, "mine")
    assert carried_by(exchange(queued("AYS SDXL", **{"mine.json": {}, "other.json": {}}))) == {}


def test_the_file_in_the_folder_wins_over_a_carried_one_and_it_is_said(host, folder, exchange, caplog):
    other = save_profile(replace(VE, cfg=5.0), folder, "mine")
    sent = carried_by(exchange(queued("mine.json")))
    other.unlink()
    save_profile(VE, folder, "mine")
    exchange(queued("mine.json", **sent))
    assert "carries another 'mine.json' than the one in models/attune" in caplog.text
    assert host.call("AttuneLoadProfile", profile_name="mine.json")[0].id == VE.id


@pytest.mark.parametrize("bad", [[], "x", {"format": 1}, {"format": 99}, {"format": 1, "kind": "schedule", "name": {}}])
def test_what_a_strangers_workflow_carries_is_checked_like_a_file(host, exchange, caplog, bad):
    assert carried_by(exchange(queued("mine.json", **{"mine.json": bad}))) == {}
    assert "'mine.json' in the workflow" in caplog.text
    node = host.nodes.NODE_CLASS_MAPPINGS["AttuneLoadProfile"]
    assert "There is no profile 'mine.json'" in node.validate_inputs(profile_name="mine.json")


@pytest.mark.nightly
def test_a_mutated_workflow_never_stops_the_queue(exchange, fuzz):
    """As a page may send it that a picture of a stranger was dropped on: the queued JSON, profiles and all."""
    good = queued("mine.json", "AYS SDXL", **{"mine.json": spell_profile(VE)})
    good["extra_data"]["extra_pnginfo"]["workflow"]["nodes"] = [{"id": 0, "widgets_values": ["mine.json"]}]
    for i in range(fuzz):
        rng, sent = random.Random(i), json.loads(json.dumps(good))
        for _ in range(rng.choice([1, 1, 3, 8])):
            sent = hostile.changed(rng, sent)
        if isinstance(sent, dict):
            assert exchange(sent) is sent
            assert len(json.dumps(sent.get("extra_data"))) < 200_000


@pytest.mark.parametrize(
    "odd", [{}, {"prompt": 3}, {"extra_data": []}, {"extra_data": {"extra_pnginfo": {"workflow": {"extra": 7}}}},
            {"prompt": {"1": 5, "2": {"class_type": "AttuneLoadProfile"}}, "extra_data": {"extra_pnginfo": {"workflow": {"a": 1}}}}]
)  # fmt: skip
def test_prompts_of_any_shape_pass(exchange, odd):
    assert exchange(json.loads(json.dumps(odd))).get("prompt") == odd.get("prompt")


def test_a_long_profile_stays_out_of_the_pictures(folder, exchange, caplog):
    save_profile(replace(VE, sigmas=tuple(14.0 - i / 717 for i in range(10_000)), alignments=()), folder, "long")
    assert carried_by(exchange(queued("long.json"))) == {}
    assert "'long.json' is too large to travel" in caplog.text


def test_memory_of_carried_profiles_is_bounded(carried):
    names = [f"{i}.json" for i in range(carried.MOST_CARRIED + 6)]
    for name in names:
        carried.exchange(queued(name, **{name: spell_profile(VE)}))
    assert [name.partition("@")[0] for name in carried.CARRIED] == names[6:]


@pytest.mark.parametrize("node", ["AttuneScheduler", "AttuneKSampler"])
def test_a_schedule_that_is_not_there_is_said_before_the_run(host, node):
    known = host.nodes.NODE_CLASS_MAPPINGS[node].validate_inputs
    assert known(schedule="auto") is True and known(schedule=None) is True
    for odd in (5, ["auto"], {"auto": 1}, 0.5, True, ""):
        assert known(schedule=odd).startswith(f"There is no schedule {odd!r}. Choose one of: auto")
    assert "There is no profile 'gone.json' in" in known(schedule="gone.json")
    assert "There is no schedule 'AYS 9'. Choose one of: auto" in known(schedule="AYS 9")


def test_workflows_are_remembered_while_their_prompts_wait_or_run_and_no_longer(carried, monkeypatch):
    from types import SimpleNamespace

    queue = SimpleNamespace(currently_running={}, queue=[])
    monkeypatch.setattr(carried, "PromptServer", SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue)))
    monkeypatch.setattr(carried, "QUEUED", {})
    first = carried.exchange(queued())
    queue.queue.append((0, "id", {}, first["extra_data"]))
    for _ in range(100):
        carried.exchange(queued())
    assert len(carried.QUEUED) <= carried.ON_THEIR_WAY + 1
    queue.currently_running[0] = queue.queue.pop()
    carried.exchange(queued())
    assert carried.running_workflow() is first["extra_data"]["extra_pnginfo"]["workflow"]


def test_a_workflow_that_names_a_content_gets_it_though_the_file_of_that_name_holds_another(host, folder, carried):
    other = replace(VE, cfg=5.0)
    save_profile(other, folder, "mine")
    named = f"mine.json@{VE.id}"
    assert named_by(carried.exchange(queued(named, **{"mine.json": spell_profile(VE)}))) == named
    find = host.module("nodes._host.folders").find_profile
    assert find(named).id == VE.id and find("mine.json").id == other.id
    assert named_by(carried.exchange(queued(f"mine.json@{other.id}"))) == "mine.json"
