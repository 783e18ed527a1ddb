"""The weights of a MODEL that a loader rounded, and full ones in their place for the runs of a clone."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_management import get_torch_device
from comfy.ops import fp8_ops
from comfy.patcher_extension import CallbacksMP
from comfy.utils import get_attr
from torch import Tensor
from torch.nn import Parameter

from ...kernels.precision import (
    MANTISSA,
    OTHER,
    OUTERMOST,
    TIME,
    MoreBits,
    outermost,
    relative_error,
    sensitive_part,
    time_embedding,
)
from ...models.full_precision import each_full_weight, full_weights
from .._plan.precision import BitsPutBack
from .folders import file_names
from .identity import network_of

NONE = "none"
FOLDERS = ("diffusion_models", "checkpoints")
LOW = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))
TIMES = 32  # of the training time, at which the embedding is compared
NETWORK = "diffusion_model."
KEY = "attune.precision"


@dataclass(frozen=True)
class Weight:
    """One weight of a network: its part of it, how it is kept, and whether a full one can be put in its place.

    layer: what computes with it.
    """

    name: str
    part: str
    value: Tensor
    scale: Tensor | None
    layer: Any = None

    @property
    def kept(self) -> str:
        """The type as the user knows it; of a tensor of another pack's or the host's own class the class's name."""
        plain = type(self.value) in (Parameter, Tensor)
        return str(self.value.dtype).removeprefix("torch.") if plain else type(self.value).__name__

    @property
    def low(self) -> bool:
        return type(self.value) in (Parameter, Tensor) and self.value.dtype in LOW

    @property
    def in_8_bits(self) -> bool:
        """Multiplied in 8 bits, too, as weight_dtype fp8_e4m3fn_fast has it: nothing finer reaches the product."""
        return isinstance(self.layer, fp8_ops.Linear)

    @property
    def takes_bits(self) -> bool:
        """Rounded, and unpacked by a layer of the host's that lets others add to what it unpacks."""
        own = self.name.endswith(".weight") and hasattr(self.layer, "weight_function")
        return self.low and own and self.value.dtype in MANTISSA and not self.in_8_bits

    @property
    def read_only(self) -> bool:
        """Packed in a class of its own: GGUF's, or one of the host's quantised layouts."""
        return type(self.value) not in (Parameter, Tensor)

    @property
    def unpacked(self) -> Tensor:
        """What the network computes with, float32 on the CPU."""
        value = self.value.detach().cpu().float()
        return value if self.scale is None else value * self.scale.detach().cpu().float()


def files() -> list[str]:
    """Files that may hold a network in full precision, as FOLDER/NAME."""
    return [
        f"{folder}/{name}" for folder in FOLDERS for name in file_names(folder)
        if name.lower().endswith((".safetensors", ".sft"))
    ]  # fmt: skip


def file_of(chosen: str) -> Path:
    """ValueError with what to do where the file is not there any more."""
    folder, _, name = str(chosen).partition("/")
    path = folder_paths.get_full_path(folder, name) if folder in FOLDERS else None
    if path is None:
        raise ValueError(
            f"There is no file '{chosen}'. Put it into models/{FOLDERS[0]} or models/{FOLDERS[1]}, press R to refresh, "
            "and choose it again in 'full_precision'."
        )
    return Path(path)


def weights_of(model: Any) -> list[Weight]:
    """All weights of a MODEL's network, in its order, without its LoRAs; those that a guard put in place count as they
    then are, those that another clone's runs left in place do not."""
    network, found = network_of(model), []
    parameters = dict(network.named_parameters())
    ends = outermost(list(parameters))
    for name, value in (parameters | _rounded_buffers(model, network)).items():
        if name.rpartition(".")[2].startswith("scale_"):
            continue
        parent = network.get_submodule(name.rpartition(".")[0])
        scale = getattr(parent, "scale_weight", None) if name.endswith(".weight") else None
        part = sensitive_part(name, value.ndim)
        part = OUTERMOST if part == OTHER and name in ends else part
        found.append(Weight(name, part, _own(model, NETWORK + name, value), scale, parent))
    return found


def _rounded_buffers(model: Any, network: Any) -> dict[str, Tensor]:
    """Of what a network keeps beside its parameters and reads from its file, as SD3 its embedding of places."""
    own = {name: _own(model, NETWORK + name, value) for name, value in network.named_buffers()}
    found = {name: value for name, value in own.items() if value.dtype in LOW}
    return {name: value for name, value in found.items() if name in network.state_dict()} if found else {}


def _own(model: Any, key: str, value: Tensor) -> Tensor:
    """What a MODEL itself has under a key, whatever a clone of it, or a LoRA, has put there since."""
    if key in model.object_patches:
        return model.object_patches[key]
    before_lora = model.backup.get(key)
    kept = value if before_lora is None else before_lora.weight
    return model.object_patches_backup.get(key, kept)


def read_full(chosen: str, weights: list[Weight]) -> dict[str, Tensor]:
    """The full weights by name, of those that are low."""
    return full_weights(file_of(chosen), {one.name: tuple(one.value.shape) for one in weights if one.low})


def is_dynamic(model: Any) -> bool:
    """Whether newer hosts' dynamic VRAM loads a MODEL: it keeps the weights of a network's earlier runs, in the types
    of its file, whatever another clone puts in their place."""
    return bool(getattr(model, "is_dynamic", bool)())


def not_dynamic(model: Any) -> Any:
    """A clone of MODEL on a network that is loaded once more without dynamic VRAM, as the host does for LoRA hooks."""
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ValueError(
            "Under dynamic VRAM the weights of this MODEL cannot be replaced, and the node that loads it cannot switch "
            "dynamic VRAM off. Load it with Load Checkpoint or Load Diffusion Model, or start ComfyUI with "
            "--disable-dynamic-vram."
        ) from error


