#!/usr/bin/env python3
"""A day of use in minutes: 1,000 prompts through a real server, methods on and off in turn, from two pages at once.

Small pictures and few steps of all shipped workflows, and in between each fit and each training twice. Watched from
outside: memory, living objects and seconds per prompt, with the slope of each after a warm-up; that each page hears of
its own prompts and of no other; and that the same prompt gives the same picture every time, also under ComfyUI's other
caches, and after a restart with what was saved and learned. The same server with stock nodes alone is the control.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import hashlib
import importlib.util
import json
import math
import os
import random
import secrets
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path

import aiohttp
import numpy as np
from PIL import Image

from comfy_process import ROOT
from results import DOCS, Table, markdown, record

SIDE, STEPS, FRAMES, SEEDS, SAMPLES = 64, 4, 29, 3, 50
WARM_UP = 0.2  # of the prompts: what grows there are caches of the host and of the allocator
WORKFLOWS = [
    "first_picture", "flow_model", "aligned_ksampler", "aligned_schedule", "apply_profile", "attention",
    "calibration_set", "compare_profile", "draft_seeds", "everything_at_once", "fast_sampler", "few_step",
    "golden_noise", "golden_noise_advanced", "img2img", "long_video", "noise_mask", "noise_shift", "noise_space",
    "noise_space_keep", "noise_space_morph", "noise_space_variation", "one_more_step", "one_more_step_colour",
    "one_more_step_few_steps", "precision", "propagation", "propagation_controlnet", "propagation_transformer",
    "redenoise", "signal_leak", "timestep_field", "training_noise", "zigzag",
]  # fmt: skip
FITS = [
    "align_timesteps", "fit_attention", "fit_fast", "fit_noise_shift", "fit_propagation", "fit_sampler", "protect",
    "share_a_profile", "train_npnet", "train_one_more_step",
]  # fmt: skip
PATIENCE = 900  # seconds that two prompts may take
FIT_EVERY = 20  # prompts at least: fits and trainings take long
STOCK = ["first_picture", "flow_model"]
MEASURED = ["memory, MB", "objects", "tensors", "objects of Attune", "model patchers"]
SAVED = "long run"
LEARNING = {"AttuneFastSampler": {"evaluations": 4, "fidelity": 10.0}, "AttuneDraftSeeds": {"drafts": 4}}
LEARNED_STEPS, FITTED_PICTURES = 12, 8  # of a run that is to be made shorter, and of what is fitted
OFF = {  # settings that leave the picture as it is without the node
    "AttuneAttentionBySigma": {"kernel": "stock"}, "AttuneFastSampler": {"use": "full run"},
    "AttuneProtectImage": {"budget": 0},
}  # fmt: skip


def small(prompt: dict, seed: int, on: bool) -> dict:
    """A workflow at `SIDE` pixels and few steps; with `on` False, its methods at strength 0. Where a picture is put
    into another one, both keep their size."""
    prompt = copy.deepcopy(prompt)
    placed = any("x" in node["inputs"] for node in prompt.values())
    learns = any(node["class_type"].startswith((*LEARNING, "AttuneFit", "AttuneTrain")) for node in prompt.values())
    for node in prompt.values():
        given, kind = node["inputs"], node["class_type"]
        for name in given:
            if name in ("width", "height") and not placed:
                given[name] = SIDE
            elif name == "steps":
                given[name] = min(given[name], LEARNED_STEPS if learns else STEPS)
            elif name in ("seed", "noise_seed") and not isinstance(given[name], list):
                given[name] = seed
            elif name == "sizes":
                given[name] = f"{SIDE}x{SIDE}"
            elif name == "length":
                given[name] = min(given[name], FRAMES)
            elif name == "batch_size":
                given[name] = min(given[name], FITTED_PICTURES if learns else 2)
            elif not on and name in ("strength", "diversity") and kind.startswith("Attune"):
                given[name] = 0.0
            elif not on and name == "interval":
                given[name] = 1
        given |= {**LEARNING.get(kind, {}), **({} if on else OFF.get(kind, {}))}
    return prompt


class Page(threading.Thread):
    """An open page: it hears what the server sends to it, until the server ends."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.client_id = url, secrets.token_hex(8)
        self.ended: list[str] = []  # prompts, since it was last asked
        self._known: set[str] = set()  # of a prompt with a blocked part the host says an error, and later its success
        self.pictures = 0  # shown while nodes run
        self.connected, self._told = threading.Event(), threading.Condition()
        self.start()
        assert self.connected.wait(300), "the server does not answer a page"

    def run(self) -> None:
        with suppress(aiohttp.ClientError, ConnectionError):
            asyncio.run(self._listen())

    def heard(self, prompts: list[str]) -> None:
        """AssertionError unless the page hears of the end of these prompts and of no other since it was last asked."""
        with self._told:
            self._told.wait_for(lambda: len(self.ended) >= len(prompts), PATIENCE)
            assert self.ended == prompts, f"a page heard of {self.ended}, but its prompts were {prompts}"
            self.ended.clear()

    async def _listen(self) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={self.client_id}", max_msg_size=0) as socket,
        ):
            self.connected.set()
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    self.pictures += 1
                elif message.type == aiohttp.WSMsgType.TEXT:
                    said = json.loads(message.data)
                    if said["type"] in ("execution_success", "execution_error"):
                        self._end(said["data"]["prompt_id"])

    def _end(self, prompt: str) -> None:
        with self._told:
            if prompt not in self._known:
                self._known.add(prompt)
                self.ended.append(prompt)
                self._told.notify()


