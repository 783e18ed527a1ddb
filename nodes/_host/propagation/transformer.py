"""Propagation in a transformer (SD3, Flux, …): on most steps the inner blocks are replaced by what they added.

The host lets a patch stand in for any block of most networks, so their forward runs as it is. On a key step the first
and the last replaced block of each kind record what goes in and what comes out; on the others the last one returns what
went in plus that difference. With no fresh block before them the output itself is held: the paper's variant for
transformers. Of a network that asks no patch (PixArt, Cosmos, Lumina, Z-Image, HiDream, …) the longest row of like
blocks is taken, and the host's object patches give each of them a `forward` that asks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ....kernels.propagation import Costs, Features, Reuse
from ..._plan.propagation import Choice, choose_blocks, part_of_transformer
from ..identity import network_of
from . import RUN, Propagation

# Where the host's transformers keep the blocks that it offers to patches under these names.
BLOCK_KINDS = {
    "double_block": ("joint_blocks", "double_blocks", "double_layers", "transformer_blocks", "blocks"),
    "single_block": ("single_blocks", "single_layers"),
}
SEATED = "block"  # of the blocks that a network offers to no patch
SEATS = "attune.seats"
ODD = "odd"  # what a block gives that is unlike what it takes, and cannot be reused
STREAMS = ("img", "txt")
CONTROL = "control"
Block = tuple[str, int]


def blocks_of(network: nn.Module) -> dict[Block, nn.Module]:
    """The blocks of a transformer in the order in which they run, by the host's names; empty for other networks."""
    found: dict[Block, nn.Module] = {}
    if isinstance(network, openaimodel.UNetModel):
        return found
    kind_of: Any = type(network)
    for kind, names in BLOCK_KINDS.items() if _asks_patches(kind_of) else ():
        lists = (getattr(network, name, None) for name in names)
        blocks = next((blocks for blocks in lists if isinstance(blocks, nn.ModuleList)), ())
        found |= {(kind, i): block for i, block in enumerate(blocks)}
    return found or {(SEATED, i): network.get_submodule(name) for i, name in enumerate(row_of(network))}


@functools.cache
def _asks_patches(network: Any) -> bool:
    """Whether the source of a network looks for patches by the names in BLOCK_KINDS; yes where it cannot be read."""
    try:
        source = "".join(inspect.getsource(one) for one in network.__mro__ if _is_network(one))
    except (OSError, TypeError):
        return True
    return "patches_replace" in source and any(kind in source for kind in BLOCK_KINDS)


def _is_network(one: type) -> bool:
    return issubclass(one, nn.Module) and one is not nn.Module


def row_of(network: nn.Module) -> list[str]:
    """The names of the blocks in the row of one class that holds most of a network's weights."""
    rows = []
    for name, row in network.named_modules():
        members = list(row.children())
        alike = len({type(one) for one in members}) == 1 and isinstance(row, nn.ModuleList | nn.ModuleDict)
        if alike and len(members) > 1 and not isinstance(members[0], nn.ModuleList | nn.ModuleDict | nn.Sequential):
            size = sum(weight.numel() for weight in row.parameters())
            rows.append((size, [f"{name}.{key}" for key, _ in row.named_children()]))
    return max(rows, default=(0, []))[1]


class _Seats(threading.local):
    """What stands in for the blocks of a network that asks no patch, while it is called in this thread."""

    def __init__(self) -> None:
        self.patches: dict[Block, Callable] = {}
        self.streams = self.seen = 1  # how many tensors a block moves, and as was seen since the patches are these

    def sit(self, patches: dict[Block, Callable]) -> None:
        self.patches, self.streams = patches, self.seen

    def __deepcopy__(self, memo: dict) -> _Seats:
        return self

    def take(self, model: Any) -> None:
        """Sit in the blocks of this MODEL's own network."""
        for i, block in enumerate(row_of(network_of(model))):
            place = f"diffusion_model.{block}.forward"
            model.add_object_patch(place, self.of(i, model.get_model_object(place)))

    def move(self, model: Any, clone: Any) -> None:
        """ON_CLONE: newer hosts clone a MODEL onto another network for each further GPU, with these seats in it."""
        if clone.model is model.model:
            return
        for place, seat in [*clone.object_patches.items()]:
            if getattr(seat, "seats", None) is self:
                del clone.object_patches[place]
        self.take(clone)

    def of(self, i: int, forward: Callable) -> Callable:
        """The `forward` of block i, as the host's own blocks are offered: its first argument is the picture.

        Some blocks (CogVideoX, PixelDiT) give a tuple of their first arguments, moved: that is seen in the first whole
        step, and the next ones offer as many.
        """

        @functools.wraps(forward)
        def seated(*args, **kwargs):
            patch = self.patches.get((SEATED, i))
            if patch is None:
                return forward(*args, **kwargs)
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            names = [*given][: self.streams]
            picture = tuple(given[name] for name in names) if self.streams > 1 else given[names[0]]

            def original(now: dict) -> dict:
                moved = {**given, **dict(zip(names, now["img"] if self.streams > 1 else [now["img"]], strict=True))}
                out = forward(*(moved[j] for j in range(len(args))), **{name: moved[name] for name in kwargs})
                if isinstance(out, tuple) and _alike(out, tuple(given.values())[: len(out)]):
                    self.seen = len(out)
                return {"img" if _alike(out, picture) else ODD: out}

            left = patch({"img": picture}, {"original_block": original})
            return left[ODD] if ODD in left else left["img"]

        seated.seats = self  # type: ignore[attr-defined]
        return seated


