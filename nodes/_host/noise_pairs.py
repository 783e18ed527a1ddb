"""Collect pairs of noise and golden noise by re-denoising in the host's sampling, shard by shard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import torch
from torch import Tensor

from ...models.noise_pairs import Job, Shard, published_pairs, remaining, save_shard, shard_path
from ...models.store import file_stem
from .calibrating import calibrating
from .identity import config_hash
from .redenoise import Redenoise, redenoised


def pairs_folder(name: str) -> Path:
    """Where the pairs of that name are, in the host's output folder; ValueError for a name that is no folder's."""
    return Path(folder_paths.get_output_directory()) / "attune_pairs" / file_stem(name)


def facts_of(model: Any, cfg: float, settings: Redenoise, negative: list) -> dict[str, Any]:
    """What pairs were made with; folders of other facts are not mixed."""
    embedding = float(sum(float(tokens.double().sum()) for tokens, _ in negative))
    return {
        "base_model": type(model.model.model_config).__name__,
        "config_hash": config_hash(model.model.model_config.unet_config),
        "latent_format": type(model.get_model_object("latent_format")).__name__,
        "strong_cfg": cfg, "weak_cfg": settings.weak_cfg, "rounds": settings.rounds, "depth": settings.depth,
        "negative": round(embedding, 3),
    }  # fmt: skip


def collect(
    model: Any,
    clip: Any,
    negative: list,
    cfg: float,
    settings: Redenoise,
    latent: Tensor,
    shards: list[list[Job]],
    part: str,
    folder: Path,
    facts: Mapping[str, Any],
    batch: int = 8,
) -> Iterator[int]:
    """Makes the shards of a part that are not there yet, in order; yields how many pairs are done after each batch.

    latent [1 c h w] gives the size. Every pair is drawn from its own seed, as the host would for it alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for index in remaining(folder, shards, part, facts):
        jobs = shards[index]
        prompts = list(dict.fromkeys(job.prompt for job in jobs))
        encoded = [_encode(clip, prompt) for prompt in prompts]
        which = torch.tensor([prompts.index(job.prompt) for job in jobs])
        noise = torch.cat([comfy.sample.prepare_noise(latent, job.seed) for job in jobs])
        golden = []
        for rows in torch.arange(len(jobs)).split(batch):
            conditioning = [encoded[int(i)] for i in which[rows]]
            golden.append(_golden(model, conditioning, negative, cfg, settings, noise[rows]))
            done += len(rows)
            yield done
        save_shard(
            shard_path(folder, index),
            Shard(noise, torch.cat(golden), which, *_stack(encoded), tuple(jobs), facts),
        )


def import_published(clip: Any, source: Path, folder: Path, shard_size: int) -> int:
    """Write the pairs of a folder in the authors' format as shards, with their prompts' embeddings; their number.

    Shards that are there already are kept, so that an interrupted import goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs, index, count = published_pairs(source), 0, 0
    while some := list(itertools.islice(pairs, shard_size)):
        path = shard_path(folder, index)
        if not path.exists():
            prompts = list(dict.fromkeys(job.prompt for job, _, _ in some))
            which = torch.tensor([prompts.index(job.prompt) for job, _, _ in some])
            noise = torch.cat([noise for _, noise, _ in some])
            golden = torch.cat([golden for _, _, golden in some])
            jobs = tuple(job for job, _, _ in some)
            encoded = _stack([_encode(clip, prompt) for prompt in prompts])
            save_shard(path, Shard(noise, golden, which, *encoded, jobs, {"source": source.name}))
        index, count = index + 1, count + len(some)
    return count


def _encode(clip: Any, prompt: str) -> tuple[Tensor, dict]:
    ((tokens, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return tokens, extra


def _stack(encoded: list[tuple[Tensor, dict]]) -> tuple[Tensor, Tensor | None]:
    """tokens [p t d] and pooled [p d] of prompts; ValueError if some are longer than others."""
    sizes = {tokens.shape[1] for tokens, _ in encoded}
    if len(sizes) > 1:
        raise ValueError(
            f"The prompts have different numbers of tokens ({', '.join(map(str, sorted(sizes)))}): shorten some."
        )
    pooled = [extra.get("pooled_output") for _, extra in encoded]
    stacked = None if any(p is None for p in pooled) else torch.cat([p for p in pooled if p is not None])
    return torch.cat([tokens for tokens, _ in encoded]), stacked


class _Collector(comfy.samplers.Sampler):
    """A sampler in the eyes of the host that only makes golden noise."""

    def __init__(self, settings: Redenoise):
        self.settings = settings
        self.golden: Tensor | None = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        full = self.max_denoise(model_wrap, sigmas)
        golden, _ = redenoised(model_wrap, sigmas, extra_args, noise, latent_image, full, self.settings)
        self.golden = golden.cpu()
        return latent_image


def _golden(
    model: Any, encoded: list[tuple[Tensor, dict]], negative: list, cfg: float, settings: Redenoise, noise: Tensor
) -> Tensor:
    """Golden noise [b c h w], each sample for its own prompt."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    tokens, pooled = _stack(encoded)
    extra = dict(encoded[0][1]) | ({} if pooled is None else {"pooled_output": pooled})
    guider = comfy.samplers.CFGGuider(calibrating(model))
    guider.set_conds([[tokens, extra]], negative)
    guider.set_cfg(cfg)
    collector = _Collector(settings)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 10)
    guider.sample(noise, torch.zeros_like(noise), collector, sigmas, disable_pbar=True, seed=0)
    assert collector.golden is not None
    return collector.golden
