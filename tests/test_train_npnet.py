"""Pairs on disk and the trainer: known targets are learned, prompts matter, and a resumed training is the same one."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pack.models.noise_pairs import (
    Job,
    Shard,
    held_out,
    load_shard,
    part_of,
    plan,
    remaining,
    save_shard,
    shard_path,
    shard_paths,
)
from pack.models.npnet import decompose
from pack.models.npnet_files import load_npnet, save_npnet
from pack.models.train_npnet import NPNetTraining, Pairs, Recipe, Share, config_for, identity_npnet
from pack.training.published_pairs import published_pairs

SIDE, WIDTH = 8, 6
RECIPE = Recipe(epochs=4, batch_size=32, learning_rate=3e-3, size="small")
PROMPTS = [f"prompt {i}" for i in range(24)]


def shard(target, first: int = 0, count: int = 96) -> Shard:
    """Pairs whose golden noise is target(noise, tokens of their prompt)."""
    generator = torch.Generator().manual_seed(first)
    noise = torch.randn(count, 4, SIDE, SIDE, generator=generator)
    tokens = torch.randn(len(PROMPTS), 2, WIDTH, generator=torch.Generator().manual_seed(99))
    which = torch.arange(count) % len(PROMPTS)
    jobs = tuple(Job(PROMPTS[int(w)], first + i) for i, w in enumerate(which))
    noise = noise.half().float()
    return Shard(noise, target(noise, tokens[which]), which, tokens, None, jobs, {"weak": 1.0})


def stretched(noise, tokens):
    """The toy target: all singular values become 1.1 s + 0.5."""
    config = config_for(shard(lambda n, t: n, count=24), RECIPE)
    u, s, vh = decompose(noise, config)
    m = (u * (1.1 * s + 0.5)[:, None]) @ vh
    rows = m.split(SIDE, dim=1)
    return torch.cat([torch.stack(row.split(SIDE, dim=2), dim=1) for row in rows], dim=1)


def write(folder, target, shards: int = 2, count: int = 96):
    folder.mkdir(exist_ok=True)
    for i in range(shards):
        save_shard(shard_path(folder, i), shard(target, 1000 * i, count))
    return shard_paths(folder)


def training_of(paths, recipe=RECIPE, **more) -> NPNetTraining:
    return NPNetTraining(Pairs.scan(paths), recipe, **more)


def trained(paths, state, recipe=RECIPE, **more) -> NPNetTraining:
    training = training_of(paths, recipe, **more)
    list(training.run(state))
    return training


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> NPNetTraining:
    """A training that ran to its end, on the pairs that `write` writes."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(write(folder / "pairs", stretched), folder / "state")


def test_an_untrained_network_is_the_identity_and_its_error_the_noises_own(tmp_path):
    start = training_of(write(tmp_path, stretched))
    assert start._measure() == pytest.approx(start.pairs.error, rel=1e-4)
    assert start.explained == 0 and start.best_epoch == 0


def test_a_known_change_of_the_singular_values_is_learned(tmp_path):
    paths = write(tmp_path, stretched, shards=2, count=120)
    assert trained(paths, tmp_path / "state", replace(RECIPE, epochs=6)).explained > 0.95


def test_each_sample_is_trained_with_its_own_prompt(tmp_path):
    training, pairs = training_of(write(tmp_path, stretched, shards=1)), shard(stretched)
    net = training.network
    with torch.no_grad():
        net.alpha.fill_(1.0)
        together = training._golden(pairs, torch.tensor([3, 40, 7]))
        for row, i in zip(together, (3, 40, 7), strict=True):
            own = net(pairs.noise[i][None], pairs.tokens[pairs.which[i]][None])[0]
            torch.testing.assert_close(row, own, rtol=0, atol=1e-2)  # the shard rounds prompts to float16
            other = net(pairs.noise[i][None], pairs.tokens[(pairs.which[i] + 1) % 24][None])[0]
            assert (row - other).abs().max() > 0.05


def test_a_resumed_training_is_the_same_to_the_bit(tmp_path, whole):
    paths, state = write(tmp_path / "pairs", stretched), tmp_path / "state.unfinished"
    run = training_of(paths).run(state)
    assert [next(run), next(run)] == [1, 2]
    run.close()
    second = training_of(paths)
    assert list(second.run(state)) == [3, 4]
    assert second.losses == whole.losses and second.best_epoch == whole.best_epoch
    for name, value in whole.result().state_dict().items():
        assert torch.equal(value, second.result().state_dict()[name])
    assert list(training_of(paths).run(state)) == []  # finished, though nobody has kept the result yet


def test_it_goes_on_with_the_same_pairs_alone(tmp_path):
    """The names of the files, and what they were made with, are no evidence."""
    paths, state = write(tmp_path / "pairs", stretched), tmp_path / "state.unfinished"
    next(training_of(paths).run(state))
    save_shard(paths[0], replace(load_shard(paths[0]), golden=load_shard(paths[0]).golden + 0.01))
    with pytest.raises(ValueError, match=r"an unfinished training with pairs \w+ \(now \w+\)\. Set that back"):
        next(training_of(paths).run(state))
    with pytest.raises(ValueError, match=r"learning_rate 0\.003 \(now 0\.001\)"):
        next(training_of(paths, replace(RECIPE, learning_rate=1e-3)).run(state))


