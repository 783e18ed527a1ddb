"""Train a network of One More Step inside the host: examples from files, progress, preview, stop and go on."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...kernels.one_more_step import SignalLeak, clean_of_v
from ...models.one_more_step import Architecture, read_header, save_module
from ...models.store import is_finite, load_tensors
from ...models.train_one_more_step import MODULE_SIZES, ModuleTraining
from ...models.training import MADE, UNFINISHED, digest, find_place, keep_result, outline, spelled
from .._plan.latents import refuse_nested
from .folders import MODULES, find_folder, folder_of
from .live import ProgressBar, coloured
from .one_more_step import Module, TimelessUNet, check_model, diffusers_names, initialise, load_module

HEAD_DIM = 32
OLD_SCALE = 1 / 0.18215  # of .latent files from before they said their scale
MOST_FOR_LEAK = 1024
KEPT_EVERY, SHOWN_EVERY = 200, 20


@dataclass(frozen=True)
class Examples:
    """Pictures of one size whose captions have one length: latents [n c h w], texts [n tokens width]."""

    latents: Tensor
    texts: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def given_examples(latents: dict, captions: str, model) -> list[tuple[Tensor, str]]:
    """A LATENT in the model's scale with one line of `captions` for each of its items, or one for all."""
    refuse_nested(latents["samples"], "latents")
    samples, lines = latents["samples"], [line.strip() for line in captions.splitlines() if line.strip()] or [""]
    if samples.ndim != 4 or not bool(torch.isfinite(samples).all()):
        raise ValueError(f"'latents' must be finite latents of pictures, but its shape is {list(samples.shape)}.")
    if len(lines) not in (1, len(samples)):
        raise ValueError(
            f"'captions' has {len(lines)} lines for {len(samples)} latents: give one line for each, or one for all."
        )
    _check_channels("'latents'", samples, model)
    own = model.model.process_latent_in(samples.float())
    return list(zip(own, lines * (len(samples) // len(lines)), strict=True))


def read_examples(folder: str, model) -> list[tuple[Tensor, str]]:
    """Every .latent file of a folder, in the model's scale, with the .txt beside it as the caption."""
    place = find_folder(folder)
    files = sorted(path for path in place.iterdir() if path.suffix in (".latent", ".safetensors"))
    if not files:
        raise ValueError(
            f"There are no .latent files in {place}. Save latents with SaveLatent, and captions as .txt files of the "
            "same name."
        )
    found = []
    for path in files:
        caption = path.with_suffix(".txt")
        text = caption.read_text("utf-8", errors="replace").strip() if caption.exists() else ""
        found += [(latent, text) for latent in _latents(path, model)]
    return found


def encoded(examples: list[tuple[Tensor, str]], clip) -> tuple[list[Examples], Tensor]:
    """The examples in groups of one shape, and the empty prompt's text [1 tokens width]."""
    texts = {
        text: clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0].float().cpu()
        for text in {"", *(text for _, text in examples)}
    }
    groups: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    for latent, text in examples:
        groups.setdefault((latent.shape, texts[text].shape), []).append((latent, texts[text][0]))
    return [Examples(*map(torch.stack, zip(*group, strict=True))) for group in groups.values()], texts[""]


def _latents(path: Path, model) -> Tensor:
    """The latents of a file in the model's scale, [n c h w]."""
    held, _ = load_tensors(path)
    latents = held.get("latent_tensor")
    if latents is None or latents.ndim != 4 or not all(latents.shape) or not is_finite(latents):
        raise ValueError(
            f"'{path.name}' does not hold finite latents of pictures [n channels height width]: move it out."
        )
    _check_channels(f"'{path.name}'", latents, model)
    scale = 1.0 if "latent_format_version_0" in held else OLD_SCALE
    return model.model.process_latent_in(latents.float() * scale)


def _check_channels(what: str, latents: Tensor, model) -> None:
    wanted = model.get_model_object("latent_format").latent_channels
    if latents.shape[1] != wanted:
        raise ValueError(
            f"{what} holds latents of {latents.shape[1]} channels, but the model's have {wanted}: encode the pictures "
            "with this model's VAE."
        )


def draw_batch(
    groups: list[Examples], empty: Tensor, size: int, dropped: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Latents and texts of one group, drawn in proportion to its size; some texts become the empty prompt."""
    among = torch.tensor([float(len(group)) for group in groups])
    group = groups[int(torch.multinomial(among, 1, generator=generator))]
    chosen = torch.randint(len(group), (size,), generator=generator)
    texts = group.texts[chosen]
    # A prompt repeated along its tokens is the same to an attention, which is how the host mixes lengths, too.
    blank = empty.repeat(1, -(-texts.shape[1] // empty.shape[1]), 1)[:, : texts.shape[1]]
    drop = torch.rand(size, generator=generator) < dropped
    return group.latents[chosen], torch.where(drop[:, None, None], blank, texts)


@dataclass(frozen=True)
class Course:
    """How a module is trained, in the words of the node."""

    size: str
    steps: int
    batch_size: int
    learning_rate: float  # 0: the size's own
    empty_prompts: float
    seed: int

    @property
    def rate(self) -> float:
        return self.learning_rate or MODULE_SIZES[self.size][-1]

    def architecture(self, channels: int, context_dim: int) -> Architecture:
        widths, blocks, _ = MODULE_SIZES[self.size]
        return Architecture(
            in_channels=channels, channels=widths, blocks=(blocks,) * 3, middle=1,
            down=(0,) * blocks + (1,) * 2 * blocks, up=(1,) * 2 * (blocks + 1) + (0,) * (blocks + 1),
            context_dim=context_dim, linear=False, head_dim=HEAD_DIM,
        )  # fmt: skip


def train(model, clip, examples: list[tuple[Tensor, str]], name: str, course: Course) -> tuple[Module, str]:
    """The trained module and a report; at once where this very training has finished before.

    Stopped, it goes on from where it was when run again. ValueError before any training for what cannot be trained.
    """
    check_model(model)
    find_place(folder_of(MODULES), name, {})  # a bad name, a full disk
    groups, empty = encoded(examples, clip)
    space = type(model.get_model_object("latent_format")).__name__
    made = {
        **asdict(course), "learning_rate": course.rate, "latents": space,
        "pictures": digest(*(part for latent, text in examples for part in (latent, text))),
        "texts": outline(torch.cat([texts.flatten() for texts in (empty, *(group.texts for group in groups))])),
    }  # fmt: skip
    path, finished = find_place(folder_of(MODULES), name, made)
    if not finished:
        with torch.inference_mode(False), torch.enable_grad():
            groups = [Examples(group.latents.clone(), group.texts.clone()) for group in groups]
            path = _train(model, groups, empty.clone(), path, course, made, space)
    return load_module(path, "", "", "", 0), f"{path}\n{read_header(path).metadata['oms.report']}"


def _train(
    model, groups: list[Examples], empty: Tensor, path: Path, course: Course, made: dict[str, Any], space: str
) -> Path:  # fmt: skip
    """Train to the end, and keep the module under the name of `path` or the next that is free: its path."""
    device = comfy.model_management.get_torch_device()
    architecture = course.architecture(groups[0].latents.shape[1], empty.shape[-1])
    network = TimelessUNet(architecture, dtype=torch.float32)
    initialise(network, torch.Generator().manual_seed(course.seed))
    weights = sum(parameter.numel() for parameter in network.parameters())
    comfy.model_management.free_memory(24 * weights, device)  # weights, average, gradients, two moments, batch

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        latents, texts = draw_batch(groups, empty, course.batch_size, course.empty_prompts, generator)
        return latents.to(device), texts.to(device)

    training = ModuleTraining(
        network.to(device), draw, made, course.steps, course.rate, min(500, max(1, course.steps // 20)), course.seed
    )
    state = path.with_suffix(UNFINISHED)
    _watch(training, state, model, groups[0], device)
    leak = _leak(training.result(), groups, device)
    own, report = training.network.state_dict(), describe(training.losses, groups)
    facts = {
        "oms.prediction": "v", "oms.head_dim": str(HEAD_DIM), "oms.latent_format": space,
        "oms.context_dim": str(architecture.context_dim), "oms.steps": str(course.steps), "oms.report": report,
        MADE: spelled(made),
    }  # fmt: skip
    tensors = {theirs: own[ours] for theirs, ours in diffusers_names(architecture).items()}
    kept = keep_result(path.parent, path.stem, lambda to: save_module(to, tensors, leak, facts, exclusive=True))
    state.unlink(missing_ok=True)
    return kept


def _watch(training: ModuleTraining, state: Path, model, shown: Examples, device: torch.device) -> None:
    """Train with a bar, a preview of the first caption, and an ear for the stop button."""
    bar = ProgressBar(training.steps)
    noise = torch.randn(shown.latents[:1].shape, generator=torch.Generator().manual_seed(0)).to(device)
    with contextlib.closing(training.run(state, KEPT_EVERY)) as steps:
        for step in steps:
            picture = None
            if step % SHOWN_EVERY == 0:
                picture = coloured(model, clean_of_v(training.say(noise, shown.texts[:1].to(device))))
            bar.update(step, picture)
            comfy.model_management.throw_exception_if_processing_interrupted()


@torch.no_grad()
def _leak(network: torch.nn.Module, groups: list[Examples], device, frequencies: int = 3) -> SignalLeak | None:
    """How examples differ from the prediction of their captions, from the most frequent shape."""
    group = max(groups, key=len)
    latents, texts = group.latents[:MOST_FOR_LEAK], group.texts[:MOST_FOR_LEAK]
    if len(latents) < 2 or min(latents.shape[2:]) < frequencies:
        return None
    generator = torch.Generator().manual_seed(0)
    rest = []
    for x0, text in zip(latents.split(16), texts.split(16), strict=True):
        noise = torch.randn(x0.shape, generator=generator).to(device)
        rest.append(x0 - clean_of_v(network(noise, text.to(device))).cpu())
    return SignalLeak.fit(torch.cat(rest), frequencies)


def describe(losses: list[float], groups: list[Examples]) -> str:
    """What was learnt, next to the loss of saying the mean of all pictures."""
    last = losses[-min(100, len(losses)) :]
    squares = sum(float((g.latents - g.latents.mean(0)).square().sum()) for g in groups)
    count = sum(g.latents.numel() for g in groups)
    return (
        f"{len(losses)} steps on {sum(map(len, groups))} latents: loss {sum(last) / len(last):.4f}; the mean of all "
        f"pictures of a size would have {squares / count:.4f}. The difference is what the captions tell."
    )
