"""The one loop of all trainings: what it goes on with, what it returns instead of training, and where it writes."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pack.models.training import (
    MADE,
    Training,
    differences,
    digest,
    find_place,
    keep_result,
    outline,
    spelled,
)

MADE_OF = {"pictures": "ab12", "seed": 0, "learning_rate": 0.1, "texts": [0.5, -0.25]}


class Line(Training):
    """Learns y = 3 x from numbers that the seed and the step draw."""

    def __init__(self, steps: int = 6, rate: float = 0.1, **made):
        network = nn.Linear(1, 1)
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        super().__init__(network, MADE_OF | {"learning_rate": rate} | made, steps, rate)

    def learn(self):
        x = torch.rand(8, 1, generator=torch.Generator().manual_seed(self.step))
        self.optimizer.zero_grad()
        loss = (self.network(x) - 3 * x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.kept = {name: value.clone() for name, value in self.network.state_dict().items()}
        return loss.item()


def run(training, path, stop=None, **more):
    with contextlib.closing(training.run(path, **more)) as steps:
        for step in steps:
            if step == stop:
                break
    return training


def test_a_stopped_training_goes_on_to_the_bit_wherever_it_was_stopped(tmp_path):
    whole = run(Line(), tmp_path / "whole")
    for stop in range(1, 6):
        path = tmp_path / f"{stop}"
        assert run(Line(), path, stop, every=4).step == stop
        again = run(Line(), path, every=4)
        assert again.losses == whole.losses and len(again.losses) == 6
        assert all(torch.equal(again.kept[name], value) for name, value in whole.kept.items())
        assert again.optimizer.state[again.network.weight]["step"] == 6


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ({"pictures": "cd34"}, "pictures ab12 (now cd34)"),
        ({"seed": 1}, "seed 0 (now 1)"),
        ({"rate": 0.2}, "learning_rate 0.1 (now 0.2)"),
        ({"texts": [0.5, -0.3]}, "texts [0.5, -0.25] (now [0.5, -0.3])"),
        ({"size": "small"}, "size None (now small)"),
    ],
)
def test_it_goes_on_with_the_same_data_seed_and_settings_alone(tmp_path, made, named):
    run(Line(), tmp_path / "x.unfinished", stop=2)
    before = (tmp_path / "x.unfinished").read_bytes()
    other = Line(**made)
    with pytest.raises(ValueError, match=r"x\.unfinished is an unfinished training with .*Set that back") as refusal:
        run(other, tmp_path / "x.unfinished")
    assert named in str(refusal.value) and other.step == 0 and (tmp_path / "x.unfinished").read_bytes() == before


def test_encodings_of_another_device_are_the_same_and_of_another_encoder_are_not():
    texts = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))
    of = lambda x: {"texts": outline(x)}
    assert differences(of(texts), of(texts.half().float() * (1 + 1e-3 * torch.randn_like(texts)))) == ""
    assert differences(of(texts), of(torch.randn(2, 77, 768))) != ""
    assert len(outline(torch.zeros(3))) == 3


def test_everything_in_the_data_counts():
    x = torch.arange(6.0)
    known = [digest(x), digest(x.view(2, 3)), digest(x.half()), digest(x, "a"), digest("a", x), digest(x, "a", ""), digest(x + 1e-6)]  # fmt: skip
    assert len(set(known)) == len(known) and digest(x[::2]) == digest(x[::2].clone())


@pytest.mark.parametrize("part", ["losses", "updates", "network.weight", "kept.bias", "first.weight", "second.bias"])
def test_a_damaged_state_is_named_and_nothing_of_it_is_used(tmp_path, part):
    path = tmp_path / "x.unfinished"
    run(Line(), path, stop=3)
    good = load_file(path)
    wrong = [torch.full_like(good[part], -1), torch.full((7,), 1.0), torch.ones(()), None]
    if part != "updates":
        wrong.append(torch.full_like(good[part], torch.nan))
    for value in wrong if part != "losses" else wrong[1:]:
        if value is not None and value.shape == good[part].shape and value.isfinite().all() and part != "updates":
            continue  # other numbers: nothing tells that they are not those of the training
        held = {name: tensor for name, tensor in good.items() if name != part}
        save_file(held if value is None else held | {part: value}, path, {MADE: spelled(MADE_OF)})
        training = Line()
        with pytest.raises(ValueError, match=r"x\.unfinished is damaged: its numbers do not fit the network. Delete"):
            run(training, path)
        assert training.step == 0 and not training.network.weight.any()
    for content in (b"", path.read_bytes()[:40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.unfinished holds no unfinished training .*Delete it to begin anew"):
            run(Line(), path)


def test_a_training_that_does_not_converge_is_said_and_its_last_state_stays(tmp_path):
    training, path = Line(), tmp_path / "x.unfinished"
    steps = training.run(path)
    next(steps)
    before = path.read_bytes()
    training.network.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"no number after step 2: .*Lower 'learning_rate'"):
        next(steps)
    assert path.read_bytes() == before


def test_processes_that_share_a_training_read_its_state_and_do_not_write_it(tmp_path):
    run(Line(), tmp_path / "x", stop=2)
    before = (tmp_path / "x").read_bytes()
    assert run(Line(), tmp_path / "x", writes=False).step == 6 and (tmp_path / "x").read_bytes() == before


def test_a_finished_training_is_found_and_another_one_gets_a_number(tmp_path):
    def save(path, **made):
        assert not path.exists()
        save_file({"x": torch.ones(1)}, path, {MADE: spelled(MADE_OF | made)})

    assert find_place(tmp_path, "mine", MADE_OF) == (tmp_path / "mine.safetensors", False)
    save(tmp_path / "mine.safetensors")
    assert find_place(tmp_path, "mine.safetensors", MADE_OF) == (tmp_path / "mine.safetensors", True)
    assert find_place(tmp_path, "mine", MADE_OF | {"seed": 1}) == (tmp_path / "mine (2).safetensors", False)
    save(tmp_path / "mine (2).safetensors", seed=1)
    assert find_place(tmp_path, "mine", MADE_OF | {"seed": 1}) == (tmp_path / "mine (2).safetensors", True)
    (tmp_path / "mine.safetensors").write_bytes(b"of somebody else")
    assert find_place(tmp_path, "mine", MADE_OF) == (tmp_path / "mine (3).safetensors", False)
    with pytest.raises(ValueError, match="is no file name"):
        find_place(tmp_path, "///", MADE_OF)


def test_a_result_never_takes_the_place_of_a_file_that_came_meanwhile(tmp_path):
    from pack.models.store import save_tensors

    path, _ = find_place(tmp_path, "mine", MADE_OF)
    path.write_bytes(b"another process was faster")
    kept = keep_result(tmp_path, "mine", lambda to: save_tensors(to, {"x": torch.ones(1)}, {}, exclusive=True))
    assert kept.name == "mine (2).safetensors" and path.read_bytes() == b"another process was faster"


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Nothing can be written in .*file"):
        find_place(tmp_path / "file", "mine", MADE_OF)
    assert os.listdir(tmp_path) == ["file"]
