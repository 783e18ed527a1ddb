"""Propagation on a small network of each kind that the host knows: it works, or says why not."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nightly import daily
from tiny_networks import TINY, drawn, network_class, tiny_network

PAGE = Path(__file__).resolve().parents[2] / "docs/networks.md"
STEPS = 20
KEYS = 12  # every second step and the last four
REFUSED = {"Stable_Cascade_C", "Stable_Cascade_B"}  # neither a UNet with skips nor a row of blocks of one kind
PAIRED = {"PixelDiTT2I", "PiD", "CogVideoX_T2V"}  # blocks that give the prompt too: seen in a MODEL's first whole step
WHOLE = {"HiDreamO1", "SeedVR2"}  # blocks that give what they do not take, or all rows in one
APART = {"MiniMaxH3"}  # each condition in a call of its own
DAILY = ("SD15", "Flux", "CosmosT2IPredict2", "HiDream", "Hunyuan3Dv2_1", "Stable_Cascade_C")  # one of each way


@dataclass
class Kind:
    """How propagation stands in for a network's blocks, and those that the steps in between pass over."""

    way: str
    blocks: int
    reused: list


@pytest.fixture(scope="module")
def propagate(host):
    def apply(model, **changed):
        inputs = {
            "mode": "uniform", "interval": 2, "speed": 1.5, "reuse": "automatic", "forecast": True, "keep_last": 4,
            "start_percent": 0.0, "end_percent": 1.0, "prior_noise": 0.0, "cache_dtype": "as computed",
            "cache_device": "as computed", "memory_limit": 0, "parallel": "auto", **changed,
        }  # fmt: skip
        return host.call("AttunePropagation", model=model, **inputs)[0]

    return apply


@pytest.fixture(scope="module")
def draw(host):
    return lambda family, model: drawn(host, family, model, STEPS)


def psnr(a, b):
    return float(-10 * ((a - b).square().mean() / b.abs().max() ** 2).log10())


def kind_of(model) -> Kind:
    from pack.nodes._host.propagation.transformer import SEATED, blocks_of
    from pack.nodes._host.propagation.unet import blocks_a_side, unet_of

    unet = unet_of(model)
    if unet is not None:
        return Kind("UNet features", blocks_a_side(unet), [unet.middle_block])
    blocks = blocks_of(model.model.diffusion_model)
    if len(blocks) < 2:
        return Kind("not", len(blocks), [])
    return Kind("block's forward" if (SEATED, 0) in blocks else "host's patch", len(blocks), [*blocks.values()][1:])


class Calls:
    """Counts the calls of the layers inside blocks: those of a block itself go on where a `forward` stands in."""

    def __init__(self, blocks: list):
        self.n = 0
        layers = [layer for block in blocks for layer in block.modules() if not [*layer.children()]]
        self.hooks = [layer.register_forward_hook(self._count) for layer in layers]

    def _count(self, *_):
        self.n += 1

    def taken(self) -> int:
        taken, self.n = self.n, 0
        return taken

    def close(self):
        for hook in self.hooks:
            hook.remove()


def asked(family, model, kind, propagate, draw, caplog) -> int:
    """How many steps ran in part, all that must hold of such a run asserted."""
    keys, stock = list(model.model.state_dict()), draw(family, model)
    assert torch.isfinite(stock).all() and stock.std() > 0
    calls = Calls(kind.reused)
    assert torch.equal(draw(family, propagate(model, interval=1)), stock)
    whole = calls.taken() / STEPS
    during, ours = [], propagate(model)
    if family in PAIRED:
        assert not torch.equal(draw(family, ours), stock) and calls.taken() == (KEYS + 1) * whole
    look = model.model.diffusion_model.register_forward_pre_hook(lambda *_: during.append([*model.model.state_dict()]))
    with caplog.at_level("INFO"):
        ours = draw(family, ours)
    look.remove()
    assert during and all(one == keys for one in during) and list(model.model.state_dict()) == keys
    said = re.search(r"ran whole (\d+) times \((\d+) of them .*in part (\d+) times, and (\d+) ", caplog.text)
    calls_a_step = 2 if family in APART else 1
    counted, missing, part, ready = (int(one) / calls_a_step for one in said.groups())
    assert (counted, missing, ready) == (KEYS, 0, 0) and f"; {KEYS} of {STEPS} steps are key steps" in caplog.text
    assert whole > 0 and calls.taken() == KEYS * whole
    calls.close()
    assert torch.isfinite(ours).all() and not torch.equal(ours, stock) and psnr(ours, stock) >= 20
    assert torch.equal(draw(family, model), stock)
    return int(part)


