"""The host's UNet in parts: record features as they pass, run it with some blocks replaced by features, count its work.

Nothing of the host's forward is repeated here: a whole step is the host's own forward with a passive patch, a shorter
one is the same forward on a view of the network in which some blocks only return what they were given.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ....kernels.encoder_propagation import Costs, Reuse
from ....kernels.feature_cache import Features

ENTRY = "entry"  # the feature that enters the first output block that runs
CONTEXT_TOKENS = 77


def blocks_a_side(unet: Any) -> int:
    return len(unet.output_blocks)


# --- a whole step ---


def recording(options: dict, reuse: Reuse, n: int, found: Features) -> dict:
    """Transformer options with a patch that writes what `reuse` needs into `found` and changes nothing.

    It is the first of the output patches, so it sees skips with their control residuals and before FreeU and others,
    which may write into them in place; a clone is kept where there are any.
    """
    patches = options.get("patches", {})
    others = patches.get("output_block_patch", [])
    kept = (lambda tensor: tensor.clone()) if others else (lambda tensor: tensor)

    def record(h, skip, options):
        block = options["block"][1]
        if block == reuse.cut:
            found[ENTRY] = kept(h)
        if block >= reuse.cut and n - 1 - block >= reuse.fresh and skip is not None:
            found["skip", n - 1 - block] = kept(skip)
        return h, skip

    return {**options, "patches": {**patches, "output_block_patch": [record, *others]}}


def control_features(control: Mapping | None, reuse: Reuse, n: int, rows: int) -> Features | None:
    """The control residuals of the blocks that a shorter step computes afresh; None if they do not split by rows.

    The host takes them from the ends of its lists: block 0 of each side gets the last one.
    """
    found: Features = {}
    if control is None or not reuse.fresh:
        return found
    for side, at in (("input", lambda block: -1 - block), ("output", lambda block: block - n)):
        values = control.get(side, ())
        for block in range(reuse.fresh):
            value = values[at(block)] if -at(block) <= len(values) else None
            if value is not None:
                if value.shape[0] != rows:
                    return None
                found[side, block] = value
    return found


# --- a shorter step ---


class _Given:
    """In the place of a block: returns what it was given. `transformers` keeps the host's running number in step."""

    value: Tensor | None = None

    def __init__(self, block: Any, view: UNetView):
        self.view = view
        self.transformers = sum(type(layer).__name__.startswith("Spatial") for layer in block or ())

    def __call__(self, x: Tensor) -> Tensor | None:
        self.view.options["transformer_index"] += self.transformers
        return self.value


class UNetView:
    """A UNet that computes what `reuse` wants and takes the rest from features; it shares every weight."""

    def __init__(self, unet: Any, reuse: Reuse):
        n = self.n = blocks_a_side(unet)
        self.reuse = reuse
        self.lock = threading.Lock()  # newer hosts evaluate conditions in threads
        self.options: dict = {}
        self.inputs = [_Given(block, self) for block in unet.input_blocks[reuse.fresh :]]
        self.middle = _Given(unet.middle_block, self)
        self.outputs = [_Given(block, self) for block in unet.output_blocks[: reuse.cut]]
        self.unet = object.__new__(type(unet))
        # Plain lists as instance attributes hide the registered modules of the same names.
        self.unet.__dict__.update(
            unet.__dict__,
            input_blocks=[*unet.input_blocks[: reuse.fresh], *([block] for block in self.inputs)],
            middle_block=[self.middle],
            output_blocks=[*([block] for block in self.outputs), *unet.output_blocks[reuse.cut :]],
        )
        assert len(self.inputs) + reuse.fresh == n

    def run(self, call: Callable, features: Features, x: Tensor, options: dict) -> Tensor:
        """`call(forward, control, options)` with the features in place.

        Skips that nobody reads are tensors without channels: the host concatenates them to the same.
        """
        nothing = x.new_empty((x.shape[0], 0, 1, 1))
        # FreeU and others write into what they are given.
        keep = bool(options.get("patches", {}).get("output_block_patch"))
        given = {name: value.clone() if keep else value for name, value in features.items()}
        with self.lock:
            self.options = _shorter_options(options, self.reuse)
            for block, stub in enumerate(self.inputs, start=self.reuse.fresh):
                stub.value = given.get(("skip", block), nothing)
            for stub in (self.middle, *self.outputs):
                stub.value = nothing
            (self.outputs[-1] if self.outputs else self.middle).value = given[ENTRY]
            try:
                return call(self.unet, _control_of(features, self.n), self.options)
            finally:
                self.options = {}
                for stub in (*self.inputs, self.middle, *self.outputs):
                    stub.value = None


