"""Propagation in a UNet: whole steps recorded, the others run in part.

Nothing of the host's forward is repeated here: a whole step is the host's own forward with passive patches, a shorter
one is the same forward on a view of the network in which some blocks only return what they were given.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ....kernels.propagation import Costs, Features, Reuse
from ..._plan.propagation import FAR_BELOW, ONE, TWO_LEVELS, Choice, choose, part_of_unet, reuse_by_name
from ..identity import network_of
from . import RUN, Propagation

ENTRY = "entry"  # the feature that enters the first output block that runs
CONTEXT_TOKENS = 77
MOST_AHEAD = 4
# (kind of patch, its number, block) -> shapes of what goes in and what comes out, without the rows
PatchShapes = dict[tuple[str, int, int], tuple[tuple[int, ...], tuple[int, ...]]]
INPUT_PATCHES = ("input_block_patch", "input_block_patch_after_skip")


def unet_of(model: Any) -> openaimodel.UNetModel | None:
    """The UNet inside a MODEL, None for every other kind of network."""
    network = network_of(model)
    return network if isinstance(network, openaimodel.UNetModel) else None


def levels_above(unet: Any) -> tuple[int, ...]:
    """How many input blocks lie above each change of resolution: the first number run at full resolution."""
    down = tuple(
        i
        for i, block in enumerate(unet.input_blocks)
        if any(isinstance(layer, openaimodel.Downsample) or getattr(layer, "updown", False) for layer in block)
    )
    return down or (len(unet.input_blocks),)


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


def watching(options: dict, shapes: PatchShapes) -> dict:
    """Transformer options whose input patches write into `shapes` what they make of the features they see.

    Those of other packs (Deep Shrink) may shrink features in a part of the run.
    """

    def watched(patch: Callable, *place) -> Callable:
        def note(h, options):
            before, out, where = tuple(h.shape[1:]), patch(h, options), (*place, options["block"][1])
            shapes[where] = before, tuple(out.shape[1:])
            return out

        return note

    patches = options.get("patches", {})
    noted = {
        name: [watched(patch, name, i) for i, patch in enumerate(patches[name])]
        for name in INPUT_PATCHES
        if name in patches
    }
    return {**options, "patches": {**patches, **noted}} if noted else options


def shapes_now(options: dict, shapes: PatchShapes, x: Tensor) -> PatchShapes:
    """What the input patches make of the noted features at the noise level of `options`, tried on zeros."""
    patches: dict = options.get("patches", {})
    found: PatchShapes = {}
    for (name, i, block), (before, _) in shapes.items():
        told = {**options, "block": ("input", block), "transformer_index": 0, "original_shape": list(x.shape)}
        for patch in patches.get(name, ())[i : i + 1]:
            found[name, i, block] = before, tuple(patch(x.new_zeros((x.shape[0], *before)), told).shape[1:])
    return found


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
    for name in INPUT_PATCHES:
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


def lies_deep(model: Any, samples: Tensor) -> bool:
    """Whether a MODEL is a UNet most of whose work on latents like `samples` lies below its two highest levels."""
    unet = unet_of(model)
    if unet is None:
        return False
    two = reuse_by_name(TWO_LEVELS, False, blocks_a_side(unet), levels_above(unet))
    return measure_unet(unet, *samples.shape[-2:]).costs.of_step(two) <= FAR_BELOW


# --- a run ---


@torch.compiler.disable(recursive=False)
def _diffusion_model(
    executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **extra
):
    """torch.compile runs this wrapper, too: decisions and shorter steps stay out of its graphs, whole steps are in."""
    options = transformer_options or {}
    run = options.get(RUN)
    if run is None or run.clock.step is None:
        return executor(x, timesteps, context, y, control, options, **extra)
    output, options, keep = run.prepare(executor, x, timesteps, context, y, control, options, extra)
    if output is None:
        output = executor(x, timesteps, context, y, control, options, **extra)
        if keep is not None:
            torch.compiler.disable(keep)()
    return output


class UNetPropagation(Propagation):
    """The run's object for a UNet."""

    network = "a UNet"
    profile_kind = "encoder_propagation"
    inner = {WrappersMP.DIFFUSION_MODEL: _diffusion_model}
    part = staticmethod(part_of_unet)

    @classmethod
    def blocks_in(cls, model: Any) -> int:
        unet = unet_of(model)
        return 0 if unet is None else blocks_a_side(unet)

    def inspect(self, noise: Tensor) -> None:
        unet: Any = unet_of(self.model)
        self.blocks, self.levels = blocks_a_side(unet), levels_above(unet)
        self.size = measure_unet(unet, *noise.shape[-2:])
        self.costs = self.size.costs
        self.views: dict[int, UNetView] = {}
        self.shapes: dict[tuple, PatchShapes] = {}  # signature -> as noted on the last whole call

    def choose(self, sigmas: list[float], shares: list[float], fresh_noise: bool) -> Choice:
        return choose(self.settings, sigmas, shares, self.costs, self.levels, fresh_noise)

    def bytes_of(self, reuse: Reuse, dtype: torch.dtype | None) -> int:
        return self.rows * self.size.kept_elements(reuse) * self.element_size(dtype) * (1 + reuse.forecast)

    def thinner(self, reuse: Reuse) -> Reuse:
        return reuse_by_name(ONE, reuse.forecast, self.blocks, self.levels)

    def reach(self) -> float:
        """All of the way where the top level alone is fresh: over 50 steps that was measured to be nearer."""
        return super().reach() if self.reuse.fresh > self.levels[0] else 1.0

    def close(self) -> None:
        super().close()
        self.views.clear()

    def view(self, unet: Any) -> UNetView:
        if id(unet) not in self.views:
            self.views[id(unet)] = UNetView(unet, self.reuse)
        return self.views[id(unet)]

    @torch.compiler.disable
    def prepare(
        self, executor: Any, x: Tensor, timesteps, context, y, control, options: dict, extra: dict
    ) -> tuple[Tensor | None, dict, Callable[[], None] | None]:
        """Before a call of the UNet: its answer, or the options to run it whole with and what to do afterwards."""
        whole = None, options, None
        keys = self.keys_of(options, x.device)
        if keys is None or x.shape[0] % len(keys) or "_forward" in vars(executor.class_obj):
            self.counts["whole"] += 1
            return whole
        signature = self.signature(keys, x)
        if self.shorter and not self.moved(keys, x):
            now = (*signature, *shapes_now(options, self.shapes.get(signature, {}), x).items())
            output = self._shorter(executor, keys, now, x, timesteps, context, y, options, extra)
            if output is not None:
                return output, options, None
        self.counts["missing"] += self.shorter
        self.counts["whole"] += 1
        wanted = self.records(keys)
        if not (wanted or self.plan.captured):
            return whole
        # Recorded on every whole step, kept on some: torch.compile would compile a patch that comes and goes twice.
        found: Features = {}
        shapes: PatchShapes = {}
        residuals = control_features(control, self.reuse, self.blocks, x.shape[0]) if wanted else None

        def keep() -> None:
            if found and residuals is not None:  # nothing is found where another wrapper answered in the UNet's place
                self.shapes[signature] = shapes
                self.store(keys, (*signature, *shapes.items()), {**found, **residuals}, x)

        return None, recording(watching(options, shapes), self.reuse, self.blocks, found), keep

    def _shorter(self, executor, keys, signature, x, timesteps, context, y, options, extra) -> Tensor | None:
        ready = self.cache.ahead(keys, self.step, signature) if self.clock.on_grid and self.sources is None else None
        if ready is not None and ready.shape[0] == x.shape[0]:
            self.counts["ready"] += 1
            return ready
        ahead = self._steps_ahead(executor, x, options, extra)
        n = len(ahead)
        times = [self.plan.times[i] for i in ahead] if n > 1 else [self.plan.time(self.clock.sigma)]
        each = [self.recall(keys, signature, time, x) for time in times]
        if any(features is None for features in each):
            return None
        features = each[0]
        if n > 1:
            features = {name: torch.cat([part[name] for part in each]) for name in features}
            sigmas = torch.tensor([self.plan.sigmas[i] for i in ahead], device=x.device).repeat_interleave(len(x))
            timesteps = self.model.model.model_sampling.timestep(sigmas).float()
            x, context, y = (_repeat(value, n) for value in (x, context, y))
            options = {**options, **{name: options[name] * n for name in ("uuids", "cond_or_uncond")}}

        def call(part: Any, control: dict | None, options: dict) -> Tensor:
            inner = WrapperExecutor.new_class_executor(part._forward, part, executor.wrappers, executor.idx + 1)
            return inner.execute(x, timesteps, context, y, control, options, **extra)

        output = self.view(executor.class_obj).run(call, features, x, options)
        self.counts["part"] += 1
        if n == 1:
            return output
        now, *later = output.chunk(n)
        for i, part in zip(ahead[1:], later, strict=True):
            self.cache.keep_ahead(keys, i, signature, part)
        return now

    def _steps_ahead(self, executor: Any, x: Tensor, options: dict, extra: dict) -> range:
        """The coming steps whose outputs are computed in one batch: they depend on the timestep only, not on x."""
        group, wanted = self.plan.group(self.step), self.settings.parallel
        alone = range(self.step, self.step + 1)
        if self.reuse.fresh or wanted == "off" or self.sources is not None or len(group) < 2 or extra:
            return alone
        if not self.clock.on_grid or not self._plain_times():
            return alone
        if wanted != "auto":
            return group[: int(wanted)]
        patched = any(options.get(name) for name in ("patches", "patches_replace"))
        if patched or executor.idx + 1 < len(executor.wrappers):
            return alone  # patches may look at the noise level, which is one for the whole batch
        free = comfy.model_management.get_free_memory(x.device)
        for n in range(min(len(group), MOST_AHEAD), 1, -1):
            if self.model.model.memory_required([n * x.shape[0], *x.shape[1:]]) * 1.5 < free:
                return group[:n]
        return alone

    def _plain_times(self) -> bool:
        """Whether the network is told the schedule's own timesteps, so that coming ones are known."""
        base = self.model.model
        stock = type(base).process_timestep is comfy.model_base.BaseModel.process_timestep
        return stock and "process_timestep" not in vars(base)


def _repeat(value: Tensor | None, n: int) -> Tensor | None:
    return None if value is None else value.repeat(n, *[1] * (value.ndim - 1))
