"""Every file the pack reads, mutated: one clear sentence or a use that is right; no code runs, nothing is written, and no
memory is taken beyond the file's own size.

A short run here; `python dev.py test tests/test_hostile_files.py --fuzz 10000 -s` is the long one, and counts.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import hostile
import npnets
from pack.kernels.fitted_sampler import FittedRun, solve
from pack.kernels.noise_space import NoiseMaps, sample_replay
from pack.kernels.propagation import Reuse
from pack.kernels.schedules import check_sigmas
from pack.kernels.space import NoiseSpace
from pack.models.calibration import KINDS, Calibration, CondLevels, KeySteps, Point, ShortRun, conditioning_map
from pack.models.calibration_set import sample_path, samples_in, save_samples
from pack.models.demo import VOCABULARY_KEY, pack_vocabulary, unpack_vocabulary
from pack.models.full_precision import full_weights
from pack.models.noise_maps import InvertedPicture, load_maps, maps_in_words, save_maps
from pack.models.noise_pairs import Job, Shard, load_shard, read_jobs, rows, save_shard, shard_path
from pack.models.npnet_files import load_npnet, read_config, save_npnet
from pack.models.one_more_step import (
    architecture_of,
    latent_space_of,
    prediction_of,
    read_header,
    read_leak,
    save_module,
)
from pack.models.profile_format import read_profile, spell_profile
from pack.models.store import load_profile, load_tensors, save_profile, update_profile
from pack.models.train_npnet import NPNetTraining, Pairs, Recipe
from pack.models.train_one_more_step import ModuleTraining
from pack.models.training import Training
from pack.nodes._plan.installed import about
from pack.training.published_pairs import published_pairs

ROOT = Path(__file__).resolve().parents[1]
SPARE = 48 << 20  # bytes of address space that a reader may take beyond eight times its file
SMALL = replace(npnets.TINY, tokens=77, width=4)


# --- the files, and what is done with one that is accepted ---


def kinds() -> list[Calibration]:
    """One calibration of each kind, with every field that the kind can have."""
    knots = CondLevels("euler", (512, 512), (0.5, 2.0, 9.0), (0.4, 1.8, 8.0))
    levels = (14.0, 5.0, 1.0, 0.0)
    made = Calibration(
        "mine", "by hand", "ve", ("SD15",), (512, 512), levels, "a test", solver="euler", prediction="eps", cfg=7.0,
        config_hash="ab", weights_hash="cd", patches="ef", alignments=(knots,), metrics={"gain": 0.1},
        provenance={"seed": 3},
    )  # fmt: skip
    reuse = lambda fresh, cut: KeySteps(12, "euler", levels, (Point(Reuse(fresh, cut, True), (0, 2), 1.4, 30.0),))
    rows = ((), (), (0.1, -0.2, 0.3))
    point = Point(Reuse(0, 1), (0, 1), 2.0, 40.0, (1,), rows, (0.0, 0.2, 0.0))
    forecasts = KeySteps(1, "euler", levels, (point,))
    tolerant = KeySteps(1, "euler", levels, (Point(Reuse(0, 1), (0,), 1.0, 50.0),))
    flow = tuple(CondLevels("", (n, n), (0.2, 0.8), (0.21, 0.82)) for n in (512, 768))
    numbers = ((-0.1, 0.2), (0.1, 0.1, 0.4))
    short = ShortRun(FittedRun((levels[0], levels[1], levels[-1]), numbers, (0.1, 0.2)), 44.0, 2)
    return [
        made,
        replace(made, kind="noise_shift", space="flow", families=("SD3",), sigmas=(), alignments=flow),
        replace(made, kind="encoder_propagation", key_steps=reuse(2, 3)),
        replace(made, kind="block_propagation", key_steps=reuse(1, 3)),
        replace(made, kind="step_forecast", alignments=(), key_steps=forecasts),
        replace(made, kind="fitted_sampler", alignments=(), setting="0" * 16, runs=(short,)),
        replace(made, kind="attention_levels", method="split", alignments=(), key_steps=tolerant),
    ]


def test_every_kind_of_profile_is_among_those_that_are_mutated():
    assert {one.kind for one in kinds()} == set(KINDS)
    assert [read_profile("it", spell_profile(one)) for one in kinds()] == kinds()


def use_profile(path: Path) -> None:
    got = load_profile(path)
    assert about(got)
    with hostile.unwatched():
        again = save_profile(got, path.parent / "again", "again")
        assert load_profile(again) == got
        again.unlink()
    if got.sigmas:
        check_sigmas(torch.tensor(got.sigmas, dtype=torch.float64))
    for point in got.key_steps.points if got.kind == "step_forecast" else ():
        assert len(point.weights) == len(point.errors) == got.steps and set(point.one_sided) <= set(point.keys)
    for one in got.runs:
        x = solve(lambda x, sigma: 0.5 * x, torch.ones(1, 1, 2, 2, dtype=torch.float64), one.run)
        assert x.isfinite().all() and one.run.history <= 4
    for one in got.alignments:
        assert torch.isfinite(conditioning_map(got, one)(torch.linspace(0, 1, 20))).all()


def use_npnet(path: Path) -> None:
    listed, said = None, ""
    try:
        listed, _ = read_config(path)
    except ValueError as refusal:
        said = str(refusal)
    assert listed is not None or (path.name in said and len(said) < 1000 and "\n" not in said), said
    net = load_npnet(path).net
    assert listed == net.config  # what loads is listed as it is
    c = net.config
    assert all(weight.dtype == torch.float32 and not weight.is_meta for weight in net.parameters())
    if c.side <= 32 and c.text_size <= 4096 and all(bool(weight.isfinite().all()) for weight in net.parameters()):
        out = net(torch.randn(1, c.channels, c.side, c.side), torch.randn(1, c.text_size))
        assert out.shape == (1, c.channels, c.side, c.side)


def use_module(path: Path) -> None:
    header = read_header(path)
    found = architecture_of(header)
    assert latent_space_of(header, found.context_dim) and prediction_of(header) in ("v", "x0")
    leak = read_leak(header)
    if leak is not None:
        assert all(bool(part.isfinite().all()) for part in (leak.mean, leak.root, leak.rest))


def shard() -> Shard:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 4, 4, 4, generator=generator)
    jobs = tuple(Job(f"prompt {i % 20}", i) for i in range(40))
    tokens, pooled = torch.randn(20, 2, 6, generator=generator), torch.randn(20, 3, generator=generator)
    return Shard(noise, 1.1 * noise, torch.arange(40) % 20, tokens, pooled, jobs, {"weak_cfg": 1.0})


def use_shard(path: Path) -> None:
    got = load_shard(path)
    held = {job.prompt for job in got.jobs[::3]}
    assert len(got.jobs) == len(got.noise) == len(rows(got, held, True)) + len(rows(got, held, False))
    assert read_jobs(path) == (got.jobs, got.facts)
    assert (
        bool(got.tokens[got.which].isfinite().all())
        and min(got.noise.shape) > 0
        and all(isinstance(name, str) for name in got.facts)
    )


def inverted(again: bool = False) -> InvertedPicture:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 1, 4, 8, 8, generator=generator).half() for n in (6, 5)]
    picture, sigmas = torch.randn(1, 4, 8, 8, generator=generator), torch.linspace(9, 0, 7).double()
    maps = NoiseMaps(sigmas, *parts, 0.1 * picture, picture, 1.0, NoiseSpace("ve"))
    return InvertedPicture(maps, picture, {"family": "SD15", "cfg": "3.5", "seed": str(int(again))})


def use_maps(path: Path) -> None:
    """Whatever is accepted can be described and replayed."""
    got = load_maps(path)
    assert maps_in_words(got) and all(isinstance(value, str) for value in got.facts.values())
    state = got.maps.states[0].to(got.maps.picture)
    for *_, x in sample_replay(lambda x, sigma: 0.5 * x, got.maps, state):
        assert x.shape == got.maps.picture.shape


RECIPE = Recipe(epochs=1, batch_size=40, size="small", text_mode="flat")


def npnet_training(folder: Path, **more) -> NPNetTraining:
    return NPNetTraining(Pairs.scan([shard_path(folder, 0)]), replace(RECIPE, **more))


def make_state(folder: Path) -> Path:
    """A training, and the pairs that it belongs to."""
    save_shard(shard_path(folder, 0), shard())
    list(npnet_training(folder).run(folder / "good.safetensors"))
    return folder / "good.safetensors"


def use_state(path: Path) -> None:
    use_training(npnet_training(path.parent), path)


def use_training(training: Training, path: Path) -> None:
    """Of a state that is not this training's nothing is used."""
    fresh = {name: value.clone() for name, value in training.network.state_dict().items()}
    try:
        training.resume(path)
    except ValueError:
        assert training.step == 0 and not training.optimizer.state_dict()["state"]
        assert all(torch.equal(value, fresh[name]) for name, value in training.network.state_dict().items())
        raise
    assert 0 <= training.step <= training.steps
    assert all(bool(value.isfinite().all()) for value in training.result().state_dict().values())


