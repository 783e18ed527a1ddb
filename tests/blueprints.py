"""Blueprints, the nodes made of nodes in subgraphs/, from the prompts that tests run: no dial or socket that the host lacks."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path

PROMPTS = Path(__file__).parent / "prompts"
INPUT, OUTPUT = -10, -20  # what the page calls the two ends of a subgraph


@dataclass(frozen=True)
class Spec:
    """prompt: where the nodes `inside` stand. dials: name -> (node, widget) of each that it turns. named: what an input
    from (node, output) outside is called, if not as its first socket. outputs: name -> (node, output)."""

    prompt: str
    inside: tuple[str, ...]
    description: str
    dials: dict[str, list[tuple[str, str]]]
    outputs: dict[str, tuple[str, int]]
    named: dict[tuple[str, int], str] = field(default_factory=dict)


SPECS = {
    "Attune Fast KSampler": Spec(
        "fast_sampler", ("5", "6", "7", "8"),
        "Learns from your own run: the first picture takes all its steps, the next ones take a fifth of the evaluations.",
        {
            "seed": [("8", "noise_seed")], "steps": [("5", "steps")], "cfg": [("8", "cfg")],
            "sampler_name": [("6", "sampler_name")], "scheduler": [("5", "scheduler")], "denoise": [("5", "denoise")],
            "use": [("7", "use")], "evaluations": [("7", "evaluations")],
        },
        {"latent": ("8", 0)},
    ),
    "Attune Edit Picture": Spec(
        "noise_space", ("3", "7", "8", "9", "10", "11"),
        "Changes a real picture and keeps the rest of it: positive says what it shows, edit says what it should show.",
        {"steps": [("7", "steps")], "skip": [("9", "skip")], "focus": [("9", "focus")], "cfg": [("10", "cfg")]},
        {"image": ("11", 0)},
        {("2", 0): "image", ("6", 0): "edit"},
    ),
    "Attune Draft and Draw": Spec(
        "draft_seeds", ("5", "6", "8"),
        "Draws many seeds as a sheet of fast drafts, and then the seed whose number you set, with all its steps.",
        {
            "seed": [("5", "seed")], "drafts": [("5", "drafts")], "number": [("6", "number")],
            **{name: [("5", name), ("8", name)] for name in ("steps", "cfg", "sampler_name", "scheduler", "denoise")},
            "speed": [("5", "speed")],
        },
        {"latent": ("8", 0), "sheet": ("5", 1)},
    ),
    "Attune Film Sampler": Spec(
        "timestep_field", ("5", "10", "11", "12"),
        "Continues a film from given frames, with video models that read a noise level for each frame.",
        {
            "seed": [("12", "noise_seed")], "steps": [("5", "steps")], "cfg": [("12", "cfg")],
            "scheduler": [("5", "scheduler")], "preset": [("11", "preset")], "given_frames": [("11", "given_frames")],
        },
        {"latent": ("12", 0)},
    ),
}  # fmt: skip


def is_widget(kind) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def slots(node_class) -> dict[str, tuple[str, dict]]:
    """Name -> (type, options) of a node's inputs as the page orders them: sockets, then widgets."""
    known = node_class.INPUT_TYPES()
    given = {
        name: (one[0], one[1] if len(one) > 1 else {})
        for group in ("required", "optional")
        for name, one in known.get(group, {}).items()
    }
    ordered = sorted(given, key=lambda name: is_widget(given[name][0]))
    return {name: ("COMBO" if isinstance(given[name][0], list) else given[name][0], given[name][1]) for name in ordered}


