"""Propagation in a transformer (SD3, Flux, …): on most steps the inner blocks are replaced by what they added.

The host lets a patch stand in for any block, so its forward runs as it is. On a key step the first and the last
replaced block of each kind record what goes in and what comes out; on the others the last one returns what went in plus
that difference. With no fresh block before them the output itself is held: the paper's variant for transformers.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ....kernels.propagation import Costs, Features, Reuse
from ..._plan.propagation import Choice, choose_blocks, part_of_transformer
from . import RUN, Propagation

# Where the host's transformers keep the blocks that it offers to patches under these names.
BLOCK_KINDS = {
    "double_block": ("joint_blocks", "double_blocks", "double_layers", "transformer_blocks", "blocks"),
    "single_block": ("single_blocks", "single_layers"),
}
STREAMS = ("img", "txt")
CONTROL = "control"
Block = tuple[str, int]


def blocks_of(network: nn.Module) -> dict[Block, nn.Module]:
    """The blocks of a transformer in the order in which they run, by the host's names; empty for other networks."""
    found: dict[Block, nn.Module] = {}
    if isinstance(network, openaimodel.UNetModel):
        return found
    for kind, names in BLOCK_KINDS.items():
        lists = (getattr(network, name, None) for name in names)
        blocks = next((blocks for blocks in lists if isinstance(blocks, nn.ModuleList)), ())
        found |= {(kind, i): block for i, block in enumerate(blocks)}
    return found


def costs_of(blocks: Iterable[nn.Module]) -> Costs:
    """What each block of a transformer costs, by the size of its weights: every token meets each of them once."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    shares = tuple(size / sum(sizes) for size in sizes)
    return Costs(shares, 0.0, shares)  # of_step adds those before `fresh` and those from `cut` on


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **extra):
    options = transformer_options or {}
    run = options.get(RUN)
    if run is None or run.clock.step is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **extra)
    return run.evaluate(executor, x, t, c_concat, c_crossattn, control, options, extra)


class TransformerPropagation(Propagation):
    """The run's object for a transformer."""

    network = "a transformer"
    profile_kind = "block_propagation"
    inner = {WrappersMP.APPLY_MODEL: _apply_model}
    part = staticmethod(part_of_transformer)

    @classmethod
    def blocks_in(cls, model: Any) -> int:
        return len(blocks_of(model.get_model_object("diffusion_model")))

    def inspect(self, noise: Tensor) -> None:
        network = self.model.get_model_object("diffusion_model")
        self.blocks = blocks_of(network)
        self.costs = costs_of(self.blocks.values())
        width = getattr(network, "hidden_size", 0)
        patch = getattr(network, "patch_size", 1)
        side = patch[-1] if isinstance(patch, tuple | list) else patch
        self.elements = width * math.prod(noise.shape[2:]) // side**2 if isinstance(width, int) else 0

    def choose(self, sigmas: list[float], shares: list[float], fresh_noise: bool) -> Choice:
        return choose_blocks(self.settings, sigmas, shares, self.costs)

    def bytes_of(self, reuse: Reuse, dtype: torch.dtype | None) -> int:
        """For the picture's tokens; those of the prompt come on top."""
        kinds = len({kind for kind, _ in list(self.blocks)[reuse.fresh : reuse.cut]})
        return self.rows * kinds * self.elements * self.element_size(dtype) * (1 + reuse.forecast)

    def evaluate(self, executor: Any, x: Tensor, t: Tensor, concat, context, control, options: dict, extra: dict):
        """One call of the model, with patches in the place of the blocks that are reused or recorded."""
        keys = self.keys_of(options, x.device)
        if keys is None or x.shape[0] % len(keys):
            self.counts["whole"] += 1
            return executor(x, t, concat, context, control, options, **extra)
        signature = self.signature(keys, x)
        reuses = self.shorter and not self.moved(keys, x)
        features = self.recall(keys, signature, self.plan.time(self.clock.sigma), x) if reuses else None
        if features is not None:
            self.counts["part"] += 1
            options = self._patched(options, lambda *of: _Reused(features, self.reuse.fresh > 0).patches(*of))
            with _not_compiled():
                return executor(x, t, concat, context, _control_of(features), options, **extra)
        self.counts["missing"] += self.shorter
        self.counts["whole"] += 1
        wanted = self.records(keys)
        found: Features = {}
        residuals = self._control_features(control, x.shape[0]) if wanted else None
        if wanted or self.plan.captured:  # on every whole step: torch.compile would compile patches that come and go
            options = self._patched(options, lambda *of: _Recorded(found, self.reuse.fresh > 0).patches(*of))
        output = executor(x, t, concat, context, control, options, **extra)
        if found and residuals is not None:  # nothing is found in a network that does not offer its blocks
            self.store(keys, signature, {**found, **residuals}, x)
        return output

    def _control_features(self, control: Mapping | None, rows: int) -> Features | None:
        """The control residuals that a shorter step adds; None if they do not split by rows.

        Those of the blocks it computes, and of the last reused block of each kind: the host adds them after the block,
        so they are not in the recorded difference. Its lists count the blocks of one kind from 0, and different
        networks read different lists.
        """
        blocks = list(self.blocks)
        last = dict(blocks[self.reuse.fresh : self.reuse.cut])
        added = {i for _, i in [*blocks[: self.reuse.fresh], *blocks[self.reuse.cut :]]} | set(last.values())
        found: Features = {}
        for side, values in (control or {}).items():
            for i, value in enumerate(values):
                if value is not None and i in added:
                    if value.shape[0] != rows:
                        return None
                    found[CONTROL, side, i] = value
        return found

    def _patched(self, options: dict, patches_of: Callable) -> dict:
        """Transformer options in which `patches_of(kind, indices, others)` stands in for the reused blocks."""
        replaced = options.get("patches_replace", {})
        others = replaced.get("dit", {})
        reused = list(self.blocks)[self.reuse.fresh : self.reuse.cut]
        patches = dict(others)
        for kind in BLOCK_KINDS:
            indices = [i for name, i in reused if name == kind]
            if indices:
                patches |= patches_of(kind, indices, others)
        return {**options, "patches_replace": {**replaced, "dit": patches}}