def _guarded(model: Any) -> Any:
    """A clone of MODEL to put weights in, which each further network of it gets as its own."""
    clone = model.clone()
    clone.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _own_on_another_network)
    clone.patches_uuid = uuid.uuid4()  # else the host takes the weights for loaded where the network is
    return clone


def _own_on_another_network(model: Any, clone: Any) -> None:
    """ON_CLONE: newer hosts clone a MODEL onto a network of its own for each further GPU, with all patches, and move
    the weights of each network to its GPU."""
    if clone.model is model.model:
        return
    for key, kept in clone.object_patches.items():
        if isinstance(kept, Parameter):
            device = get_attr(clone.model, key).device
            clone.object_patches[key] = Parameter(kept.detach().to(device, copy=True), requires_grad=False)
    for key, added in clone.weight_wrapper_patches.items():
        own = [_PutBack(one.more) if isinstance(one, _PutBack) else one for one in added]
        clone.weight_wrapper_patches[key] = own


def with_full(model: Any, weights: list[Weight], full: Mapping[str, Tensor]) -> Any:
    """A clone of MODEL that runs with the full weights; what a LoRA adds to them stays."""
    clone = _guarded(model)
    for one in weights:
        if one.name in full:
            value = full[one.name] if one.scale is None else full[one.name].float() / one.scale.detach().cpu().float()
            _take_back(clone, NETWORK + one.name)
            kept = Parameter(value, requires_grad=False) if isinstance(one.value, Parameter) else value
            clone.add_object_patch(NETWORK + one.name, kept)
    return clone


class _PutBack:
    """More bits of a weight as the host's layers take them: they call it with the weight unpacked for their use, and
    the host moves it to the layers' device and back."""

    def __init__(self, more: MoreBits):
        self.more = more

    def __call__(self, weight: Tensor) -> Tensor:
        return weight if weight.dtype in LOW else self.more(weight)

    def move_to(self, device: torch.device) -> int:
        self.more = self.more.to(device)
        return self.more.size


def with_more_bits(model: Any, weights: list[Weight], chosen: str, bits: int) -> tuple[Any, BitsPutBack]:
    """A clone of MODEL whose rounded weights are made finer by bits of the full file's, and what that gives."""
    clone, device = _guarded(model), get_torch_device()
    by_name = {one.name: one for one in weights}
    count = size = 0
    before, after, exact = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for name, full in each_full_weight(file_of(chosen), {one.name: tuple(one.value.shape) for one in weights}):
        one, wanted = by_name[name], full.to(device).float()
        wanted = wanted if one.scale is None else wanted / one.scale.to(wanted)
        low = one.value.detach().to(device)
        more = MoreBits.of(low, wanted, bits)
        before += (low.float() - wanted).double().square().sum().cpu()
        after += (more(low.float()) - wanted).double().square().sum().cpu()
        exact += wanted.double().square().sum().cpu()
        _take_back(clone, NETWORK + name)
        clone.add_weight_wrapper(NETWORK + name, _PutBack(more.to(torch.device("cpu"))))
        count, size = count + 1, size + more.size
    errors = [float((error / exact).sqrt()) if count else 0.0 for error in (before, after)]
    return clone, BitsPutBack(bits, count, size / 1e6, *errors)


def _take_back(clone: Any, key: str) -> None:
    """What an earlier guard has put back to a weight of a clone."""
    others = [one for one in clone.weight_wrapper_patches.get(key, []) if not isinstance(one, _PutBack)]
    if key in clone.weight_wrapper_patches:
        clone.weight_wrapper_patches[key] = others


def embedding_error(model: Any, weights: list[Weight], full: Mapping[str, Tensor]) -> float | None:
    """How far the rounded weights move the time embedding over the model's timesteps, in parts of its size; None for a
    network whose embedding is no plain MLP."""
    layers = [one for one in weights if one.part == TIME and one.name.endswith(".weight") and one.value.ndim == 2]
    if len(layers) < 2 or layers[0].value.shape[0] != layers[1].value.shape[1]:
        return None
    by_name = {one.name: one for one in weights}

    def mlp(value_of) -> list[tuple[Tensor, Tensor | None]]:
        bias = lambda one: by_name.get(one.name.removesuffix("weight") + "bias")
        return [(value_of(one), None if bias(one) is None else value_of(bias(one))) for one in layers[:2]]

    times = _timesteps(model.get_model_object("model_sampling"))
    low, exact = mlp(lambda one: one.unpacked), mlp(lambda one: full.get(one.name, one.unpacked).float())
    return relative_error(time_embedding(times, low), time_embedding(times, exact))


def _timesteps(sampling: Any) -> Tensor:
    """Timesteps over the whole range, in thousandths where the model counts from 0 to 1."""
    places = [(i + 0.5) / TIMES for i in range(TIMES)]
    times = torch.stack(
        [
            torch.as_tensor(sampling.timestep(torch.tensor([float(sampling.percent_to_sigma(place))])))
            for place in places
        ]
    ).flatten()
    return times.float().cpu() * (1000 if float(times.max()) <= 1 else 1)


def rounding_error(weights: list[Weight], full: Mapping[str, Tensor]) -> float:
    """How far these weights are from the full ones, in parts of their size."""
    pairs = [(one.unpacked.flatten(), full[one.name].float().flatten()) for one in weights if one.name in full]
    return relative_error(torch.cat([low for low, _ in pairs]), torch.cat([exact for _, exact in pairs]))