@pytest.mark.parametrize("family", daily(TINY, *DAILY))
def test_steps_run_in_part_or_a_sentence_says_why_not(family, host, propagate, draw, caplog):
    model = tiny_network(family)
    kind = kind_of(model)
    if family in REFUSED:
        network = type(model.model.diffusion_model).__name__
        with pytest.raises(ValueError, match=f"this MODEL is a {network}: connect another MODEL, or remove the node"):
            propagate(model)
        check_page(family, row(family, model, kind, 0))
        return
    if family in WHOLE:
        assert torch.equal(draw(family, propagate(model)), draw(family, model))
        assert "every step ran whole and nothing was saved" in caplog.text
        check_page(family, row(family, model, Kind("whole, and says so", kind.blocks, []), 0))
        return
    part = asked(family, model, kind, propagate, draw, caplog)
    assert part == STEPS - KEYS
    check_page(family, row(family, model, kind, part))


@pytest.mark.parametrize(
    ("family", "runs"), [("Flux", ()), ("HiDream", ("double_stream_blocks", "caption_projection"))]
)
def test_what_runs_on_every_step_is_in_the_costs(family, runs, host):
    from pack.kernels.propagation import Reuse
    from pack.nodes._host.propagation.transformer import blocks_of, costs_of

    network = tiny_network(family).model.diffusion_model
    blocks = [*blocks_of(network).values()]
    size = lambda *modules: sum(weight.numel() for module in modules for weight in module.parameters())
    always = [network.get_submodule(name) for name in runs]
    share = costs_of(network, blocks).of_step(Reuse(1, len(blocks), False))
    assert share == pytest.approx(size(*always, blocks[0]) / size(*always, *blocks))


@pytest.mark.parametrize("family", daily(["SD15", "Flux", "CosmosT2IPredict2"], "Flux"))
def test_a_network_that_another_pack_compiled_is_known_as_before(family, host, propagate, draw):
    """Some put torch.compile's module in the network's place; it passes for the network but by its class."""
    from pack.nodes._host.identity import identify

    model = tiny_network(family)
    compiled = model.clone()
    compiled.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    assert identify(compiled) == identify(model)
    with torch.compiler.set_stance("force_eager"):
        ours = draw(family, propagate(compiled))
        assert not torch.equal(draw(family, compiled), ours)
    assert torch.equal(ours, draw(family, propagate(model)))


# --- a network with two streams, of audio and video, as newer hosts have ---


class Pair(torch.nn.Module):
    """A block that moves both of a pair of tensors, and reads the prompt."""

    def __init__(self):
        super().__init__()
        self.video, self.audio = torch.nn.Linear(12, 12), torch.nn.Linear(8, 8)

    def forward(self, pair, prompt):
        video, audio = pair
        both = prompt.mean() + video.mean(dim=(1, 2))[:, None, None] + audio.mean(dim=(1, 2))[:, None, None]
        return video + self.video(video + both).tanh(), audio + self.audio(audio + both).tanh()


class Pairs(torch.nn.Module):
    """Offers its blocks as LTX-2 does: 'img' of a patch is the pair."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList([Pair() for _ in range(8)])

    def forward(self, x, timestep, context, transformer_options={}, **_):  # noqa: B006 - as the host's
        video, audio = x[:, :12].flatten(2).mT, x[:, 12:].reshape(len(x), 32, 8)
        pair, replaced = (video, audio + timestep[:, None, None]), transformer_options.get("patches_replace", {})
        for i, block in enumerate(self.transformer_blocks):
            given = {"img": pair, "v_context": context}
            if ("double_block", i) in replaced.get("dit", {}):
                original = {"original_block": lambda args, block=block: {"img": block(args["img"], args["v_context"])}}
                pair = replaced["dit"]["double_block", i](given, original)["img"]
            else:
                pair = block(pair, context)
        video, audio = pair
        return torch.cat([video.mT.reshape(len(x), 12, *x.shape[2:]), audio.reshape(len(x), 4, *x.shape[2:])], dim=1)


def test_a_pair_of_streams_is_reused_as_one_is(propagate, draw, caplog):
    model = tiny_network("Flux")
    torch.manual_seed(0)
    model.model.diffusion_model = Pairs().requires_grad_(False)
    kind = kind_of(model)
    assert (kind.way, kind.blocks) == ("host's patch", 8)
    assert asked("Flux", model, kind, propagate, draw, caplog) == STEPS - KEYS


class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, tokens):
        return tokens + self.inner(tokens).tanh()


class Windows(torch.nn.Module):
    """Runs its row of blocks for each window of the tokens, of which the last is the shortest, as MiniMax Music 3."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Step() for _ in range(8)])

    def forward(self, x, timestep, context, **_):
        tokens = x.flatten(2).mT + context.mean() + timestep[:, None, None]
        ends = []
        for window in tokens.split(24, dim=1):
            for block in self.blocks:
                window = block(window)
            ends.append(window)
        return torch.cat(ends, dim=1).mT.reshape(x.shape)