def _not_compiled() -> contextlib.AbstractContextManager:
    """While a shorter step runs, torch.compile compiles nothing: the whole steps' graphs are all there are."""
    in_use = "torch._dynamo" in sys.modules  # it takes seconds to import, and a model that is not compiled needs it not
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    return set_stance("force_eager") if in_use and set_stance else contextlib.nullcontext()


def _control_of(features: Features) -> dict[str, list] | None:
    """The host's lists of control residuals with those that were kept."""
    kept = {key[1:]: value for key, value in features.items() if isinstance(key, tuple) and key[0] == CONTROL}
    if not kept:
        return None
    length = 1 + max(i for _, i in kept)
    return {side: [kept.get((side, i)) for i in range(length)] for side in ("input", "middle", "output")}


class _Recorded:
    """Runs the blocks, another node's patches among them, and writes down what the whole row of them does."""

    def __init__(self, found: Features, difference: bool):
        self.found, self.difference = found, difference
        self.entered: dict[str, Tensor] = {}

    def patches(self, kind: str, indices: list[int], others: dict) -> dict[Block, Callable]:
        def patch_for(i: int) -> Callable:
            def patch(args: dict, extra: dict) -> dict:
                if i == indices[0] and self.difference:  # a copy: Flux adds to it in place
                    self.entered = {name: args[name].clone() for name in STREAMS if args.get(name) is not None}
                other = others.get((kind, i))
                out = other(args, extra) if other else extra["original_block"](args)
                if i == indices[-1]:
                    for name in STREAMS:
                        if out.get(name) is not None:
                            value = out[name] - self.entered[name] if self.difference else out[name].clone()
                            self.found[kind, name] = value
                return out

            return patch

        return {(kind, i): patch_for(i) for i in indices}


class _Reused:
    """Stands in for the blocks: the first one computes where the last one will end, the others pass on.

    What a ControlNet adds on the way is part of the recorded difference.
    """

    def __init__(self, features: Features, difference: bool):
        self.features, self.difference = features, difference
        self.target: dict[str, Tensor | None] = {}

    def patches(self, kind: str, indices: list[int], others: dict) -> dict[Block, Callable]:
        def patch_for(i: int) -> Callable:
            def patch(args: dict, extra: dict) -> dict:
                if i == indices[0]:
                    self.target = {name: self._end_of(kind, name, args) for name in STREAMS if name in args}
                return self.target if i == indices[-1] else {name: args[name] for name in STREAMS if name in args}

            return patch

        return {(kind, i): patch_for(i) for i in indices}

    def _end_of(self, kind: str, name: str, args: dict) -> Tensor | None:
        feature = self.features.get((kind, name))
        if feature is None:
            return args[name]
        return args[name] + feature if self.difference else feature.clone()
