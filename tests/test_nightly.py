"""What repeats a kind waits for --all, and nothing else is left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nightly import daily


def marked(value) -> bool:
    return [mark.name for mark in getattr(value, "marks", ())] == ["nightly"]


def test_what_is_telling_is_asked_each_time_and_the_rest_in_the_night():
    values = daily(["euler", "heun", "lms"], "heun", "of_another_host")
    assert values[1] == "heun" and marked(values[0]) and marked(values[2]) and values[0].values == ("euler",)
    pairs = daily([("a", 1), ("b", 2)], ("a", 1), names=2)
    assert pairs[0] == ("a", 1) and marked(pairs[1]) and pairs[1].values == ("b", 2)
    assert daily([(5, 8)])[0].values == ((5, 8),)


@pytest.mark.parametrize(("everything", "left"), [(False, ["plain", "host"]), (True, ["plain", "nightly", "host"])])
def test_only_the_marked_are_left_out_and_only_without_all(request, monkeypatch, everything, left):
    monkeypatch.delenv("CI", raising=False)
    conftest = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "HOST_MARKS"))
    mark = lambda item, name: name if name in item.name.split() else None
    items = [
        SimpleNamespace(name=name, get_closest_marker=None, add_marker=lambda _: None)
        for name in ("host", "plain", "nightly")
    ]
    for item in items:
        item.get_closest_marker = lambda name, item=item: mark(item, name)
    said = []
    hook = SimpleNamespace(pytest_deselected=lambda items: said.extend(items))
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda _: everything, hook=hook), items)
    assert [item.name for item in items] == left and [item.name for item in said] == ([] if everything else ["nightly"])
