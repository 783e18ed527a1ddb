"""The edges of what can be asked of a sampler, in a table: the right result or the right sentence, for every method.

Where the stock graph gives a picture, so do we, of the same shape and type and finite where its own is; off, it is the
stock one to the bit. Where the stock graph fails, ours fails in the same words, or with a sentence of its own before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from graphs import SIDE, Kit
from methods import EVERY_DAY, METHODS
from nightly import daily

Draw = Callable[[Kit, Callable], Tensor]
FROM_NOISE = ("one more step", "signal leak", "golden noise", "re-denoise")  # they change the noise of a run
REUSE = ("encoder propagation", "top level fresh", "block propagation")  # they need some steps
ASKED_LESS = ("one-sided steps", "forecasts")  # they need some steps between others, on levels that they know
TOLD = ("aligned timesteps", "aligned timesteps, flow", "noise shift")  # they tell the network another noise level
ONE_SIDED = ("one-sided steps",)  # asks both where it cannot tell what the negative would say
ALL = tuple(METHODS)


@dataclass(frozen=True)
class Edge:
    """same: methods that rightly change nothing. refused: method -> part of its sentence. like: another graph, and the
    rms distance of its result from the first latents of this one's."""

    draw: Draw
    same: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    like: tuple[Draw, float] | None = None


def ksampler(**changed) -> Draw:
    """KSampler with other inputs; a function gets the kit."""

    def draw(kit: Kit, node: Callable) -> Tensor:
        given = {name: value(kit) if callable(value) else value for name, value in changed.items()}
        return kit.ksampler(node(kit.model), **given)

    return draw


def levels(*shares: float) -> Draw:
    """SamplerCustom over these noise levels, in units of the model's highest."""

    def draw(kit: Kit, node: Callable) -> Tensor:
        top = float(kit.model.get_model_object("model_sampling").sigma_max)
        return kit.host.call(
            "SamplerCustom", model=node(kit.model), add_noise=True, noise_seed=3, cfg=3.0, positive=kit.positive,
            negative=kit.negative, sampler=kit.host.call("KSamplerSelect", sampler_name="euler")[0],
            sigmas=torch.tensor([top * share for share in shares]), latent_image=kit.empty(),
        )[0]["samples"]  # fmt: skip

    return draw


def empty(*shape: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[Kit], dict]:
    return lambda kit: {"samples": torch.zeros(batch, kit.channels, *shape, dtype=dtype)}


def picture(change: Callable[[Tensor], Tensor]) -> Callable[[Kit], dict]:
    return lambda kit: {"samples": change(kit.picture()["samples"])}


def two_parts(kit: Kit) -> dict:
    """A latent of two tensors, as of a video with sound, which the host packs into one."""
    import comfy.nested_tensor

    return {"samples": comfy.nested_tensor.NestedTensor([kit.empty()["samples"]] * 2)}


