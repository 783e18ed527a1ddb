"""From prompts to a network inside the host: collected pairs are what the redenoise node makes, and resume."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pack.models.noise_pairs import load_shard, shard_paths

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "\n".join(f"a {word} on a {colour} background" for word in ("cat", "star", "apple", "heart", "panda", "tree") for colour in ("black", "white", "green", "blue"))  # fmt: skip


@pytest.fixture(scope="module")
def given(demo, encode):
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    return {
        "model": demo[0], "clip": demo[1], "prompts": PROMPTS, "negative": encode(""), "latent_image": latent, "seed": 100,
        "seeds_per_prompt": 2, "strong_cfg": 4.0, "shard_size": 20,
    }  # fmt: skip


QUICK = {"epochs": 6, "batch_size": 16, "size": "small"}


def pairs_of(host, name):
    return host.folders / "output" / "attune_pairs" / name


def collect(host, given, name, **more):
    return host.call("AttuneTrainNPNet", name=name, **QUICK, **{**given, **more})


@pytest.fixture(scope="module")
def made(host, given):
    """Collected and trained in one call."""
    npnet, said = collect(host, given, "test")
    return npnet, said, shard_paths(pairs_of(host, "test"))


@pytest.fixture
def no_calls(host, monkeypatch):
    """The model must not be called."""
    monkeypatch.setattr(
        host.module("nodes._host.noise_pairs"), "_golden", lambda *_: pytest.fail("the model was called")
    )


def test_a_pair_is_what_the_redenoise_node_starts_from(host, demo, encode, made):
    shard, seen = load_shard(made[2][1]), []

    def see(executor, guider, sigmas, extra_args, callback, noise, *args):
        seen.append(noise.clone())
        return executor(guider, sigmas, extra_args, callback, noise, *args)

    model, _ = host.call("AttuneRedenoise", model=demo[0], strong_cfg=4.0)
    model = model.clone()
    model.add_wrapper_with_key("sampler_sample", "zzz", see)
    job = shard.jobs[5]
    assert job.seed == 125 and job.prompt == PROMPTS.splitlines()[12]
    host.call(
        "KSampler", model=model, seed=job.seed, steps=1, cfg=4.0, sampler_name="euler", scheduler="simple",
        positive=encode(job.prompt), negative=encode(""), latent_image={"samples": torch.zeros(1, 4, 8, 8)}, denoise=1.0,
    )  # fmt: skip
    torch.testing.assert_close(shard.golden[5:6], seen[0], rtol=0, atol=4e-3)  # float16
    (noise,) = host.call("RandomNoise", noise_seed=job.seed)
    drawn = noise.generate_noise({"samples": torch.zeros(1, 4, 8, 8)})
    torch.testing.assert_close(shard.noise[5:6], drawn, rtol=0, atol=2e-3)


def test_a_trained_network_is_used_at_once_and_listed(host, demo, encode, made):
    npnet, said, paths = made
    assert len(paths) == 3 and sum(len(load_shard(path).jobs) for path in paths) == 48
    assert "val_explained: 0." in said and "strong_cfg: 4.0" in said and "base_model: AttuneDemo" in said
    (loaded, info) = host.call("AttuneLoadNPNet", npnet_name="test.safetensors")
    assert info == said
    (noise,) = host.call("RandomNoise", noise_seed=1)
    latent, positive = {"samples": torch.zeros(1, 4, 8, 8)}, encode("a cat on a black background")
    patched = [host.call("AttuneGoldenNoiseModel", model=demo[0], npnet=n)[0] for n in (npnet, loaded)]
    starts = [
        host.call("AttuneNoise", noise=noise, model=m, sigmas=torch.tensor([14.6, 0.0]), positive=positive)[0]
        .generate_noise(latent)
        for m in patched
    ]  # fmt: skip
    assert torch.equal(*starts) and not torch.equal(starts[0], noise.generate_noise(latent))


def test_a_finished_network_is_returned_and_another_training_takes_no_file_away(
    host, given, made, no_calls, monkeypatch
):
    """After a restart, when nothing is cached; also from the pairs alone, without the model."""
    file = host.folders / "models" / "npnet" / "test.safetensors"
    before = file.read_bytes()
    train_npnet = host.module("nodes.train_npnet")
    with monkeypatch.context() as patch:
        patch.setattr(train_npnet.NPNetTraining, "learn", lambda self: pytest.fail("trained again"))
        assert collect(host, given, "test")[1] == made[1]
        assert host.call("AttuneTrainNPNet", name="test", seed=100, **QUICK)[1] == made[1]
    _, said = host.call("AttuneTrainNPNet", name="test", seed=101, **QUICK | {"epochs": 2})
    assert said.startswith("test (2).safetensors: ") and file.read_bytes() == before
    assert not list(file.parent.glob("*.unfinished"))
    _, said = host.call("AttuneTrainNPNet", name="second", pairs="test", seed=100, **QUICK | {"epochs": 2})
    assert said.startswith("second.safetensors: ")


def test_collecting_again_adds_what_is_missing_to_the_bit(host, given, made):
    path = made[2][1]
    before = load_shard(path)
    path.unlink()
    collect(host, given, "test")
    again = load_shard(path)
    assert torch.equal(again.golden, before.golden) and torch.equal(again.tokens, before.tokens)
    assert (again.jobs, again.facts) == (before.jobs, before.facts)


def test_a_stop_while_collecting_loses_one_batch_at_most(host, given, made, monkeypatch):
    noise_pairs, calls = host.module("nodes._host.noise_pairs"), []
    plain = noise_pairs._golden

    def golden(source, encoded, noise):
        calls.append(len(noise))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(source, encoded, noise)

    with monkeypatch.context() as patch:
        patch.setattr(noise_pairs, "_golden", golden)
        with pytest.raises(KeyboardInterrupt):
            collect(host, given, "stopped")
        assert [path.name for path in pairs_of(host, "stopped").iterdir()] == ["pairs-00000.unfinished"]
        with pytest.raises(
            ValueError, match=r"pairs-00000\.unfinished was made with other .*: strong_cfg 4\.0 \(now 3\.0"
        ):
            collect(host, given, "stopped", strong_cfg=3.0)
        assert collect(host, given, "stopped")[1].count("val_explained") == 1
    assert calls == [8, 8, 4, 4, 8, 8, 4, 8]
    for path in made[2]:
        assert torch.equal(load_shard(pairs_of(host, "stopped") / path.name).golden, load_shard(path).golden)
    assert len(list(pairs_of(host, "stopped").iterdir())) == 3


def test_pairs_of_other_settings_or_weights_are_not_mixed(host, given, made, no_calls):
    with pytest.raises(ValueError, match=r"other prompts or settings: strong_cfg 4\.0 \(now 3\.0\)\. Set that back"):
        collect(host, given, "test", strong_cfg=3.0)
    tuned = given["model"].clone()
    key = next(key for key in tuned.model.state_dict() if key.endswith("out.2.weight"))
    tuned.add_patches({key: (torch.ones_like(tuned.model.state_dict()[key]),)}, 0.1)
    with pytest.raises(ValueError, match=r"other prompts or settings: patches"):
        collect(host, given, "test", model=tuned)


def test_machines_share_the_work_and_only_collect(host, given):
    from comfy_execution.graph_utils import ExecutionBlocker

    npnet, said = collect(host, given, "parts", part="2/2")
    found = shard_paths(pairs_of(host, "parts"))
    assert [path.name for path in found] == ["pairs-00001.safetensors"]
    assert "20 new pairs of 24 prompts, 1 of 3 files" in said and isinstance(npnet, ExecutionBlocker)


def test_what_could_not_be_trained_on_is_said_before_the_model_is_called(host, given, no_calls, monkeypatch):
    latent = lambda *shape: {"samples": torch.zeros(1, 4, *shape)}
    for wrong, said in (
        ({"prompts": " \n"}, "'prompts' is empty: write one prompt a line"),
        ({"prompts": "\n".join(PROMPTS.splitlines()[:19] * 2)}, "There are 19 different prompts"),
        ({"latent_image": latent(16, 12)}, "'latent_image' is 16 x 12 latents, but an NPNet is square"),
        (
            {"prompts": PROMPTS + "\n" + "a long word " * 40},
            r"different numbers of tokens \(\d+, \d+\): shorten prompts such as 'a long",
        ),
        ({"text_mode": "pooled", "clip": Poolless(given["clip"])}, "no pooled embeddings"),
        ({"name": "///"}, "is no file name"),
        ({"part": "3/2"}, "'part' must be such as 1/1"),
        ({"clip": None}, "To collect pairs, connect 'clip', too"),
    ):
        with pytest.raises(ValueError, match=said):
            collect(host, given, **{"name": "none", **wrong})
    with pytest.raises(ValueError, match="no noise pairs in"):
        host.call("AttuneTrainNPNet", name="nothing here")
    (host.folders / "output" / "attune_pairs" / "occupied").write_text("")
    with pytest.raises(ValueError, match=r"Nothing can be written in .*occupied"):
        collect(host, given, "occupied")


class Poolless:
    """A text encoder without a pooled vector, as some are."""

    def __init__(self, clip):
        self.tokenize, self._clip = clip.tokenize, clip

    def encode_from_tokens_scheduled(self, tokens):
        return [[self._clip.encode_from_tokens_scheduled(tokens)[0][0], {}]]


def test_wrappers_of_ours_on_the_model_are_told_to_stand_aside(host, given, monkeypatch):
    """Pairs of a model that already starts from golden noise, or reuses features, would be pairs of something else."""
    fits, seen = host.module("nodes._host.calibrating"), []

    def outer_sample(executor, *args, **more):
        seen.append(fits.stands_aside(executor.class_obj.model_options, "attune.any"))
        return executor(*args, **more)

    model = given["model"].clone()
    model.add_wrapper_with_key("outer_sample", "attune.any", outer_sample)
    collect(host, given, "wrapped", part="2/2", model=model)
    assert seen == [True] * 3


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_collect_and_train_one_network_from_the_command_line(tmp_path, processes):
    """As `accelerate launch` starts two. That two share the steps of one: tests/test_train_npnet.py."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", f"{processes}"]
    launch = [sys.executable, *(several if processes > 1 else [])]
    words = ["--prompts", "24", "--seeds", "2", "--name", "shared", "--batch-size", "16", "--shard-size", "12"]
    words += ["--work", str(tmp_path)]
    done = subprocess.run(
        [*launch, str(ROOT / "training" / "train_npnet.py"), *words],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"{48 // processes} new pairs of 24 prompts") == processes
    assert "epochs: 6" in done.stdout and "pairs: 48" in done.stdout and done.stdout.count("val_explained") == 1
    assert (tmp_path / "models" / "npnet" / "shared.safetensors").exists()


