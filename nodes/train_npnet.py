"""Make an NPNet for your own model: collect pairs of noise and golden noise, then train on them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ..models.noise_pairs import plan, shard_paths
from ..models.npnet import NPNet
from ..models.npnet_files import NPNetFile, save_npnet
from ..models.train_npnet import ALONE, SIZES, Recipe, Share, Trainer, report
from ._host.api import io, schema
from ._host.folders import npnet_folder
from ._host.golden_noise import HostNPNet, NPNetType
from ._host.noise_pairs import collect, facts_of, pairs_folder
from ._host.redenoise import Redenoise
from ._host.session import ProgressBar, empty_latent, stop_if_asked, training_device

LOG = logging.getLogger(__name__)
CATEGORY = "attune/noise"
NAME_TIP = "A folder in output/attune_pairs. Run again, it goes on where it stopped."


class AttuneCollectNoisePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneCollectNoisePairs",
            display_name="Attune Collect Noise Pairs",
            category=CATEGORY,
            description="Golden noise of many prompts by re-denoising: what Attune Train NPNet learns from.",
            search_aliases=["golden noise", "NPNet", "dataset", "noise prompt dataset"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to make golden noise for."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.String.Input("prompts", multiline=True, default="", tooltip="One prompt a line; 20 or more."),
                io.Conditioning.Input("negative", tooltip="What to guide away from, mostly an empty prompt."),
                io.Latent.Input("latent_image", tooltip="An empty latent; gives the size. Square."),
                io.String.Input("name", default="pairs", tooltip=NAME_TIP),
                io.Int.Input("seeds_per_prompt", default=4, min=1, max=10000, tooltip="Pairs for each prompt."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                    tooltip="Of the first pair; every pair has the next.",
                ),
                io.Float.Input(
                    "strong_cfg", default=5.5, min=0.1, max=100.0, step=0.1, tooltip="Guidance down; published 5.5."
                ),
                io.Float.Input(
                    "weak_cfg", default=1.0, min=0.1, max=100.0, step=0.1, tooltip="Guidance back; published 1."
                ),
                io.Int.Input("rounds", default=1, min=1, max=10, tooltip="Zigzags for each pair."),
                io.Float.Input(
                    "depth", default=0.39, min=0.0, max=0.95, step=0.01,
                    tooltip="How far down, as a part of the first noise level.",
                ),
                io.Int.Input("shard_size", default=256, min=1, max=65536, tooltip="Pairs in one file."),
                io.String.Input(
                    "part", default="1/1", tooltip="2/4 makes the second quarter of the files: for several machines."
                ),
            ],
            outputs=[
                io.String.Output(display_name="name", tooltip="For Attune Train NPNet."),
                io.String.Output(display_name="report", tooltip="What there is now, and where."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, prompts, negative, latent_image, name="pairs", seeds_per_prompt=4, seed=0, strong_cfg=5.5,
        weak_cfg=1.0, rounds=1, depth=0.39, shard_size=256, part="1/1",
    ) -> io.NodeOutput:  # fmt: skip
        lines = list(dict.fromkeys(line.strip() for line in prompts.splitlines() if line.strip()))
        if not lines:
            raise ValueError("'prompts' is empty: write one prompt a line.")
        folder, settings = pairs_folder(name), Redenoise(strong_cfg, weak_cfg, rounds, depth=depth)
        shards = plan(lines, seeds_per_prompt, seed, shard_size)
        facts = facts_of(model, strong_cfg, settings, negative)
        bar, done = ProgressBar(sum(map(len, shards))), 0
        latent = empty_latent(model, latent_image)[:1]
        for done in collect(model, clip, negative, strong_cfg, settings, latent, shards, part, folder, facts):
            bar.update(done)
        said = (
            f"{done} new pairs of {len(lines)} prompts, {len(shard_paths(folder))} of {len(shards)} files in {folder}"
        )
        LOG.info("Attune Collect Noise Pairs: %s.", said)
        return io.NodeOutput(name, said)


class AttuneTrainNPNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneTrainNPNet",
            display_name="Attune Train NPNet",
            category=CATEGORY,
            description="A network that predicts golden noise for your model, from collected pairs.",
            search_aliases=["golden noise", "NPNet", "training"],
            is_output_node=True,
            inputs=[
                io.String.Input("pairs", default="pairs", tooltip="The name given to Attune Collect Noise Pairs."),
                io.String.Input("name", default="my_npnet", tooltip="Of the file in models/npnet; it is replaced."),
                io.Int.Input("epochs", default=30, min=1, max=10000, tooltip="Times through all pairs; published 30."),
                io.Int.Input("batch_size", default=64, min=1, max=4096, tooltip="Pairs a step; published 64."),
                io.Float.Input(
                    "learning_rate", default=1e-4, min=1e-6, max=0.1, step=1e-6, round=1e-7,
                    tooltip="The highest, of AdamW; falls to 0 as a cosine. Published 0.0001; small networks 0.003.",
                ),
                io.Combo.Input(
                    "size", options=list(SIZES), default="published",
                    tooltip="published: 120 MB. small: under a megabyte and the prompt layer, for small latents.",
                ),
                io.Combo.Input(
                    "text_mode", options=["auto", "flat", "pooled", "mean"], default="auto",
                    tooltip="What of a prompt the network reads. auto: all tokens up to 77 (flat), else the pooled "
                    "vector, else the mean token.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False,
                    tooltip="Of the weights it starts from and of the order of the pairs.",
                ),
            ],
            outputs=[
                NPNetType.Output(display_name="npnet", tooltip="For Attune Golden Noise and its MODEL twin."),
                io.String.Output(display_name="report", tooltip="What the network explains of unseen prompts."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, pairs="pairs", name="my_npnet", epochs=30, batch_size=64, learning_rate=1e-4, size="published",
        text_mode="auto", seed=0,
    ) -> io.NodeOutput:  # fmt: skip
        recipe = Recipe(epochs, batch_size, learning_rate, seed, size, text_mode)
        with torch.inference_mode(False), torch.enable_grad():  # the host runs nodes without gradients
            file, net, measured = trained(pairs, name, recipe)
        said = "\n".join(f"{key}: {value}" for key, value in {"file": file.name, **measured}.items())
        facts = {key: str(value) for key, value in measured.items()}
        return io.NodeOutput(HostNPNet.of(NPNetFile(net.cpu(), file.name, facts)), said)


def trained(pairs: str, name: str, recipe: Recipe, share: Share = ALONE) -> tuple[Path, NPNet, dict[str, Any]]:
    """Train on the pairs of that name, resumed where it stopped: the network's file, the network, what was measured.

    Processes that share the training share the folders too; the first one writes.
    """
    folder, file = pairs_folder(pairs), npnet_folder() / f"{pairs_folder(name).name}.safetensors"
    state, bar = folder / "training.safetensors", ProgressBar(recipe.epochs)
    trainer = Trainer(shard_paths(folder), recipe, training_device(), share)
    trainer.resume(state)
    for epoch in trainer.run():
        stop_if_asked()
        if share.rank == 0:
            trainer.save(state)
            LOG.info("Attune Train NPNet: epoch %d explains %.2f %%.", epoch.number, 100 * epoch.explained)
        bar.update(epoch.number)
    measured, net = {**trainer.facts, **report(trainer, epoch)}, trainer.result()
    if share.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_npnet(net, file, measured)
    return file, net, measured


NODES = [AttuneCollectNoisePairs, AttuneTrainNPNet]