def test_a_stop_is_heard_between_batches_and_loses_one_epoch_at_most(tmp_path, whole):
    paths, state, calls = write(tmp_path / "pairs", stretched), tmp_path / "state.unfinished", []

    def pause():
        calls.append(0)
        if len(calls) == 12:  # in the second epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(training_of(paths, pause=pause).run(state))
    second = training_of(paths)
    assert list(second.run(state)) == [2, 3, 4] and second.losses == whole.losses


def test_processes_that_share_a_training_take_the_steps_of_one(tmp_path):
    paths, recipe = write(tmp_path / "pairs", stretched), replace(RECIPE, epochs=2)
    alone = trained(paths, tmp_path / "alone", recipe)
    barrier, slots = threading.Barrier(3), {}

    def total(rank):
        def add(tensor):
            slots[rank] = tensor
            barrier.wait()
            found = slots[0] + slots[1] + slots[2]
            barrier.wait()
            return found

        return add

    trainings = [training_of(paths, recipe, share=Share(rank, 3, total(rank))) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: list(one.run(tmp_path / "shared", writes=one.share.rank == 0)), trainings))
    assert trainings[0].losses == trainings[1].losses == trainings[2].losses
    assert trainings[0].losses == pytest.approx(alone.losses, rel=1e-3)
    for name, value in alone.network.state_dict().items():
        assert torch.equal(trainings[0].network.state_dict()[name], trainings[2].network.state_dict()[name])
        torch.testing.assert_close(trainings[1].network.state_dict()[name], value, rtol=0, atol=2e-3)


def test_training_leaves_the_global_random_numbers_alone(tmp_path, monkeypatch):
    """Those of a GPU, too: torch.manual_seed would seed them all."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU's random state is moved"))
    paths, before = write(tmp_path, stretched), torch.get_rng_state()
    trained(paths, tmp_path / "state", replace(RECIPE, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trained_network_comes_back_from_its_file_with_its_report(tmp_path, whole):
    net = whole.result()
    path = save_npnet(net, tmp_path / "own.safetensors", {**whole.pairs.facts, **whole.report()})
    loaded = load_npnet(path)
    x, text = torch.randn(2, 4, SIDE, SIDE), torch.randn(2, 2, WIDTH)
    assert torch.equal(loaded.net(x, text), net(x, text)) and loaded.net.config == net.config
    assert float(loaded.facts["val_explained"]) > 0 and loaded.facts["pairs"] == "192" and loaded.facts["weak"] == "1.0"


def test_what_cannot_be_learned_is_not_saved(tmp_path):
    generator = torch.Generator().manual_seed(5)
    paths = write(tmp_path, lambda n, t: n + torch.randn(n.shape, generator=generator), shards=1)
    training = training_of(paths)
    training.losses = [2 * training.pairs.error]
    with pytest.raises(ValueError, match=r"would only do harm, and is not saved"):
        training.report()
    with pytest.raises(ValueError, match="there is nothing to learn"):
        training_of(write(tmp_path / "same", lambda n, t: n))


def test_too_few_prompts_are_said(tmp_path):
    one = shard(stretched)
    same = replace(one, jobs=tuple(Job(f"prompt {i % 19}", i) for i in range(len(one.jobs))))
    save_shard(shard_path(tmp_path, 0), same)
    with pytest.raises(ValueError, match=r"There are 19 different prompts, too few .*: give 20 or more"):
        training_of(shard_paths(tmp_path))


def test_shards_of_two_kinds_are_not_mixed(tmp_path):
    """Copied together from two machines: the first one's facts would have stood for both."""
    paths, one = write(tmp_path, stretched), shard(stretched)
    for other, what in (
        (replace(one, facts={"weak": 2.0}), r"weak 2\.0 \(now 1\.0\)"),
        (replace(one, noise=one.noise[:, :2], golden=one.golden[:, :2]), "latents, tokens and pooled vectors of"),
    ):
        save_shard(paths[1], other)
        with pytest.raises(ValueError, match=rf"pairs-00001\.safetensors and pairs-00000.* not of one kind: {what}"):
            training_of(paths)


def test_the_identity_of_the_published_size_starts_at_the_noise():
    config = config_for(shard(lambda n, t: n, count=24), replace(RECIPE, size="small", text_mode="mean"))
    net = identity_npnet(config, 0)
    x = torch.randn(2, 4, SIDE, SIDE)
    torch.testing.assert_close(net(x, torch.randn(2, WIDTH)), x, rtol=0, atol=1e-5 * float(x.abs().max()))
    assert config.signs == "canonical" and config.text == "mean"


def test_pooled_pairs_need_pooled_embeddings_and_square_latents():
    with pytest.raises(ValueError, match="no pooled embeddings"):
        config_for(shard(lambda n, t: n, count=24), replace(RECIPE, text_mode="pooled"))
    wide = shard(lambda n, t: n, count=24)
    with pytest.raises(ValueError, match="the pairs are 8 x 4"):
        config_for(replace(wide, noise=wide.noise[..., :4]), RECIPE)


