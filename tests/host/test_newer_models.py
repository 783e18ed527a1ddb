"""Kinds of models that only newer hosts have, made here of the demo models: what they say of themselves is heard."""

from __future__ import annotations

import types

import pytest
import torch

from graphs import Kit
from methods import METHODS


@pytest.fixture(scope="module")
def kits(host):
    return {name: Kit(host, name) for name in ("unet", "flow")}


@pytest.fixture(scope="module")
def seam(host):
    from pack.nodes._host import identity, session

    return types.SimpleNamespace(identify=identity.identify, solver_of=session.solver_of, identity=identity)


def sampled_by(model, of_class: type, **attributes):
    """A clone of MODEL whose model_sampling is a `of_class` with the parameters of its own."""
    own = model.get_model_object("model_sampling")
    kind = type("ModelSampling", (of_class, type(own)), {})
    made = kind(model.model.model_config)
    made.load_state_dict(own.state_dict())
    for name, value in attributes.items():
        setattr(made, name, value)
    clone = model.clone()
    clone.add_object_patch("model_sampling", made)
    return clone


# --- noise of another scale: HiDream-O1, the node ModelNoiseScale ---


class Loud:
    """What newer hosts make of CONST."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return super().noise_scaling(sigma, self.noise_scale * noise, latent_image, max_denoise)


def loud(model, scale: float = 8.0):
    """A clone of a flow MODEL with noise of another scale, by the host's own class where it has one."""
    of_host = hasattr(model.get_model_object("model_sampling"), "set_noise_scale")
    return sampled_by(model, type("Plain", (), {}) if of_host else Loud, noise_scale=scale)


def test_the_scale_of_the_noise_is_part_of_what_a_model_is(kits, seam):
    model = kits["flow"].model
    assert seam.identify(model).noise_scale == 1
    found = seam.identify(loud(model))
    assert found.noise_scale == found.noise_space.scale == 8
    assert seam.identify(loud(model, 0.0)).noise_space.scale == 1  # no noise at all: nothing to divide by
    assert seam.identify(sampled_by(kits["unet"].model, type("Odd", (), {"noise_scale": 8.0}))).noise_scale == 1


def test_redenoise_turns_where_it_does_without_the_scale(kits, caplog):
    kit, method = kits["flow"], METHODS["re-denoise"]
    turns = []
    for model in (kit.model, loud(kit.model)):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert kit.ksampler(method.on(kit)(model)).isfinite().all()
        turns.append(caplog.text.split("sigma ")[1].split(" and back")[0])
    assert turns == ["1 to 0.61"] * 2


def test_redenoise_of_loud_noise_is_that_of_plain_noise_and_smaller_data(kits):
    """The network is linear in nothing, but a model of 8 times everything is the same model: x is asked as x / 8."""
    kit, method = kits["flow"], METHODS["re-denoise"]
    from comfy.patcher_extension import WrappersMP

    def smaller(executor, x, t, *args, **kwargs):
        return 8 * executor(x / 8, t, *args, **kwargs)

    larger = loud(kit.model)
    larger.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", smaller)
    want, got = (kit.ksampler(method.on(kit)(model)) for model in (kit.model, larger))
    inside = kit.model.model.latent_format.process_in
    torch.testing.assert_close(
        inside(got), 8 * inside(want), rtol=1e-3, atol=1e-3 * float(inside(want).abs().max()) * 8
    )


def test_a_model_that_begins_from_a_picture_has_no_noise_to_refine(kits, caplog):
    class FromPicture:
        def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
            return latent_image

    kit, method = kits["flow"], METHODS["re-denoise"]
    model = sampled_by(kit.model, FromPicture)
    with caplog.at_level("INFO"):
        assert torch.equal(kit.ksampler(method.on(kit)(model)), kit.ksampler(model))
    assert "stands aside, this model starts from a picture, without noise" in caplog.text


# --- a MODEL that calls its network in its own way: LongCat-Image ---


def own_way(model, apply):
    """A clone of MODEL whose class has this `_apply_model`."""
    clone, base = model.clone(), model.model
    kind = type("LongCatImage", (type(base),), {"_apply_model": apply})
    clone.model = kind.__new__(kind)
    clone.model.__dict__.update(base.__dict__)
    return clone


@pytest.mark.parametrize("label", ["aligned timesteps", "aligned timesteps, flow", "noise shift"])
def test_a_model_that_adds_to_its_call_is_told_and_nobody_is_warned(kits, label, caplog):
    def adds(self, x, t, *args, **kwargs):
        return super(type(self), self)._apply_model(x, t, *args, **kwargs)

    method = METHODS[label]
    kit = kits[method.model]
    model = own_way(kit.model, adds)
    assert torch.equal(kit.ksampler(method.on(kit)(model)), kit.ksampler(method.on(kit)(kit.model)))
    assert "in its own way" not in caplog.text


def test_a_model_that_asks_for_no_timestep_is_named_once_a_run(kits, caplog):
    import comfy.model_base

    def deaf(self, x, t, *args, **kwargs):
        own, heard = self.__dict__.pop("process_timestep", None), comfy.model_base.BaseModel._apply_model
        try:
            return heard(self, x, t, *args, **kwargs)
        finally:
            if own is not None:
                self.process_timestep = own

    kit, method = kits["unet"], METHODS["aligned timesteps"]
    model = own_way(kit.model, deaf)
    assert torch.equal(kit.ksampler(method.on(kit)(model)), kit.ksampler(model))
    assert caplog.text.count("This MODEL (LongCatImage) runs in its own way: it does not ask for its timestep") == 1


# --- latents that the network takes as they are: CogVideoX, for the VOID Sampler alone ---


class V_PREDICTION_DDPM:
    def calculate_input(self, sigma, noise):
        return noise


def test_a_model_for_a_sampler_of_its_own_is_fitted_by_no_other(host, kits, seam, caplog):
    kit, method = kits["unet"], METHODS["re-denoise"]
    model = sampled_by(kit.model, V_PREDICTION_DDPM)
    assert seam.identify(model).prediction == "v"
    (euler,) = host.call("KSamplerSelect", sampler_name="euler")
    with pytest.raises(ValueError, match=r"runs with the sampler that was made for it alone \(VOID Sampler\)"):
        seam.solver_of(euler, model)
    with caplog.at_level("INFO"):
        (patched, _) = host.call(method.node, model=model, **method.inputs)
        assert torch.equal(kit.ksampler(patched), kit.ksampler(model))
    assert "stands aside, this model's latents are those of its own sampler" in caplog.text
