"""Every method in every kind of graph. Each cell asserts the same five exact things:

off, the result is that of the graph without the node, bit for bit; on, it is another one, the same when it is repeated,
and the same through KSampler and SamplerCustomAdvanced; the global random state is where the stock graph leaves it; and
afterwards the stock graph gives the bits that it gave before.

Each run asks every kind once: each graph with one method, some with both models, and what a method rightly does
otherwise, each method with one other, one failure and each kind of solver. The other combinations are nightly.

docs/compatibility.md is what this file has passed:
`ATTUNE_WRITE=1 python dev.py test --all tests/host/test_compatibility.py` writes it.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

from graphs import GRAPHS, REPLAYED, Kit
from methods import EVERY_DAY, METHODS
from nightly import daily
from pack.kernels.fitted_sampler import fidelity

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/compatibility.md"


SAME = lambda model: model
RUN: set[tuple[str, str]] = set()  # (method, graph), of this process
PASSED: set[tuple[str, str]] = set()


@pytest.fixture(scope="module")
def kits(host):
    return {name: Kit(host, name) for name in ("unet", "flow")}


def drawn(graph: Callable, kit: Kit, node: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent, and the global random state that the run leaves."""
    torch.manual_seed(0)
    return graph(kit, node), torch.get_rng_state()


@pytest.fixture(scope="module")
def stock_of(kits):
    """The stock result of a graph and the random state that it leaves, drawn once for all methods."""
    return lru_cache(maxsize=None)(lambda model, name: drawn(GRAPHS[name], kits[model], SAME))


@pytest.fixture(scope="module")
def alone(kits):
    """What a method draws with KSampler, once for all tests."""

    def run(name: str) -> torch.Tensor:
        kit = kits[METHODS[name].model]
        return kit.ksampler(METHODS[name].on(kit)(kit.model))

    return lru_cache(maxsize=None)(run)


def asked_twice(model):
    """A clone with another pack's function that deep-copies the options it is given and evaluates once more."""
    import comfy.samplers

    def once_more(args):
        options = copy.deepcopy(args["model_options"])
        comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(once_more)
    return model


@pytest.mark.parametrize("method", daily(METHODS, *EVERY_DAY[::3]))
def test_another_pack_may_deep_copy_the_options_while_it_samples(kits, alone, method):
    kit = kits[METHODS[method].model]
    assert torch.equal(kit.ksampler(asked_twice(METHODS[method].on(kit)(kit.model))), alone(method))


def of_model(model: str) -> list[str]:
    """The methods of each day."""
    return [name for name in EVERY_DAY if METHODS[name].model == model]


def in_turn(model: str, kinds: Iterable) -> set[tuple]:
    """(method, kind) with every kind and every method at least once."""
    methods, kinds = of_model(model), list(kinds)
    return {(methods[i % len(methods)], kinds[i % len(kinds)]) for i in range(max(len(methods), len(kinds)))}


# Where conditions are evaluated apart, features of one must not serve another; where a start is no pure noise, a method of
# the first state has to know.
TELLING = {
    "encoder propagation": ("areas", "prompts in turn", "LoRA schedule on one prompt", "ControlNet"),
    "block propagation": ("areas", "ControlNet", "context windows"),
    "one more step": ("KSampler (Advanced), two stages", "inpaint mask", "batch_index", "areas"),
    "golden noise": ("batch_index", "prompts in turn"),
    "attention by sigma": ("KSampler",),
    "precision guard": ("fp8 weights",),
    "calibration set": ("KSampler",),
    "training noise": ("KSampler",),
    "noise shift": ("torch.compile",),
}
BOTH = ("ControlNet", "LoRA", "areas", "inpaint mask", "context windows")  # where the two models' networks differ
ENTRIES = [(method, name) for method in METHODS for name in GRAPHS]
LEARNS = "fitted sampler"  # no MODEL -> MODEL node: a SAMPLER that is learned in one run and makes the next
TEACHES_NOTHING = {"inpaint mask": "A short run may be used there, but none is learned from a run with a mask."}
CELLS = [*ENTRIES, *((LEARNS, name) for name in GRAPHS)]
LEARNED = ("inpaint mask", "ControlNet", "LoRA hook on one prompt")
ODD = {*[*GRAPHS][::2]}
EACH_DAY = [name for name in GRAPHS if name != "torch.compile"]  # with propagation: test_propagation_transformer.py
OTHERWISE = list({  # a method for each sentence that says why it changes nothing there, or refuses
    why: (label, name)
    for label, method in METHODS.items()
    for name, why in [*(method.where or {}).items(), *(method.refused or {}).items()]
}.values())  # fmt: skip
ASKED = {
    *in_turn("unet", [name for name in EACH_DAY if name in BOTH or name in ODD]),
    *in_turn("flow", [name for name in EACH_DAY if name in BOTH or name not in ODD]),
    *OTHERWISE,
    *((method, name) for method, names in TELLING.items() for name in names),
    *((LEARNS, name) for name in LEARNED),
}  # fmt: skip


