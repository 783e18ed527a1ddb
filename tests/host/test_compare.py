"""The node in the real host, on the pictures of two samplers."""

from __future__ import annotations

import torch


def test_it_takes_up_to_six_batches_in_their_order(host):
    grey = lambda value: torch.full((1, 16, 16, 3), value)
    given = {"image_3": grey(0.9), "image_1": grey(0.1), "image_6": grey(0.5)}
    (image,) = host.call("AttuneCompare", labels="dark", difference=0.0, histogram=False, width=64, rows=1, **given)
    assert image.shape[0] == 1 and image.shape[3] == 3 and image.dtype == torch.float32
    row = image[0, 84]
    assert [round(float(row[8 + 72 * i + 32, 0]), 1) for i in range(3)] == [0.1, 0.9, 0.5]
