"""NPNet: the network that turns a draw of noise and a prompt into golden noise (Zhou et al. 2024, arXiv 2411.09502).

Torch alone, with the names of the published weights, so that the authors' files and their conversions load as they are.
`NPNetConfig` describes the published networks by default and networks for other latents, texts and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WINDOW = 7  # of the Swin transformer, in patches
PATCH = 4
RESIDUAL = 7  # channels of the Swin branch before its last convolution: its feature map's rows, see `NoiseTransformer`
HIDDEN = 64
INSTEAD = "Use an NPNet trained for this model, or Attune Redenoise, which needs no weights."


@dataclass(frozen=True)
class NPNetConfig:
    """The shape of an NPNet; the defaults are SDXL's.

    channels, side: of the latents it was trained on. text: what of a prompt it reads: "flat", the first `tokens`
    tokens; "mean", their mean; "pooled", the pooled vector; `width` numbers each. signs: "raw" takes singular vectors
    as LAPACK gives them; "canonical" makes the largest entry of each left vector positive. swin_*: width of the first
    stage, blocks and heads per stage. hidden: width of the last SVD layer.
    """

    channels: int = 4
    side: int = 128
    text: Literal["flat", "mean", "pooled"] = "flat"
    tokens: int = 77
    width: int = 2048
    signs: Literal["raw", "canonical"] = "raw"
    swin_width: int = 96
    swin_depths: tuple[int, ...] = (2, 2, 6, 2)
    swin_heads: tuple[int, ...] = (3, 6, 12, 24)
    hidden: int = 1024

    @property
    def grid(self) -> tuple[int, int]:
        """How the channels are laid out as one matrix: rows and columns of channel images."""
        return grid(self.channels)

    @property
    def rank(self) -> int:
        """Singular values of that matrix."""
        return min(self.grid) * self.side

    @property
    def text_size(self) -> int:
        return self.width * (self.tokens if self.text == "flat" else 1)

    @property
    def image_side(self) -> int:
        """Pixels of the picture that the Swin transformer sees: its last stage is one window."""
        return PATCH * WINDOW * 2 ** (len(self.swin_depths) - 1)


def grid(channels: int) -> tuple[int, int]:
    """The most nearly square factors of `channels`, the smaller one first: 4 -> 2 x 2, 12 -> 3 x 4, 16 -> 4 x 4."""
    a = max(d for d in range(1, int(channels**0.5) + 1) if channels % d == 0)
    return a, channels // a


def prompt_texts(config: NPNetConfig, tokens: Tensor | None, pooled: Tensor | None, long_prompt: str) -> list[Tensor]:
    """What the network reads of an encoded prompt, tokens [b t d] and pooled [b p]: [b text_size], one for each part.

    Only "average" gives more than one, for a prompt of several parts as long as the network's.
    """
    if config.text == "pooled":
        if pooled is None:
            raise ValueError(
                f"This NPNet needs the pooled embedding of the prompt, but the conditioning has none. {INSTEAD}"
            )
        if pooled.shape[-1] != config.width:
            raise ValueError(
                f"This NPNet expects pooled embeddings of {config.width} numbers, but the conditioning has "
                f"{pooled.shape[-1]}. {INSTEAD}"
            )
        return [pooled]
    if tokens is None or tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            "Golden noise follows the prompt, but this conditioning holds no encoded text. Connect CLIP Text Encode."
        )
    n, width = tokens.shape[1:]
    if width != config.width:
        size = f"{config.tokens} x {config.width}" if config.text == "flat" else f"n x {config.width}"
        family = " (SDXL family)" if (config.tokens, config.width) == (77, 2048) else ""
        raise ValueError(
            f"This NPNet expects {size} prompt embeddings{family}, but the conditioning has {n} x {width}. {INSTEAD}"
        )
    if config.text == "mean":
        return [tokens.mean(dim=1)]
    if n < config.tokens:
        raise ValueError(
            f"This NPNet needs {config.tokens} tokens of a prompt, but the conditioning has {n} tokens. {INSTEAD}"
        )
    parts = n // config.tokens if long_prompt == "average" else 1
    return [part.flatten(1) for part in tokens[:, : parts * config.tokens].split(config.tokens, dim=1)]


def canonical_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """The singular vectors u [b m k], vh [b k n] with the largest entry of each left one positive.

    (u_i, v_i) and (-u_i, -v_i) are the same matrix, and libraries differ in which they return.
    """
    largest = u.gather(1, u.abs().argmax(dim=1, keepdim=True))  # [b 1 k]
    sign = torch.where(largest < 0, -1.0, 1.0).to(u)
    return u * sign, vh * sign.transpose(1, 2)


class NPNet(nn.Module):
    """Golden noise = SVD branch + (2 sigmoid(alpha) - 1) * e + beta * Swin branch of (noise + e), e the text branch."""

    def __init__(self, config: NPNetConfig):
        super().__init__()
        self.config = config
        self.alpha, self.beta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.text_embedding = TextNorm(config)
        self.unet_svd = SVDNoiseUnet(config)
        self.unet_embedding = NoiseTransformer(config)

    def forward(self, noise: Tensor, text: Tensor, svd_device: torch.device | None = None) -> Tensor:
        """noise [b c side side], text [b ...] or [1 ...] of `text_size` numbers -> golden noise, in the noise's dtype.

        Computed in float32. The singular value decomposition runs on `svd_device`, by default on the noise's own.
        """
        x = noise.float()
        e = self.text_embedding(x, text.float().flatten(1))
        svd = self.unet_svd(x, decompose(x, self.config, svd_device))
        return (svd + (2 * self.alpha.sigmoid() - 1) * e + self.beta * self.unet_embedding(x + e)).to(noise.dtype)


def decompose(x: Tensor, config: NPNetConfig, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [b m k], s [b k], Vh [b k n] of the channels of x laid out as one matrix; without a gradient."""
    a, c = config.grid
    with torch.no_grad():
        matrix = rearrange(x, "b (a c) h w -> b (a h) (c w)", a=a, c=c)
        u, s, vh = torch.linalg.svd(matrix if device is None else matrix.to(device), full_matrices=False)
        if config.signs == "canonical":
            u, vh = canonical_signs(u, vh)
        return u.to(x.device), s.to(x.device), vh.to(x.device)


