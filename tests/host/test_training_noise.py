"""Training noise in the host's own Train LoRA: the levels that it draws, the noise that it gets, and what stays stock."""

from __future__ import annotations

import pytest
import torch

from pack.kernels.training_noise import TimestepDensity, quantile, stages

SIDE, PICTURES = 4, 4


@pytest.fixture(scope="module")
def trainable(kit):
    """The MODEL loaded as a trainer needs it: of 0.3.75's nodes the weights are inference tensors, and its Train LoRA
    stops at those of a flow model's norms."""
    loader = kit.host.nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]()
    return loader.load_checkpoint(kit.file)[0]


def patched(kit, model=None, **choice):
    return kit.host.call("AttuneTrainingNoise", model=model or kit.model, **choice)[0]


def trained(kit, model, batch: int = PICTURES) -> tuple[list[float], torch.Tensor]:
    """The sigmas that Train LoRA drew in one step, and the noise that it added, [n c h w]."""
    node = kit.host.nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"]
    watched, sigmas, noises = model.clone(), [], []

    def watch(executor, x, sigma, *args, **kwargs):
        level = sigma.detach()[:batch].reshape(-1, 1, 1, 1)  # the host asks the whole batch for each prompt again
        alpha = 1 - level if kit.name == "flow" else 1
        if not sigmas:
            sigmas.extend(level.flatten().tolist())
            noises.append((x.detach()[:batch] - alpha * _scaled(kit)) / level)
        return executor(x, sigma, *args, **kwargs)

    watched.add_wrapper_with_key("apply_model", "test", watch)
    torch.manual_seed(7)
    given = {
        "model": watched, "positive": kit.positive, "batch_size": batch, "steps": 1, "training_dtype": "fp32",
        "lora_dtype": "fp32", "rank": 1, "gradient_checkpointing": False, "existing_lora": "[None]",
    }  # fmt: skip
    pictures = [{"samples": _picture(kit)[None]}] * PICTURES
    if hasattr(node, "GET_SCHEMA"):  # each input is a list
        given = {one.id: one.default for one in node.GET_SCHEMA().inputs if hasattr(one, "default")} | given
        given = {name: [value] for name, value in given.items()} | {"latents": pictures}
    else:  # of 0.3.64: the pictures are one batch
        optional = {
            name: more[0]["default"]
            for name, (_, *more) in node.INPUT_TYPES()["required"].items()
            if more and "default" in more[0]
        }
        given = optional | given | {"latents": {"samples": torch.cat([one["samples"] for one in pictures])}}
    kit.host.call("TrainLoraNode", **given)
    return sigmas, noises[0]


def _picture(kit) -> torch.Tensor:
    """One latent for all, so that which of them a batch takes does not matter."""
    return torch.randn(kit.channels, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def _scaled(kit) -> torch.Tensor:
    return kit.model.model.process_latent_in(_picture(kit)[None])[0]


def test_stock_is_the_model_itself(unet):
    assert patched(unet) is unet.model
    assert patched(unet, noise="nearest of several", draws=1) is unet.model


def test_runs_that_sample_are_those_without_it(kit):
    model = patched(kit, timesteps="logit-normal", noise="nearest of several", highest_sigma=0.9)
    assert torch.equal(kit.ksampler(model), kit.ksampler(kit.model))


def test_train_lora_draws_its_levels_by_the_density_and_its_noise_as_before(kit, trainable):
    sampling = kit.model.get_model_object("model_sampling")
    stock, noise = trained(kit, trainable)
    band = {"highest_sigma": 0.8, "lowest_sigma": 0.1}
    found, same = trained(kit, patched(kit, trainable, timesteps="logit-normal", mean=-0.5, **band))
    levels = kit.host.module("nodes._host.training_noise").levels_of(sampling)
    density = TimestepDensity("logit-normal", -0.5, highest=0.8, lowest=0.1)
    place = quantile(stages(density, levels)[0])
    drawn = [share_of(sampling, sigma) for sigma in stock]
    assert found == pytest.approx([float(sampling.percent_to_sigma(place(u))) for u in drawn], rel=1e-3)
    assert all(0.09 < sigma < 0.81 for sigma in found) and len(found) == PICTURES
    torch.testing.assert_close(same, noise, rtol=0, atol=2e-3)


def share_of(sampling, sigma: float) -> float:
    """The u for which percent_to_sigma(u) is sigma, by bisection."""
    low, high = 1e-6, 1 - 1e-6
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sampling.percent_to_sigma(middle) > sigma else (low, middle)
    return low


def test_the_nearest_noise_is_nearer_and_the_levels_stay(unet):
    stock, noise = trained(unet, unet.model)
    found, near = trained(unet, patched(unet, noise="nearest of several", draws=8))
    assert found == stock
    picture = _scaled(unet)
    far = lambda one: (one - picture).flatten(1).norm(dim=1)
    assert (far(near) <= far(noise) + 1e-3).all() and (far(near) < far(noise) - 0.01).any()


def test_an_immiscible_batch_is_the_trainers_own_noise_with_the_least_distance(unet):
    module = unet.host.module("nodes._host.training_noise")
    sampling = unet.model.get_model_object("model_sampling")
    drawing = module._Drawing(module.TrainingNoise(TimestepDensity(), module.BATCH), sampling, 0)
    pictures, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    sigma = torch.tensor([1.0, 2.0, 3.0])
    scaled = drawing.sampling.noise_scaling(sigma, noise.clone(), pictures, False)
    added = (scaled - pictures) / sigma.reshape(-1, 1, 1, 1)
    distance = torch.cdist(pictures.flatten(1), noise.flatten(1))
    orders = [[a, b, c] for a in range(3) for b in range(3) for c in range(3) if {a, b, c} == {0, 1, 2}]
    best = min(orders, key=lambda order: float(distance[torch.arange(3), order].sum()))
    torch.testing.assert_close(added, noise[best], rtol=0, atol=1e-5)
    nothing = torch.zeros_like(noise)
    assert torch.equal(drawing.sampling.noise_scaling(0 * sigma, nothing, pictures, False), pictures)


def test_a_curriculum_begins_anew_with_each_training(unet):
    model = patched(unet, timesteps="curriculum", planned_draws=24, clusters=3)
    levels = unet.host.module("nodes._host.training_noise").levels_of(unet.model.get_model_object("model_sampling"))
    first = stages(TimestepDensity("curriculum", clusters=3, planned=24), levels)[0]
    lowest = float(levels.sigma[int((first > 0).nonzero()[-1])])
    runs = [trained(unet, model)[0] for _ in range(2)]
    assert runs[0] == runs[1] and min(runs[0]) >= 0.99 * lowest


def test_what_is_said_and_drawn(kit, caplog):
    _, plot, report = kit.host.call(
        "AttuneTrainingNoise", model=kit.model, timesteps="min-SNR", noise="immiscible batch"
    )
    assert plot.shape[-1] == 3 and report.startswith("Half of the draws lie at sigma ") and "stock: " in report
    assert "Noise: immiscible batch." in report
    staged = kit.host.call("AttuneTrainingNoise", model=kit.model, timesteps="curriculum", planned_draws=40)[2]
    assert staged.startswith("5 stages, down to sigma ") and "from draw 20 on" in staged
    with pytest.raises(ValueError, match="No noise level of this MODEL lies between 30 and 20"):
        patched(kit, lowest_sigma=30.0, highest_sigma=20.0)
    with pytest.raises(ValueError, match="'timesteps' is 'cosine'"):
        patched(kit, timesteps="cosine")
