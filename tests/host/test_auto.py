"""Attune Auto inside the host: the facts it sees, the graph that it stands for, and the graph that it leaves alone."""

from __future__ import annotations

import inspect
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blueprints import SPECS, build
from families import FAMILIES

from pack.models.store import save_profile, shipped_profiles
from pack.nodes._plan.auto import ALWAYS, FAITHFUL, OFF, SHOWN

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = ("schedule", "one_more_step", "noise_shift", "golden_noise")
BASES = {"WAN21_T2V": "WAN21"}  # configuration class -> model class, where the names differ


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")[0]


@pytest.fixture
def auto(host, demo, encode):
    def run(model=None, state=SHOWN, **changed):
        model = demo[0] if model is None else model
        channels = model.model.latent_format.latent_channels
        inputs = {
            "model": model, "latent": {"samples": torch.zeros(1, channels, 16, 16)}, "steps": 8,
            "sampler_name": "euler", "cfg": 3.0, "denoise": 1.0, "scheduler": "simple",
            **dict.fromkeys(SWITCHES, state), "speed": OFF, "positive": encode("a cat on a black background"), **changed,
        }  # fmt: skip
        return host.call("AttuneAuto", **inputs)

    return run


def sampled(host, encode, model, sigmas, sampler="euler"):
    channels = model.model.latent_format.latent_channels
    return host.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=3, cfg=3.0,
        positive=encode("a cat on a black background"), negative=encode(""),
        sampler=host.call("KSamplerSelect", sampler_name=sampler)[0], sigmas=sigmas,
        latent_image={"samples": torch.zeros(1, channels, 16, 16)},
    )[0]["samples"]  # fmt: skip


def ours(host, name: str):
    """A file of nodes/_host, as the host has loaded it."""
    return sys.modules[host.nodes.NODE_CLASS_MAPPINGS["AttuneAuto"].__module__.removesuffix("auto") + f"_host.{name}"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith(("demo", "unknown"))])
def test_the_families_of_the_docs_are_as_the_host_states_them(host, name):
    import comfy.model_base
    import comfy.supported_models

    facts = FAMILIES[name].facts
    config = getattr(comfy.supported_models, facts.family, None)
    if config is None:
        pytest.skip(f"the host has no {facts.family}")
    made = config({"hidden_size": 6144, **config.unet_config})  # newer hosts take Flux.2's memory from it
    kinds = {"eps": comfy.model_base.ModelType.EPS, "v": comfy.model_base.ModelType.V_PREDICTION}
    if facts.model.prediction == "flow":
        base = getattr(comfy.model_base, BASES.get(facts.family, facts.family))
        kind = inspect.signature(base).parameters["model_type"].default
    else:
        kind = kinds[facts.model.prediction]
    sampling = comfy.model_base.model_sampling(made, kind)
    model = SimpleNamespace(get_model_object=lambda _: sampling, model=SimpleNamespace(model_config=made), patches={})
    seen = ours(host, "identity").identify(model)
    assert seen.families == facts.model.families and seen.space == facts.model.space
    assert (seen.prediction, seen.shift) == (facts.model.prediction, facts.model.shift)
    assert seen.sigma_max == pytest.approx(facts.model.sigma_max, rel=1e-4)
    assert type(made.latent_format).__name__ == facts.latent_space
    assert made.latent_format.latent_channels == facts.channels
    assert made.unet_config.get("context_dim") == facts.text_width or facts.network == "transformer"


@pytest.mark.parametrize("name", ["demo UNet", "demo flow"])
def test_the_demo_models_are_seen_as_the_docs_have_them(auto, demo, flow, name):
    case = FAMILIES[name]
    model = demo[0] if name == "demo UNet" else flow
    inputs = {"steps": case.run.steps, "sampler_name": case.run.solver, "cfg": case.run.cfg}
    report = auto(model, **inputs)[2]
    wanted = f"Attune {name.lower()}, {case.run.solver}, {case.run.steps} steps"
    assert f"+ schedule: {wanted}" in report and f"{case.facts.family}, " in report


def test_switched_off_it_hands_the_model_through_with_the_stock_levels(host, auto, demo, flow):
    for model in (demo[0], flow):
        for steps, denoise in ((8, 1.0), (6, 0.4), (4, 0.0)):
            out, sigmas, report = auto(model, OFF, steps=steps, denoise=denoise)
            (stock,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=denoise)
            assert out is model and torch.equal(sigmas, stock) and "+ " not in report