class TextNorm(nn.Module):
    """The text branch: the noise, normalised over the whole sample, with a scale and a shift per channel."""

    def __init__(self, config: NPNetConfig):
        super().__init__()
        self.linear = nn.Linear(config.text_size, 2 * config.channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.linear(text)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, 1, eps=1e-6) * (1 + scale) + shift


class SVDNoiseUnet(nn.Module):
    """The SVD branch: the noise with singular values that attention over its singular triples corrects."""

    def __init__(self, config: NPNetConfig):
        super().__init__()
        (a, c), k = config.grid, config.rank
        self.grid = (a, c)
        self.mlp1 = nn.Sequential(nn.Linear(a * config.side, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, k))
        self.mlp2 = nn.Sequential(nn.Linear(c * config.side, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, k))
        self.mlp3 = nn.Sequential(nn.Linear(k, k))
        self.attention = Attention(k, heads=8 if k % 8 == 0 else 1, qkv_bias=False)
        self.mlp4 = nn.Sequential(nn.Linear(k, config.hidden), nn.ReLU(), nn.Linear(config.hidden, k))

    def forward(self, x: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        u, s, vh = factors
        tokens = self.mlp1(u.mT) + self.mlp2(vh) + self.mlp3(s)[:, None]  # [b k k]: one token a singular triple
        corrected = self.mlp4(self.attention(tokens).mean(dim=1)) + s  # [b k]
        a, c = self.grid
        return rearrange((u * corrected[:, None]) @ vh, "b (a h) (c w) -> b (a c) h w", a=a, c=c)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [b n width], with an additive bias."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h n d -> b n (h d)"))