@dataclass
class Server:
    """A running ComfyUI, and what every prompt drew in it: name -> digest of its pictures."""

    url: str
    output: Path
    pages: list[Page] = field(default_factory=list)
    drawn: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    compared: int = 0
    faults: list[str] = field(default_factory=list)

    def run(self, named: list[tuple[str, dict]]) -> list[dict]:
        """All prompts in the queue at once, from the pages in turn; every picture is compared with those drawn before
        under its name."""
        pages = [page for page, _ in zip(cycle(self.pages or [None]), named, strict=False)]
        queued = [self._queue(prompt, page) for (_, prompt), page in zip(named, pages, strict=True)]
        for page in self.pages:
            page.heard([id for id, its in zip(queued, pages, strict=True) if its is page])
        return [self._wait(name, id) for (name, _), id in zip(named, queued, strict=True)]

    def _queue(self, prompt: dict, page: Page | None) -> str:
        whose = {"client_id": page.client_id} if page else {}
        return ask(f"{self.url}/prompt", {"prompt": prompt, **whose})["prompt_id"]

    def _wait(self, name: str, id: str) -> dict:
        until = time.time() + PATIENCE
        while not (entry := ask(f"{self.url}/history/{id}").get(id)):
            assert time.time() < until, f"{name} did not end"
            time.sleep(0.01)
        if entry["status"]["status_str"] != "success":
            self._fault(f"{name}: {entry['status']['messages'][-1]}")
            return entry["outputs"]
        at = {event: data["timestamp"] for event, data in entry["status"]["messages"]}
        self.seconds.append((at["execution_success"] - at["execution_start"]) / 1000)
        pictures = self._take(entry["outputs"])
        if pictures:
            if self.drawn.setdefault(name, pictures) != pictures:
                self._fault(f"{name} drew another picture")
            self.compared += 1
        return entry["outputs"]

    def _fault(self, what: str) -> None:
        """Said at once; the day goes on, so that it tells all of them."""
        print(what, flush=True)
        self.faults.append(what)

    def _take(self, outputs: dict) -> str:
        """A digest of the saved pictures, in the order of their nodes: they end in another one with another cache."""
        digest = hashlib.sha256()
        images = [image for _, output in sorted(outputs.items()) for image in output.get("images", [])]
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
    dev.wait_for_server = partial(dev.wait_for_server, seconds=PATIENCE)
    (folder / "custom_nodes").mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("count_objects.py"), folder / "custom_nodes")
    host = dev.Host(os.environ["COMFYUI_PATH"])
    shown = ("--preview-method", "latent2rgb")
    with dev.server(host, folder, "--base-directory", str(folder), *shown, *flags) as url:
        server = Server(url, folder / "output", [Page(url), Page(url)])
        yield server
    assert not server.faults, f"{len(server.faults)} prompts failed; the first: {server.faults[0]}"


def prompt_of(name: str) -> dict:
    return json.loads((ROOT / "tests/prompts" / f"{name}.json").read_text("utf-8"))