class Builder:
    def __init__(self, name: str, spec: Spec, classes: dict):
        self.name, self.spec, self.classes = name, spec, classes
        self.prompt = json.loads((PROMPTS / f"{spec.prompt}.json").read_text("utf-8"))
        self.slots = {one: slots(classes[self.prompt[one]["class_type"]]) for one in spec.inside}
        self.links: list[dict] = []

    def id(self, what: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"attune/{self.name}/{what}"))

    def link(self, origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        ends = dict(zip(("origin_id", "origin_slot", "target_id", "target_slot"), (*origin, *target), strict=True))
        self.links.append({"id": len(self.links) + 1, **ends, "type": kind})
        return len(self.links)

    def inputs(self) -> dict[str, list[tuple[str, str]]]:
        """Name -> the (node, input) that it feeds: what comes from outside, then the dials."""
        feeds: dict[tuple, list] = {}
        for one in self.spec.inside:
            for name in self.slots[one]:
                value = self.prompt[one]["inputs"].get(name)
                if isinstance(value, list) and value[0] not in self.spec.inside:
                    feeds.setdefault(tuple(value), []).append((one, name))
        given = {self.spec.named.get(origin, targets[0][1]): targets for origin, targets in feeds.items()}
        return {**given, **self.spec.dials}

    def build(self) -> dict:
        inputs, outputs = self.inputs(), self.spec.outputs
        place = lambda one, name: (int(one), list(self.slots[one]).index(name))
        kinds = {name: self.slots[targets[0][0]][targets[0][1]][0] for name, targets in inputs.items()}
        linked: dict[tuple[int, int], int] = {}
        ends = []
        for i, (name, targets) in enumerate(inputs.items()):
            for one in targets:
                linked[place(*one)] = self.link((INPUT, i), place(*one), kinds[name])
            ids = [linked[place(*one)] for one in targets]
            ends.append({"id": self.id(f"in {name}"), "name": name, "type": kinds[name], "linkIds": ids, "pos": [0, 0]})
        for one in self.spec.inside:
            for name, (kind, _) in self.slots[one].items():
                value = self.prompt[one]["inputs"].get(name)
                if isinstance(value, list) and value[0] in self.spec.inside:
                    linked[place(one, name)] = self.link((int(value[0]), value[1]), place(one, name), kind)
        results = []
        for i, (name, (one, slot)) in enumerate(outputs.items()):
            kind = self.classes[self.prompt[one]["class_type"]].RETURN_TYPES[slot]
            ids = [self.link((int(one), slot), (OUTPUT, i), kind)]
            results.append({"id": self.id(f"out {name}"), "name": name, "type": kind, "linkIds": ids, "pos": [0, 0]})
        nodes = [self.node(i, one, linked) for i, one in enumerate(self.spec.inside)]
        graph = {
            "id": self.id("graph"), "version": 1, "revision": 0, "name": self.name, "config": {},
            "state": {"lastGroupId": 0, "lastNodeId": max(map(int, self.spec.inside)), "lastLinkId": len(self.links),
                      "lastRerouteId": 0},
            "inputNode": {"id": INPUT, "bounding": [-240, 60, 140, 40 + 20 * len(ends)]},
            "outputNode": {"id": OUTPUT, "bounding": [400 * len(nodes), 60, 140, 40 + 20 * len(results)]},
            "inputs": ends, "outputs": results, "widgets": [], "nodes": nodes, "groups": [], "links": self.links,
            "extra": {},
        }  # fmt: skip
        return {
            "revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [self.outer(graph, inputs)], "links": [],
            "version": 0.4, "definitions": {"subgraphs": [graph]},
            "extra": {"BlueprintDescription": self.spec.description},
        }  # fmt: skip

    def node(self, i: int, one: str, linked: dict[tuple[int, int], int]) -> dict:
        kind = self.prompt[one]["class_type"]
        types = self.classes[kind].RETURN_TYPES
        names = getattr(self.classes[kind], "RETURN_NAMES", None) or types
        from_here = lambda slot: [x["id"] for x in self.links if (x["origin_id"], x["origin_slot"]) == (int(one), slot)]
        return {
            "id": int(one), "type": kind, "pos": [400 * i, 40], "size": [340, 80 + 30 * len(self.slots[one])],
            "flags": {}, "order": i, "mode": 0,
            "inputs": [
                {"localized_name": name, "name": name, "type": kind,
                 **({"widget": {"name": name}} if is_widget(kind) else {}), "link": linked.get((int(one), at))}
                for at, (name, (kind, _)) in enumerate(self.slots[one].items())
            ],
            "outputs": [
                {"localized_name": name, "name": name, "type": kind, "links": from_here(slot)}
                for slot, (name, kind) in enumerate(zip(names, types, strict=True))
            ],
            "properties": {"Node name for S&R": kind}, "widgets_values": self.values(one),
        }  # fmt: skip

    def values(self, one: str) -> list:
        values = []
        for name, (kind, options) in self.slots[one].items():
            if is_widget(kind):
                value = self.prompt[one]["inputs"].get(name, options.get("default", 0))
                values.append(options.get("default", 0) if isinstance(value, list) else value)
                values += ["fixed"] * bool(options.get("control_after_generate"))
        return values

    def outer(self, graph: dict, inputs: dict) -> dict:
        """The node itself, with the dials' values as they are inside."""
        dials = list(self.spec.dials)
        first = {name: targets[0] for name, targets in inputs.items()}
        return {
            "id": 1, "type": graph["id"], "pos": [100, 100], "size": [300, 80 + 28 * len(inputs)], "flags": {},
            "order": 0, "mode": 0,
            "inputs": [
                {"name": one["name"], "type": one["type"],
                 **({"widget": {"name": one["name"]}} if one["name"] in dials else {}), "link": None}
                for one in graph["inputs"]
            ],
            "outputs": [{"name": one["name"], "type": one["type"], "links": []} for one in graph["outputs"]],
            "title": self.name,
            "properties": {"proxyWidgets": [["-1", name] for name in dials]},
            "widgets_values": [self.prompt[first[name][0]]["inputs"][first[name][1]] for name in dials],
        }  # fmt: skip


def build(name: str, classes: dict) -> dict:
    """A blueprint as the page keeps it."""
    return Builder(name, SPECS[name], classes).build()
