"""NPNet weights in files: the three published layouts and the pack's own, all read with suspicion."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .npnet import NPNet, NPNetConfig, grid
from .store import save_tensors, shortened
from .training import MADE

SAFE, PICKLED = (".safetensors", ".sft"), (".pth", ".pt")
LARGEST_FILE = 1 << 30  # bytes; the published ones have 122 MB
MOST_NAMES = 2000  # weights in a file; the published ones have 203
VERSION = 1  # of the metadata below
UNUSED = r"unet_svd\.bn\.|unet_embedding\.swin\.head\.|.*\.(attn_mask|relative_position_index)$|.*num_batches_tracked$"
SWIN = "unet_embedding.swin."
NEEDED = (  # what the shape of the network is read from
    "alpha", "beta", "text_embedding.linear.weight", "unet_svd.mlp1.0.weight", "unet_svd.mlp2.0.weight",
    "unet_svd.mlp3.0.weight", "unet_svd.mlp4.0.weight", "unet_embedding.downconv.weight",
    f"{SWIN}patch_embed.proj.weight",
)  # fmt: skip


@dataclass(frozen=True)
class NPNetFile:
    """A network ready to use, and what its file says about it."""

    net: NPNet
    name: str
    facts: Mapping[str, str]

    def describe(self) -> str:
        c = self.net.config
        text = f"{c.tokens} x {c.width}" if c.text == "flat" else f"{c.text}, {c.width}"
        head = f"{self.name}: golden noise for {c.channels} x {c.side} x {c.side} latents, prompts {text}"
        facts = (f"{key}: {shortened(value, 500)}" for key, value in sorted(self.facts.items()) if key != MADE)
        return "\n".join([head, *facts])


@dataclass(frozen=True)
class _Content:
    """What is in a file: the shapes of its weights, how to read one of them, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    facts: Mapping[str, str]


def load_npnet(path: Path) -> NPNetFile:
    """The network of a .safetensors or .pth file, float32, for inference; ValueError with a sentence for anything else.

    Shapes are checked before any network is made, and no code in a file is ever run.
    """
    with _opened(path, whole=True) as content:
        names, net = _empty_network(path.name, content)
        # A copy: tensors that point into a file lie where it put them, and the place in memory moves the last bit.
        weights = {ours: _numbers(path.name, ours, content.read(theirs)) for ours, theirs in names.items()}
    net.load_state_dict(weights, assign=True)
    return NPNetFile(net.train(False).requires_grad_(False), path.name, content.facts)


def read_config(path: Path) -> tuple[NPNetConfig, Mapping[str, str]]:
    """The shape of a file's network and its metadata, from what the file says first; ValueError as `load_npnet`."""
    with _opened(path, whole=False) as content:
        return _empty_network(path.name, content)[1].config, content.facts


def save_npnet(net: NPNet, path: Path, facts: Mapping[str, Any], exclusive: bool = False) -> Path:
    """Write the weights under the published flat names with the facts as metadata; whole or not at all.

    exclusive: FileExistsError where there is a file of that name.
    """
    config = net.config
    said = {
        "npnet_version": VERSION, "arch": json.dumps({"attention": True}), "channels": config.channels,
        "resolution": config.side, "text_mode": config.text, "text_tokens": config.tokens, "text_dim": config.width,
        "svd": config.signs, **facts,
    }  # fmt: skip
    weights = {name: value.float() for name, value in net.state_dict().items()}
    save_tensors(path, weights, {key: str(value) for key, value in said.items()}, exclusive)
    return path