def _alike(out: Any, given: Any) -> bool:
    """Whether a block gave what it took: a tensor of the same shape, or a tuple of several."""
    if isinstance(out, tuple) and isinstance(given, tuple):
        return 1 < len(out) == len(given) and all(map(_alike, out, given))
    return isinstance(out, Tensor) and isinstance(given, Tensor) and out.shape == given.shape


def costs_of(network: nn.Module, blocks: Iterable[nn.Module]) -> Costs:
    """What each block of a transformer costs, by the size of its weights: every token meets each of them once.

    A network's other lists (the double blocks of HiDream, where the single ones are the row) run on every step.
    """
    weights = [[*block.parameters()] for block in blocks]
    inside = {id(weight) for block in weights for weight in block}
    lists = (one for one in network.children() if isinstance(one, nn.ModuleList | nn.ModuleDict))
    always = sum(weight.numel() for one in lists for weight in one.parameters() if id(weight) not in inside)
    sizes = [sum(weight.numel() for weight in block) for block in weights]
    whole = sum(sizes) + always
    shares = tuple(size / whole for size in sizes)
    return Costs(shares, 0.0, shares, always / whole)  # of_step adds those before `fresh` and those from `cut` on


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
        return len(blocks_of(network_of(model)))

    @classmethod
    def equip(cls, model: Any) -> None:
        if (SEATED, 0) not in blocks_of(network_of(model)):
            return
        seats = model.model_options["transformer_options"][SEATS] = _Seats()
        seats.take(model)
        model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, SEATS)
        model.add_callback_with_key(CallbacksMP.ON_CLONE, SEATS, seats.move)

    def inspect(self, noise: Tensor) -> None:
        network = network_of(self.model)
        self.blocks = blocks_of(network)
        self.costs = costs_of(network, self.blocks.values())
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
            reused = lambda *of: _Reused(features, self.reuse.fresh > 0).patches(*of)
            with _not_compiled(), self._patched(options, reused) as patched:
                return executor(x, t, concat, context, _control_of(features), patched, **extra)
        self.counts["missing"] += self.shorter
        self.counts["whole"] += 1
        wanted = self.records(keys)
        found: Features = {}
        residuals = self._control_features(control, x.shape[0]) if wanted else None
        if not wanted and not self.plan.captured:
            return executor(x, t, concat, context, control, options, **extra)
        # Recorded on every whole step: torch.compile would compile patches that come and go.
        recorded = lambda *of: _Recorded(found, self.reuse.fresh > 0).patches(*of)
        with self._patched(options, recorded) as patched:
            output = executor(x, t, concat, context, control, patched, **extra)
        # MiniMax H3 lays all tokens of its one row in a row each.
        if not found or (x.shape[0] > 1 and any(value.shape[0] != x.shape[0] for value in found.values())):
            self.counts["unseen"] += 1
        elif residuals is not None:
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

    @contextlib.contextmanager
    def _patched(self, options: dict, patches_of: Callable) -> Iterator[dict]:
        """Transformer options with which `patches_of(kind, indices, others)` stands in for the reused blocks."""
        replaced = options.get("patches_replace", {})
        others, reused = replaced.get("dit", {}), list(self.blocks)[self.reuse.fresh : self.reuse.cut]
        patches: dict[Block, Callable] = {}
        for kind in dict(reused):
            patches |= patches_of(kind, [i for name, i in reused if name == kind], others)
        seats = options.get(SEATS)
        if seats is None:
            yield {**options, "patches_replace": {**replaced, "dit": {**others, **patches}}}
            return
        seats.sit(patches)
        try:
            yield options
        finally:
            seats.sit({})