class NoiseTransformer(nn.Module):
    """The Swin branch.

    The published code reads the transformer's [b row column feature] map as [b channel row column]: rows become
    channels, columns become rows and every few features a column. The weights were trained that way.
    """

    def __init__(self, config: NPNetConfig):
        super().__init__()
        self.side, self.image_side = config.side, config.image_side
        self.downconv = nn.Conv2d(config.channels, 3, 1)
        self.upconv = nn.Conv2d(RESIDUAL, config.channels, 1)
        self.swin = Swin(config.swin_width, config.swin_depths, config.swin_heads)

    def forward(self, x: Tensor) -> Tensor:
        features = self.swin(self.downconv(F.interpolate(x, (self.image_side, self.image_side))))  # [b 7 7 f]
        return self.upconv(F.interpolate(features, (self.side, self.side)))


class Swin(nn.Module):
    """Swin transformer (Liu et al. 2021, arXiv 2103.14030): [b 3 h w] -> normalised features [b h/32 w/32 8 width]."""

    def __init__(self, width: int, depths: tuple[int, ...], heads: tuple[int, ...]):
        super().__init__()
        self.patch_embed = PatchEmbed(width)
        self.layers = nn.ModuleList(
            Stage(width * 2**i, depth, head, downsample=i > 0, shifted=i < len(depths) - 1)
            for i, (depth, head) in enumerate(zip(depths, heads, strict=True))
        )
        self.norm = nn.LayerNorm(width * 2 ** (len(depths) - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class PatchEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # [b h w c]


class Stage(nn.Module):
    """Blocks at one resolution; every second one shifts its windows, but for the last stage, which is one window."""

    def __init__(self, width: int, depth: int, heads: int, downsample: bool, shifted: bool):
        super().__init__()
        self.downsample = PatchMerging(width // 2) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, shift=WINDOW // 2 if shifted and i % 2 else 0) for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class PatchMerging(nn.Module):
    """Each 2 x 2 patches become one of twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(rearrange(x, "b (h y) (w x) c -> b h w (x y c)", y=2, x=2)))


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, shift: int):
        super().__init__()
        self.shift = shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """[b h w c]"""
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        mask = shift_mask(h, w, self.shift).to(x.device) if self.shift else None
        x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = rearrange(x, "b (h y) (w x) c -> (b h w) (y x) c", y=WINDOW, x=WINDOW)
        x = rearrange(
            self.attn(windows, mask), "(b h w) (y x) c -> b (h y) (w x) c",
            h=h // WINDOW, w=w // WINDOW, y=WINDOW, x=WINDOW,
        )  # fmt: skip
        return x.roll((self.shift, self.shift), (1, 2))


class WindowAttention(Attention):
    """Attention within windows, with a learned bias for each offset between two patches."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [b * windows, n, c]; mask [windows n n]."""
        index = relative_position_index().to(x.device)
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)[None]  # [1 heads n n]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        return super().forward(x, bias)


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def relative_position_index() -> Tensor:
    """Which row of the bias table belongs to two patches of a window, [n n]."""
    at = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))  # [n 2]
    dy, dx = (at[:, None] - at[None] + WINDOW - 1).unbind(-1)
    return dy * (2 * WINDOW - 1) + dx


def shift_mask(h: int, w: int, shift: int) -> Tensor:
    """-100 between patches of a shifted window that were not neighbours before the shift, else 0: [windows n n]."""

    def region(n: int) -> Tensor:
        return (torch.arange(n) >= n - WINDOW).long() + (torch.arange(n) >= n - shift).long()

    label = 3 * region(h)[:, None] + region(w)[None]
    windows = rearrange(label, "(h y) (w x) -> (h w) (y x)", y=WINDOW, x=WINDOW)
    return torch.where(windows[:, :, None] == windows[:, None], 0.0, -100.0)