def stream(names: list[str], count: int, fits: list[str]) -> Iterator[tuple[str, dict]]:
    """Seeded prompts: a workflow, a seed, the methods on or off; now and then one of `fits`, each twice in the end."""
    rng, turn, every = random.Random(0), cycle(fits), max(count // (2 * len(fits) or 1), FIT_EVERY)
    prompts = {name: prompt_of(name) for name in [*names, *fits]}
    for i in range(count):
        name, seed, on = rng.choice(names), rng.randrange(SEEDS), rng.random() < 0.5
        if fits and i % every == every // 2:
            name, seed, on = next(turn), 1, True
        yield f"{name}, seed {seed}, {'on' if on else 'off'}", small(prompts[name], seed, on)


def day(
    server: Server, names: list[str], count: int, minutes: float, say: Callable, fits: list[str] | None = None
) -> list[list[float]]:
    """Run `count` prompts, two at a time, or as many as `minutes` allow; [prompts so far, *MEASURED] now and then."""
    until = time.time() + 60 * minutes
    prompts, counted, every = list(stream(names, count, fits or [])), [], max(count // SAMPLES // 2 * 2, 2)
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


def saved_before(server: Server, save: bool) -> None:
    """Draw with a profile that this server, or an earlier one, has saved, and with what it has learned."""
    prompt = small(prompt_of("apply_profile"), 1, True)
    loader = next(id for id, node in prompt.items() if node["class_type"] == "AttuneLoadProfile")
    learn = small(prompt_of("fast_sampler"), 1, True)
    if save:
        given = {"profile": [loader, 0], "name": SAVED}
        server.run([("", {**prompt, "save": {"class_type": "AttuneSaveProfile", "inputs": given}})])
        server.run([("the run that is learned from", learn)])
    prompt[loader]["inputs"]["profile_name"] = f"{SAVED}.json"
    server.run([("the saved profile", prompt), ("what was learned", learn)])
    server.seconds.clear()


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


def first_day(folder: Path, count: int, minutes: float, say: Callable) -> dict:
    """All methods, on the server that saves and learns."""
    with serving(folder) as server:
        saved_before(server, save=True)
        counted = day(server, WORKFLOWS, count, minutes, say, FITS)
        shown = sum(page.pictures for page in server.pages)
        return {"counted": counted, "seconds": server.seconds, "drawn": server.drawn, "compared": server.compared,
                "shown": shown}  # fmt: skip


def restarted(folder: Path, cache: str, drawn: dict[str, str], count: int, minutes: float) -> list:
    """A server with another cache, on the files of the first one: it must draw the same."""
    with serving(folder, *f"--cache-{cache}".split()) as server:
        server.drawn = dict(drawn)
        saved_before(server, save=False)  # by the server before the restart
        until, prompts = time.time() + 60 * minutes / 4, list(stream(WORKFLOWS, count, []))
        for start in range(0, count, 2):
            if time.time() < until:
                server.run(prompts[start : start + 2])
        return [f"--cache-{cache}", server.compared, float(np.median(server.seconds))]


def control(folder: Path, count: int, minutes: float, say: Callable) -> dict:
    with serving(folder) as server:
        return {"counted": day(server, STOCK, count, minutes, say), "seconds": server.seconds}


def kept(path: Path, make: Callable):
    """What `make` gave, or gave when it was last run: a server's part of the day lies in a file once it has ended."""
    if not path.exists():
        path.write_text(json.dumps(make()), "utf-8")
    return json.loads(path.read_text("utf-8"))


@contextmanager
def files(cache: Path | None) -> Iterator[Path]:
    if cache:
        (cache / "long_run").mkdir(parents=True, exist_ok=True)
        yield cache / "long_run"
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop each server's prompts after so long")
    parser.add_argument(
        "--caches", nargs="*", default=["none", "lru 1", "lru 100"], help="ComfyUI's --cache-… to compare"
    )
    parser.add_argument("--control", type=int, default=500, help="prompts of stock nodes alone; 0: none")
    parser.add_argument(
        "--cache", type=Path, help="keep the servers' files and parts here, and go on from those that ended"
    )
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    say = lambda text: print(text, flush=True)
    short = min(max(args.prompts // 20, 4), 50)
    with files(args.cache) as folder:
        whole = kept(folder / "day.json", lambda: first_day(folder, args.prompts, args.minutes, say))
        drawn, seconds = whole["drawn"], whole["seconds"]
        results = {"all methods": (np.array(whole["counted"]), seconds)}
        caches = []
        for cache in args.caches:
            part = partial(restarted, folder, cache, drawn, short, args.minutes)
            caches.append(kept(folder / f"{cache}.json", part))
            say(f"{caches[-1]}")
        if args.control:
            stock = kept(folder / "stock.json", lambda: control(folder, args.control, args.minutes, say))
            results["stock nodes alone"] = np.array(stock["counted"]), stock["seconds"]
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
            [["as it comes", whole["compared"], float(np.median(seconds))], *caches],
            "All are equal, bit for bit, to the first server's; each server but the first began by drawing with the "
            "profile that the first one had saved, and with what it had learned. Each of two pages heard of the end of "
            f"its own prompts and of no other; the first server showed them {whole['shown']} pictures while it worked.",
        ),
    ]
    notes = [" ".join(part.split()) for part in __doc__.split("\n\n")[1:]]
    data = {label: {"counted": counts.tolist(), "seconds": times} for label, (counts, times) in results.items()}
    record("long_run", "Many prompts on one server", tables, began, ["long_run.png"], notes, args.out, data)
    print("\n".join(map(markdown, tables)))


if __name__ == "__main__":
    main()
