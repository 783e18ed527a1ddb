"""From prompts to a network inside the host: collected pairs are what the redenoise node makes, and resume."""

from __future__ import annotations

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
def given(host, demo, encode):
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    return {
        "model": demo[0], "clip": demo[1], "prompts": PROMPTS, "negative": encode(""), "latent_image": latent, "seed": 100,
        "seeds_per_prompt": 2, "strong_cfg": 4.0, "shard_size": 20,
    }  # fmt: skip


@pytest.fixture(scope="module")
def collected(host, given):
    name, said = host.call("AttuneCollectNoisePairs", name="test", **given)
    assert "48 new pairs of 24 prompts, 3 of 3 files" in said
    return shard_paths(host.folders / "output" / "attune_pairs" / name)


def test_a_pair_is_what_the_redenoise_node_starts_from(host, demo, encode, collected):
    shard, seen = load_shard(collected[1]), []

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
        positive=encode(job.prompt), negative=encode(""), latent_image={"samples": torch.zeros(1, 4, 16, 16)}, denoise=1.0,
    )  # fmt: skip
    torch.testing.assert_close(shard.golden[5:6], seen[0], rtol=0, atol=4e-3)  # float16
    (noise,) = host.call("RandomNoise", noise_seed=job.seed)
    drawn = noise.generate_noise({"samples": torch.zeros(1, 4, 16, 16)})
    torch.testing.assert_close(shard.noise[5:6], drawn, rtol=0, atol=2e-3)


def test_collecting_again_adds_what_is_missing_to_the_bit(host, given, collected):
    before = load_shard(collected[1])
    collected[1].unlink()
    _, said = host.call("AttuneCollectNoisePairs", name="test", **given)
    again = load_shard(collected[1])
    assert said.startswith("20 new pairs") and torch.equal(again.golden, before.golden)
    assert (again.jobs, again.facts) == (before.jobs, before.facts) and torch.equal(again.tokens, before.tokens)
    with pytest.raises(ValueError, match="other prompts or settings"):
        host.call("AttuneCollectNoisePairs", name="test", **{**given, "strong_cfg": 3.0})


def test_machines_share_the_work(host, given):
    host.call("AttuneCollectNoisePairs", name="parts", part="2/2", **given)
    found = shard_paths(host.folders / "output" / "attune_pairs" / "parts")
    assert [path.name for path in found] == ["pairs-00001.safetensors"]


def test_no_prompts_and_no_pairs_are_said(host, given):
    with pytest.raises(ValueError, match="'prompts' is empty: write one prompt a line"):
        host.call("AttuneCollectNoisePairs", name="none", **{**given, "prompts": " \n"})
    with pytest.raises(ValueError, match="no noise pairs in"):
        host.call("AttuneTrainNPNet", pairs="nothing here")


def test_a_trained_network_is_used_at_once_and_listed(host, demo, encode, collected):
    npnet, said = host.call(
        "AttuneTrainNPNet", pairs="test", name="mine", epochs=6, batch_size=16, learning_rate=3e-3, size="small"
    )
    _, again = host.call(
        "AttuneTrainNPNet", pairs="test", name="mine", epochs=6, batch_size=16, learning_rate=3e-3, size="small"
    )
    assert again == said  # finished already: nothing is trained
    assert "val_explained: 0." in said and "strong_cfg: 4.0" in said and "base_model: AttuneDemo" in said
    (loaded, info) = host.call("AttuneLoadNPNet", npnet_name="mine.safetensors")
    assert "val_explained" in info
    (noise,) = host.call("RandomNoise", noise_seed=1)
    latent, positive = {"samples": torch.zeros(1, 4, 16, 16)}, encode("a cat on a black background")
    patched = [host.call("AttuneGoldenNoiseModel", model=demo[0], npnet=n)[0] for n in (npnet, loaded)]
    made = [
        host.call("AttuneNoise", noise=noise, model=m, sigmas=torch.tensor([14.6, 0.0]), positive=positive)[0]
        .generate_noise(latent)
        for m in patched
    ]  # fmt: skip
    assert torch.equal(*made) and not torch.equal(made[0], noise.generate_noise(latent))


def test_two_processes_collect_and_train_one_network_from_the_command_line(tmp_path):
    """As `accelerate launch` starts them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["--prompts", "24", "--name", "shared", "--batch-size", "16", "--shard-size", "24", "--work", str(tmp_path)]
    done = subprocess.run(
        [*launch, str(ROOT / "training" / "train_npnet.py"), *words],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("48 new pairs of 24 prompts") == 2
    assert "epochs: 6" in done.stdout and "pairs: 96" in done.stdout and done.stdout.count("val_explained") == 1
    assert (tmp_path / "models" / "npnet" / "shared.safetensors").exists()


def test_published_pairs_become_shards_that_the_trainer_reads(host, demo, tmp_path):
    noise_pairs = host.module("nodes._host.noise_pairs")
    random = np.random.default_rng(0)
    lines = []
    for i in range(5):
        lines.append(f'{{"index": {i}, "seed": {7 + i}, "caption": "a cat", "original_score_list": [0.1], "optimized_score_list": [{0.0 if i == 2 else 0.2}]}}')  # fmt: skip
        np.savez(tmp_path / f"{i}_{7 + i}.npz", *random.standard_normal((2, 1, 4, 16, 16)).astype(np.float16), i)
    (tmp_path / "npd.jsonl").write_text("\n".join(lines))
    assert noise_pairs.import_published(demo[1], tmp_path, tmp_path / "shards", 3) == 4
    first, second = map(load_shard, shard_paths(tmp_path / "shards"))
    assert [job.seed for job in (*first.jobs, *second.jobs)] == [7, 8, 10, 11]
    assert (
        second.noise.shape == (1, 4, 16, 16) and first.tokens.shape[0] == 1 and first.facts == {"source": tmp_path.name}
    )
