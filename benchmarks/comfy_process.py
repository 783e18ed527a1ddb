"""A real ComfyUI in this process: its nodes and its executor, our pack loaded by its own loader. Tests use it, too."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


class Host:
    """The booted host: `nodes` by id, `run` a prompt graph, `call` a node as the executor would."""

    def __init__(self, folders: Path):
        comfyui = os.environ["COMFYUI_PATH"]
        flags = [] if torch.cuda.is_available() else ["--cpu"]
        for name in ("output", "temp", "user", "input"):
            (folders / name).mkdir(exist_ok=True)
        sys.path.insert(0, comfyui)
        own, sys.argv = sys.argv, ["main.py", *flags, "--disable-api-nodes", "--base-directory", str(folders)]
        import comfy.options

        comfy.options.enable_args_parsing()
        import utils.extra_config  # noqa: F401 - before `nodes`, which puts comfy/ first on the path and hides utils/

        sys.argv = own
        import execution
        import nodes
        import server

        self.root, self.folders, self.nodes, self.execution = ROOT, folders, nodes, execution
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        server.PromptServer(self.loop)
        self.loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        self.classes_before = set(nodes.NODE_CLASS_MAPPINGS)
        self.before = snapshot()
        began = time.process_time()
        self.loaded = self.loop.run_until_complete(nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"))
        self.load_seconds = time.process_time() - began
        self.after = snapshot()

    @property
    def profiles(self) -> Path:
        """The user's models/attune, where fits keep what they find."""
        return self.folders / "models" / "attune"

    def call(self, node_id: str, **inputs) -> tuple:
        node = self.nodes.NODE_CLASS_MAPPINGS[node_id]
        with torch.inference_mode():
            if hasattr(node, "execute"):
                return self._resolved(node.execute(**inputs))
            return getattr(node(), node.FUNCTION)(**inputs)

    def _resolved(self, output) -> tuple:
        """The outputs of a node, those of the nodes that it stands for in place of links to them."""
        done: dict[str, tuple] = {}

        def value(given):
            inner = isinstance(given, list) and len(given) == 2 and given[0] in (output.expand or {})
            return done[given[0]][given[1]] if inner else given

        for name, one in (output.expand or {}).items():  # in the order in which they were added
            done[name] = self.call(one["class_type"], **{key: value(given) for key, given in one["inputs"].items()})
        return tuple(map(value, output.result))

    def module(self, name: str):
        """A module of the pack as the host loaded it: "nodes.train_npnet"."""
        return sys.modules[f"{ROOT}.{name}"]

    def executor(self, server: Any) -> Any:
        """The host's own, with its plain cache."""
        kind, plain = self.execution.PromptExecutor, {"cache_type": self.execution.CacheType.CLASSIC}
        if "cache_args" in inspect.signature(kind).parameters:  # 0.3.64 has none
            plain["cache_args"] = {"lru": 0, "ram": 0, "ram_inactive": 0}
        return kind(server, **plain)

    def run(self, prompt: dict) -> dict:
        """Validate and execute an API-format prompt; the history's outputs, or an AssertionError with its messages."""
        messages = []

        class Server:
            client_id, last_node_id, sockets_metadata = "test", None, {}

            def send_sync(self, event, data, sid=None):
                messages.append((event, data))

        executor = self.executor(Server())
        prompt = copy.deepcopy(prompt)
        valid, error, outputs, node_errors = self.loop.run_until_complete(
            self.execution.validate_prompt("test", prompt, None)
        )
        assert valid, (error, node_errors)
        executor.execute(prompt, "test", {"client_id": "test"}, outputs)
        self.errors = [data["exception_message"] for event, data in messages if event == "execution_error"]
        assert executor.success, self.errors
        return executor.history_result["outputs"]


def snapshot() -> dict[str, int]:
    """Identity of every attribute of the host's modules and of the classes defined in them."""
    seen = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if os.environ["COMFYUI_PATH"] not in file or "site-packages" in file:
            continue
        for attribute, value in list(vars(module).items()):
            seen[f"{name}.{attribute}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                seen |= {f"{name}.{attribute}.{key}": id(item) for key, item in vars(value).items()}
    return seen
