"""The feature cache: what goes in comes out for the same condition, whatever the batches look like."""

from __future__ import annotations

import torch

from pack.kernels.feature_cache import FeatureCache

LIKE = torch.zeros(1)


def rows(*values: float) -> dict:
    return {"h": torch.tensor(values, dtype=torch.float32)[:, None]}


def test_conditions_are_found_again_in_other_batches():
    cache = FeatureCache(depth=1)
    cache.store(["uncond", "cond"], 0, 9.0, "s", rows(1, 2, 10, 20))  # two pictures each
    assert cache.recall(["uncond", "cond"], "s", 0, 8.0, LIKE)["h"].flatten().tolist() == [1, 2, 10, 20]
    assert cache.recall(["cond", "uncond"], "s", 0, 8.0, LIKE)["h"].flatten().tolist() == [10, 20, 1, 2]
    assert cache.recall(["cond"], "s", 0, 8.0, LIKE)["h"].flatten().tolist() == [10, 20]


def test_a_whole_capture_is_recalled_without_a_copy():
    cache, features = FeatureCache(depth=1), rows(1, 2)
    cache.store(["a", "b"], 0, 9.0, "s", features)
    assert cache.recall(["a", "b"], "s", 0, 8.0, LIKE)["h"].data_ptr() == features["h"].data_ptr()


def test_missing_old_or_unfitting_features_are_never_used():
    cache = FeatureCache(depth=1)
    cache.store(["a"], 3, 9.0, "s", rows(1))
    assert cache.recall(["b"], "s", 0, 8.0, LIKE) is None
    assert cache.recall(["a"], "other shape", 0, 8.0, LIKE) is None
    assert cache.recall(["a"], "s", 4, 8.0, LIKE) is None
    assert cache.holds("a", 3) and not cache.holds("a", 4) and not cache.holds("b", 0)
    cache.clear()
    assert cache.recall(["a"], "s", 0, 8.0, LIKE) is None and cache.bytes == 0


def test_a_forecast_is_exact_for_features_that_are_linear_in_time():
    cache = FeatureCache(depth=2)
    cache.store(["a"], 0, 10.0, "s", rows(1.0))
    assert cache.recall(["a"], "s", 0, 7.0, LIKE)["h"].item() == 1.0  # one capture alone is held
    cache.store(["a"], 2, 8.0, "s", rows(3.0))
    assert cache.recall(["a"], "s", 0, 7.0, LIKE)["h"].item() == 4.0
    cache.store(["a"], 2, 8.0, "s", rows(3.5))  # the same step again replaces
    assert cache.recall(["a"], "s", 0, 8.0, LIKE)["h"].item() == 3.5


def test_a_calibration_chooses_its_sources():
    cache = FeatureCache(depth=4)
    for step, value in enumerate((1.0, 3.0, 9.0)):
        cache.store(["a"], step, 10.0 - step, "s", rows(value))
    assert cache.recall(["a"], "s", 0, 8.0, LIKE, sources=(0, None))["h"].item() == 1.0
    assert cache.recall(["a"], "s", 0, 8.0, LIKE, sources=(1, 0))["h"].item() == 5.0
    assert cache.recall(["a"], "s", 0, 8.0, LIKE, sources=(1, 7)) is None


def test_features_are_kept_in_the_type_asked_for_and_come_back_in_the_callers():
    cache = FeatureCache(depth=1, dtype=torch.float16)
    cache.store(["a"], 0, 9.0, "s", {"h": torch.randn(2, 8)})
    assert cache.bytes == 2 * 8 * 2
    assert cache.recall(["a"], "s", 0, 8.0, LIKE)["h"].dtype == torch.float32


def test_outputs_computed_ahead_are_served_once_all_are_there_and_dropped_by_a_new_capture():
    cache = FeatureCache(depth=1)
    cache.keep_ahead(["a", "b"], 5, torch.tensor([[1.0], [2.0]]))
    assert cache.ahead(["b", "a"], 5).flatten().tolist() == [2, 1]
    assert cache.ahead(["a"], 4) is None and cache.ahead(["a", "c"], 5) is None
    cache.store(["a"], 6, 1.0, "s", rows(0))
    assert cache.ahead(["a", "b"], 5) is None and cache.ahead(["b"], 5).item() == 2.0
