"""Which weights of a network suffer most from few bits, and what rounding them does to what every block reads.

A network told its time by a small MLP reads that answer in every block, so an error there is an error everywhere
(Huang et al. 2024, Temporal Feature Matters, arXiv 2407.19547); norms, biases, first and last layers are few numbers
that act on all others. float8_e4m3fn keeps 3 bits behind the leading one: 1/16 of a weight at most, e5m2 twice that.
What rounding took off all the others is put back bit by bit: each halves the error that is left.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TIME, PROJECTION, OUTER, VECTOR = "time embedding", "its projections", "first and last layers", "norms and biases"
OUTERMOST, OTHER = "outermost blocks", "all others"
SENSITIVE = (TIME, PROJECTION, OUTER, VECTOR)
NAMES = (  # of weights in the networks of the field
    (TIME, r"^(time_embed|time_in|t_embedder|time_embedding|time_embedder|adaln_single\.emb|time_text_embed)\."),
    (PROJECTION, r"(^|\.)(emb_layers|adaLN_modulation\w*|time_projection|modulation|scale_shift_table|\w+_mod)(\.|$)"),
    (OUTER, r"^(input_blocks\.0|out|conv_in|conv_out|x_embedder|img_in|final_layer|patch_embedding|head|proj_out)\."),
    (OUTER, r"^(pos_embed$|(context_embedder|txt_in|vector_in|y_embedder|label_emb|cap_embedder|text_embedding)\.)"),
)
MANTISSA = {  # bits behind the leading one, and the exponent below which weights are evenly spaced
    torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14),
}  # fmt: skip
EXPONENT = 0x7F800000  # the bits of a float32 that hold it
NUMBERED = r"(\w*(?:blocks|layers))\.(\d+)\."


def sensitive_part(name: str, dimensions: int) -> str:
    """Which part of a network the weight of that name belongs to: one of SENSITIVE, or OTHER."""
    for part, pattern in NAMES:
        if re.search(pattern, name):
            return part
    return VECTOR if dimensions < 2 else OTHER


def outermost(names: Sequence[str]) -> set[str]:
    """The weights of the first block of a network and of its last, by the names of all in the network's order.

    A UNet's first input block is its first layer and no block here.
    """
    places = {name: (found[1], int(found[2])) for name in names if (found := re.match(NUMBERED, name))}
    inner = [place for name, place in places.items() if sensitive_part(name, 2) != OUTER]
    if not inner:
        return set()
    first_stack, last_stack = inner[0][0], inner[-1][0]
    ends = {
        (first_stack, min(i for stack, i in inner if stack == first_stack)),
        (last_stack, max(i for stack, i in inner if stack == last_stack)),
    }
    return {name for name, place in places.items() if place in ends}


def sinusoid(timesteps: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """cos and sin of timesteps [n] at width / 2 frequencies from 1 down to 1 / period, [n width] (Ho et al. 2020)."""
    half = width // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float64) / half)
    angle = timesteps.double()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def time_embedding(timesteps: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """What a network's time MLP, (weight [out in], bias [out] or None) a layer and SiLU between, makes of timesteps."""
    x = sinusoid(timesteps, layers[0][0].shape[1])
    for i, (weight, bias) in enumerate(layers):
        x = torch.nn.functional.silu(x) if i else x
        x = x @ weight.double().T + (0 if bias is None else bias.double())
    return x


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The root mean square of the difference, in units of that of what is exact."""
    difference = (found.double() - exact.double()).square().mean()
    return float((difference / exact.double().square().mean()).sqrt())


# --- more bits for weights that stay rounded ---


@dataclass(frozen=True)
class MoreBits:
    """What rounding to 8 bits took off a matrix, to a few bits a weight.

    planes: [bits, ceil(n / 8)], the bits of all n weights, the most telling first, eight to a byte; factor:
    [out 1 ...], how much of it is added; kind: the 8-bit type.
    """

    planes: Tensor
    factor: Tensor
    kind: torch.dtype

    @staticmethod
    def of(low: Tensor, full: Tensor, bits: int) -> MoreBits:
        """For weights `low` [out ...] in an 8-bit type and the ones that they were rounded from.

        Each weight lies within half a spacing of its rounded one, anywhere in it: which half of it is one bit, which
        quarter two. Each takes 6.02 dB off an error that is even in it, as of any uniform quantiser. The factor is the
        least squares one of each output channel, so that none gets farther away than it was.
        """
        rounded = low.float()
        left = full.float() - rounded
        level = ((left / spacing(rounded, low.dtype) + 0.5) * 2**bits).floor().clamp(0, 2**bits - 1).to(torch.uint8)
        planes = torch.stack([_packed(level >> bit & 1) for bit in reversed(range(bits))])
        put = MoreBits(planes, torch.ones(1), low.dtype)(rounded) - rounded
        across = tuple(range(1, low.ndim))
        factor = (left * put).sum(across, keepdim=True) / put.square().sum(across, keepdim=True)
        return MoreBits(planes, factor, low.dtype)

    def __call__(self, rounded: Tensor) -> Tensor:
        """The rounded weights, unpacked to a wider type, with what was taken off them."""
        level = torch.zeros(rounded.numel(), dtype=torch.uint8, device=rounded.device)
        for plane in self.planes:
            level = (level << 1) | _unpacked(plane, rounded.numel())
        place = (level.reshape(rounded.shape) + 0.5) / 2 ** len(self.planes) - 0.5  # of its part's middle, in spacings
        wide = rounded.float()
        return (wide + self.factor * place * spacing(wide, self.kind)).to(rounded.dtype)

    def to(self, device: torch.device) -> MoreBits:
        return MoreBits(self.planes.to(device), self.factor.to(device), self.kind)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.planes.numel() + self.factor.numel() * self.factor.element_size()


def spacing(rounded: Tensor, kind: torch.dtype) -> Tensor:
    """From each weight of an 8-bit type, given in float32, to its neighbour farther from zero."""
    behind, lowest = MANTISSA[kind]
    power = (rounded.contiguous().view(torch.int32) & EXPONENT).view(torch.float32)  # the power of two at or below it
    return power.clamp(min=2.0**lowest) * 2.0**-behind


def _packed(bits: Tensor) -> Tensor:
    """Eight bits of a flat tensor of 0 and 1 to a byte, uint8."""
    flat = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).reshape(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).flatten()[:count]