_STANCE = threading.Lock()
_eager: list[Any] = []  # one entry for each shorter step that runs now; the first holds what the compiler did before


@contextlib.contextmanager
def _not_compiled() -> Iterator[None]:
    """While a shorter step runs, torch.compile compiles nothing: the whole steps' graphs are all there are.

    The stance is the process's, and several GPUs run their steps in threads: the last that ends gives it back.
    """
    in_use = "torch._dynamo" in sys.modules  # it takes seconds to import, and a model that is not compiled needs it not
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    if not in_use or set_stance is None:
        yield
        return
    with _STANCE:
        _eager.append(_eager[0] if _eager else set_stance("force_eager"))  # in force from here on
    try:
        yield
    finally:
        with _STANCE:
            stance = _eager.pop()
            if not _eager:
                stance.__exit__(None, None, None)


def _control_of(features: Features) -> dict[str, list] | None:
    """The host's lists of control residuals with those that were kept."""
    kept = {key[1:]: value for key, value in features.items() if isinstance(key, tuple) and key[0] == CONTROL}
    if not kept:
        return None
    length = 1 + max(i for _, i in kept)
    return {side: [kept.get((side, i)) for i in range(length)] for side in ("input", "middle", "output")}


class _Recorded:
    """Runs the blocks, another node's patches among them, and writes down what the whole row of them does.

    What one tensor needs stands in the patch itself: torch.compile makes a graph of its own of a function called there.
    """

    def __init__(self, found: Features, difference: bool):
        self.found, self.difference = found, difference
        self.entered: dict[str, Any] = {}
        self.rows: dict[str, int] = {}  # how often each kind's row was entered: MiniMax Music runs it for each window

    def patches(self, kind: str, indices: list[int], others: dict) -> dict[Block, Callable]:
        def patch_for(i: int) -> Callable:
            def patch(args: dict, extra: dict) -> dict:
                if i == indices[0]:
                    self.rows[kind] = self.rows.get(kind, 0) + 1
                if i == indices[0] and self.difference:  # a copy: Flux adds to it in place
                    self.entered = {
                        name: one.clone() if isinstance(one, Tensor) else [part.clone() for part in one]
                        for name, one in args.items()
                        if name in STREAMS and one is not None
                    }
                other = others.get((kind, i))
                out = other(args, extra) if other else extra["original_block"](args)
                if i == indices[-1]:
                    for name in STREAMS:
                        left = out.get(name)
                        if isinstance(left, Tensor):
                            value = left - self.entered[name] if self.difference else left.clone()
                            self.found[kind, name, 0, self.rows[kind]] = value
                        elif left is not None:
                            self._keep(kind, name, left)
                return out

            return patch

        return {(kind, i): patch_for(i) for i in indices}

    def _keep(self, kind: str, name: str, left: Sequence[Tensor]) -> None:
        for j, value in enumerate(left):
            kept = value - self.entered[name][j] if self.difference else value.clone()
            self.found[kind, name, j, self.rows[kind]] = kept


class _Reused:
    """Stands in for the blocks: the first one computes where the last one will end, the others pass on.

    What a ControlNet adds on the way is part of the recorded difference.
    """

    def __init__(self, features: Features, difference: bool):
        self.features, self.difference = features, difference
        self.target: dict[str, Any] = {}
        self.rows: dict[str, int] = {}

    def patches(self, kind: str, indices: list[int], others: dict) -> dict[Block, Callable]:
        def patch_for(i: int) -> Callable:
            def patch(args: dict, extra: dict) -> dict:
                if i == indices[0]:
                    self.rows[kind] = self.rows.get(kind, 0) + 1
                    self.target = {name: self._end_of(kind, name, args[name]) for name in STREAMS if name in args}
                return self.target if i == indices[-1] else {name: args[name] for name in STREAMS if name in args}

            return patch

        return {(kind, i): patch_for(i) for i in indices}

    def _end_of(self, kind: str, name: str, given: Any) -> Any:
        row = self.rows[kind]
        if (kind, name, 0, row) not in self.features:
            return given
        if isinstance(given, Tensor):
            alone = self.features[kind, name, 0, row]
            return given + alone if self.difference else alone.clone()
        kept = [self.features[kind, name, j, row] for j in range(len(given))]
        return type(given)(a + b if self.difference else b.clone() for a, b in zip(given, kept, strict=True))