@pytest.mark.parametrize(("method", "name"), daily(ENTRIES, *ASKED, names=2))
def test_the_method_in_the_graph(kits, stock_of, method, name):
    RUN.add((method, name))
    chosen, graph = METHODS[method], GRAPHS[name]
    kit = kits[chosen.model]
    stock, state = stock_of(chosen.model, name)
    assert stock.isfinite().all()
    if name in (chosen.refused or {}):
        with pytest.raises(ValueError, match=chosen.refused[name]):
            graph(kit, chosen.on(kit))
        assert torch.equal(drawn(graph, kit, chosen.idle(kit))[0], stock)
        PASSED.add((method, name))
        return
    ours, ours_state = drawn(graph, kit, chosen.on(kit))
    assert ours.isfinite().all() and torch.equal(ours, stock) == bool(chosen.same(name))
    assert torch.equal(ours_state, state)
    assert torch.equal(drawn(graph, kit, chosen.on(kit))[0], ours)
    assert torch.equal(drawn(graph, kit, chosen.idle(kit))[0], stock)  # and nothing was left behind
    PASSED.add((method, name))


@pytest.mark.parametrize("name", daily(GRAPHS, *LEARNED))
def test_the_first_run_of_a_graph_is_stocks_and_the_next_is_near_it(kits, host, monkeypatch, name):
    """Every run's sampler is taken for Attune Fast Sampler's, whatever node of the graph runs it."""
    import comfy.samplers

    RUN.add((LEARNS, name))
    fast, plan, said = host.module("nodes._host.fitted_sampler"), host.module("nodes._plan.fitted_sampler"), []
    draw = lambda: GRAPHS[name](kits["unet"], SAME)
    stock, same = draw(), comfy.samplers.CFGGuider.sample

    def learning(self, noise, latent_image, sampler, *args, **kwargs):
        wish = plan.Wish(evaluations=4, fidelity=1.0)
        return same(self, noise, latent_image, fast.FastSampler(sampler, wish, say=said.append), *args, **kwargs)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", learning)
    assert torch.equal(draw(), stock) and all(text.startswith("A full run") for text in said)
    assert any("Learned" in text for text in said) != (name in TEACHES_NOTHING), said
    runs, second = len(said), draw()
    if name not in TEACHES_NOTHING:
        assert all(text.startswith("The short run") for text in said[runs:]), said[runs:]
        assert fidelity(second, stock) > 15
    monkeypatch.undo()
    assert torch.equal(draw(), stock)
    PASSED.add((LEARNS, name))


@pytest.mark.parametrize("method", daily(METHODS, *EVERY_DAY[1::3]))
def test_every_sampler_node_gives_the_same_bits(kits, alone, method):
    kit = kits[METHODS[method].model]
    for name in ("SamplerCustom", "SamplerCustomAdvanced, CFGGuider"):
        assert torch.equal(GRAPHS[name](kit, METHODS[method].on(kit)), alone(method))


def samplers() -> list[str]:
    """The stock samplers of the host under test."""
    source = (
        (Path(os.environ["COMFYUI_PATH"]) / "comfy/samplers.py").read_text("utf-8")
        if "COMFYUI_PATH" in os.environ
        else ""
    )
    names: list[str] = []
    for list_name in ("KSAMPLER_NAMES", "SAMPLER_NAMES"):
        body = source.partition(f"\n{list_name} = ")[2]
        names += [part.strip(" \n\"'") for part in body.partition("[")[2].partition("]")[0].split(",") if part.strip()]
    return list(dict.fromkeys(names))


# One of each kind: one evaluation a step, two, several steps back, noise, both, steps of its own choice.
SOLVERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "uni_pc", "dpm_adaptive", "lcm")  # fmt: skip


RUNS = [(model, sampler) for model in ("unet", "flow") for sampler in samplers() or SOLVERS]
DAILY = [
    ("unet" if sampler in ("euler", "dpmpp_2m_sde") else "flow", sampler) for sampler in SOLVERS
]  # each with one of the models, mostly with the one that takes less time


