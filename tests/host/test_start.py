"""Where runs begin: all starts through one wrapper, handed out as NOISE, in their order, and out of the way of fits."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

from graphs import STEPS, Kit
from methods import METHODS
from nightly import daily

KEY = "attune.start"  # of a MODEL's options
STARTS = ["one more step", "signal leak", "golden noise", "re-denoise"]


@pytest.fixture(scope="module")
def kits(host):
    return {name: Kit(host, name) for name in ("unet", "flow")}


def advanced(kit: Kit, model, noise, latent=None):
    """SamplerCustomAdvanced on a MODEL with CFGGuider, from a NOISE."""
    call = kit.host.call
    (guider,) = call("CFGGuider", model=model, positive=kit.positive, negative=kit.negative, cfg=3.0)
    (sampler,) = call("KSamplerSelect", sampler_name="euler")
    given = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": levels(kit)}
    return call("SamplerCustomAdvanced", latent_image=latent or kit.empty(2), **given)[0]["samples"]


def levels(kit: Kit):
    return kit.host.call("BasicScheduler", model=kit.model, scheduler="normal", steps=STEPS, denoise=1.0)[0]


def plain(kit: Kit):
    return kit.host.call("RandomNoise", noise_seed=3)[0]


def begun(kit: Kit, model):
    """The start of a MODEL as NOISE."""
    prompts = {"positive": kit.positive, "negative": kit.negative, "cfg": 3.0}
    return kit.host.call("AttuneNoise", noise=plain(kit), model=model, sigmas=levels(kit), **prompts)[0]


def starts_of(model) -> tuple:
    return model.model_options["transformer_options"].get(KEY, ())


@contextmanager
def whole_calls(kit: Kit):
    """The rows of every call of an inner block, which a network that reuses features leaves out."""
    network, calls = kit.model.model.diffusion_model, []
    block = network.input_blocks[1] if kit.name == "unet" else network.joint_blocks[1]
    block = block[0] if kit.name == "unet" else block.x_block.mlp
    hook = block.register_forward_hook(lambda module, args, out: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


BEGUN = [(latent, name) for latent in ("empty", "masked picture") for name in STARTS]


@pytest.mark.parametrize(("latent", "name"), daily(BEGUN, BEGUN[0], BEGUN[-1], names=2))
def test_the_noise_is_where_the_patched_model_begins_to_the_bit(kits, name, latent):
    method = METHODS[name]
    kit = kits[method.model]
    model, given = method.on(kit)(kit.model), kit.empty(2)
    if latent != "empty":
        given = kit.picture(2) | {"noise_mask": torch.zeros(1, 1, 64, 64)}
        given["noise_mask"][..., 32:] = 1
    wanted = advanced(kit, model, plain(kit), given)
    assert torch.equal(advanced(kit, kit.model, begun(kit, model), given), wanted)
    assert not torch.equal(advanced(kit, kit.model, plain(kit), given), wanted)


@pytest.mark.parametrize("name", daily(STARTS, *list(STARTS)[::2]))
def test_a_start_that_is_in_the_noise_already_is_not_added_again(kits, name, caplog):
    method = METHODS[name]
    kit = kits[method.model]
    model = method.on(kit)(kit.model)
    once = advanced(kit, kit.model, begun(kit, model))
    assert torch.equal(advanced(kit, model, begun(kit, model)), once)
    assert "holds the MODEL's start already" in caplog.text
    assert torch.equal(advanced(kit, model, plain(kit)), once)  # and the next run has its start again


def test_the_noise_of_a_model_without_a_start_is_the_noise(kits, caplog):
    kit = kits["unet"]
    assert torch.equal(begun(kit, kit.model).generate_noise(kit.empty()), plain(kit).generate_noise(kit.empty()))
    assert "nothing on this MODEL changes where its runs begin" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"), [("golden noise", "there is none"), ("re-denoise", "'positive' and 'neg")]
)
def test_a_prompt_that_a_start_needs_is_asked_for_by_the_node(kits, name, message):
    kit = kits[METHODS[name].model]
    model = METHODS[name].on(kit)(kit.model)
    with pytest.raises(ValueError, match=message):
        kit.host.call("AttuneNoise", noise=plain(kit), model=model, sigmas=levels(kit))


def test_several_starts_act_in_one_order_and_one_of_a_place_counts(kits):
    kit = kits["unet"]
    nodes = {name: METHODS[name].on(kit) for name in STARTS[:3]}
    nodes["re-denoise"] = lambda model: kit.host.call("AttuneRedenoise", model=model)[0]
    orders = (["one more step", "golden noise", "re-denoise"], ["re-denoise", "one more step", "golden noise"])
    ends = []
    for order in orders:
        model = kit.model
        for name in order:
            model = nodes[name](model)
        ends.append(kit.ksampler(model))
    assert torch.equal(*ends)
    both = nodes["signal leak"](nodes["one more step"](kit.model))
    assert torch.equal(kit.ksampler(both), kit.ksampler(nodes["signal leak"](kit.model)))
    assert [start.place for start in starts_of(both)] == ["first state"] and not starts_of(kit.model)


@pytest.mark.parametrize("name", daily(STARTS, *list(STARTS)[1::2]))
def test_another_pack_may_copy_all_options_while_sampling(kits, name):
    method = METHODS[name]
    kit = kits[method.model]
    model, copies = method.on(kit)(kit.model), []

    def look(executor, *args, **kwargs):
        copies.append(copy.deepcopy(executor.class_obj.model_options))
        return executor(*args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key("predict_noise", "test", look)
    assert torch.equal(kit.ksampler(watched), kit.ksampler(model))
    assert copies[0]["transformer_options"][KEY][0] is starts_of(model)[0]  # no network is copied


CACHE = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
IN_FRONT = [*(name for name in METHODS if name != "top level fresh"), "EasyCache", "LazyCache"]


@pytest.mark.parametrize("name", daily(IN_FRONT, "encoder propagation", "noise shift", "golden noise", "LazyCache"))
def test_a_fit_behind_any_method_is_the_fit_of_the_plain_model(kits, name):
    """Its own solves and its reference: the same path, and as many whole calls of the network."""
    from pack.kernels.space import NoiseSpace
    from pack.nodes._host.session import Solver, named_sampler, run_session
    from pack.nodes._plan.solvers import SOLVERS

    kit = kits[METHODS[name].model if name in METHODS else "flow"]
    cached = lambda model: kit.host.call(name, model=model, **CACHE)[0]
    behind = METHODS[name].on(kit) if name in METHODS else cached
    sigmas, space = levels(kit), NoiseSpace("flow" if kit.name == "flow" else "ve")
    euler = Solver("euler", "euler", named_sampler("euler"), SOLVERS["euler"])

    def work(solves):
        noise = plain(kit).generate_noise(kit.empty())
        return torch.stack([solves.solve(sigmas, noise), *solves.record(sigmas, noise).states])

    found = []
    for model in (kit.model, behind(kit.model)):
        with whole_calls(kit) as calls:
            ends = run_session(
                model, kit.positive, kit.negative, 3.0, euler, sigmas, kit.empty()["samples"], 3, space, work
            )
        found.append((ends, len(calls)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] == 2 * STEPS


def test_a_prediction_without_a_latent_blocks_who_uses_it_and_nobody_else(host):
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors"),
        "2": node("AttuneLoadOneMoreStep", oms_name="attune_demo.safetensors", latent_space="auto",
                  weight_dtype="default", prediction="auto", head_dim=0),
        "3": node("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "4": node("AttuneOneMoreStep", model=["1", 0], oms_model=["2", 0], positive=["3", 0], cfg=1.0, strength=1.0,
                  solver="ddpm", noise_level="exact", diversity=0.0, share_noise=False),
        "5": node("PreviewAny", source=["4", 0]),
    }  # fmt: skip
    assert host.run(graph) and not host.errors
    graph["6"] = node("VAEDecode", samples=["4", 1], vae=["1", 2])
    graph["7"] = node("PreviewImage", images=["6", 0])
    assert "7" not in host.run(graph)
    (said,) = host.errors
    assert "'prediction' is used, but 'latent' is not connected" in said


@pytest.mark.parametrize(("node", "name"), [("AttuneLoadNPNet", "npnet_name"), ("AttuneLoadOneMoreStep", "oms_name")])
def test_a_loader_whose_file_is_missing_or_no_name_has_a_fingerprint_all_the_same(host, node, name):
    loader = host.nodes.NODE_CLASS_MAPPINGS[node]
    for value in ({}, {name: None}, {name: "none.safetensors"}, {name: 5}, {name: ["a"]}):
        assert loader.fingerprint_inputs(**value) == loader.fingerprint_inputs(**value)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("AttuneOneMoreStep", ["solver", "noise_level"]),
        ("AttuneSignalLeak", ["noise_level"]),
        ("AttuneGoldenNoiseModel", ["other_sizes", "long_prompt", "svd_on", "partial_denoise"]),
        ("AttuneRedenoise", ["mode", "evaluate_at", "partial_denoise"]),
        ("AttuneLoadOneMoreStep", ["oms_name", "latent_space", "weight_dtype", "prediction"]),
        ("AttuneLoadNPNet", ["npnet_name"]),
    ],
)
def test_a_choice_that_no_list_has_is_answered_by_a_sentence(kits, node, inputs):
    """As an API prompt may send it: older hosts check no list."""
    kit = kits["unet"]
    needed = {
        "AttuneOneMoreStep": METHODS["one more step"].needs, "AttuneSignalLeak": METHODS["signal leak"].needs,
        "AttuneGoldenNoiseModel": METHODS["golden noise"].needs, "AttuneRedenoise": lambda kit: {},
    }  # fmt: skip
    given = {"model": kit.model} | needed[node](kit) if node in needed else {"oms_name": "attune_demo.safetensors"}
    for name in inputs:
        for value in (None, 5, "x", {"a": 1}):
            with pytest.raises(ValueError, match=r"Choose one of: |There is no "):
                kit.host.call(node, **(given if "Load" not in node or node.endswith("Step") else {}) | {name: value})