def test_connected_sigmas_are_kept_where_nothing_is_known(auto, demo):
    own = torch.tensor([14.0, 3.0, 0.5, 0.0])
    model, sigmas, report = auto(None, OFF, sigmas=own)
    assert model is demo[0] and sigmas is own and "'sigmas'" in report


def test_it_is_the_graph_of_the_single_nodes_bit_for_bit(host, encode, auto, demo):
    profile, *_ = host.call("AttuneLoadProfile", profile_name="Attune demo unet, euler, 8 steps")
    by_hand, _, sigmas, _ = host.call(
        "AttuneApplyProfile", model=demo[0], profile=profile, steps=8, denoise_mode="comfy"
    )
    one, ones_sigmas, _ = auto()
    assert torch.equal(sigmas, ones_sigmas)
    assert torch.equal(sampled(host, encode, one, ones_sigmas), sampled(host, encode, by_hand, sigmas))


def test_everything_at_once_is_the_graph_of_the_single_nodes_bit_for_bit(host, encode, auto, demo):
    profile, *_ = host.call("AttuneLoadProfile", profile_name="Attune demo unet, euler, 20 steps")
    by_hand, _, sigmas, _ = host.call(
        "AttuneApplyProfile", model=demo[0], profile=profile, steps=25, denoise_mode="comfy", strength=0.0
    )
    (module,) = host.call("AttuneLoadOneMoreStep", oms_name="attune_demo.safetensors")
    prompt = encode("a cat on a black background")
    by_hand, _ = host.call("AttuneOneMoreStep", model=by_hand, oms_model=module, positive=prompt)
    npnet, _ = host.call("AttuneLoadNPNet", npnet_name="attune_demo_npnet.safetensors")
    (by_hand,) = host.call("AttuneGoldenNoiseModel", model=by_hand, npnet=npnet)
    (by_hand,) = host.call("AttunePropagation", model=by_hand, mode="uniform", interval=3, reuse="one block fresh")
    model, ones_sigmas, report = auto(state=ALWAYS, steps=25, speed=FAITHFUL)
    assert report.count("\n+ ") == 4 and torch.equal(sigmas, ones_sigmas)
    assert torch.equal(sampled(host, encode, model, ones_sigmas), sampled(host, encode, by_hand, sigmas))


def test_the_flow_model_runs_with_everything_that_fits(host, encode, auto, flow):
    model, sigmas, report = auto(flow, ALWAYS, sampler_name="dpmpp_2m", cfg=3.0, steps=6)
    assert "+ golden noise: re-denoise" in report
    assert sampled(host, encode, model, sigmas, "dpmpp_2m").isfinite().all()
    plain = sampled(host, encode, flow, sigmas, "dpmpp_2m")
    assert not torch.equal(sampled(host, encode, model, sigmas, "dpmpp_2m"), plain)


def test_small_pictures_of_the_flow_model_get_their_noise_shift_on_demand(auto, flow):
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    assert "'Attune demo flow, noise shift' is there" in auto(flow, latent=latent)[2]
    assert "+ noise shift: Attune demo flow, noise shift" in auto(flow, ALWAYS, latent=latent)[2]


def test_a_profile_that_is_dropped_in_is_used_and_a_damaged_file_is_named(host, auto):
    node = host.nodes.NODE_CLASS_MAPPINGS["AttuneAuto"]
    folder = host.profiles
    folder.mkdir(parents=True, exist_ok=True)
    before = node.fingerprint_inputs()
    mine = replace(shipped_profiles()["Attune demo unet, euler, 8 steps"], name="mine", solver="heun", alignments=())
    save_profile(mine, folder)
    (folder / "bad.json").write_text("{")
    assert node.fingerprint_inputs() != before
    _, sigmas, report = auto(sampler_name="heun")
    assert "+ schedule: mine.json" in report and "! bad.json is not a profile" in report
    assert sigmas.tolist() == pytest.approx(list(mine.sigmas))


def test_the_report_is_shown_on_the_node_without_being_taken_for_html(host, monkeypatch):
    import server

    shown = []
    monkeypatch.setattr(
        server.PromptServer.instance, "send_progress_text", lambda text, node: shown.append((text, node))
    )
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "attune_demo.safetensors"}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "7": {
            "class_type": "AttuneAuto",
            "inputs": {
                "model": ["1", 0], "latent": ["2", 0], "steps": 4, "sampler_name": "heun", "cfg": 3.0, "denoise": 1.0,
                "scheduler": "simple", **dict.fromkeys(SWITCHES, SHOWN), "speed": OFF,
            },
        },
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 2]}},
    }  # fmt: skip
    outputs = host.run(prompt)
    (report,) = outputs["7"]["text"]
    assert outputs["8"]["text"] == [report]
    assert shown == [(report, "7")]
    ours(host, "api").say_on_node(SimpleNamespace(hidden=SimpleNamespace(unique_id="7")), "<b>&'x'")
    assert shown[1] == ("&lt;b&gt;&amp;'x'", "7")


