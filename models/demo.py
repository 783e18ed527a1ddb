"""The shape of the demo models and the word-level vocabulary that travels inside their checkpoint."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT_WIDTH = 128
MAX_TOKENS = 16  # per chunk, start and end included; longer prompts continue in another chunk, as with CLIP
BEGIN, END, UNKNOWN = 0, 1, 2
VOCABULARY_KEY = "attune_vocabulary"  # uint8 [n]: the words, newline-separated ASCII, in the order of their ids
VOCABULARY_LIMIT = 65536  # bytes; ours has under 2000

# The text encoder is a CLIP text transformer, described in the host's own configuration keys.
TEXT_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": TEXT_WIDTH, "num_attention_heads": 4, "intermediate_size": 4 * TEXT_WIDTH,
    "hidden_act": "gelu", "max_position_embeddings": MAX_TOKENS, "eos_token_id": END,
}  # fmt: skip

# A UNet of the SD1.5 class: same blocks, same layout of levels, 1/10 of the width, three levels instead of four.
UNET_CONFIG: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1, 1], "channel_mult": [1, 4, 5],
    "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1], "transformer_depth_middle": 1,
    "num_head_channels": 32, "context_dim": TEXT_WIDTH, "adm_in_channels": TEXT_WIDTH,
}  # fmt: skip

# The inpainting model is the same UNet with SD's nine input channels: noisy latent, mask, latent of the masked picture.
# Its file holds what tells it from the UNet above, from whose file the host gets the rest.
INPAINT_CHANNELS = 9
FIRST_LAYER = "input_blocks.0.0.weight"  # kept whole, under its own name: by it the host counts the channels
DIFFERENCE = "difference."  # before every other name: NAME whole, or NAME.up [out rank] @ NAME.down [rank in] is added

# An MMDiT of the SD3 class; the host reads these numbers from the file.
MMDIT_CONFIG: dict[str, Any] = {"in_channels": 16, "depth": 3, "patch_size": 2, "pos_embed_side": 24}

# A video transformer of the Wan class on the flow model's latents, frame by frame; the host reads all but the text's
# width from the file.
VIDEO_CONFIG: dict[str, Any] = {
    "in_dim": 16, "out_dim": 16, "dim": 256, "ffn_dim": 768, "num_heads": 2, "num_layers": 4, "text_dim": TEXT_WIDTH,
}  # fmt: skip
VIDEO_SHIFT = 3.0
VIDEO_FRAMES = 8  # that it was trained on


@lru_cache(maxsize=2)
def demo_facts(name: str = "attune_demo") -> dict[str, Any]:
    """What training wrote down beside the weights: sizes, loss curves, colour factors for the live preview."""
    return json.loads((Path(__file__).parent / "weights" / f"{name}.json").read_text("utf-8"))


def with_difference(base: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inpainting UNet's weights from the UNet's and what its file holds; ValueError where these do not fit."""
    weights = dict(base)
    for name, tensor in stored.items():
        of = name.removeprefix(DIFFERENCE)
        if of.endswith(".down"):
            continue
        of = of.removesuffix(".up")
        own, down = base.get(of), stored.get(f"{DIFFERENCE}{of}.down")
        if own is None or not (_low_rank(own, tensor, down) if name.endswith(".up") else _whole(of, own, tensor)):
            raise ValueError(
                "The inpainting checkpoint does not fit the demo checkpoint that it changes: get both again from the "
                "pack's models/weights folder."
            )
        added = None if down is None else (tensor.float() @ down.float()).view(own.shape)
        weights[of] = tensor if added is None else (own.float() + added).to(own.dtype)
    return weights


def _low_rank(own: Tensor, up: Tensor, down: Tensor | None) -> bool:
    inputs = own[0].numel()
    return down is not None and up.ndim == 2 and up.shape[0] == len(own) and down.shape == (up.shape[1], inputs)


def _whole(name: str, own: Tensor, tensor: Tensor) -> bool:
    channels = (INPAINT_CHANNELS,) if name == FIRST_LAYER else own.shape[1:2]
    return tensor.shape == (*own.shape[:1], *channels, *own.shape[2:])


class WordTokenizer:
    """Lower-case words to ids, with the few methods that the host asks of a tokenizer."""

    def __init__(self, words: list[str]):
        self.ids = {word: i for i, word in enumerate(words)}

    @classmethod
    def from_pretrained(cls, words: list[str]) -> WordTokenizer:
        return cls(words)

    def get_vocab(self) -> dict[str, int]:
        return self.ids

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Every word the model never saw becomes the one unknown token; punctuation is dropped."""
        ids = [self.ids.get(word, UNKNOWN) for word in split_words(text)]
        return {"input_ids": [BEGIN, *ids, END]}


def split_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())


def pack_vocabulary(words: list[str]) -> Tensor:
    """uint8 [n], the form in which a safetensors file can carry the words."""
    return torch.tensor(list("\n".join(words).encode("ascii")), dtype=torch.uint8)


def unpack_vocabulary(packed: Tensor) -> list[str]:
    """The words; raises ValueError when the tensor is not what `pack_vocabulary` writes."""
    if packed.dtype != torch.uint8 or packed.ndim != 1 or not 0 < len(packed) <= VOCABULARY_LIMIT:
        raise ValueError(
            f"The checkpoint's vocabulary must be a uint8 list of at most {VOCABULARY_LIMIT} bytes, but it is "
            f"{packed.dtype} {list(packed.shape)}: get the demo checkpoint again from the pack's models/weights folder."
        )
    words = bytes(packed.tolist()).decode("ascii", errors="replace").split("\n")
    if len(words) <= UNKNOWN or len(set(words)) < len(words):
        raise ValueError(
            "The checkpoint's vocabulary is damaged: a word is in it twice, or it has none. Get the demo checkpoint "
            "again from the pack's models/weights folder."
        )
    return words
