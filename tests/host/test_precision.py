"""The precision guard on the demo models as the host loads them in 8 bits: nearer, identical where nothing is rounded."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import Parameter

from graphs import CHECKPOINTS
from several_networks import apart

FLOAT8 = torch.float8_e4m3fn


def in_fp8(kit):
    """The demo model with every weight in fp8, as UNETLoader's weight_dtype makes it."""
    import comfy.sd

    path = str(kit.host.root / "models/weights" / kit.file)
    options = {"dtype": FLOAT8}
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False, model_options=options)[0]


@pytest.fixture(scope="module")
def rounded(kit):
    return in_fp8(kit)


@pytest.fixture(scope="module")
def rounded_unet(unet):
    return in_fp8(unet)


def guard(kit, model, **choice):
    return kit.host.call("AttunePrecisionGuard", model=model, **choice)


def own_file(kit) -> str:
    return f"checkpoints/{kit.file}"


def distance(kit, model, exact) -> float:
    return float((kit.ksampler(model, steps=2) - exact).square().mean().sqrt())


def test_a_full_model_is_left_as_it_is(kit):
    model, report = guard(kit, kit.model, full_precision=own_file(kit))
    assert model is kit.model and report.endswith(
        "keeps the sensitive parts in full: there is nothing to put in place."
    )


def test_without_a_file_it_says_what_is_rounded_and_changes_nothing(kit, rounded):
    model, report = guard(kit, rounded)
    assert model is rounded and "time embedding: 4 in float8_e4m3fn." in report
    assert "choose the one that this model was made from in 'full_precision'" in report


@pytest.mark.parametrize("kit", ["unet", "flow"], indirect=True)
def test_full_weights_bring_it_nearer_and_leave_the_rounded_model_as_it_was(kit, rounded):
    exact, before = kit.ksampler(kit.model, steps=2), kit.ksampler(rounded, steps=2)
    model, report = guard(kit, rounded, full_precision=own_file(kit))
    seen = guard(kit, rounded)[1]
    found = [distance(kit, one, exact) for one in (rounded, model)]
    assert found[1] < 0.75 * found[0]
    assert (
        "time embedding: 4 in float8_e4m3fn" in seen and guard(kit, rounded)[1] == seen
    )  # the full ones are loaded now
    assert torch.equal(kit.ksampler(rounded, steps=2), before)
    assert "full weights from 'checkpoints/" in report and "The time embedding's answer is " in report
    again, said = guard(kit, model, full_precision=own_file(kit))
    assert again is model and "already keeps" in said


def test_more_bits_bring_it_nearer_still_and_the_rounded_model_stays_as_it_was(kit, rounded):
    exact, before = kit.ksampler(kit.model, steps=2), kit.ksampler(rounded, steps=2)
    few = guard(kit, rounded, full_precision=own_file(kit))[0]
    model, report = guard(kit, rounded, full_precision=own_file(kit), more_bits=2)
    found = distance(kit, few, exact), distance(kit, model, exact)
    assert found[1] < 0.4 * found[0]  # each bit halves what is left, and the embedding of places has none of it
    assert re.search(
        r"other weights get 2 more bits each, .* MB: they were rounded by (2|3)\.\d+% and now are by 0\.", report
    )
    assert torch.equal(kit.ksampler(rounded, steps=2), before)
    again = guard(kit, model, full_precision=own_file(kit), more_bits=1)[0]  # the earlier bits are not added twice
    put_back = [one for (one,) in again.weight_wrapper_patches.values()]
    assert {len(one.more.planes) for one in put_back} == {1}


def test_with_every_rounded_weight_in_full_it_is_the_full_model(kit, rounded):
    module = kit.host.module("nodes._host.precision")
    weights = [one for one in module.weights_of(rounded) if one.low]
    model = module.with_full(rounded, weights, module.read_full(own_file(kit), weights))
    assert torch.equal(kit.ksampler(model, steps=2), kit.ksampler(kit.model, steps=2))


def test_full_weights_take_the_place_of_bits_put_back_before(unet, rounded_unet):
    bits = guard(unet, rounded_unet, full_precision=own_file(unet), more_bits=1)[0]
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert bits.weight_wrapper_patches[key]
    full = guard(unet, bits, full_precision=own_file(unet), parts="sensitive and outermost blocks")[0]
    assert full.weight_wrapper_patches[key] == [] and key in full.object_patches
    assert bits.weight_wrapper_patches[key]


def test_where_products_are_in_8_bits_more_bits_are_not_promised(unet, rounded_unet):
    import comfy.ops

    module = unet.host.module("nodes._host.precision")
    value = torch.zeros(2, 2).to(FLOAT8)
    fast, plain = (kind.Linear(2, 2) for kind in (comfy.ops.fp8_ops, comfy.ops.manual_cast))
    weights = [module.Weight("middle_block.0.weight", "all others", value, None, layer) for layer in (fast, plain)]
    assert [(one.in_8_bits, one.takes_bits) for one in weights] == [(True, False), (False, True)]


