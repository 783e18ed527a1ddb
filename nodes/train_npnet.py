"""Make an NPNet for your own model: collect the pairs of noise and golden noise that are missing, train on them."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import cast

import torch

from ..models.noise_pairs import plan, remaining, shard_paths
from ..models.npnet import NPNet
from ..models.npnet_files import save_npnet
from ..models.train_npnet import ALONE, NPNET_SIZES, NPNetTraining, Pairs, Recipe, Share
from ..models.training import MADE, UNFINISHED, check_writable, find_place, keep_result, spelled
from ._draw.plots import draw_learning
from ._host.api import ExecutionBlocker, advanced, io, schema
from ._host.folders import NPNETS, folder_of
from ._host.golden_noise import HostNPNet, NPNetType
from ._host.live import ProgressBar, coloured
from ._host.noise_pairs import Source, collect, pairs_folder
from ._host.redenoise import Redenoise
from ._host.session import empty_latent, stop_if_asked, training_device

LOG = logging.getLogger(__name__)
ALL = "1/1"


class AttuneTrainNPNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "AttuneTrainNPNet", "Attune Train NPNet", "attune/noise",
            "Trains a network that predicts golden noise for your model: it makes pairs and learns from them.",
            search_aliases=["golden noise", "NPNet", "training", "noise prompt dataset", "collect noise pairs"],
            is_output_node=True,
            inputs=[
                *_source(),
                io.String.Input(
                    "prompts", multiline=True, default="",
                    tooltip="The prompts, one on each line, 20 or more. They are used when 'model' is connected.",
                ),
                io.String.Input(
                    "name", default="my_npnet",
                    tooltip="The name of the file in models/npnet and of the pairs in output/attune_pairs. Running "
                    "the node again goes on with them.",
                ),
                io.Int.Input(
                    "seeds_per_prompt", default=4, min=1, max=10000,
                    tooltip="How many pairs of noises are made for each prompt.",
                ),
                io.Float.Input(
                    "strong_cfg", default=5.5, min=0.1, max=100.0, step=0.1,
                    tooltip="Guidance on the way down; 5.5 as published.",
                ),
                io.Int.Input(
                    "epochs", default=30, min=1, max=10000,
                    tooltip="How many times the training goes through all pairs; 30 as published.",
                ),
                io.Combo.Input(
                    "size", options=list(NPNET_SIZES), default="published",
                    tooltip="The size of the network. published: 120 MB. small: less than a megabyte plus the prompt "
                    "layer, for small latents.",
                ),
                *advanced(*_details()),
            ],
            outputs=[
                NPNetType.Output(display_name="npnet", tooltip="For Attune Golden Noise."),
                io.String.Output(
                    display_name="report",
                    tooltip="How much of the golden noise the network predicts for prompts that it has not seen.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, prompts="", name="my_npnet", seeds_per_prompt=4, strong_cfg=5.5, epochs=30, size="published",
        learning_rate=0.0, batch_size=64, text_mode="auto", seed=0, weak_cfg=1.0, rounds=1, depth=0.39, shard_size=256,
        part=ALL, pairs="", model=None, clip=None, negative=None, latent_image=None,
    ) -> io.NodeOutput:  # fmt: skip
        recipe, folder = Recipe(epochs, batch_size, learning_rate, seed, size, text_mode), pairs_folder(pairs or name)
        check_place(folder, name)
        given = {"model": model, "clip": clip, "negative": negative, "latent_image": latent_image}
        missing = [key for key, value in given.items() if value is None]
        if len(missing) < len(given):
            if missing:
                raise ValueError(
                    f"To collect pairs, connect {' and '.join(map(repr, missing))}, too; to train on those that are "
                    "there, none of these inputs."
                )
            settings = Redenoise(strong_cfg, weak_cfg, rounds, depth=depth)
            source = Source(model, clip, negative, empty_latent(model, latent_image)[:1], settings)
            said = collected(source, prompts, seeds_per_prompt, seed, shard_size, part, folder, recipe)
            if part != ALL:
                why = f"'part' {part} only collects. With all files in one folder, run it again with 1/1 to train."
                return io.NodeOutput(ExecutionBlocker(why), said)
        with torch.inference_mode(False), torch.enable_grad():  # the host runs nodes without gradients
            file = trained(folder, name, recipe)
        npnet = HostNPNet.load(file)
        return io.NodeOutput(npnet, npnet.file.describe())


def _source() -> list:
    tip = "Leave all four inputs unconnected to train on the pairs that are there."
    return [
        io.Model.Input("model", optional=True, tooltip=f"The model to make golden noise for. {tip}"),
        io.Clip.Input("clip", optional=True, tooltip="The text encoder of this model."),
        io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt, usually empty."),
        io.Latent.Input("latent_image", optional=True, tooltip="An empty square latent, which gives the size."),
    ]


def _details() -> list:
    return [
        io.Float.Input(
            "learning_rate", default=0.0, min=0.0, max=0.1, step=1e-6, round=1e-7,
            tooltip="The highest learning rate of AdamW, which falls to 0 as a cosine. 0 takes the rate of the size: "
            "0.0001 for published, 0.003 for small.",
        ),
        io.Int.Input(
            "batch_size", default=64, min=1, max=4096,
            tooltip="How many pairs a training step sees; 64 as published.",
        ),
        io.Combo.Input(
            "text_mode", options=["auto", "flat", "pooled", "mean"], default="auto",
            tooltip="What the network reads of a prompt. auto: all tokens if they are at most 77 (flat), otherwise "
            "the pooled vector, otherwise the mean token.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
            tooltip="The seed of the first pair; each further pair has the next seed. The first weights and the "
            "order of the pairs depend on it, too.",
        ),
        io.Float.Input(
            "weak_cfg", default=1.0, min=0.1, max=100.0, step=0.1,
            tooltip="Guidance on the way back; 1 as published.",
        ),
        io.Int.Input("rounds", default=1, min=1, max=10, tooltip="How many zigzags make each pair."),
        io.Float.Input(
            "depth", default=0.39, min=0.0, max=0.95, step=0.01,
            tooltip="How far the noise goes down, as a share of the first noise level.",
        ),
        io.Int.Input("shard_size", default=256, min=1, max=65536, tooltip="How many pairs one file holds."),
        io.String.Input(
            "part", default=ALL,
            tooltip="For several machines. 2/4 only makes the second quarter of the files. 1/1 then trains on all of "
            "them.",
        ),
        io.String.Input(
            "pairs", default="",
            tooltip="A folder in output/attune_pairs other than 'name', so that a second network learns from the "
            "same pairs.",
        ),
    ]  # fmt: skip


def check_place(folder: Path, name: str) -> None:
    """ValueError for a name that is no file's, and for folders that cannot be written."""
    check_writable(folder)
    find_place(folder_of(NPNETS), name, {})


