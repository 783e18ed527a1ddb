"""Collect pairs of noise and golden noise by re-denoising in the host's sampling, shard by shard."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import torch
from torch import Tensor

from ...models.noise_pairs import Job, Shard, check_same, held_out, load_shard, save_shard, shard_path
from ...models.store import file_stem, shortened
from ...models.train_npnet import Recipe, config_for
from ...models.training import UNFINISHED, outline
from .calibrating import calibrating, inside_run
from .identity import identify
from .redenoise import Redenoise
from .start import StartingRun, from_the_top


def pairs_folder(name: str) -> Path:
    """Where the pairs of that name are, in the host's output folder; ValueError for a name that is no folder's."""
    return Path(folder_paths.get_output_directory()) / "attune_pairs" / file_stem(name)


@dataclass(frozen=True)
class Source:
    """What makes golden noise: a MODEL at a strong and a weak guidance, its text encoder, an empty latent [1 c h w]."""

    model: Any
    clip: Any
    negative: list
    latent: Tensor
    settings: Redenoise

    def facts(self, prompt: str) -> dict[str, Any]:
        """What the pairs are made with; those of other facts are not mixed. `prompt`: any, to know the encoder by."""
        about, settings = identify(self.model, weights=True), self.settings
        return {
            "base_model": about.family, "config_hash": about.config_hash, "weights": about.weights_hash,
            "patches": about.patches,
            "latent_format": type(self.model.get_model_object("latent_format")).__name__,
            "latent": list(self.latent.shape[1:]),
            "strong_cfg": settings.strong_cfg, "weak_cfg": settings.weak_cfg, "rounds": settings.rounds,
            "depth": settings.depth, "negative": outline(torch.cat([tokens.flatten() for tokens, _ in self.negative])),
            "texts": outline(encode(self.clip, prompt)[0]),
        }  # fmt: skip

    def check(self, prompts: list[str], recipe: Recipe) -> None:
        """ValueError before the model is called once for what could not be trained on in the end."""
        held_out(prompts)
        if self.latent.ndim != 4:
            raise ValueError(f"'latent_image' is {list(self.latent.shape[1:])}: an NPNet learns from pictures alone.")
        h, w = self.latent.shape[2:]
        if h != w:
            raise ValueError(
                f"'latent_image' is {h} x {w} latents, but an NPNet is square. Make width and height equal."
            )
        layouts: dict[str, str] = {}
        for prompt in prompts:  # one encoding for each number of tokens: of 100,000 prompts it would take long
            layouts.setdefault(_layout(self.clip, prompt), prompt)
        tokens, pooled = stack([(prompt, encode(self.clip, prompt)) for prompt in layouts.values()])
        one = torch.zeros(1, *self.latent.shape[1:])
        config_for(Shard(one, one, torch.zeros(1, dtype=torch.long), tokens, pooled, (), {}), recipe)


def collect(
    source: Source, shards: list[list[Job]], missing: list[int], folder: Path, batch: int = 8
) -> Generator[tuple[int, Tensor], None, None]:
    """Makes the missing shards, in order; yields how many pairs are done after each batch, and of its last pair what is
    golden in the noise, [1 c h w] of variance 1.

    Every pair is drawn from its own seed, as the host would for it alone. What is done of a shard is kept when the
    caller closes the generator: use contextlib.closing.
    """
    facts, done = source.facts(shards[0][0].prompt), 0
    for index in missing:
        jobs, path = shards[index], shard_path(folder, index)
        prompts = list(dict.fromkeys(job.prompt for job in jobs))
        encoded = [encode(source.clip, prompt) for prompt in prompts]
        texts = stack(list(zip(prompts, encoded, strict=True)))
        which = torch.tensor([prompts.index(job.prompt) for job in jobs])
        noise = torch.cat([comfy.sample.prepare_noise(source.latent, job.seed) for job in jobs])
        golden = _begun(path.with_suffix(UNFINISHED), jobs, facts)
        done += len(golden)
        try:
            while len(golden) < len(jobs):
                rows = slice(len(golden), len(golden) + batch)
                golden = torch.cat([golden.to(noise), _golden(source, [encoded[i] for i in which[rows]], noise[rows])])
                done += len(noise[rows])
                change = golden[-1:] - noise[len(golden) - 1 : len(golden)]
                yield done, change / change.std().clamp(min=1e-6)
        finally:
            n = len(golden)
            if n:
                end = path if n == len(jobs) else path.with_suffix(UNFINISHED)
                save_shard(end, Shard(noise[:n], golden, which[:n], *texts, tuple(jobs[:n]), facts))
        path.with_suffix(UNFINISHED).unlink(missing_ok=True)


def _begun(path: Path, jobs: list[Job], facts: Mapping[str, Any]) -> Tensor:
    """The golden noises that an unfinished shard begins with, none where there is no such file."""
    if not path.exists():
        return torch.zeros(0)
    shard = load_shard(path)
    check_same(path, shard.jobs, shard.facts, jobs, facts)
    return shard.golden


def _layout(clip: Any, prompt: str) -> str:
    """How many tokens a prompt has for each of the text encoders."""
    encoders = {name: parts for name, parts in clip.tokenize(prompt).items() if isinstance(parts, list)}
    return repr({name: [len(part) for part in parts] for name, parts in encoders.items()})


def encode(clip: Any, prompt: str) -> tuple[Tensor, dict]:
    ((tokens, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return tokens, extra


def stack(encoded: list[tuple[str, tuple[Tensor, dict]]]) -> tuple[Tensor, Tensor | None]:
    """tokens [p t d] and pooled [p d] of prompts; ValueError if some are longer than others."""
    lengths = {tokens.shape[1]: prompt for prompt, (tokens, _) in encoded}
    if len(lengths) > 1:
        longest = shortened(lengths[max(lengths)], 80)
        raise ValueError(
            f"The prompts have different numbers of tokens ({', '.join(map(str, sorted(lengths)))}): shorten prompts "
            f"such as '{longest}' until all have as many."
        )
    tokens, extras = zip(*(one for _, one in encoded), strict=True)
    pooled = [extra.get("pooled_output") for extra in extras]
    return torch.cat(tokens), None if any(p is None for p in pooled) else torch.cat(pooled)


def _golden(source: Source, encoded: list[tuple[Tensor, dict]], noise: Tensor) -> Tensor:
    """Golden noise [b c h w], each sample for its own prompt; our own wrappers on the MODEL stand aside."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    tokens, pooled = stack([("", one) for one in encoded])
    extra = dict(encoded[0][1]) | ({} if pooled is None else {"pooled_output": pooled})
    guider = comfy.samplers.CFGGuider(calibrating(source.model))
    guider.set_conds([[tokens, extra]], source.negative)
    guider.set_cfg(source.settings.strong_cfg)
    sampling = source.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 10)

    def redenoised(guided, sigmas: Tensor, extra_args: dict, noise: Tensor, latent: Tensor) -> Tensor:
        sampling = guided.inner_model.model_sampling
        top = from_the_top(sampling, sigmas)
        return source.settings.begin(StartingRun(guided, sampling, sigmas, noise, latent, None, top, extra_args))[
            0
        ].cpu()

    return inside_run(guider, noise, torch.zeros_like(noise), sigmas, 0, redenoised)