def module_training() -> ModuleTraining:
    draw = lambda generator: (torch.ones(2, 3), torch.ones(2, 3))
    return ModuleTraining(Told(3, 3), draw, {"seed": 0}, 10)


class Told(nn.Linear):
    def forward(self, x, cond):
        return super().forward(x + cond)


def use_unfinished(path: Path) -> None:
    use_training(module_training(), path)


COLLECTED = {"family": "SD15", "weights": "ab", "spacing": "uniform"}


def use_samples(path: Path) -> None:
    assert 0 <= samples_in(path.parent, COLLECTED) < 2**53


WANTED = {"time_embed.0.weight": (8, 4), "out.2.bias": (4,)}


def use_full_precision(path: Path) -> None:
    """A weight whose numbers are no numbers is used as it is, as the host would."""
    for name, weight in full_weights(path, WANTED).items():
        assert tuple(weight.shape) == WANTED[name] and weight.dtype in (torch.float16, torch.bfloat16, torch.float32)


def use_vocabulary(path: Path) -> None:
    held, _ = load_tensors(path)
    if VOCABULARY_KEY not in held:
        raise ValueError(f"{path.name} has no vocabulary")
    try:
        words = unpack_vocabulary(held[VOCABULARY_KEY])
    except ValueError as error:
        if "The checkpoint's vocabulary" not in str(error):
            raise AssertionError(error) from error
        raise ValueError(f"{path.name}: {error}") from error
    assert len(words) == len(set(words)) >= 3 and all(words)