@contextlib.contextmanager
def _opened(path: Path, whole: bool) -> Iterator[_Content]:
    """The content of a file of either format; whole: with its numbers, else these are left on the disk."""
    size, suffix = path.stat().st_size, path.suffix.lower()
    if size > LARGEST_FILE:
        raise ValueError(f"{path.name} is no NPNet: it has {size:,} bytes, and an NPNet has at most {LARGEST_FILE:,}.")
    if suffix in PICKLED:
        weights = _unpickled(path, whole)
        yield _Content({name: tuple(w.shape) for name, w in weights.items()}, weights.__getitem__, {})
        return
    if suffix not in SAFE:
        raise ValueError(f"{path.name} is not an NPNet: its name must end in {' or '.join((*SAFE, *PICKLED))}.")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            yield _Content(shapes, file.get_tensor, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file: {shortened(error)}. Get it again.") from error


def _unpickled(path: Path, whole: bool) -> dict[str, Tensor]:
    """The tensors of a .pth file by dotted names. Not whole: mapped, not read, and without the check of their sums."""
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = shortened(found[1], 80) if found else "more than weights"
        raise ValueError(
            f"{path.name}: refused by the safe loader (it contains {what}). "
            "Convert it to safetensors in a place you trust."
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path.name} is damaged: {shortened(error)}. Get it again.") from error
    weights = _flat(path.name, loaded)
    _check_memory(path, weights)
    return weights


def _check_archive(path: Path) -> None:
    """A .pth is a zip archive of uncompressed parts: nothing in it can be larger than the file.

    Its first bytes say so, too: for others torch tries formats that it unpacks into a folder.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise zipfile.BadZipFile("it does not begin as a zip archive")
        with zipfile.ZipFile(path) as archive:
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path.name} is damaged or no file of torch.save: {shortened(error)}. Get it again."
        ) from error
    if packed:
        raise ValueError(f"{path.name} is compressed inside, as torch.save never does. Get it from a place you trust.")


def _check_memory(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Every weight has numbers of its own in the file: torch can also save a huge tensor that repeats a single one."""
    for name, weight in weights.items():
        plain = weight.layout == torch.strided and not weight.is_nested and not weight.is_quantized
        if not plain or weight.device.type != "cpu":
            raise ValueError(f"{path.name} is damaged: {shortened(name, 80)} is no plain tensor. Get it again.")
    if sum(math.prod(weight.shape) * weight.element_size() for weight in weights.values()) > path.stat().st_size:
        raise ValueError(f"{path.name} is damaged: its weights are larger than the file. Get it again.")


def _flat(name: str, loaded: Any) -> dict[str, Tensor]:
    """The tensors of a nested or flat dict, by dotted names."""
    weights: dict[str, Tensor] = {}
    for key, value in loaded.items() if isinstance(loaded, dict) else ():
        inner = value if isinstance(value, dict) else {"": value}
        for part, tensor in inner.items():
            if isinstance(tensor, Tensor):
                weights[f"{key}.{part}".removesuffix(".")] = tensor.detach()
    if not weights:
        _refuse(name, list(NEEDED))
    return weights


def published_names(names: list[str]) -> dict[str, str]:
    """Our name -> the file's, for every weight that inference uses, from any of the known layouts."""
    prefix = next((p for p in ("module.", "npnet.") if names and all(n.startswith(p) for n in names)), "")
    found = {n.removeprefix(prefix).replace("embeeding.", "text_embedding.", 1): n for n in names}
    found = {ours: theirs for ours, theirs in found.items() if not re.match(UNUSED, ours)}
    stages = {int(m[1]) for n in found if (m := re.match(rf"{re.escape(SWIN)}layers\.(\d{{1,2}})\.", n))}
    old = f"{SWIN}layers.0.downsample." in " ".join(found)  # before timm 0.8 a stage ended with its downsampling
    if old and not any(n.startswith(f"{SWIN}layers.{max(stages)}.downsample.") for n in found):
        move = lambda m: f"layers.{int(m[1]) + 1}.downsample."
        found = {re.sub(r"layers\.(\d{1,2})\.downsample\.", move, ours): theirs for ours, theirs in found.items()}
    return found


def _empty_network(name: str, content: _Content) -> tuple[dict[str, str], NPNet]:
    """Our name -> the file's for every weight, and the network that they fit, without a number in it."""
    if len(content.shapes) > MOST_NAMES:
        raise ValueError(f"{name} is not an NPNet: it holds {len(content.shapes)} weights, an NPNet about 200.")
    names = published_names(list(content.shapes))
    shapes = {ours: content.shapes[theirs] for ours, theirs in names.items()}
    config = _config(name, shapes, content.facts)
    with torch.device("meta"):
        net = NPNet(config)
    wanted = {ours: tuple(weight.shape) for ours, weight in net.state_dict().items()}
    if missing := [ours for ours in wanted if ours not in shapes]:
        _refuse(name, missing)
    if extra := [ours for ours in shapes if ours not in wanted]:
        raise ValueError(f"{name} is not an NPNet that this version knows: unexpected {_some(extra)}.")
    for ours, shape in wanted.items():
        if shapes[ours] != shape:
            raise ValueError(f"{name} is damaged: {ours} is {_size(shapes[ours])}, expected {_size(shape)}.")
    return names, net


def _numbers(name: str, weight: str, read: Tensor) -> Tensor:
    if not read.is_floating_point():
        raise ValueError(f"{name} is damaged: {weight} holds {read.dtype}, expected numbers with a fraction.")
    return read.to(torch.float32, copy=True).contiguous()


def _config(name: str, shapes: dict[str, tuple[int, ...]], facts: Mapping[str, str]) -> NPNetConfig:
    """The network's shape, from the shapes of its weights and the metadata of its file."""
    if missing := [weight for weight in NEEDED if weight not in shapes]:
        _refuse(name, missing)
    for weight in NEEDED[2:]:
        if len(shapes[weight]) not in (2, 4) or min(shapes[weight]) < 1:
            raise ValueError(f"{name} is damaged: {weight} is {_size(shapes[weight])}.")
    channels = shapes["unet_embedding.downconv.weight"][1]
    side = shapes["unet_svd.mlp1.0.weight"][1] // grid(channels)[0]
    stages = [_stage(shapes, i) for i in range(8)]
    stages = stages[: stages.index((0, 0))] if (0, 0) in stages else stages
    text_size, version = shapes["text_embedding.linear.weight"][1], facts.get("npnet_version", "")
    if version not in ("", str(VERSION)) or "false" in facts.get("arch", ""):
        raise ValueError(
            f"{name} needs NPNet format {shortened(version, 20) or 'without attention'}. Update ComfyUI-Attune."
        )
    text = facts.get("text_mode", "flat").replace("flat77", "flat")
    tokens = int(facts["text_tokens"]) if re.fullmatch(r"[1-9]\d{0,4}", facts.get("text_tokens", "")) else 77
    signs = "canonical" if facts.get("svd") in ("canonical", "sign-augmented") else "raw"
    if text not in ("flat", "mean", "pooled") or (text == "flat" and text_size % tokens):
        raise ValueError(
            f"{name} is damaged: its text layer takes {text_size} numbers, which are not {tokens} tokens "
            f"(text mode '{shortened(text, 20)}'). Get it again."
        )
    if not stages or any(heads < 1 or depth > 64 for depth, heads in stages) or side < 1:
        raise ValueError(f"{name} is damaged: no Swin transformer of the published kind is in it. Get it again.")
    return NPNetConfig(
        channels=channels, side=side, text=text, tokens=tokens,  # type: ignore[arg-type]
        width=text_size // (tokens if text == "flat" else 1), signs=signs,  # type: ignore[arg-type]
        swin_width=shapes[f"{SWIN}patch_embed.proj.weight"][0], swin_depths=tuple(depth for depth, _ in stages),
        swin_heads=tuple(heads for _, heads in stages), hidden=shapes["unet_svd.mlp4.0.weight"][0],
    )  # fmt: skip


def _stage(shapes: dict[str, tuple[int, ...]], i: int) -> tuple[int, int]:
    """Blocks and heads of Swin stage `i`; (0, 0) where there is none."""
    table = f"{SWIN}layers.{i}.blocks.0.attn.relative_position_bias_table"
    if len(shapes.get(table, ())) != 2:
        return 0, 0
    own = {m[1] for n in shapes if (m := re.match(rf"{re.escape(SWIN)}layers\.{i}\.blocks\.(\d{{1,3}})\.", n))}
    return len(own), shapes[table][1]


def _some(names: list[str]) -> str:
    more = f" ({len(names) - 5} more)" if len(names) > 5 else ""
    return f"{', '.join(shortened(name, 80) for name in names[:5])}{more}"


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _refuse(name: str, missing: list[str]) -> NoReturn:
    raise ValueError(
        f"{name} is not an NPNet: missing {_some(missing)}. Expected the official .pth or its safetensors conversion. "
        "Without one, Attune Redenoise makes golden noise for every model; Attune Draft Seeds helps to choose a seed."
    )
