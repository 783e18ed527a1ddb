"""API prompts with missing, null or odd values: the host's own words or a sentence of ours, never a Python error."""

from __future__ import annotations

import inspect
import json
import math

import pytest

ODD = [None, 5, -1, "", "nonsense", ["auto"], [], {}, True, 1e400]
PYTHON = ("Error", "Traceback", "object has no", "unhashable", "NoneType", "positional argument", "not iterable")


def ours(host) -> dict:
    return {name: node for name, node in host.nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("Attune")}


def checked(host, inputs: dict, class_type: str) -> list[dict]:
    """What the host answers to a prompt with one of our nodes, and a node that needs it."""
    prompt = {
        "1": {"class_type": class_type, "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    _, error, _, node_errors = host.loop.run_until_complete(host.execution.validate_prompt("odd", prompt, None))
    assert "exception" not in (error or {}).get("type", ""), error
    return [one for node in node_errors.values() for one in node["errors"]]


def assert_no_python(reasons: list[dict], what) -> None:
    for one in reasons:
        assert "exception_during" not in one["type"], (what, one)
        words = json.dumps([one["message"], one["details"]])
        assert one["type"] != "custom_validation_failed" or not any(word in words for word in PYTHON), (what, one)


def test_a_prompt_without_an_input_is_told_which(host):
    for name, node in ours(host).items():
        required = [one.id for one in node.GET_SCHEMA().inputs if not one.optional]
        reasons = checked(host, {}, name)
        assert_no_python(reasons, name)
        missing = {one["extra_info"]["input_name"] for one in reasons if one["type"] == "required_input_missing"}
        assert missing >= {one.partition(".")[0] for one in required}, name


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_prompt_with_an_odd_value_is_answered_in_words(host, value):
    for name, node in ours(host).items():
        for one in node.GET_SCHEMA().inputs:
            assert_no_python(checked(host, {one.id: value}, name), (name, one.id))


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_our_own_checks_take_any_value(host, value):
    """Also for all at once, which the host asks only of what is complete."""
    for name, node in ours(host).items():
        for check in ("validate_inputs", "fingerprint_inputs"):
            if not any(check in vars(one) for one in node.__mro__ if one.__name__.startswith("Attune")):
                continue
            ask = getattr(node, check)
            ask()
            for one in node.GET_SCHEMA().inputs:
                takes = inspect.signature(ask).parameters
                if one.id not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
                    continue  # the host asks for no more than what is named
                answer = ask(**{one.id: value})
                assert check == "fingerprint_inputs" or answer is True or isinstance(answer, str), (name, one.id)


LINKED = {  # what a widget of a type cannot take; None only where it is required
    "INT": [None, "", "7", 2.5, math.nan, math.inf, 10**400, []],
    "FLOAT": [None, "", "0.5", math.nan, -math.inf, -(10**400), []],
    "BOOLEAN": [None, "", "false", []], "STRING": [None, 5, True, []], "COMBO": [None, "", 5, "nonsense", []],
}  # fmt: skip


def test_a_link_may_bring_anything_and_a_sentence_names_the_widget(host):
    """The host looks at values, not at what links bring: None of a switch, a float of a calculator."""
    asked = 0
    for name, node in ours(host).items():
        own = {*host.module("nodes._host.api").ANSWERED, *inspect.signature(node.validate_inputs).parameters}
        for one in node.GET_SCHEMA().inputs:
            if not hasattr(one, "socketless") or (one.id in own and one.io_type == "COMBO"):
                continue
            for value in LINKED[one.io_type][bool(one.optional) :]:
                with pytest.raises(ValueError, match=r"^'(\w+)' is .*\. Choose .*\.$") as said:
                    node.execute(**{one.id: [value] if node.GET_SCHEMA().is_input_list else value})
                assert said.value.args[0].startswith(f"'{one.id}' is {value!r}. "), name
                asked += 1
    assert asked > 500


def test_a_link_that_brings_what_fits_is_taken(host):
    """A whole number of a calculator is one; None leaves an optional widget at its default."""
    api = host.module("nodes._host.api")

    class Node(api.io.ComfyNode):
        @classmethod
        def define_schema(cls):
            kinds = (api.io.Int, api.io.Float, api.io.Boolean, api.io.String)
            inputs = [kind.Input(kind.io_type, optional=True) for kind in kinds]
            return api.schema("Node", "Node", "test", "", inputs=inputs)

        @classmethod
        def execute(cls, **given):
            return given

    node = api.with_checked_widgets(Node)
    assert repr(node.execute(INT=20.0, FLOAT=3, BOOLEAN=False, STRING="")) == repr(
        {"INT": 20, "FLOAT": 3, "BOOLEAN": False, "STRING": ""}
    )
    assert node.execute(INT=None, FLOAT=None, BOOLEAN=None, STRING=None) == {}


@pytest.mark.parametrize(
    ("class_type", "widget"),
    [("AttuneKSampler", "schedule"), ("AttuneScheduler", "schedule"), ("AttuneLoadProfile", "profile_name"),
     ("AttuneLoadOneMoreStep", "oms_name"), ("AttuneLoadNPNet", "npnet_name")],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 5, True])
def test_a_null_where_a_name_belongs_ends_in_a_sentence(host, class_type, widget, value):
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}
    prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name="attune_demo.safetensors"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    }
    schema = host.nodes.NODE_CLASS_MAPPINGS[class_type].GET_SCHEMA()
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]}
    inputs = {one.id: links.get(one.id, getattr(one, "default", None)) for one in schema.inputs if not one.optional}
    prompt |= {"7": node(class_type, **{**inputs, widget: value}), "8": node("PreviewAny", source=["7", 0])}
    with pytest.raises(AssertionError) as end:
        host.run(prompt)
    said = str(end.value)
    assert "exception_during" not in said and not any(word in said for word in PYTHON), said
    assert "Choose one of" in said or "There is no" in said or "Required input is missing" in said or "not in" in said