@pytest.mark.parametrize("path", sorted((ROOT / "subgraphs").glob("*.json")), ids=lambda p: p.stem)
def test_a_blueprint_holds_one_node_made_of_known_nodes_with_valid_values(host, path):
    blueprint = json.loads(path.read_text("utf-8"))
    (node,) = blueprint["nodes"]
    (graph,) = blueprint["definitions"]["subgraphs"]
    assert node["type"] == graph["id"] and graph["name"] == path.stem and blueprint["extra"]["BlueprintDescription"]
    assert [one["name"] for one in node["inputs"]] == [one["name"] for one in graph["inputs"]]
    for inner in graph["nodes"]:
        known = host.nodes.NODE_CLASS_MAPPINGS[inner["type"]].INPUT_TYPES()
        options = {**known["required"], **known.get("optional", {})}
        assert [one["name"] for one in inner["inputs"]] and {one["name"] for one in inner["inputs"]} <= set(options)


@pytest.mark.parametrize("name", SPECS)
def test_a_blueprint_is_made_of_the_prompt_that_tests_run(host, name):
    """ATTUNE_WRITE=1 writes it."""
    path = ROOT / "subgraphs" / f"{name}.json"
    made = json.loads(json.dumps(build(name, host.nodes.NODE_CLASS_MAPPINGS)))
    if os.environ.get("ATTUNE_WRITE"):
        path.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    assert json.loads(path.read_text("utf-8")) == made


def test_one_dial_of_the_blueprint_drives_the_sampler_and_attune_auto(host):
    graph = json.loads((ROOT / "subgraphs/Attune Auto Sampler.json").read_text("utf-8"))["definitions"]["subgraphs"][0]
    types = {node["id"]: node for node in graph["nodes"]}
    ends = {one["name"]: set() for one in graph["inputs"]}
    for link in graph["links"]:
        if link["origin_id"] == -10 and link["target_id"] in types:
            node = types[link["target_id"]]
            slot = (node["type"], node["inputs"][link["target_slot"]]["name"])
            ends[graph["inputs"][link["origin_slot"]]["name"]].add(slot)
    assert ends["cfg"] == {("AttuneAuto", "cfg"), ("SamplerCustom", "cfg")}
    assert ends["sampler"] == {("AttuneAuto", "sampler_name"), ("KSamplerSelect", "sampler_name")}
    assert ends["latent"] == {("AttuneAuto", "latent"), ("SamplerCustom", "latent_image")}
    assert ends["positive"] == {("AttuneAuto", "positive"), ("SamplerCustom", "positive")}


