"""The demo model's words: what a prompt becomes, and what a damaged vocabulary is told."""

from __future__ import annotations

import pytest
import torch

from pack.models.demo import (
    BEGIN,
    END,
    FIRST_LAYER,
    UNKNOWN,
    WordTokenizer,
    pack_vocabulary,
    split_words,
    unpack_vocabulary,
    with_difference,
)

WORDS = ["<start>", "<end>", "<unknown>", "a", "red", "t-shirt", "3d"]


def test_words_survive_the_trip_through_a_tensor():
    assert unpack_vocabulary(pack_vocabulary(WORDS)) == WORDS


def test_a_prompt_becomes_known_words_between_start_and_end():
    ids = WordTokenizer(WORDS)("A RED, t-shirt (3D) zebra!")["input_ids"]
    assert ids == [BEGIN, 3, 4, 5, 6, UNKNOWN, END]


def test_an_empty_prompt_is_start_and_end():
    assert WordTokenizer(WORDS)("")["input_ids"] == [BEGIN, END]


def test_punctuation_and_other_scripts_do_not_disturb():
    assert split_words("  a-b--c, 愛 “red”_x ") == ["a-b", "c", "red", "x"]


@pytest.mark.parametrize(
    "packed", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), torch.zeros(70000, dtype=torch.uint8),
               pack_vocabulary(["a", "b", "a", "c"]), pack_vocabulary(["a", "b"])]
)  # fmt: skip
def test_a_damaged_vocabulary_is_refused_with_the_remedy(packed):
    with pytest.raises(ValueError, match=r"[gG]et the demo checkpoint again"):
        unpack_vocabulary(packed)


BASE = {FIRST_LAYER: torch.ones(8, 4, 3, 3), "a.weight": torch.ones(6, 5, 3, 3), "a.bias": torch.ones(6)}


def difference(**changed) -> dict[str, torch.Tensor]:
    up, down = torch.randn(6, 2), torch.randn(2, 45)
    named = {
        "first": FIRST_LAYER,
        "up": "difference.a.weight.up",
        "down": "difference.a.weight.down",
        "bias": "difference.a.bias",
    }
    found = {"first": torch.rand(8, 9, 3, 3), "up": up, "down": down, "bias": torch.rand(6), **changed}
    return {named.get(name, name): tensor for name, tensor in found.items() if tensor is not None}


def test_a_difference_replaces_adds_and_leaves_the_rest():
    stored = difference(bias=None)
    found = with_difference(BASE, stored)
    assert torch.equal(found[FIRST_LAYER], stored[FIRST_LAYER]) and torch.equal(found["a.bias"], BASE["a.bias"])
    added = stored["difference.a.weight.up"] @ stored["difference.a.weight.down"]
    torch.testing.assert_close(found["a.weight"], 1 + added.view(6, 5, 3, 3))


@pytest.mark.parametrize(
    "changed",
    [
        {"first": torch.rand(8, 4, 3, 3)}, {"up": torch.randn(5, 2)}, {"up": torch.randn(6, 3)}, {"down": None},
        {"down": torch.randn(2, 5)}, {"bias": torch.rand(7)}, {"difference.b.weight": torch.rand(3)},
        {"up": torch.randn(6)},
    ],
)  # fmt: skip
def test_a_difference_of_another_model_is_refused_with_the_remedy(changed):
    with pytest.raises(ValueError, match="does not fit the demo checkpoint"):
        with_difference(BASE, difference(**changed))