def test_a_row_that_runs_for_each_window_is_reused_window_by_window(propagate, draw, caplog):
    model = tiny_network("Flux")
    torch.manual_seed(0)
    model.model.diffusion_model = Windows().requires_grad_(False)
    assert asked("Flux", model, kind_of(model), propagate, draw, caplog) == STEPS - KEYS


class Both(torch.nn.Module):
    """A block that gives the picture and the prompt, and is offered to no patch."""

    def __init__(self):
        super().__init__()
        self.picture, self.prompt = torch.nn.Linear(16, 16), torch.nn.Linear(6, 6)

    def forward(self, tokens, prompt, time):
        both = (tokens.mean(dim=(1, 2)) + prompt.mean(dim=(1, 2)))[:, None, None] + time
        return tokens + self.picture(tokens + both).tanh(), prompt + self.prompt(prompt + both).tanh()


class Boths(torch.nn.Module):
    """Calls its blocks as CogVideoX does, by names."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.ModuleList([Both() for _ in range(8)])

    def forward(self, x, timestep, context, **_):
        tokens, prompt = x.flatten(2).mT, context[..., :6]
        for block in self.rows:
            tokens, prompt = block(tokens=tokens, prompt=prompt, time=timestep[:, None, None])
        return (tokens + prompt.mean()).mT.reshape(x.shape)


def test_a_block_that_gives_the_prompt_too_is_reused_once_that_was_seen(propagate, draw, caplog):
    model = tiny_network("Flux")
    torch.manual_seed(0)
    model.model.diffusion_model = Boths().requires_grad_(False)
    stock, ours, calls = draw("Flux", model), propagate(model), Calls([*model.model.diffusion_model.rows])
    with caplog.at_level("INFO"):
        first, second = draw("Flux", ours), draw("Flux", ours)
    runs = re.findall(r"ran whole (\d+) times \((\d+) of them .*in part (\d+) times", caplog.text)
    assert runs == [(f"{KEYS + 1}", "1", f"{STEPS - KEYS - 1}"), (f"{KEYS}", "0", f"{STEPS - KEYS}")]
    assert 0 < calls.taken() < 2 * 2 * 8 * STEPS
    assert all(not torch.equal(one, stock) and psnr(one, stock) >= 20 for one in (first, second))


# --- a network of which nothing can be reused, and what a run leaves behind ---


class Odd(torch.nn.Module):
    """Asks no patch, and its blocks give a pair for the one tensor that they take."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(4)])
        for block in self.blocks:
            block.forward = lambda x, block=block: (torch.nn.functional.linear(x, block.weight, block.bias).tanh(), x)

    def forward(self, x, timestep, context, **_):
        tokens = x.flatten(2).mT + context.mean() + timestep[:, None, None]
        for block in self.blocks:
            moved, came = block(tokens)
            tokens = came + moved
        return tokens.mT.reshape(x.shape)


def test_a_network_that_shows_nothing_to_reuse_runs_whole_and_the_user_is_told(propagate, draw, caplog):
    model = tiny_network("Flux")
    torch.manual_seed(0)
    model.model.diffusion_model = Odd().requires_grad_(False)
    stock = draw("Flux", model)
    assert torch.equal(draw("Flux", propagate(model)), stock)
    assert "every step ran whole and nothing was saved" in caplog.text