def collected(
    source: Source, prompts: str, seeds_per_prompt: int, seed: int, shard_size: int, part: str, folder: Path,
    recipe: Recipe,
) -> str:  # fmt: skip
    """Make the pairs of a part that are missing: what there is now. ValueError before the model is called."""
    lines = list(dict.fromkeys(line.strip() for line in prompts.splitlines() if line.strip()))
    if not lines:
        raise ValueError("'prompts' is empty: write one prompt a line.")
    source.check(lines, recipe)
    shards, done = plan(lines, seeds_per_prompt, seed, shard_size), 0
    missing = remaining(folder, shards, part, source.facts(lines[0]))
    bar = ProgressBar(sum(len(shards[index]) for index in missing))
    with contextlib.closing(collect(source, shards, missing, folder)) as counts:
        for done, change in counts:
            bar.update(done, coloured(source.model, change))
    there = len(list(folder.glob("pairs-*.safetensors")))
    said = f"{done} new pairs of {len(lines)} prompts, {there} of {len(shards)} files in {folder}"
    LOG.info("Attune Train NPNet: %s.", said)
    return said


def trained(folder: Path, name: str, recipe: Recipe, share: Share = ALONE) -> Path:
    """Train on the pairs in a folder, resumed where it stopped: the network's file, at once where it is there.

    Processes that share the training share the folders too; the first one writes.
    """
    pairs, first = Pairs.scan(shard_paths(folder)), share.rank == 0
    training = NPNetTraining(pairs, recipe, training_device(), share, stop_if_asked)
    path, finished = find_place(folder_of(NPNETS), name, training.made)
    if finished:
        return path
    bar, state = ProgressBar(recipe.epochs), path.with_suffix(UNFINISHED)
    with contextlib.closing(training.run(state, writes=first)) as epochs:
        for epoch in epochs:
            shares = [1 - error / pairs.error for error in training.losses]
            bar.update(epoch, draw_learning(shares, recipe.epochs))
            if first:
                LOG.info("Attune Train NPNet: epoch %d, the best explains %.2f %%.", epoch, 100 * training.explained)
    measured, net = training.report(), cast(NPNet, training.result())
    if first:
        facts = {key: value for key, value in pairs.facts.items() if not isinstance(value, list)}
        facts |= {**measured, MADE: spelled(training.made)}
        path = keep_result(path.parent, path.stem, lambda to: save_npnet(net, to, facts, exclusive=True))
        state.unlink(missing_ok=True)
    return path


NODES = [AttuneTrainNPNet]