def test_published_pairs_become_shards_that_the_trainer_reads(host, demo, tmp_path):
    published = importlib.import_module(f"{ROOT}.training.published_pairs")
    random = np.random.default_rng(0)
    lines = []
    for i in range(5):
        lines.append(f'{{"index": {i}, "seed": {7 + i}, "caption": "a cat", "original_score_list": [0.1], "optimized_score_list": [{0.0 if i == 2 else 0.2}]}}')  # fmt: skip
        np.savez(tmp_path / f"{i}_{7 + i}.npz", *random.standard_normal((2, 1, 4, 16, 16)).astype(np.float16), i)
    (tmp_path / "npd.jsonl").write_text("\n".join(lines))
    assert published.import_published(demo[1], tmp_path, tmp_path / "shards", 3) == 4
    first, second = map(load_shard, shard_paths(tmp_path / "shards"))
    assert [job.seed for job in (*first.jobs, *second.jobs)] == [7, 8, 10, 11]
    assert (
        second.noise.shape == (1, 4, 16, 16) and first.tokens.shape[0] == 1 and first.facts == {"source": tmp_path.name}
    )
    assert published.import_published(demo[1], tmp_path, tmp_path / "shards", 3) == 4  # nothing to do
    (tmp_path / "npd.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="was made with other prompts or settings"):
        published.import_published(demo[1], tmp_path, tmp_path / "shards", 3)