def test_a_lora_stays_on_the_full_weights(unet, rounded_unet):
    key = "diffusion_model.time_embed.0.weight"
    change = {key: ("diff", (torch.full_like(unet.model.model.state_dict()[key].float(), 0.01),))}

    def with_lora(model):
        patched = model.clone()
        patched.add_patches(change, 1.0)
        return patched

    exact = unet.ksampler(with_lora(unet.model), steps=2)
    model = guard(unet, with_lora(rounded_unet), full_precision=own_file(unet))[0]
    assert distance(unet, model, exact) < 0.75 * distance(unet, with_lora(rounded_unet), exact)


def test_the_embeddings_error_is_that_of_the_networks_own_layers(unet, rounded_unet):
    import comfy.model_management
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    module = unet.host.module("nodes._host.precision")
    weights = module.weights_of(rounded_unet)
    found = module.embedding_error(rounded_unet, weights, module.read_full(own_file(unet), weights))
    times = module._timesteps(unet.model.get_model_object("model_sampling"))
    comfy.model_management.unload_all_models()  # what other tests have put in place
    embed = lambda model: model.model.diffusion_model.time_embed(timestep_embedding(times, 32).float()).float()
    with torch.inference_mode():
        low, exact = embed(rounded_unet), embed(unet.model)
    assert found == pytest.approx(float(((low - exact).square().mean() / exact.square().mean()).sqrt()), rel=0.02)


def test_a_scaled_weight_is_replaced_in_its_own_scale(unet, rounded_unet):
    module = unet.host.module("nodes._host.precision")
    weights = [one for one in module.weights_of(rounded_unet) if one.name == "time_embed.0.weight"]
    scaled = [module.Weight(one.name, one.part, one.value, Parameter(torch.tensor(0.5))) for one in weights]
    full = module.read_full(own_file(unet), weights)
    placed = module.with_full(rounded_unet, scaled, full).object_patches["diffusion_model.time_embed.0.weight"]
    torch.testing.assert_close(placed * 0.5, full["time_embed.0.weight"].float())


def test_packed_weights_are_read_only(unet):
    class Packed(torch.Tensor):
        pass

    module = unet.host.module("nodes._host.precision")
    one = module.Weight("time_embed.0.weight", "time embedding", torch.zeros(2).as_subclass(Packed), None)
    assert one.read_only and not one.low and one.kept == "Packed"


def test_a_further_gpus_network_has_weights_of_its_own(unet, rounded_unet):
    """Else the host would move those of the first one to the other GPU with it."""
    model = guard(unet, rounded_unet, full_precision=own_file(unet), more_bits=1)[0]
    want, stock = unet.ksampler(model, steps=2), unet.ksampler(rounded_unet, steps=2)
    clone, other = apart(model)
    torch.testing.assert_close(unet.ksampler(clone, steps=2), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    other.model.diffusion_model.double()  # a move, as the host's of the weights of a network in use
    for one in (other, other.clone()):
        for (bits,) in one.weight_wrapper_patches.values():
            bits.move_to(torch.device("meta"))
    assert torch.equal(unet.ksampler(model, steps=2), want)
    other.detach()
    assert torch.equal(unet.ksampler(rounded_unet, steps=2), stock)


def test_the_weights_are_loaded_where_the_rounded_model_is_loaded(unet, rounded_unet):
    from comfy.patcher_extension import CallbacksMP

    unet.ksampler(rounded_unet, steps=1)
    model, loaded = guard(unet, rounded_unet, full_precision=own_file(unet))[0], []
    model.add_callback_with_key(CallbacksMP.ON_LOAD, "test", lambda *_: loaded.append(1))
    unet.ksampler(model, steps=1)
    assert loaded


def dynamic(model, load_again):
    """MODEL as dynamic VRAM has it on a GPU: its clones without are loaded again, as older hosts are taught here."""
    clone, own = model.clone(), model.clone
    clone.is_dynamic = lambda: True
    clone.clone = lambda disable_dynamic=False: load_again() if disable_dynamic else own()
    return clone


def test_under_dynamic_vram_the_guarded_model_is_loaded_without(unet, rounded_unet):
    model, said = guard(unet, dynamic(rounded_unet, lambda: in_fp8(unet)), full_precision=own_file(unet), more_bits=1)
    want, report = guard(unet, rounded_unet, full_precision=own_file(unet), more_bits=1)
    assert said == report and model.model is not rounded_unet.model
    assert torch.equal(unet.ksampler(model, steps=2), unet.ksampler(want, steps=2))


def test_a_dynamic_model_that_cannot_be_loaded_again_is_refused(unet, rounded_unet):
    def none():
        raise RuntimeError("cached_patcher_init is not initialized")

    model = dynamic(rounded_unet, none)
    with pytest.raises(
        ValueError, match=r"Load it with Load Checkpoint or .*start ComfyUI with --disable-dynamic-vram"
    ):
        guard(unet, model, full_precision=own_file(unet))
    assert guard(unet, model)[0] is model  # where it only says what is rounded


def test_the_wrong_file_and_none_are_told(unet, rounded_unet):
    with pytest.raises(ValueError, match=r"has no weight '.*', so it is not this model in full precision"):
        guard(unet, rounded_unet, full_precision=f"checkpoints/{CHECKPOINTS['flow']}")
    with pytest.raises(ValueError, match=r"There is no file 'checkpoints/gone.safetensors'. Put it into"):
        guard(unet, rounded_unet, full_precision="checkpoints/gone.safetensors")
