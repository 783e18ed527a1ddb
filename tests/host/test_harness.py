"""The benchmark harness: what it draws equals what a user's graph draws, once, and again from the cache."""

from __future__ import annotations

import pytest
import torch

from harness import Cell, Lab, prompt, tasks

WORK = tasks(3)


@pytest.fixture(scope="module")
def lab(host, tmp_path_factory):
    return Lab(host, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("model", ["unet", "flow"])
def test_every_picture_of_a_batch_equals_the_stock_graph_for_its_prompt_and_seed(host, lab, model):
    cell = Cell(model, "dpmpp_2m", lab.sigmas(model, "simple", 4))
    drawn = lab.run(cell, WORK)
    for i, task in enumerate(WORK):
        positive, negative = (
            host.call("CLIPTextEncode", clip=lab.clip, text=text)[0] for text in (prompt(task.obj, task.background), "")
        )
        (alone,) = host.call(
            "KSampler", model=lab.models[model], seed=task.seed, steps=4, cfg=3.0, sampler_name="dpmpp_2m",
            scheduler="simple", positive=positive, negative=negative,
            latent_image={"samples": torch.zeros(1, drawn.latents.shape[1], 16, 16)}, denoise=1.0,
        )  # fmt: skip
        torch.testing.assert_close(drawn.latents[i : i + 1], alone["samples"], rtol=1e-3, atol=1e-4)


def test_model_calls_are_counted(lab):
    assert lab.run(Cell("unet", "euler", lab.sigmas("unet", "normal", 5)), WORK).calls == 5
    assert lab.run(Cell("unet", "heun", lab.sigmas("unet", "normal", 5)), WORK).calls == 9


def test_a_second_run_reads_the_cache_and_another_setting_does_not(lab):
    said = []
    cell = Cell("unet", "euler", lab.sigmas("unet", "karras", 3))
    first, second = lab.run(cell, WORK, said.append), lab.run(cell, WORK, said.append)
    assert len(said) == 1 and torch.equal(first.latents, second.latents) and second.seconds == first.seconds
    lab.run(Cell("unet", "euler", cell.sigmas, cfg=2.0), WORK, said.append)
    assert len(said) == 2


def test_a_run_that_was_cut_short_leaves_nothing_that_looks_finished(lab, monkeypatch):
    cell = Cell("unet", "euler", lab.sigmas("unet", "beta", 3))

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.run(cell, WORK, interrupt)
    assert not lab.path(cell, WORK).exists()
    assert len(lab.run(cell, WORK).latents) == 3


def test_tasks_visit_every_object_and_every_background_before_they_repeat():
    some = tasks(128)
    assert len({task.obj for task in some}) == 128 and len({task.background for task in some}) == 20
    assert len({(task.obj, task.background) for task in tasks(2560)}) == 2560