@pytest.mark.parametrize("call", [None, 1, 2])
def test_nothing_stands_in_for_a_block_once_a_run_has_ended(propagate, draw, call):
    """Ended by itself, or broken in a whole or in a shorter step."""
    from pack.nodes._host.propagation.transformer import SEATS

    model, calls = propagate(tiny_network("CosmosT2IPredict2")), []

    def broken(*_):
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError

    model.model.diffusion_model.final_layer.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError) if call else contextlib.nullcontext():
        draw("CosmosT2IPredict2", model)
    assert calls and model.model_options["transformer_options"][SEATS].patches == {}


# --- the page ---


def of_host() -> list[str]:
    import comfy.supported_models as supported

    return [one.__name__ for one in supported.models if getattr(supported, one.__name__, None) is one]


def relatives() -> dict[str, list[str]]:
    """Each family of the table, and those of the host that its network stands for, its children first."""
    import comfy.supported_models

    there = [family for family in TINY if hasattr(comfy.supported_models, family)]
    found: dict[str, list[str]] = {family: [] for family in there}
    networks = {family: network_class(family) for family in there}
    for family in set(of_host()) - set(there):
        parents = [one.__name__ for one in getattr(comfy.supported_models, family).__mro__ if one.__name__ in there]
        same = [one for one in [*parents, *there] if networks[one] is network_class(family)]
        if same:
            found[same[0]].append(family)
    return {family: sorted(others) for family, others in found.items()}


def row(family, model, kind, part) -> str:
    from pack.nodes._host.identity import identify
    from pack.nodes._plan.named_schedules import of_auto

    auto = of_auto(identify(model))
    maker = getattr(auto, "maker", None)
    runs = "the stock *simple*" if auto is None else f"{auto.name} by {maker}" if maker else auto.name
    names = ", ".join([f"**{family}**", *relatives()[family]])
    network = type(model.model.diffusion_model).__name__
    blocks = kind.blocks or "–"
    return f"| {names} | {network} | {TINY[family].makes} | {blocks} | {kind.way} | {part or '–'} | {runs} |"


HEAD = (
    "| families | network | makes | blocks in small | propagation | steps in part of 20 | auto |\n" + "|---" * 7 + "|"
)


def sections() -> dict[str, re.Match]:
    """The page's tables by the version of the host that they are of."""
    marks = r"(<!-- networks of ComfyUI (\S+): .*?-->\n\n)(.*?)(<!-- end -->)"
    return {one[2]: one for one in re.finditer(marks, PAGE.read_text("utf-8"), flags=re.S)}


def check_page(family: str, line: str):
    """The page is of some hosts, and a family in the table of the oldest that has it; others are not written down."""
    from pack.nodes._host import host_version

    tables = sections()
    written = tables.pop(host_version(), None)
    if written is None or any(f"**{family}**" in one[3] for one in tables.values()):
        return
    text = PAGE.read_text("utf-8")
    if os.environ.get("ATTUNE_WRITE"):
        lines = {re.match(r"\| \*\*(\w+)", one)[1]: one for one in written[3].splitlines() if one.startswith("| **")}
        lines[family] = line
        table = "\n".join([HEAD, *(lines[one] for one in TINY if one in lines)])
        said = f"{table}\n\nFamilies of which no network was built: {not_built()}.\n\n"
        text = text[: written.start()] + written[1] + said + written[4] + text[written.end() :]
        PAGE.write_text(text, "utf-8")
    assert line in text


def missing() -> list[str]:
    stood_for = {family for others in relatives().values() for family in others}
    return [family for family in of_host() if family not in stood_for | set(TINY)]


NOTHING_SAMPLED = "sees, and samples nothing"
NOT_BUILT = {
    "DepthAnything3": NOTHING_SAMPLED, "RT_DETR_v4": NOTHING_SAMPLED,
    "SAM3": NOTHING_SAMPLED, "SAM31": NOTHING_SAMPLED,
}  # fmt: skip


def not_built() -> str:
    return ", ".join(f"{family} ({NOT_BUILT[family]})" for family in missing()) or "none"


def test_each_family_of_the_host_has_its_network_in_the_table(host):
    """By the class of the network; a host of another version may know more, and this test says which."""
    from pack.nodes._host import host_version

    assert {*missing()} <= {*NOT_BUILT}
    assert len(of_host()) == len(missing()) + sum(1 + len(others) for others in relatives().values())
    written = sections().get(host_version())
    assert written is None or f"no network was built: {not_built()}.\n" in written[3]
