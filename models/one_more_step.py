"""Files of One More Step: what network is in them, which latents it is for, and whether that can be true.

The names and shapes are those of diffusers' UNet2DConditionModel without everything that knows a timestep, as the
authors published their three modules; ours have their facts in the metadata.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.one_more_step import SignalLeak
from .store import is_finite, save_tensors, shortened

LATENT_SPACES = {"SD1.x, SD2.x": "SD15", "SDXL": "SDXL"}  # as users know them -> the host's class
PREDICTIONS = ("v", "x0")
PUBLISHED = {  # sha256 of files that say nothing about themselves -> latent space
    "e7655e421510ae0a539a01575f3b122d3fb6eb2a7e2c1d0409f90cce9014d19e": "SDXL",
    "512a4b23067a064f97e6350c09d684082c371d4c347f1506493c2f273497f675": "SDXL",
}
PUBLISHED_BYTES = 308_083_816
ENCODERS = {
    768: "CLIP-L, SD1.5",
    1024: "OpenCLIP-H, the text encoder of SD2.1: CLIPLoader with type stable_diffusion",
    1280: "OpenCLIP-bigG, the SDXL refiner",
    2048: "SDXL",
    4096: "T5",
}
LEAK = "signal_leak."  # in our own files: how examples differ from the prediction
WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")  # of weights
MOST_NAMES = 10_000  # weights in a file; the published ones have 299
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """A timeless UNet: channels per level, residual blocks per level, depths of the transformers down, in the middle
    and up (per residual block), width of the text, and what the shapes cannot tell: channels per attention head."""

    in_channels: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    down: tuple[int, ...]
    middle: int
    up: tuple[int, ...]
    context_dim: int
    linear: bool
    head_dim: int

    def unet_config(self) -> dict[str, Any]:
        """The arguments of the host's UNet class; it takes the depths on the way up from the end."""
        return {
            "image_size": 32, "in_channels": self.in_channels, "out_channels": self.in_channels,
            "model_channels": self.channels[0], "channel_mult": [c // self.channels[0] for c in self.channels],
            "num_res_blocks": list(self.blocks), "transformer_depth": list(self.down),
            "transformer_depth_middle": self.middle, "transformer_depth_output": list(reversed(self.up)),
            "context_dim": self.context_dim, "use_linear_in_transformer": self.linear,
            "num_head_channels": self.head_dim, "use_spatial_transformer": True, "legacy": False,
        }  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a file says before any tensor is read: its shapes and its metadata."""

    path: Path
    shapes: Shapes
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Names and shapes in a safetensors file of weights; ValueError for anything else. Reads no tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            foreign = [name for name, part in parts.items() if part.get_dtype() not in WEIGHT_DTYPES]
            if foreign or len(parts) > MOST_NAMES:
                what = f"{shortened(foreign[0], 80)} is no weight" if foreign else f"it holds {len(parts)} tensors"
                raise ValueError(f"'{path.name}' is not a One More Step module: {what}. Get the file again.")
            return Header(path, {name: tuple(part.get_shape()) for name, part in parts.items()}, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{path.name}' is not a whole safetensors file. Get it again; .bin, .pt and .ckpt files are not read."
        ) from error


def architecture_of(header: Header, head_dim: int = 0) -> Architecture:
    """The network that the shapes describe; ValueError for files that hold something else.

    head_dim: channels per attention head, 0 takes it from the metadata, else a fifth of the first width, which is true
    of the published files. A wrong one loads, and is about 1 % off.
    """
    shapes, name = header.shapes, header.path.name
    if any(key.startswith(("time_embedding.", "model.diffusion_model.", "time_embed.")) or "time_emb_proj" in key
           for key in shapes):  # fmt: skip
        raise ValueError(
            f"'{name}' is an ordinary UNet, which reads a timestep, and no One More Step module. Choose a module in "
            "'oms_name', such as oms_b_openclip_15_21 or oms_b_openclip_xl."
        )
    if len(shapes.get("conv_in.weight", ())) != 4:
        raise ValueError(
            f"'{name}' is not a One More Step module: it has no weights of a diffusers UNet. Choose another file."
        )
    try:
        found = _architecture(shapes, head_dim or int(header.metadata.get("oms.head_dim", 0)))
    except (LookupError, ValueError, ZeroDivisionError, StopIteration) as error:
        raise ValueError(f"'{name}' is not a whole One More Step module: get it again.") from error
    if found.head_dim < 1 or any(width % found.head_dim for width in found.channels):
        raise ValueError(
            f"The widths {list(found.channels)} of '{name}' are no multiples of head_dim {found.head_dim}: set "
            "'head_dim' to 0."
        )
    return found


def _architecture(shapes: Shapes, head_dim: int) -> Architecture:
    def count(pattern: str) -> int:
        """How many of a numbered row there are."""
        return len({match[1] for key in shapes if (match := re.match(pattern.replace("#", r"(\d+)"), key))})

    def depth(resnet: str) -> int:
        return count(rf"{re.escape(resnet.replace('resnets', 'attentions'))}\.transformer_blocks\.#\.")

    levels = count(r"down_blocks\.#\.")
    blocks = tuple(count(rf"down_blocks\.{level}\.resnets\.#\.") for level in range(levels))
    channels = tuple(shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels))
    if any(width % channels[0] or width > 8192 for width in channels):
        raise ValueError
    down = [f"down_blocks.{level}.resnets.{i}" for level in range(levels) for i in range(blocks[level])]
    up = [f"up_blocks.{level}.resnets.{i}" for level in range(levels) for i in range(blocks[levels - 1 - level] + 1)]
    text = next(shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight"))
    project = next(shape for key, shape in shapes.items() if key.endswith(".proj_in.weight"))
    return Architecture(
        in_channels=shapes["conv_in.weight"][1], channels=channels, blocks=blocks, down=tuple(map(depth, down)),
        middle=depth("mid_block.resnets.0"), up=tuple(map(depth, up)), context_dim=text[1], linear=len(project) == 2,
        head_dim=head_dim or channels[0] // 5,
    )  # fmt: skip


def check_shapes(header: Header, expected: Shapes) -> None:
    """ValueError unless the file holds exactly the tensors of its network; to be asked before any is read."""
    missing, foreign = expected.keys() - header.shapes.keys(), header.shapes.keys() - expected.keys()
    foreign = {key for key in foreign if not key.startswith(LEAK)}
    wrong = {key for key in expected.keys() & header.shapes.keys() if expected[key] != header.shapes[key]}
    for keys, what in ((missing, "lacks"), (foreign, "should not hold"), (wrong, "has in the wrong shape")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"'{header.path.name}' is not a One More Step module: it {what} {shortened(min(keys), 80)}{more}. Get "
                "the file again."
            )


def latent_space_of(header: Header, context_dim: int, chosen: str = "") -> str:
    """The host's class of the latents a module is for: as chosen, else as the file or its name says; or ValueError."""
    stem = header.path.stem.lower()
    if chosen:
        return LATENT_SPACES[chosen]
    if said := header.metadata.get("oms.latent_format"):
        return said
    if context_dim == 2048:
        return "SDXL"
    if header.path.stat().st_size == PUBLISHED_BYTES and (space := PUBLISHED.get(_sha256(header.path))):
        return space
    if "xl" in stem:
        return "SDXL"
    if "15" in stem or "21" in stem:
        return "SD15"
    raise ValueError(
        f"Neither the file '{header.path.name}' nor its name tells which latents it is for: set 'latent_space' in "
        "Attune Load One More Step."
    )


def prediction_of(header: Header, chosen: str = "") -> str:
    """ "v" or "x0"."""
    found = chosen or header.metadata.get("oms.prediction", "v")
    if found not in PREDICTIONS:
        raise ValueError(
            f"'{header.path.name}' predicts '{shortened(found, 20)}', which is neither v nor x0: get it again."
        )
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def colour_map(x0: Tensor, factors: Sequence[Sequence[float]], bias: Sequence[float] | None) -> Tensor:
    """A rough picture of clean latents [b c h w], in the model's scale: IMAGE [b 8h 8w 3], by the live preview's
    linear map from channels to colours, with the latent's own pixels as squares."""
    rgb = torch.nn.functional.linear(
        x0.float().movedim(1, -1), torch.tensor(factors).T, None if bias is None else torch.tensor(bias)
    )
    return ((rgb + 1) / 2).clamp(0, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)


def read_leak(header: Header) -> SignalLeak | None:
    """The residual statistics that our trainer writes beside the network; None in files without."""
    names = [LEAK + part for part in ("mean", "root", "rest")]
    if names[0] not in header.shapes:
        return None
    mean = header.shapes[names[0]]
    d = mean[0] * mean[1] ** 2 if len(mean) == 3 else 0
    if not 0 < d <= 4096 or [header.shapes.get(n) for n in names] != [(mean[0], mean[1], mean[1]), (d, d), mean[:1]]:
        raise ValueError(f"The signal leak in '{header.path.name}' is damaged: get the file again.")
    with safe_open(header.path, framework="pt") as file:
        parts = [file.get_tensor(name).float() for name in names]
    if not all(map(is_finite, parts)):
        raise ValueError(f"The signal leak in '{header.path.name}' is damaged: get the file again.")
    return SignalLeak(*parts)


def save_module(
    path: Path, tensors: Mapping[str, Tensor], leak: SignalLeak | None, facts: Mapping[str, str],
    exclusive: bool = False,
) -> None:  # fmt: skip
    """Write a module: half-precision tensors by their diffusers names, the leak, the metadata; whole or not at all.

    exclusive: FileExistsError where there is a file of that name.
    """
    parts = {} if leak is None else {LEAK + "mean": leak.mean, LEAK + "root": leak.root, LEAK + "rest": leak.rest}
    whole = {name: tensor.half() for name, tensor in tensors.items()}
    whole |= {name: tensor.float() for name, tensor in parts.items()}
    save_tensors(path, whole, {"format": "pt", "oms.version": "1", **facts}, exclusive)