def test_the_plan_gives_every_pair_a_seed_and_every_machine_its_shards():
    shards = plan(["a", "b", "c"], 2, 10, 4)
    assert [[job.seed for job in jobs] for jobs in shards] == [[10, 11, 12, 13], [14, 15]]
    assert [job.prompt for job in shards[0]] == ["a", "a", "b", "b"]
    assert sorted(part_of(7, "1/3") + part_of(7, "2/3") + part_of(7, "3/3")) == list(range(7))
    for bad in ("", "0/2", "3/2", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="'part' must be such as 1/1"):
            part_of(7, bad)


def test_what_is_there_is_not_made_again_and_other_settings_are_refused(tmp_path):
    one = shard(stretched)
    save_shard(shard_path(tmp_path, 0), one)
    shards = [list(one.jobs), [Job("x", 1)]]
    assert remaining(tmp_path, shards, "1/1", {"weak": 1.0}) == [1]
    for facts, jobs in (({"weak": 2.0}, shards), ({"weak": 1.0}, [[Job("y", 2)]])):
        with pytest.raises(ValueError, match="other prompts or settings"):
            remaining(tmp_path, jobs, "1/1", facts)


def test_a_shard_comes_back_and_a_broken_one_is_named(tmp_path):
    one, path = shard(stretched), shard_path(tmp_path, 0)
    save_shard(path, one)
    back = load_shard(path)
    assert torch.equal(back.noise, one.noise) and back.jobs == one.jobs and back.facts == one.facts
    whole = path.read_bytes()
    for content in (whole[:100], b"", b"{}" * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"pairs-00000.safetensors holds no noise pairs"):
            load_shard(path)
    save_file({"noise": torch.zeros(1)}, path, {"jobs": '[["a", 1]]', "facts": "{}"})
    with pytest.raises(ValueError, match="its tensors are"):
        load_shard(path)
    with pytest.raises(ValueError, match="no noise pairs in"):
        shard_paths(tmp_path / "none")


def test_a_tenth_of_the_prompts_is_held_out_and_never_none():
    held = held_out([f"p{i}" for i in range(1000)])
    assert 70 < len(held) < 130
    for start in range(0, 1000, 20):  # by chance alone every eighth of these sets would have none
        prompts = [f"p{i}" for i in range(start, start + 20)]
        assert 1 <= len(held_out(prompts)) < 10 and held_out(prompts[::-1]) == held_out(prompts)


def publish(folder, lines, pairs):
    """A folder in the format of the NPNet authors."""
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", "utf-8")
    for (index, seed), (noise, golden) in pairs.items():
        np.savez(folder / f"{index}_{seed}.npz", noise, golden, np.array(index))


def line(index, seed, before, after):
    scores = {"original_score_list": [before, 9.0], "optimized_score_list": [after, 0.0]}
    return {"index": index, "seed": seed, "caption": f"picture {index}", **scores}


def test_published_pairs_are_those_that_scored_higher_and_exist(tmp_path):
    noise = np.random.default_rng(0).standard_normal((4, 1, 4, 8, 8)).astype(np.float16)
    lines = [line(0, 7, 0.2, 0.3), line(1, 8, 0.3, 0.2), line(2, 9, 0.1, 0.4), line(5, 10, 0.1, 0.1), line(6, 11, 1, 2)]
    publish(tmp_path, lines, {(0, 7): noise[:2], (1, 8): noise[1:3], (5, 10): noise[:2], (6, 11): noise[2:]})
    found = list(published_pairs(tmp_path))
    assert [job for job, _, _ in found] == [Job("picture 0", 7), Job("picture 6", 11)]
    assert torch.equal(found[1][1], torch.from_numpy(noise[2]).float())
    assert torch.equal(found[1][2], torch.from_numpy(noise[3]).float())


@pytest.mark.parametrize(
    "text", ["__import__('os').system('touch ran')", '{"index": 0}', "[" * 100000, '{"index": []}']
)
def test_a_published_line_is_never_evaluated(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"pairs\.jsonl holds a line that describes no pair"):
        list(published_pairs(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_damaged_published_pairs_are_named(tmp_path):
    with pytest.raises(ValueError, match="There are no published pairs in"):
        list(published_pairs(tmp_path))
    flat, nan = np.zeros((4, 8, 8)), np.full((1, 4, 8, 8), np.nan)
    for noise, golden in ((flat, flat), (nan, nan), (np.array([{}]), nan), (np.zeros((1, 4, 8, 8)), nan[:, :2])):
        publish(tmp_path, [line(0, 7, 0, 1)], {(0, 7): (noise, golden)})
        with pytest.raises(ValueError, match=r"0_7\.npz holds no pair of noises"):
            list(published_pairs(tmp_path))
    for content in (b"", b"PK\x03\x04 broken", (tmp_path / "0_7.npz").read_bytes()[:-30]):
        (tmp_path / "0_7.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"0_7\.npz holds no pair of noises"):
            list(published_pairs(tmp_path))
