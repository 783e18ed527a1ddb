"""The demo model's words: what a prompt becomes, and what a damaged vocabulary is told."""

from __future__ import annotations

import pytest
import torch

from pack.models.demo import BEGIN, END, UNKNOWN, WordTokenizer, pack_vocabulary, split_words, unpack_vocabulary

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