def make_profile(folder: Path) -> Path:
    return save_profile(kinds()[0], folder, "good")


def hostile_profile(rng: random.Random, content: bytes) -> bytes:
    """A mutation of a calibration of any kind, which has more to change than the one in `content`."""
    made = rng.choice(kinds())
    return hostile.hostile_json(rng, json.dumps(spell_profile(made)).encode())


def make_npnet(folder: Path) -> Path:
    return save_npnet(npnets.seeded(SMALL), folder / "good.safetensors", {"pairs": 3})


def make_pth(folder: Path) -> Path:
    torch.save(npnets.layouts(npnets.seeded(SMALL))["official"], folder / "good.pth")
    return folder / "good.pth"


def make_module(folder: Path) -> Path:
    """The demo's module with an eighth of its widths."""
    with safe_open(ROOT / "models/one_more_step/attune_demo.safetensors", framework="pt") as file:
        small = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = {**file.metadata(), "oms.head_dim": "4"}
    for name, tensor in small.items():
        if not name.startswith("signal_leak.") and name not in ("conv_in.weight", "conv_out.bias"):
            sides = [max(n // 8, 1) if n >= 32 else n for n in tensor.shape]
            small[name] = tensor[tuple(slice(side) for side in sides)].contiguous()
    small["conv_in.weight"] = small["conv_in.weight"][:4].contiguous()
    save_file(small, folder / "good.safetensors", facts)
    return folder / "good.safetensors"


def make_shard(folder: Path) -> Path:
    save_shard(folder / "good.safetensors", shard())
    return folder / "good.safetensors"


def make_maps(folder: Path) -> Path:
    return save_maps(folder / "good.safetensors", inverted())


def make_unfinished(folder: Path) -> Path:
    torch.manual_seed(0)
    steps = module_training().run(folder / "good.safetensors")
    next(steps)
    return folder / "good.safetensors"


def make_samples(folder: Path) -> Path:
    path = sample_path(folder, "good")
    save_samples(path, {"x": torch.zeros(2, 4, 4, 4).half(), "sigma": torch.ones(2)}, COLLECTED)
    return path


def make_full_precision(folder: Path) -> Path:
    tensors = {f"model.diffusion_model.{name}": torch.ones(shape) for name, shape in WANTED.items()}
    save_file({**tensors, "vae.other": torch.ones(3)}, folder / "good.safetensors", {"format": "pt"})
    return folder / "good.safetensors"


def make_vocabulary(folder: Path) -> Path:
    packed = pack_vocabulary(["<start>", "<end>", "<unknown>", "cat"])
    save_file({VOCABULARY_KEY: packed, "other": torch.ones(3)}, folder / "good.safetensors")
    return folder / "good.safetensors"


LINE = {"index": 7, "seed": 8, "caption": "a cat", "original_score_list": [0.1], "optimized_score_list": [0.2]}


def make_lines(folder: Path) -> Path:
    make_npz(folder)
    return folder / "lines.jsonl"


def make_npz(folder: Path) -> Path:
    np.savez(folder / "7_8.npz", np.ones((1, 4, 4, 4), "float32"), np.zeros((1, 4, 4, 4), "float32"))
    (folder / "lines.jsonl").write_text(json.dumps(LINE))
    return folder / "7_8.npz"


def use_published(path: Path) -> None:
    """Lines that tell of no pair we want are passed over."""
    for job, noise, golden in published_pairs(path.parent):
        assert isinstance(job.prompt, str) and noise.shape == golden.shape and noise.ndim == 4
        assert bool(noise.isfinite().all()) and bool(golden.isfinite().all())


@dataclass(frozen=True)
class Reader:
    """A good file, how it is mutated, its use, whether its name counts, and how much of all cases it gets."""

    make: Callable[[Path], Path]
    use: Callable[[Path], None]
    mutate: Callable = hostile.hostile_safetensors
    named: bool = False
    share: float = 0.05


READERS = {
    "profile": Reader(make_profile, use_profile, hostile_profile, share=0.4),
    "noise maps": Reader(make_maps, use_maps),
    "NPNet": Reader(make_npnet, use_npnet),
    "NPNet, .pth": Reader(make_pth, use_npnet, hostile.hostile_pickle),
    "One More Step": Reader(make_module, use_module),
    "noise pairs": Reader(make_shard, use_shard),
    "published pairs, lines": Reader(make_lines, use_published, hostile.hostile_json, named=True),
    "published pairs, arrays": Reader(make_npz, use_published, hostile.hostile_npz, named=True),
    "NPNet training": Reader(make_state, use_state),
    "One More Step training": Reader(make_unfinished, use_unfinished),
    "vocabulary": Reader(make_vocabulary, use_vocabulary),
    "calibration samples": Reader(make_samples, use_samples, named=True),
    "full precision": Reader(make_full_precision, use_full_precision),
}


def test_the_cases_are_shared_out():
    assert sum(reader.share for reader in READERS.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_refused_in_a_sentence_or_used_rightly(tmp_path, fuzz, name):
    reader, canary, cases = READERS[name], tmp_path / "canary", math.ceil(fuzz * READERS[name].share)
    good = reader.make(tmp_path)
    content = good.read_bytes()
    path = good if reader.named else tmp_path / f"hostile{good.suffix}"
    accepted, slowest = 0, 0.0
    path.write_bytes(content)
    reader.use(path)  # also imports what is imported at the first use
    for i in range(cases):
        rng = random.Random(f"{name} {i}")
        mutated = (
            reader.mutate(rng, content, canary) if good.suffix in (".pth", ".npz") else reader.mutate(rng, content)
        )
        path.write_bytes(mutated)
        began = time.perf_counter()
        try:
            with hostile.watched(8 * len(mutated) + SPARE):
                reader.use(path)
            accepted += 1
        except ValueError as refusal:
            said = str(refusal)
            assert path.name in said and len(said) < 1000 and "\n" not in said and "allocate" not in said, (i, said)
        except BaseException as error:
            raise AssertionError(f"case {i} of {name}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.perf_counter() - began)
        assert not canary.exists(), i
    print(f"\n{name}: {cases} files, {cases - accepted} refused, {accepted} used, the slowest in {slowest:.2f} s")
    assert accepted < cases


# --- saving ---


def saved_profile(folder: Path, again: bool) -> Path:
    one, two = kinds()[0], replace(kinds()[0], cfg=1.0)
    return update_profile(folder / "x.json", one, two) if again else save_profile(one, folder, "x")


def saved_npnet(folder: Path, again: bool) -> Path:
    return save_npnet(npnets.seeded(SMALL), folder / "x.safetensors", {"again": again})


def saved_module(folder: Path, again: bool) -> Path:
    save_module(folder / "x.safetensors", {"conv_in.weight": torch.full((2, 4, 3, 3), again)}, None, {})
    return folder / "x.safetensors"


def saved_pairs(folder: Path, again: bool) -> Path:
    save_shard(folder / "x.safetensors", replace(shard(), facts={"again": again}))
    return folder / "x.safetensors"


def saved_state(folder: Path, again: bool) -> Path:
    if not again:
        save_shard(shard_path(folder.parent, 0), shard())
    npnet_training(folder.parent, seed=int(again)).save(folder / "x.safetensors")
    return folder / "x.safetensors"


def saved_maps(folder: Path, again: bool) -> Path:
    return save_maps(folder / "x.safetensors", inverted(again))


WRITERS = [saved_profile, saved_npnet, saved_module, saved_pairs, saved_state, saved_maps]


@pytest.mark.parametrize("fails", ["open", "fsync", "replace"])
@pytest.mark.parametrize("save", WRITERS)
def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, save, fails):
    folder = tmp_path / "files"
    folder.mkdir()
    path = save(folder, False)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if fails == "open":
        monkeypatch.setattr("pack.models.store.save_file", full)
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(f"os.{fails}", full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, True)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]
    assert save(folder, True) == path and path.read_bytes() != before and list(folder.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be copied")
@pytest.mark.parametrize("when", ["fsync", "replace"])
@pytest.mark.parametrize("save", WRITERS)
def test_a_process_that_dies_while_it_saves_leaves_the_old_file(tmp_path, monkeypatch, save, when):
    folder = tmp_path / "files"
    folder.mkdir()
    path = save(folder, False)
    before = path.read_bytes()
    child = os.fork()
    if not child:
        try:
            setattr(os, when, lambda *_: os._exit(42))
            save(folder, True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 42
    assert path.read_bytes() == before
    assert [file.suffix for file in folder.iterdir() if file != path] == [".part"]  # which no loader lists


@pytest.mark.skipif(os.name == "nt", reason="other permissions")
@pytest.mark.parametrize("save", WRITERS)
def test_files_have_the_permissions_that_the_user_gives_to_new_ones(tmp_path, save):
    (tmp_path / "files").mkdir()
    (tmp_path / "plain").touch()
    assert save(tmp_path / "files", False).stat().st_mode == (tmp_path / "plain").stat().st_mode
