"""Starts from a picture in the host: the level where the papers start, the stock strength that this is, and the plot."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")[0]


def refine(host, model, name, steps=15, denoise=1.0, **more):
    return host.call("AttuneScheduler", model=model, steps=steps, denoise=denoise, schedule=name, **more)[0]


def test_the_node_tells_the_denoise_that_starts_at_the_same_level(host, demo, flow, caplog):
    for model, first in ((demo[0], 3**0.5), (flow, 0.5)):
        caplog.clear()
        with caplog.at_level("INFO"):
            sigmas = refine(host, model, "refine: Resfusion")
        told = float(caplog.text.split("as 'denoise' ")[1].split()[0])
        (stock,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=50, denoise=told)
        assert float(sigmas[0]) == pytest.approx(first, rel=1e-3) == pytest.approx(float(stock[0]), rel=0.05)


def test_a_run_from_a_picture_starts_at_that_level_in_the_stock_sampler(host, flow, encode):
    seen, model = [], flow.clone()

    def note(executor, guider, sigmas, extra_args, callback, noise, latent, *args):
        seen.append(guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent, False).std())
        return executor(guider, sigmas, extra_args, callback, noise, latent, *args)

    model.add_wrapper_with_key("sampler_sample", "test", note)
    (out,) = host.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=1, cfg=1.0, positive=encode("a cat"), negative=[],
        sampler=host.call("KSamplerSelect", sampler_name="euler")[0], sigmas=refine(host, model, "refine: ResShift", 4),
        latent_image={"samples": torch.full((1, 16, 16, 16), 0.06)},
    )[:1]  # fmt: skip
    assert out["samples"].isfinite().all() and float(seen[0]) == pytest.approx(1.98 / 2.98, rel=0.05)


def test_the_plot_of_what_is_kept(host, demo, flow):
    sigmas, plot = refine(host, demo[0], "refine: Resfusion"), lambda **more: host.call("AttunePlotSigmas", **more)[0]
    kept = plot(sigmas_1=sigmas, show="detail kept", model=demo[0], labels="mine")
    assert kept.shape == (1, 600, 960, 3) and not torch.equal(kept, plot(sigmas_1=sigmas, labels="mine"))
    assert not torch.equal(kept, plot(sigmas_1=0.1 * sigmas, show="detail kept", model=demo[0], labels="mine"))
    assert plot(show="detail kept", model=flow, sigmas_1=sigmas[:0]).shape == kept.shape
    with pytest.raises(ValueError, match="connect 'model'"):
        plot(sigmas_1=sigmas, show="detail kept")
    with pytest.raises(ValueError, match="set 'denoise' to 1"):
        refine(host, flow, "refine: ResShift", denoise=0.4)


def test_a_start_by_detail_is_the_same_corruption_on_every_model_and_at_every_size(host, demo, flow, caplog):
    """Nearly so: the power of a picture is shared by more frequencies where it is larger."""

    def start(model, detail, side=512, channels=4):
        latent = {"samples": torch.zeros(1, channels, side // 8, side // 8)}
        sigmas = refine(host, model, "refine: by detail", detail=detail, latent=latent)
        assert len(sigmas) == 16 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        return float(sigmas[0])

    eps, shifted = start(demo[0], 16.0), start(flow, 16.0, channels=16)
    assert shifted / (1 - shifted) == pytest.approx(eps, rel=1e-3)
    assert start(demo[0], 32.0) == pytest.approx(2 * eps, rel=1e-3)
    assert 0.85 * eps < start(demo[0], 16.0, side=1024) < eps < start(demo[0], 16.0, side=256) < 1.25 * eps
    with caplog.at_level("INFO"):
        unknown = refine(host, demo[0], "refine: by detail", detail=16.0)
    assert float(unknown[0]) == pytest.approx(eps, rel=1e-3)  # without a latent a picture of 512 pixels
    assert "draws detail finer than 16 pixels anew" in caplog.text and "as 'denoise'" in caplog.text
    assert start(flow, 4096.0, channels=16) < 1


def test_the_ksampler_takes_the_detail_too(host, flow, encode):
    latent = {"samples": torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))}
    given = {"model": flow, "steps": 3, "cfg": 1.0, "positive": encode("a cat"), "negative": []}

    def change(detail):
        out = host.call(
            "AttuneKSampler", **given, seed=1, sampler_name="euler", schedule="refine: by detail", latent_image=latent,
            denoise=1.0, detail=detail,
        )[0]["samples"]  # fmt: skip
        return float((out - latent["samples"]).square().mean())

    assert change(2.0) < 0.5 * change(32.0)
