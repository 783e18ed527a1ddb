"""Counting and sharing out FLOPs, against numbers worked out by hand. The networks themselves need the host."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

import real_size
from real_size import count, shares, side


def test_flops_of_a_convolution_and_a_linear_layer():
    conv, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 11)
    parts, kinds = count(
        lambda: (conv(torch.zeros(2, 3, 8, 8)), linear(torch.zeros(4, 7))), {"conv": [conv], "linear": [linear]}
    )
    assert parts == {"conv": 2 * 2 * 5 * 8 * 8 * 3 * 9, "linear": 2 * 4 * 7 * 11, "rest": 0}
    assert kinds == {"convolution": parts["conv"], "attention": 0, "linear": parts["linear"]}


def test_attention_products_are_a_kind_of_their_own():
    q = torch.zeros(1, 2, 16, 8)
    _, kinds = count(lambda: nn.functional.scaled_dot_product_attention(q, q, q), {})
    assert kinds == {"convolution": 0, "attention": 2 * (2 * 2 * 16 * 16 * 8), "linear": 0}


def test_parts_and_kinds_sum_to_the_total_and_the_rest_is_what_no_part_holds():
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 2))
    parts, kinds = count(lambda: network(torch.zeros(3, 4)), {"first": [network[0]], "last": [network[2]]})
    assert parts == {"first": 2 * 3 * 4 * 8, "last": 2 * 3 * 16 * 2, "rest": 2 * 3 * 8 * 16}
    assert sum(parts.values()) == sum(kinds.values())
    assert sum(shares(parts).values()) == pytest.approx(100)


def test_counting_leaves_no_hook_behind_even_after_an_error():
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count(lambda: layer(torch.zeros(3, 5)), {"layer": [layer]})
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_a_side_is_the_sum_of_its_levels():
    assert side({"input 0-3": 1.0, "input 4-6": 2.0, "middle": 4.0}, "input", "time") == 3.0


@pytest.mark.parametrize("word", ["SD1.5", "SD9=512", "SDXL=500", "SDXL=big"])
def test_a_picture_size_that_no_model_has_is_refused_by_name(word):
    with pytest.raises(argparse.ArgumentTypeError, match="multiple of 64"):
        real_size._pixels(word)
