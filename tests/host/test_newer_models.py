"""Kinds of models that only newer hosts have, made here of the demo models: what they say of themselves is heard."""

from __future__ import annotations

import types

import pytest
import torch

from graphs import Kit
from methods import METHODS
from nightly import daily
from several_networks import apart, on_another_network
from tiny_networks import drawn, tiny_network


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


class IMG_TO_IMG_VELOCITY:
    """Of models that draw a mask or a depth map: the picture stands in the place of noise, and loses a velocity."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return latent_image

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output

    def inverse_noise_scaling(self, sigma, latent):
        return latent


@pytest.mark.parametrize(
    "label", daily([label for label in METHODS if METHODS[label].model == "flow"], "noise shift", "block propagation")
)
def test_a_model_that_has_a_velocity_from_a_picture_is_run_or_stood_aside_from(kits, label, caplog):
    kit, method = kits["flow"], METHODS[label]
    model, picture = sampled_by(kit.model, IMG_TO_IMG_VELOCITY), {"latent_image": kit.picture()}
    stock = kit.ksampler(model, **picture)
    with caplog.at_level("INFO"):
        ours = kit.ksampler(method.on(kit)(model), **picture)
    assert ours.isfinite().all() and (not torch.equal(ours, stock) or "Attune" in caplog.text)
    assert torch.equal(kit.ksampler(model, **picture), stock)


# --- one MODEL on several networks: a further GPU for the other prompt, and the DualModelGuider ---


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("label", daily(METHODS, "encoder propagation", "block propagation", "forecasts"))
def test_on_two_networks_a_method_does_what_it_does_on_one(kits, label):
    method = METHODS[label]
    kit = kits[method.model]
    model = method.on(kit)(kit.model)
    want, stock = kit.ksampler(model), kit.ksampler(kit.model)
    clone, other = apart(model)
    near(kit.ksampler(clone), want)
    other.detach()
    assert torch.equal(kit.ksampler(kit.model), stock) and torch.equal(kit.ksampler(model), want)


@pytest.mark.parametrize("label", daily(METHODS, "block propagation", "one more step"))
def test_what_a_method_gives_the_host_to_load_can_be_loaded_for_a_further_gpu(kits, label):
    method = METHODS[label]
    kit = kits[method.model]
    model = method.on(kit)(kit.model)
    for one in model.get_additional_models():
        load, given = one.cached_patcher_init
        other = load(*given, disable_dynamic=True)
        pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
        assert other.model is not one.model and all(map(torch.equal, *zip(*pairs, strict=True)))
    if hasattr(model, "deepclone_multigpu"):
        assert model.deepclone_multigpu().model is not model.model


@pytest.mark.parametrize("family", daily(["CosmosT2IPredict2", "Lumina2", "PixArtSigma"], "CosmosT2IPredict2"))
def test_blocks_that_are_stood_in_for_are_those_of_the_network_that_is_asked(host, family):
    model = tiny_network(family)
    inputs = {**METHODS["block propagation"].inputs, "reuse": "automatic", "parallel": "auto"}
    (patched,) = host.call("AttunePropagation", model=model, **inputs)
    draw = lambda one: drawn(host, family, one, 8)
    want = draw(patched)
    clone, other = apart(patched)
    asked = {id(one): 0 for one in (model, other)}

    def listen(one):
        def count(*_):
            asked[id(one)] += 1

        layers = [layer for layer in one.model.diffusion_model.modules() if isinstance(layer, torch.nn.Linear)]
        return [layer.register_forward_hook(count) for layer in layers]

    hooks = [*listen(model), *listen(other)]
    near(draw(clone), want)
    for hook in hooks:
        hook.remove()
    other.detach()
    assert asked[id(model)] == asked[id(other)] > 0


def two_models(kit, model, other):
    """Newer hosts' DualModelGuider: the negative is asked of another MODEL, with the first one's options."""
    import comfy.sampler_helpers
    import comfy.samplers

    if "DualModelGuider" in kit.host.nodes.NODE_CLASS_MAPPINGS:
        inputs = {"positive": kit.positive, "negative": kit.negative, "cfg": 3.0}
        return kit.host.call("DualModelGuider", model=model, model_negative=other, **inputs)[0]

    class Guider_DualModel(comfy.samplers.CFGGuider):
        def outer_sample(self, noise, latent_image, *args, **kwargs):
            conds = {"negative": [one.copy() for one in self.conds["negative"]]}
            self.beside, conds, _ = comfy.sampler_helpers.prepare_sampling(
                other, noise.shape, conds, other.model_options
            )
            other.pre_run()
            here = other.load_device
            self.apart = comfy.samplers.process_conds(self.beside, noise.to(here), conds, here, latent_image.to(here))
            return super().outer_sample(noise, latent_image, *args, **kwargs)

        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 - as the host's
            asked = [(self.inner_model, self.conds["positive"]), (self.beside, self.apart["negative"])]
            cond, uncond = (
                comfy.samplers.calc_cond_batch(one, [prompt], x, timestep, model_options)[0] for one, prompt in asked
            )
            return comfy.samplers.cfg_function(self.inner_model, cond, uncond, self.cfg, x, timestep, model_options)

    guider = Guider_DualModel(model)
    guider.set_conds(kit.positive, kit.negative)
    guider.set_cfg(3.0)
    return guider


@pytest.mark.parametrize("label", daily(METHODS, "encoder propagation", "one-sided steps"))
def test_a_guider_of_two_models_is_served(kits, label):
    method = METHODS[label]
    kit = kits[method.model]
    other, model = on_another_network(kit.model), method.on(kit)(kit.model)
    stock = kit.advanced(kit.model, two_models(kit, kit.model, other))
    near(stock, kit.ksampler(kit.model))
    ours = kit.advanced(model, two_models(kit, model, other))
    assert ours.isfinite().all() and torch.equal(kit.advanced(model, two_models(kit, model, other)), ours)
    assert torch.equal(kit.advanced(kit.model, two_models(kit, kit.model, other)), stock)
    other.detach()