def prompt_of(state: str = ALWAYS, **changed) -> dict:
    """Attune Auto in front of a sampler, with everything that the demo UNet can have."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}
    asked = {
        "model": ["1", 0], "latent": ["2", 0], "positive": ["3", 0], "steps": 6, "sampler_name": "euler", "cfg": 3.0,
        "denoise": 1.0, "scheduler": "simple", **dict.fromkeys(SWITCHES, state), "speed": OFF, **changed,
    }  # fmt: skip
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors"),
        "2": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "3": node("CLIPTextEncode", clip=["1", 1], text="a cat"), "6": node("KSamplerSelect", sampler_name="euler"),
        "7": node("AttuneAuto", **asked), "8": node("PreviewAny", source=["7", 2]),
        "9": node("SamplerCustom", model=["7", 0], add_noise=True, noise_seed=3, cfg=3.0, positive=["3", 0],
                  negative=["3", 0], sampler=["6", 0], sigmas=["7", 1], latent_image=["2", 0]),
        "10": node("VAEDecode", samples=["9", 0], vae=["1", 2]), "11": node("PreviewImage", images=["10", 0]),
    }  # fmt: skip


def test_a_second_run_of_the_prompt_executes_no_node_again_and_loads_no_module_again(host, monkeypatch):
    loads, module = [], host.module("nodes.one_more_step")
    load = module.AttuneLoadOneMoreStep.execute.__func__
    monkeypatch.setattr(
        module.AttuneLoadOneMoreStep, "execute", classmethod(lambda cls, *a, **k: loads.append(1) or load(cls, *a, **k))
    )
    executed: list[str] = []

    class Server:
        client_id, last_node_id, sockets_metadata = "test", None, {}

        def send_sync(self, event, data, sid=None):
            if event == "executing" and data.get("node"):
                executed.append(data["node"])
            assert event != "execution_error", data["exception_message"]

        def send_progress_text(self, *_):
            pass

    executor = host.executor(Server())

    def run(prompt: dict) -> int:
        """How many nodes are executed, those that Attune Auto stands for among them."""
        executed.clear()
        valid = host.loop.run_until_complete(host.execution.validate_prompt("twice", prompt, None))
        assert valid[0], valid
        executor.execute(prompt, "twice", {"client_id": "test"}, valid[2])
        assert executor.success
        return len(executed)

    first = run(prompt_of())
    assert first >= 15 and len(loads) == 1
    assert run(prompt_of()) == 0 and len(loads) == 1
    again = run(prompt_of(cfg=4.0))  # Auto itself, and what hangs on its report; what it stands for is the same
    assert 0 < again < first and len(loads) == 1


@pytest.mark.parametrize("state", [OFF, SHOWN])
def test_with_nothing_to_add_the_model_itself_is_handed_on(host, auto, demo, state):
    model, _, report = auto(state=state, sampler_name="heun", steps=3, latent={"samples": torch.zeros(1, 4, 16, 16)})
    assert model is demo[0] and "\n+ " not in report


def broken(folder: Path) -> dict[str, str]:
    """Files that cannot be used, of every sort, and what is said of each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a folder.json").mkdir()
    (folder / "a folder.json" / "inside.json").write_text("{")
    (folder / "binary.json").write_bytes(b"\x80\x04\x95pickle")
    (folder / "cut.JSON").write_text('{"format": 1, "kind"')
    (folder / "empty.json").touch()
    (folder / "nowhere.json").symlink_to(folder / "gone")
    (folder / "locked.json").touch()
    return {
        "inside.json": "not a profile", "binary.json": "not a profile", "cut.JSON": "not a profile",
        "empty.json": "not a profile", "locked.json": "cannot be read: Permission denied",
    }  # fmt: skip


@pytest.fixture
def locked(monkeypatch):
    """As a file that its user may not read, or on a share that is gone; tests may run as root, who may read all."""
    read = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "locked.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)


def test_no_broken_file_stops_auto_the_list_or_the_combos(host, auto, demo, locked):
    said = broken(host.profiles)
    mine = replace(shipped_profiles()["Attune demo unet, euler, 8 steps"], name="mine", solver="heun", alignments=())
    text = save_profile(mine, host.profiles).read_text("utf-8")
    (host.profiles / "mine.json").unlink()
    (host.profiles / "WINDOWS.JSON").write_bytes(b"\xef\xbb\xbf" + text.encode())
    *_, report = auto(sampler_name="heun")
    *_, listed = host.call("AttuneLoadProfile", profile_name="WINDOWS.JSON", model=demo[0])
    for where in (report, listed):
        for name, why in said.items():
            assert any(line.startswith("! ") and name in line and why in line for line in where.splitlines()), name
    assert "+ schedule: WINDOWS.JSON" in report and "* WINDOWS.JSON: schedule for AttuneDemo" in listed
    for node, widget in (
        ("AttuneScheduler", "schedule"),
        ("AttuneKSampler", "schedule"),
        ("AttuneLoadProfile", "profile_name"),
    ):
        options = next(
            one for one in host.nodes.NODE_CLASS_MAPPINGS[node].GET_SCHEMA().inputs if one.id == widget
        ).options
        assert "WINDOWS.JSON" in options and (widget == "profile_name" or not {*said} & {*options})
    with pytest.raises(ValueError, match=r"locked\.json cannot be read: Permission denied\. Allow reading it"):
        host.call("AttuneLoadProfile", profile_name="locked.json")
    assert host.nodes.NODE_CLASS_MAPPINGS["AttuneAuto"].fingerprint_inputs() is not None


def test_a_distilled_flow_model_gets_its_makers_levels_and_no_schedule_for_many_steps(host, auto, flow):
    """SD3.5 Large Turbo is run so: few steps, no guidance."""
    latent = {"samples": torch.zeros(1, 16, 128, 128)}
    _, sigmas, report = auto(flow, latent=latent, steps=8, sampler_name="dpmpp_2m", cfg=1.0)
    (theirs,) = host.call("AttuneScheduler", model=flow, steps=8, denoise=1.0, schedule="auto", latent=latent)
    assert torch.equal(sigmas, theirs) and "+ schedule: auto. SD3 by Stability AI: shift 3" in report
    assert "KL-optimal" not in report
