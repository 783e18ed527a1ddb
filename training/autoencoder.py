"""A narrow autoencoder that is exactly a TAESD: trained small and fast, exported into the stock 64-wide layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STOCK_WIDTH = 64


def conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions and a skip, as in TAESD: relu(x + f(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        nn.init.zeros_(self.conv[4].weight)
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


class Identity(nn.Identity):
    """A block of the stock layout that the narrow net does not have; x >= 0 there, so relu(x + 0) = x."""


def _blocks(width: int, present: int, of: int) -> list[nn.Module]:
    return [Block(width) if i < present else Identity() for i in range(of)]


# width and number of blocks per resolution, from full to an eighth
ENCODER = ((16, 1), (32, 1), (64, 1), (64, 3))
DECODER = ((16, 1), (32, 2), (64, 3), (64, 3))


def encoder(channels: int) -> nn.Sequential:
    """[b 3 h w] in 0..1 -> [b channels h/8 w/8]; the module indices are those of the stock TAESD."""
    (w0, n0), (w1, n1), (w2, n2), (w3, n3) = ENCODER
    return nn.Sequential(
        conv(3, w0), *_blocks(w0, n0, 1),
        conv(w0, w1, stride=2, bias=False), *_blocks(w1, n1, 3),
        conv(w1, w2, stride=2, bias=False), *_blocks(w2, n2, 3),
        conv(w2, w3, stride=2, bias=False), *_blocks(w3, n3, 3),
        conv(w3, channels),
    )  # fmt: skip


def decoder(channels: int) -> nn.Sequential:
    """[b channels h/8 w/8] -> [b 3 h w] in 0..1."""
    (w0, n0), (w1, n1), (w2, n2), (w3, n3) = DECODER
    return nn.Sequential(
        Clamp(), conv(channels, w3), nn.ReLU(),
        *_blocks(w3, n3, 3), nn.Upsample(scale_factor=2), conv(w3, w2, bias=False),
        *_blocks(w2, n2, 3), nn.Upsample(scale_factor=2), conv(w2, w1, bias=False),
        *_blocks(w1, n1, 3), nn.Upsample(scale_factor=2), conv(w1, w0, bias=False),
        *_blocks(w0, n0, 1), conv(w0, 3),
    )  # fmt: skip


def widen(net: nn.Sequential, stock: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stock state dict that computes exactly what `net` computes: channels zero-padded, absent blocks zero.

    `stock` gives the names and shapes. Zero weights and biases keep a padded channel at relu(0) = 0.
    """
    wide = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in stock.items()}
    for name, tensor in net.state_dict().items():
        if tensor.ndim == 4:
            wide[name][: tensor.shape[0], : tensor.shape[1]] = tensor
        else:
            wide[name][: tensor.shape[0]] = tensor
    return wide


def narrow(net: nn.Sequential, stock: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `net` that `widen` had turned into `stock`."""
    return {
        name: stock[name][tuple(slice(n) for n in tensor.shape)].float() for name, tensor in net.state_dict().items()
    }