SHORT = ("aligned timesteps, flow", "noise shift")  # a run of one step has no level between their knots
NO_PICTURES = dict.fromkeys(("one more step", "signal leak"), "latents of pictures")
TOO_SMALL = dict.fromkeys(("one more step", "signal leak"), "has no 3 frequencies: use larger latents")
NO_TEXT = {"golden noise": "reads the prompt of the run, but there is none"}
NO_NEGATIVE = {"re-denoise": "no negative conditioning"}
EDGES = {
    "1 step": Edge(ksampler(steps=1), (*REUSE, *ASKED_LESS, *SHORT)),
    "denoise 0": Edge(ksampler(denoise=0.0, latent_image=Kit.picture), ALL),
    "denoise 0.001": Edge(
        ksampler(steps=1, denoise=1e-3, latent_image=Kit.picture),
        (*REUSE, *ASKED_LESS, *FROM_NOISE, "aligned timesteps", "aligned timesteps, flow"),
    ),
    "no noise level": Edge(levels(), ALL),
    "one noise level": Edge(levels(1.0), ALL),
    "sigma 0 alone": Edge(levels(0.0), ALL),
    "sigma 0 to 0": Edge(levels(0.0, 0.0), ALL),
    "a level twice": Edge(levels(1.0, 1.0, 0.0), (*REUSE, *ASKED_LESS, *SHORT)),
    "rising levels": Edge(levels(0.5, 1.0, 0.0), (*REUSE, *ASKED_LESS, "noise shift")),
    "above the model's levels": Edge(levels(2.0, 1.0, 0.5, 0.0), (*REUSE, *ASKED_LESS, "noise shift")),
    "ends before 0": Edge(levels(1.0, 0.5), (*REUSE, *ASKED_LESS, *SHORT)),
    "1 x 1 latent pixels": Edge(ksampler(latent_image=empty(1, 1)), ONE_SIDED, NO_PICTURES),
    "1 x 8 latent pixels": Edge(ksampler(latent_image=empty(1, 8)), refused=TOO_SMALL),
    "5 x 7 latent pixels": Edge(ksampler(latent_image=empty(5, 7))),
    "latents of a video": Edge(ksampler(latent_image=empty(1, SIDE, SIDE)), refused=NO_PICTURES),
    "latents of a video with sound": Edge(
        ksampler(latent_image=two_parts), refused={**NO_PICTURES, "golden noise": "but got a video with its sound"}
    ),
    "latents of another model": Edge(
        ksampler(latent_image=lambda kit: {"samples": torch.ones(1, 3, SIDE, SIDE)}),
        refused={**NO_PICTURES, "golden noise": "this model's latent has 3"},
    ),
    "no positive prompt": Edge(ksampler(positive=[]), ONE_SIDED, NO_TEXT),
    "no negative prompt": Edge(ksampler(negative=[]), ONE_SIDED, NO_NEGATIVE),
    "no prompt": Edge(ksampler(positive=[], negative=[]), (*TOLD, *REUSE, *ASKED_LESS), {**NO_TEXT, **NO_NEGATIVE}),
    "batch of 0": Edge(ksampler(latent_image=empty(SIDE, SIDE, batch=0))),
    "batch of 64": Edge(
        ksampler(latent_image=empty(4, 4, batch=64)), ONE_SIDED, like=(ksampler(latent_image=empty(4, 4)), 5e-3)
    ),
    "float16": Edge(ksampler(latent_image=empty(SIDE, SIDE, dtype=torch.float16)), like=(ksampler(), 0.3)),
    "bfloat16": Edge(ksampler(latent_image=empty(SIDE, SIDE, dtype=torch.bfloat16)), like=(ksampler(), 0.3)),
    "float16 picture": Edge(ksampler(latent_image=picture(Tensor.half), denoise=0.5), (*FROM_NOISE, "forecasts")),
    "cfg 0": Edge(ksampler(cfg=0.0)),
    "cfg -5": Edge(ksampler(cfg=-5.0), ONE_SIDED),
    "cfg 100": Edge(ksampler(cfg=100.0), ONE_SIDED),
    "cfg 1e30": Edge(ksampler(cfg=1e30), ALL),
    "a latent of NaN": Edge(ksampler(latent_image=picture(lambda x: x * math.nan), denoise=0.5), ALL),
}


@pytest.fixture(scope="module")
def kits(host):
    return {name: Kit(host, name) for name in ("unet", "flow")}


@pytest.fixture(scope="module")
def plain(kits):
    """The run that no edge may disturb."""
    return {name: kit.ksampler(kit.model) for name, kit in kits.items()}


def outcome(draw: Draw, kit: Kit, node: Callable) -> Tensor | str:
    """The result, or what the exception says."""
    try:
        return draw(kit, node)
    except Exception as error:  # noqa: BLE001 - of the stock graph, too
        return f"{type(error).__name__}: {error}"


def same(a: Tensor | str, b: Tensor | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str) and a == b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


EVERY = [(name, model) for name in EDGES for model in ("unet", "flow")]


@pytest.mark.parametrize(
    ("name", "model"), daily(EVERY, *(EVERY[2 * i + (i % 3 > 0)] for i in range(len(EDGES))), names=2)
)
def test_the_right_result_or_the_right_sentence(kits, plain, name, model, pytestconfig):
    """Each day every third method, in turn, and those that refuse; in the night all of them. Off, all together."""
    if name == "latents of a video with sound":
        pytest.importorskip("comfy.nested_tensor", reason="the host knows no latents of two tensors")
    kit, edge = kits[model], EDGES[name]
    methods = {label: method for label, method in METHODS.items() if method.model == model}
    stock = outcome(edge.draw, kit, lambda m: m)

    def all_idle(m):
        for method in methods.values():
            m = method.idle(kit)(m)
        return m

    assert same(outcome(edge.draw, kit, all_idle), stock)
    turn = list(EDGES).index(name) // 2
    for i, (label, method) in enumerate((label, method) for label, method in methods.items() if label in EVERY_DAY):
        if not pytestconfig.getoption("--all") and (i + turn) % 3 and label not in edge.refused:
            continue
        got = outcome(edge.draw, kit, method.on(kit))
        if label in edge.refused:
            assert isinstance(got, str) and got.startswith("ValueError") and edge.refused[label] in got, (label, got)
            assert torch.equal(kit.ksampler(kit.model), plain[model])
        elif isinstance(stock, str) or label in edge.same:
            assert same(got, stock), (label, got)
        else:
            assert isinstance(got, Tensor), (label, got)
            assert got.shape == stock.shape and got.dtype == stock.dtype and not torch.equal(got, stock), label
            assert got.isfinite().all(), label
            if edge.like:
                other, distance = edge.like[0](kit, method.on(kit)), edge.like[1]
                assert float((got[: len(other)] - other).square().mean().sqrt()) < distance, label
    assert not isinstance(stock, str) or torch.equal(kit.ksampler(kit.model), plain[model])
