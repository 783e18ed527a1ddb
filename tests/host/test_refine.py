"""Starts from a picture in the host: the level where the papers start, the stock strength that this is, and the plot."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def flow(host):
    return host.call("CheckpointLoaderSimple", ckpt_name="attune_demo_flow.safetensors")[0]


def refine(host, model, name, steps=15, denoise=1.0):
    return host.call("AttuneScheduler", model=model, steps=steps, denoise=denoise, schedule=name)[0]


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