def _control_of(features: Features, n: int) -> dict[str, list] | None:
    """The host's lists of control residuals, with those of the fresh blocks at their places from the end."""
    if not any(isinstance(name, tuple) and name[0] != "skip" for name in features):
        return None
    return {
        "input": [features.get(("input", block)) for block in reversed(range(n))],
        "middle": [],
        "output": [features.get(("output", block)) for block in range(n)],
    }


def _shorter_options(options: dict, reuse: Reuse) -> dict:
    """A copy whose input and output patches see only the blocks that really run."""
    patches = dict(options.get("patches", {}))
    for name in ("input_block_patch", "input_block_patch_after_skip"):
        if name in patches:
            patches[name] = [_only_below(patch, reuse.fresh) for patch in patches[name]]
    if "output_block_patch" in patches:
        patches["output_block_patch"] = [_only_from(patch, reuse.cut) for patch in patches["output_block_patch"]]
    return {**options, "patches": patches}


def _only_below(patch: Callable, fresh: int) -> Callable:
    return lambda h, options: patch(h, options) if options["block"][1] < fresh else h


def _only_from(patch: Callable, cut: int) -> Callable:
    return lambda h, skip, options: patch(h, skip, options) if options["block"][1] >= cut else (h, skip)


# --- work and memory ---


@dataclass(frozen=True)
class UNetSize:
    """A UNet's work per block, and the size of the features between its blocks in elements per latent of the batch."""

    costs: Costs
    skips: tuple[int, ...]
    entries: tuple[int, ...]  # what enters each output block

    def kept_elements(self, reuse: Reuse) -> int:
        return self.entries[reuse.cut] + sum(self.skips[i] for i in reuse.kept_skips(len(self.skips)))


def measure_unet(unet: Any, height: int, width: int) -> UNetSize:
    """Multiplications per block from the weights' shapes, for a latent of height x width and 77 context tokens.

    Counted: convolutions, linear layers and attention products. Norms and activations are not; they take time but
    hardly any arithmetic.
    """
    size, channels = (height, width), 0
    inputs, skips, outputs, entries = [], [], [], []
    for block in unet.input_blocks:
        work, channels, size = _block_work(block, channels, size)
        inputs.append(work)
        skips.append((channels * math.prod(size), size))
    middle, channels, size = _block_work(unet.middle_block or (), channels, size)
    for i, block in enumerate(unet.output_blocks):
        entries.append(channels * math.prod(size))
        after = skips[len(skips) - 2 - i][1] if i + 1 < len(skips) else size
        work, channels, size = _block_work(block, channels, size, after)
        outputs.append(work)
    outputs[-1] += _linear_work(unet.out, math.prod(size))
    total = sum(inputs) + middle + sum(outputs)
    costs = Costs(tuple(w / total for w in inputs), middle / total, tuple(w / total for w in outputs))
    return UNetSize(costs, tuple(elements for elements, _ in skips), tuple(entries))


def _block_work(
    block: Any, channels: int, size: tuple[int, int], after: tuple[int, int] | None = None
) -> tuple[float, int, tuple[int, int]]:
    """Multiplications of a block, and the channels and the size that leave it; `after` is the size it upsamples to."""
    work = 0.0
    for layer in block:
        name = type(layer).__name__
        if name == "Downsample":
            size = (-(-size[0] // 2), -(-size[1] // 2))
        elif name == "Upsample":
            size = after or size
        tokens = math.prod(size)
        if name.startswith("Spatial"):
            work += _transformer_work(layer, tokens)
        else:
            work += _linear_work(layer, tokens)
            channels = getattr(layer, "out_channels", channels)
    return work, channels, size


def _linear_work(layer: nn.Module, tokens: int) -> float:
    """Convolutions at every position; the linear layers of a ResBlock see one embedding."""
    convolutions = sum(p.numel() for p in layer.parameters() if p.ndim >= 4)
    return tokens * convolutions + sum(p.numel() for p in layer.parameters() if p.ndim == 2)


def _transformer_work(layer: nn.Module, tokens: int) -> float:
    work = 0.0
    for name, parameter in layer.named_parameters():
        if parameter.ndim >= 2:
            of_context = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
            work += parameter.numel() * (CONTEXT_TOKENS if of_context else tokens)
            if name.endswith("to_q.weight"):  # softmax(q k) v
                work += 2 * parameter.shape[0] * tokens * (CONTEXT_TOKENS if "attn2" in name else tokens)
    return work
