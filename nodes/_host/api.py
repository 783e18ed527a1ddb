"""The host's node API, and the differences between its versions."""

from __future__ import annotations

import dataclasses
import functools
import html
import inspect
import math
import numbers
from collections.abc import Callable, Container
from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker as ExecutionBlocker  # as an output: its users do not run
from server import PromptServer
from torch import Tensor

try:
    from comfy_api.v0_0_2 import ComfyExtension as ComfyExtension
    from comfy_api.v0_0_2 import io, ui
except ImportError:  # a host that has retired the numbered version
    from comfy_api.latest import ComfyExtension as ComfyExtension
    from comfy_api.latest import io, ui

try:
    from comfy_execution.utils import get_executing_context as executing_context
except ImportError:  # an older host does not say which node runs

    def executing_context():
        return None


Profile = io.Custom("ATTUNE_PROFILE")

_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(node_id: str, display_name: str, category: str, description: str, **fields) -> io.Schema:
    """A Schema of those `fields` that this host knows: newer ones (search_aliases, …) are dropped on older hosts."""
    known = {name: value for name, value in fields.items() if name in _FIELDS}
    return io.Schema(node_id, display_name=display_name, category=category, description=description, **known)


def advanced(*inputs: io.Input) -> list[io.Input]:
    """These inputs, which the page folds away until the user asks for them."""
    for one in inputs:
        if hasattr(one, "advanced"):
            one.advanced = True
        else:  # 0.3.75: the page knows the word, the classes do not
            one.extra_dict = {**one.extra_dict, "advanced": True}
    return list(inputs)


def more_prompts(tooltip: str) -> list[io.Input]:
    """Optional inputs positive_2 to positive_4, for nodes that fit to several prompts."""
    return [io.Conditioning.Input(f"positive_{n}", optional=True, tooltip=tooltip) for n in (2, 3, 4)]


MOST_GIVEN = 1e300  # whole numbers beyond every float are none either
WANTED = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false", "STRING": "a text"}
ANSWERED = ("npnet_name", "oms_name", "maps_name", "kernel")  # of one that is not there the node says how to get it


def with_checked_widgets(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, which looks at its widgets before it runs: what a link brings, nobody has seen.

    None leaves an optional one at its default. Choices that `validate_inputs` names are answered for there.
    """
    execute, own = node.execute.__func__, (*inspect.signature(node.validate_inputs).parameters, *ANSWERED)
    _, *names = inspect.signature(execute).parameters

    @functools.wraps(execute)
    def checked(cls, *first, **given):
        wanted, given = cls.define_schema(), {**dict(zip(names, first, strict=False)), **given}
        for one in wanted.inputs:
            if one.id not in given or not hasattr(one, "socketless"):
                continue
            value = given.pop(one.id)
            if wanted.is_input_list and isinstance(value, list):
                given[one.id] = [_taken(one, each, own) for each in value]
            elif value is not None or not one.optional:
                given[one.id] = _taken(one, value, own)
        return execute(cls, **given)

    node.execute = classmethod(checked)
    return node


def _taken(one: io.Input, value: Any, own: Container[str]) -> Any:
    """A widget's value; ValueError for what it cannot take, but for choices that the node has `own` words for."""
    if isinstance(one, io.Combo.Input):
        fits = one.id in own or value in one.options
        wanted = f"one of: {', '.join(map(str, one.options))}"
    else:
        fits, wanted = _fits(one.io_type, value), WANTED[one.io_type]
    if not fits:
        raise ValueError(f"'{one.id}' is {value!r}. Choose {wanted}.")
    return int(value) if one.io_type == "INT" else value


def _fits(io_type: str, value: Any) -> bool:
    """Whether a widget can take a value; one of whole numbers takes 20.0."""
    if io_type == "STRING":
        return isinstance(value, str)
    number: Any = value if isinstance(value, numbers.Real) else math.nan
    return abs(number) < MOST_GIVEN and (io_type != "INT" or number == int(number))


def widget_place(node: type[io.ComfyNode], name: str) -> int:
    """Where a widget of a node stands among the values that a workflow keeps: required ones first, and behind a seed
    what becomes of it after each run."""
    widgets = [one for one in node.define_schema().inputs if hasattr(one, "socketless")]
    at = 0
    for one in sorted(widgets, key=lambda one: bool(one.optional)):
        if one.id == name:
            return at
        at += 1 + bool(getattr(one, "control_after_generate", False))
    raise KeyError(name)


def say_on_node(node: type[io.ComfyNode], text: str) -> None:
    """Show `text` on the node that is running."""
    text_on(node)(text)


def text_on(node: type[io.ComfyNode]) -> Callable[[str], None]:
    """Shows a text on the node that is running, whenever it is called; nothing where another node calls it."""
    return (lambda _: None) if node.hidden is None else progress_text(str(node.hidden.unique_id))


def progress_text(node_id: str) -> Callable[[str], None]:
    """Shows a text on a node, whenever it is called; the page takes it for HTML."""

    def show(text: str) -> None:
        if getattr(PromptServer, "instance", None) is not None:
            PromptServer.instance.send_progress_text(html.escape(text, quote=False), node_id)

    return show


def shown_on(node: type[io.ComfyNode], image: Tensor) -> ui.PreviewImage | None:
    """A preview of an IMAGE on the node that is running; None where another node calls it."""
    return None if node.hidden is None else ui.PreviewImage(image)
