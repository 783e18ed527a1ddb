"""A node that becomes a graph of other nodes while it runs: the host executes and caches each of them."""

from __future__ import annotations

from typing import Any

from comfy_execution.graph_utils import GraphBuilder

from .api import io


class Expansion:
    """The graph that stands in for a running node. `links`: for each of the node's inputs what it is connected to.

    Inner nodes take the links of the outer one rather than its values, so that the host can tell whether they changed.
    Run outside of the host's executor a node has no links, and its values are taken.
    """

    def __init__(self, node: type[io.ComfyNode], values: dict[str, Any]):
        self._graph, self._values, self._links = GraphBuilder(), values, {}
        hidden = node.hidden
        if hidden is not None and hidden.dynprompt is not None:
            given = hidden.dynprompt.get_node(hidden.unique_id)["inputs"]
            self._links = {name: value for name, value in given.items() if isinstance(value, list)}

    def given(self, name: str) -> Any:
        """What the outer node has at its input `name`."""
        return self._links.get(name, self._values[name])

    def add(self, node: type[io.ComfyNode], **inputs: Any) -> Any:
        """An inner node with its widgets at their defaults but for `inputs`; `.out(i)` is its i-th output."""
        schema = node.GET_SCHEMA()
        defaults = {one.id: one.default for one in schema.inputs if getattr(one, "default", None) is not None}
        return self._graph.node(schema.node_id, **{**defaults, **inputs})

    @property
    def graph(self) -> dict[str, Any] | None:
        """For NodeOutput's `expand`; None where nothing was added."""
        return self._graph.finalize() or None
