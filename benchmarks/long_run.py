#!/usr/bin/env python3
"""A day of use in minutes: 1,000 prompts through a real server, methods on and off in turn, two in the queue at once.

Small pictures and few steps of the shipped workflows. Watched from outside: memory, living objects and seconds per
prompt, with the slope of each after a warm-up; and that the same prompt gives the same picture every time, also under
ComfyUI's other caches, and after a restart with a saved profile. The same server with stock nodes alone is the control.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import os
import random
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from comfy_process import ROOT
from results import DOCS, Table, markdown, record

SIDE, STEPS, SEEDS, SAMPLES = 64, 4, 3, 50
WARM_UP = 0.2  # of the prompts: what grows there are caches of the host and of the allocator
WORKFLOWS = [
    "first_picture", "flow_model", "aligned_ksampler", "aligned_schedule", "apply_profile", "propagation",
    "propagation_transformer", "noise_shift", "one_more_step", "golden_noise", "golden_noise_advanced", "redenoise",
    "zigzag", "signal_leak", "one_more_step_colour", "img2img", "few_step", "everything_at_once",
]  # fmt: skip
STOCK = ["first_picture", "flow_model"]
MEASURED = ["memory, MB", "objects", "tensors", "objects of Attune", "model patchers"]
SAVED = "long run"


def small(prompt: dict, seed: int, on: bool) -> dict:
    """A workflow at `SIDE` pixels and few steps; with `on` False, its methods at strength 0."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        given = node["inputs"]
        for name in given:
            if name in ("width", "height"):
                given[name] = SIDE
            elif name == "steps":
                given[name] = min(given[name], STEPS)
            elif name in ("seed", "noise_seed"):
                given[name] = seed
            elif name == "batch_size":
                given[name] = min(given[name], 2)
            elif not on and name in ("strength", "diversity") and node["class_type"].startswith("Attune"):
                given[name] = 0.0
            elif not on and name == "interval":
                given[name] = 1
    return prompt


@dataclass
class Server:
    """A running ComfyUI, and what every prompt drew in it: name -> digest of its pictures."""

    url: str
    output: Path
    drawn: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    compared: int = 0

    def run(self, named: list[tuple[str, dict]]) -> list[dict]:
        """All prompts in the queue at once; every picture is compared with those drawn before under its name."""
        queued = [ask(f"{self.url}/prompt", {"prompt": prompt})["prompt_id"] for _, prompt in named]
        return [self._wait(name, id) for (name, _), id in zip(named, queued, strict=True)]

    def _wait(self, name: str, id: str) -> dict:
        until = time.time() + 900
        while not (entry := ask(f"{self.url}/history/{id}").get(id)):
            assert time.time() < until, f"{name} did not end"
            time.sleep(0.01)
        assert entry["status"]["status_str"] == "success", (name, entry["status"]["messages"][-1])
        at = {event: data["timestamp"] for event, data in entry["status"]["messages"]}
        self.seconds.append((at["execution_success"] - at["execution_start"]) / 1000)
        pictures = self._take(entry["outputs"])
        if pictures:
            assert self.drawn.setdefault(name, pictures) == pictures, f"{name} drew another picture"
            self.compared += 1
        return entry["outputs"]

    def _take(self, outputs: dict) -> str:
        """A digest of the saved pictures, which are removed, with the host's memory of them."""
        digest = hashlib.sha256()
        images = [image for output in outputs.values() for image in output.get("images", [])]
        files = [self.output / image["subfolder"] / image["filename"] for image in images if image["type"] == "output"]
        for file in files:
            digest.update(np.asarray(Image.open(file)).tobytes())
        return digest.hexdigest() if files else ""

    def tidy(self) -> None:
        """The server keeps every prompt and its outputs for the page, and the disk every picture."""
        ask(f"{self.url}/history", {"clear": True})
        for file in self.output.rglob("*.png"):
            file.unlink()

    def counts(self) -> list[float]:
        outputs = self.run([("", {"1": {"class_type": "CountObjects", "inputs": {}}})])
        self.seconds.pop()
        memory, *objects = outputs[0]["1"]["counts"]
        return [memory / 1e6, *map(float, objects)]


def ask(url: str, body: dict | None = None) -> dict:
    """As dev.ask, with the patience that a busy machine needs."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
        return json.loads(answer.read() or b"{}")


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    """A server whose files are all in `folder`, with the node that counts."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert spec and spec.loader
    dev = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dev)
    (folder / "custom_nodes").mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("count_objects.py"), folder / "custom_nodes")
    host = dev.Host(os.environ["COMFYUI_PATH"])
    with dev.server(host, folder, "--base-directory", str(folder), *flags) as url:
        yield Server(url, folder / "output")


def stream(names: list[str], count: int) -> Iterator[tuple[str, dict]]:
    """Seeded prompts: a workflow, a seed, the methods on or off."""
    rng = random.Random(0)
    prompts = {name: json.loads((ROOT / "tests/prompts" / f"{name}.json").read_text("utf-8")) for name in names}
    for _ in range(count):
        name, seed, on = rng.choice(names), rng.randrange(SEEDS), rng.random() < 0.5
        yield f"{name}, seed {seed}, {'on' if on else 'off'}", small(prompts[name], seed, on)


