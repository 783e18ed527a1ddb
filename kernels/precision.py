"""Which weights of a network suffer most from few bits, and what rounding them does to what every block reads.

A network told its time by a small MLP reads that answer in every block, so an error there is an error everywhere
(Huang et al. 2024, Temporal Feature Matters, arXiv 2407.19547); norms, biases, first and last layers are few numbers
that act on all others. float8_e4m3fn keeps 3 bits behind the leading one: 1/16 of a weight at most, e5m2 twice that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

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