@pytest.mark.parametrize(("model", "sampler"), daily(RUNS, *DAILY, names=2))
def test_every_stock_sampler(kits, model, sampler):
    """All methods of the model at once. Off: the stock bits. On: the same bits twice, and then the stock bits."""
    kit, methods = kits[model], [method for method in METHODS.values() if method.model == model]
    run = lambda *nodes: kit.ksampler(_chain(nodes)(kit.model), sampler)
    on = [method.on(kit) for method in methods]
    stock, ours = run(), run(*on)
    assert ours.isfinite().all() and not torch.equal(ours, stock) and torch.equal(run(*on), ours)
    assert torch.equal(run(*(method.idle(kit) for method in methods)), stock)


PAIRS = [(a, b) for a, b in combinations(METHODS, 2) if METHODS[a].model == METHODS[b].model]


PAIRED = [pair for model in ("unet", "flow") for pair in zip(of_model(model)[::2], of_model(model)[1::2], strict=False)]
IN_ONE_PLACE = [(a, b) for a, b in PAIRS if not METHODS[a].beside(METHODS[b])]


@pytest.mark.parametrize(("a", "b"), daily(PAIRS, *PAIRED, *IN_ONE_PLACE, names=2), ids=lambda name: name)
def test_two_methods_together(kits, alone, a, b):
    """An idle method beside another changes nothing, in both orders. Both on, the order does not matter, or the later counts."""
    first, second = METHODS[a], METHODS[b]
    kit = kits[first.model]
    run = lambda *nodes: kit.ksampler(_chain(nodes)(kit.model))
    for name, method, other in ((a, first, second), (b, second, first)):
        if method.beside(other):
            assert torch.equal(run(method.on(kit), other.idle(kit)), alone(name))
            assert torch.equal(run(other.idle(kit), method.on(kit)), alone(name))
    together = run(first.on(kit), second.on(kit))
    assert together.isfinite().all()
    if first.beside(second):
        assert torch.equal(run(second.on(kit), first.on(kit)), together)
        assert torch.equal(together, alone(a)) == bool(second.same("KSampler"))
        assert torch.equal(together, alone(b)) == bool(first.same("KSampler"))
    else:
        assert torch.equal(together, alone(b))


def _chain(nodes) -> Callable:
    def put(model):
        for node in nodes:
            model = node(model)
        return model

    return put


FAILURES = ["interrupt", "error", "out of memory"]
FAILED = in_turn("unet", FAILURES) | in_turn("flow", FAILURES)