def day(server: Server, names: list[str], count: int, minutes: float, say: Callable) -> list[list[float]]:
    """Run `count` prompts, two at a time, or as many as `minutes` allow; [prompts so far, *MEASURED] now and then."""
    until = time.time() + 60 * minutes
    prompts, counted, every = list(stream(names, count)), [], max(count // SAMPLES // 2 * 2, 2)
    for start in range(0, count, 2):
        if time.time() > until:
            break
        server.run(prompts[start : start + 2])
        if start % every == 0:
            server.tidy()
            counted.append([start + 2.0, *server.counts()])
            say(f"{start + 2} prompts, {counted[-1][1]:.0f} MB, {server.seconds[-1]:.2f} s")
    return counted


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Per 1,000 prompts: least squares, and its standard error with the residuals' own correlation allowed for."""
    x = (x - x.mean()) / 1000
    gain = float((x * y).sum() / (x * x).sum())
    rest = y - y.mean() - gain * x
    correlation = float((rest[1:] * rest[:-1]).sum() / max((rest * rest).sum(), 1e-30))
    variance = float((rest * rest).sum()) / max(len(x) - 2, 1) / float((x * x).sum())
    return gain, (variance * (1 + max(correlation, 0)) / (1 - min(max(correlation, 0), 0.99))) ** 0.5


def rows(label: str, counted: np.ndarray, seconds: list[float]) -> list[list]:
    """Table rows: what it is after the warm-up, and its slope."""
    begin = int(WARM_UP * len(counted))
    late, times = counted[begin:], np.array(seconds[int(WARM_UP * len(seconds)) :])
    series = {name: (late[:, 0], late[:, i + 1]) for i, name in enumerate(MEASURED)}
    series["seconds a prompt"] = (np.arange(len(times), dtype=float), times)
    found = []
    for name, (x, y) in series.items():
        gain, error = slope(x, y)
        found.append([label, name, float(np.median(y)), gain, error, 100 * gain / max(float(np.median(y)), 1e-9)])
    return found


def saved_profile(server: Server, save: bool) -> None:
    """Draw with a profile that this server, or an earlier one, has saved."""
    prompt = small(json.loads((ROOT / "tests/prompts/apply_profile.json").read_text("utf-8")), 1, True)
    loader = next(id for id, node in prompt.items() if node["class_type"] == "AttuneLoadProfile")
    if save:
        given = {"profile": [loader, 0], "name": SAVED}
        server.run([("", {**prompt, "save": {"class_type": "AttuneSaveProfile", "inputs": given}})])
    prompt[loader]["inputs"]["profile_name"] = f"{SAVED}.json"
    server.run([("the saved profile", prompt)])


def plot(results: dict[str, tuple[np.ndarray, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for label, (counted, seconds) in results.items():
        axes[0].plot(counted[:, 0], counted[:, 1], label=label, linewidth=1)
        axes[1].plot(counted[:, 0], counted[:, 3], label=label, linewidth=1)
        window = max(len(seconds) // 25, 1)
        middle = [float(np.median(seconds[i : i + window])) for i in range(0, len(seconds), window)]
        axes[2].plot(np.arange(len(middle)) * window, middle, label=label, linewidth=1)
    for axis, what in zip(axes, ("resident memory, MB", "living tensors", "seconds a prompt, median"), strict=True):
        axis.set(xlabel="prompts", ylabel=what, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop each server's prompts after so long")
    parser.add_argument(
        "--caches", nargs="*", default=["none", "lru 1", "lru 100"], help="ComfyUI's --cache-… to compare"
    )
    parser.add_argument("--control", type=int, default=500, help="prompts of stock nodes alone; 0: none")
    parser.add_argument("--cache", type=Path, help="not used: nothing here is worth keeping")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    say = lambda text: print(text, flush=True)
    short = min(max(args.prompts // 20, 4), 50)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(folder) as server:
            saved_profile(server, save=True)
            counted = np.array(day(server, WORKFLOWS, args.prompts, args.minutes, say))
            drawn, seconds, compared = server.drawn, server.seconds[2:], server.compared
        caches = []
        for cache in args.caches:
            with serving(folder, *f"--cache-{cache}".split()) as server:
                server.drawn = drawn
                saved_profile(server, save=False)  # by the server before the restart
                for start in range(0, len(prompts := list(stream(WORKFLOWS, short))), 2):
                    server.run(prompts[start : start + 2])
                caches.append([f"--cache-{cache}", server.compared, float(np.median(server.seconds))])
                say(f"{caches[-1]}")
        results = {"all methods": (counted, seconds)}
        if args.control:
            with serving(folder) as server:
                stock = np.array(day(server, STOCK, args.control, args.minutes, say))
                results["stock nodes alone"] = stock, server.seconds
    plot(results, args.out / "long_run.png")
    tables = [
        Table(
            f"Growth over {len(seconds)} prompts ({len(drawn)} different ones)",
            ["server", "what", "median", "per 1,000 prompts", "standard error", "per cent"],
            [row for label, (counts, times) in results.items() for row in rows(label, counts, times)],
            f"Without the first {100 * WARM_UP:.0f} %. The error allows for the correlation of neighbouring samples.",
        ),
        Table(
            "The same picture every time",
            ["server", "pictures compared", "seconds a prompt"],
            [["as it comes", compared, float(np.median(seconds))], *caches],
            "All are equal, bit for bit, to the first server's; each server but the first began by drawing with the "
            "profile that the first one had saved.",
        ),
    ]
    notes = [" ".join(part.split()) for part in __doc__.split("\n\n")[1:]]
    data = {label: {"counted": counts.tolist(), "seconds": times} for label, (counts, times) in results.items()}
    record("long_run", "Many prompts on one server", tables, began, ["long_run.png"], notes, args.out, data)
    print("\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