@pytest.mark.parametrize(("method", "failure"), daily([(m, f) for m in METHODS for f in FAILURES], *FAILED, names=2))
def test_a_run_that_ends_at_any_evaluation_leaves_nothing(kits, stock_of, alone, method, failure, pytestconfig):
    """The next run with the node is undisturbed, the next without it is stock, and no tensor stays alive.

    Each day at the first, a middle and the last evaluation.
    """
    import comfy.model_management as management
    from comfy.patcher_extension import WrappersMP

    chosen = METHODS[method]
    kit = kits[chosen.model]
    stock, ours = stock_of(chosen.model, "KSampler")[0], alone(method)
    raised = {
        "interrupt": management.InterruptProcessingException, "error": ZeroDivisionError,
        "out of memory": management.OOM_EXCEPTION,
    }[failure]  # fmt: skip
    stops = range(chosen.asks) if pytestconfig.getoption("--all") else (0, chosen.asks // 2, chosen.asks - 1)
    with new_tensors() as count:
        for stop in stops:
            calls: list[int] = []

            def fail(executor, *args, calls=calls, stop=stop, **kwargs):
                calls.append(1)
                if len(calls) > stop:
                    raise raised
                return executor(*args, **kwargs)

            model = chosen.on(kit)(kit.model).clone()
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.fail", fail)
            with pytest.raises(raised):
                kit.ksampler(model)
            assert len(calls) == stop + 1
            del model
        assert count() == 0
    assert torch.equal(kit.ksampler(chosen.on(kit)(kit.model)), ours)
    assert torch.equal(kit.ksampler(kit.model), stock)


@pytest.mark.parametrize("method", daily(METHODS, of_model("unet")[1], of_model("flow")[0]))
def test_models_may_be_unloaded_in_between_and_may_find_no_room(kits, stock_of, alone, method, monkeypatch):
    """Whichever load of a run fails, and whatever was unloaded: the next runs are undisturbed, with the node and without."""
    import comfy.model_management as management

    chosen = METHODS[method]
    kit = kits[chosen.model]
    stock, ours = stock_of(chosen.model, "KSampler")[0], alone(method)
    load, loads = management.load_models_gpu, []

    def crowded(*args, room, **kwargs):
        loads.append(1)
        if len(loads) > room:
            raise management.OOM_EXCEPTION
        return load(*args, **kwargs)

    for room in range(9):
        loads.clear()
        with monkeypatch.context() as crowd:
            crowd.setattr(management, "load_models_gpu", lambda *args, room=room, **kw: crowded(*args, room=room, **kw))
            with suppress(management.OOM_EXCEPTION):
                assert torch.equal(kit.ksampler(chosen.on(kit)(kit.model)), ours)
        management.unload_all_models()
        assert torch.equal(kit.ksampler(chosen.on(kit)(kit.model)), ours)
        management.unload_all_models()
        assert torch.equal(kit.ksampler(kit.model), stock)
        if len(loads) <= room:  # there was room for all
            break
    assert 1 <= room < 8


@contextmanager
def new_tensors() -> Iterator[Callable[[], int]]:
    """How many tensors made in the block are alive. What was there before is set aside, until the file of tests ends."""
    gc.collect()
    gc.freeze()

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    yield count


# --- the page ---


def table(passed: set[tuple[str, str]]) -> str:
    """docs/compatibility.md: a row per graph, a column per method."""
    lines = [f"| graph | {' | '.join([*METHODS, LEARNS])} |", f"|---{'|---' * (len(METHODS) + 1)}|"]
    notes: list[str] = []
    for name in GRAPHS:
        cells = []
        for label, method in METHODS.items():
            if (label, name) not in passed:
                cells.append("✗")
                continue
            sentence = (method.refused or {}).get(name)
            reason = f"Refused before the first step: “… {sentence} …”." if sentence else method.same(name)
            if reason and reason not in notes:
                notes.append(reason)
            said = "refused" if sentence else "same as without"
            cells.append(f"{said} [{notes.index(reason) + 1}]" if reason else "✓")
        idle = TEACHES_NOTHING.get(name)
        if idle and idle not in notes:
            notes.append(idle)
        mark = f"same as without [{notes.index(idle) + 1}]" if idle else "✓"
        cells.append(mark if (LEARNS, name) in passed else "✗")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    order = lambda a, b: "any" if METHODS[a].beside(METHODS[b]) else "the later counts"
    pairs = [f"| {a} | {b} | {order(a, b)} |" for a, b in PAIRS]
    return "\n".join([
        "# Compatibility", "",
        "Generated from `tests/host/test_compatibility.py` when it passes; never edited by hand.", "",
        "✓ means five exact things, in the real host on a demo model: with the method off the result is that of the graph",
        "without the node, bit for bit; with it on, the result differs, and repeats itself bit for bit; the global random",
        "state is untouched; and afterwards the stock graph gives the same bits as before.", "",
        f"In the last column, *{LEARNS}*, ✓ means: with Attune Fast Sampler in the sampler's place the first run gives the",
        "stock bits and is learned, the second is short and near it, and afterwards the stock graph gives its bits.", "",
        *lines, "", *(f"[{i}] {note}" for i, note in enumerate(notes, 1)), *([""] if notes else []),
        "With each stock sampler: off, the stock bits; on, the same bits twice; then the stock bits again. A run that is",
        "interrupted, fails or runs out of memory at any evaluation leaves no tensor and no trace. What happens at the",
        "edges, with damaged files, on other versions of ComfyUI and in long runs: [robustness](robustness.md).",
        "", "## Two methods on one model", "",
        "In both orders: an idle one changes nothing beside the other, and the order of two matters only where said.",
        "", "| | | order |", "|---|---|---|", *pairs, "",
        "## Attune Invert and Attune Replay", "",
        "✓: in that graph, on both demo models, a picture that is inverted and replayed comes back within 1e-5, and the stock",
        "graph gives the same bits as before (`tests/host/test_noise_space.py`).", "",
        "| graph | the picture comes back |", "|---|---|", *(f"| {name} | ✓ |" for name in REPLAYED),
        "| inpaint mask | ✓ outside of the mask; inside, the prompt counts. Refused by Attune Invert: “… has a noise mask …” |",
        "| video latents (5-D), sound | ✓ |",
        *(f"| behind {name} | ✓ |" for name in METHODS),
        "| another size, schedule or checkpoint | refused before the first step |", "",
    ])  # fmt: skip


def test_the_page_says_what_is_tested():
    """A run with --all asks every cell of it, any other at least one of each row and of each column."""
    if os.environ.get("ATTUNE_WRITE"):
        assert set(CELLS) == PASSED, "The page is written by a run of this whole file, with --all."
        PAGE.write_text(table(PASSED), "utf-8")
    assert set(CELLS) >= ASKED and RUN == PASSED
    assert {method for method, _ in ASKED} == {*METHODS, LEARNS} and {name for _, name in ASKED} == set(GRAPHS)
    assert PAGE.read_text("utf-8") == table(set(CELLS))
