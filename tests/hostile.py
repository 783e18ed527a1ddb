"""Hostile files: seeded mutations of good ones, and a watch over what reading them does to the machine."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TRICKS = [
    "../../outside",
    "/outside",
    "..\\outside",
    "C:\\outside",
    "a\0b",
    "~/outside",
    "con",
    "",
    "x" * 300,
    "\ud800",
]
VALUES = [
    None, True, -1, 0, 1, 2**63, 1e308, 10**400, "", "x" * 600, [], {}, [[]], [None], [1, 2], {"a": 1}, [1e400], "ve",
    "\ud800", float("nan"), float("-inf"), [0.5] * 3, "../x", [[0]] * 1000, "9" * 5000, "1e999", "[" * 3000,
]  # fmt: skip
BOMBS = [
    b"[" * 200_000, b'{"a":' * 100_000, b"[" * 200_000 + b"]" * 200_000, b"9" * 100_000, b"1e999", b'"' + b"\\u0000" * 1000,
    b"-", b"NaN", b'{"format": NaN}', b"\xff\xfe{", b"\xef\xbb\xbf{}", b"null", b"0", b'""', b"[]", b"{}", b"",
    b'{"a": 1, "a": 2}', b"{" + b'"k": 0, ' * 50_000 + b'"k": 0}',
]  # fmt: skip
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2,
    "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip


# --- mutations ---


def changed(rng: random.Random, value: Any) -> Any:
    """One random change somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        new = {**value, key: changed(rng, value[key])}
        return {k: v for k, v in new.items() if k != key} if rng.random() < 0.15 else new
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], changed(rng, value[i]), *value[i + rng.choice([0, 1, 1]) :]]
    return rng.choice(VALUES)


def broken_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, flipped, repeated, zeroed or foreign bytes."""
    at, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 8, 100, 5000])
    kind = rng.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[at:]
    if kind == 2:
        return content[:at] + rng.randbytes(n) + content[at + n :]
    if kind == 3:
        return content[:at] + bytes(n) + content[at + n :]
    if kind == 4:
        return content[:at] + content[at : at + n] * 2 + content[at + n :]
    if kind == 5:
        return content[:at] + content[at + n :]
    return rng.choice(BOMBS)


def hostile_json(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.25:
        return broken_bytes(rng, content)
    fields = json.loads(content)
    fields.pop("id", None)
    for _ in range(rng.choice([1, 1, 1, 3])):
        fields = changed(rng, fields)
    text = json.dumps(fields)
    if rng.random() < 0.1 and ", " in text:  # a key twice
        one = text.split(", ")[0].lstrip("{")
        text = text[:-1] + f", {one}" + text[-1]
    return text.encode()


def hostile_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Of the bytes, of the header's length, of its text, of one tensor's entry, of the metadata or of the numbers."""
    n = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + n]), content[8 + n :]
    kind = rng.choice(
        ["bytes", "length", "text", "entry", "entry", "legal", "legal", "metadata", "metadata", "numbers"]
    )
    if kind == "bytes":
        return broken_bytes(rng, content)
    if kind == "length":
        length = rng.choice([0, 1, n - 1, n + 1, len(content), 2 * len(content), 10**8 + 1, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + content[8:]
    if kind == "text":
        return _assembled(rng.choice([*BOMBS, broken_bytes(rng, content[8 : 8 + n])]), data)
    if kind == "numbers":
        at, bad = rng.randrange(max(len(data) - 8, 1)), rng.choice([b"\xff" * 8, b"\0\0\xc0\x7f" * 2, b"\xff\x7f" * 4])
        return content[: 8 + n] + data[:at] + bad + data[at + 8 :]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if kind == "legal":  # what the library takes: the same bytes as other numbers in another shape
        header[name] = _other_numbers(rng, header[name])
    elif kind == "entry":
        header = _other_entry(rng, header, name, names, len(data))
    else:
        header["__metadata__"] = _other_metadata(rng, header.get("__metadata__", {}))
    return _assembled(json.dumps(header).encode(), data)


def _assembled(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _other_numbers(rng: random.Random, entry: dict) -> dict:
    start, end = entry["data_offsets"]
    dtype = rng.choice(list(DTYPES))
    count = (end - start) // DTYPES[dtype]
    shapes = [
        [count],
        [count, 1],
        [1, count],
        [1] * 6 + [count],
        entry["shape"][::-1],
        [*entry["shape"], 1],
        entry["shape"],
    ]
    if rng.random() < 0.2:
        return {**entry, "shape": rng.choice([[0], [0, 2**40], [2**31, 0, 4, 4]]), "data_offsets": [start, start]}
    return {**entry, "dtype": rng.choice([dtype, entry["dtype"]]), "shape": rng.choice(shapes)}


def _other_entry(rng: random.Random, header: dict, name: str, names: list[str], size: int) -> dict:
    entry = header[name]
    start, end = entry["data_offsets"]
    kind = rng.randrange(7)
    if kind == 0:
        return {key: value for key, value in header.items() if key != name}
    if kind == 1:
        new = rng.choice([*TRICKS, rng.choice(names) + ".0", f"layers.{10**30}.w"])
        return {new if key == name else key: value for key, value in header.items()}
    if kind == 2:
        return {**header, rng.choice(TRICKS): entry}
    if kind == 3:
        offsets = [[start, 2**62], [end, start], [-1, end], [0, size], [size, size + 8], [start], "x", [0.5, 1]]
        return {**header, name: {**entry, "data_offsets": rng.choice(offsets)}}
    if kind == 4:
        shapes = [[2**62], [2**33, 2**33], [-1], [], [1e9], entry["shape"] * 2, "x", None, [10**30], [True]]
        return {**header, name: {**entry, "shape": rng.choice(shapes)}}
    if kind == 5:
        return {**header, name: {**entry, "dtype": rng.choice(["F4", "OBJECT", "", 5, None, "f32", "F128"])}}
    return {**header, name: changed(rng, entry)}


def _other_metadata(rng: random.Random, metadata: dict) -> Any:
    if not metadata or rng.random() < 0.15:
        return changed(rng, metadata)
    key = rng.choice(list(metadata))
    text = str(metadata[key])
    with contextlib.suppress(ValueError):
        if rng.random() < 0.5:
            return {**metadata, key: json.dumps(changed(rng, json.loads(text)))}
    tricks = [
        "",
        "-1",
        "1e999",
        "nan",
        "[]",
        "{}",
        "null",
        "[[1]]",
        "9" * 5000,
        "[" * 20000,
        "\0",
        text[:-1],
        text * 2,
        *TRICKS,
    ]
    return rng.choice([{**metadata, key: rng.choice(tricks)}, {k: v for k, v in metadata.items() if k != key}])


class Code:
    """A pickle that runs something when it is read; the canary is a file."""

    def __init__(self, canary: Path, kind: int):
        self.canary, self.kind = str(canary), kind

    def __reduce__(self):
        import builtins
        import shutil

        touch = f"open({self.canary!r}, 'w')"
        return [
            (os.system, (f"echo ran > {self.canary}",)),
            (builtins.eval, (touch,)),
            (builtins.exec, (touch,)),
            (builtins.open, (self.canary, "w")),
            (os.mkdir, (self.canary,)),
            (shutil.rmtree, (self.canary,)),
            (torch.load, (self.canary,)),
            (torch.save, ([], self.canary)),
        ][self.kind % 8]


def hostile_pickle(rng: random.Random, content: bytes, canary: Path) -> bytes:
    """Of the bytes, of the archive's parts, or of the objects in it."""
    kind = rng.choice(["bytes", "parts", "parts", "objects", "objects", "code"])
    if kind == "bytes":
        return broken_bytes(rng, content)
    if kind == "code":
        evil = Code(canary, rng.randrange(8))
        if rng.random() < 0.3:
            return pickle.dumps(evil)
        return _saved(rng.choice([evil, {"alpha": evil}, {evil.canary: evil}, [evil]]), rng)
    if kind == "parts":
        return _other_parts(rng, content, canary)
    weights = torch.load(io.BytesIO(content), weights_only=True)
    return _saved(_other_object(rng, weights), rng)


def _saved(thing: Any, rng: random.Random) -> bytes:
    out = io.BytesIO()
    torch.save(thing, out, _use_new_zipfile_serialization=rng.random() < 0.9)
    return out.getvalue()


def _other_parts(rng: random.Random, content: bytes, canary: Path) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [[info.filename, archive.read(info)] for info in archive.infolist()]
    i, stored = rng.randrange(len(parts)), zipfile.ZIP_STORED
    index = next(n for n, part in enumerate(parts) if part[0].endswith("data.pkl"))
    kind = rng.randrange(7)
    if kind == 0:
        del parts[i]
    elif kind == 1:
        parts[i][0] = rng.choice([f"../../{canary.name}", str(canary), "archive/data/../../x", parts[i - 1][0], "\xff"])
    elif kind == 2:
        parts[i][1] = rng.choice([b"", parts[i][1][:-1], parts[i][1] * 2, bytes(10**6)])
    elif kind == 3:
        parts[index][1] = broken_bytes(rng, parts[index][1])
    elif kind == 4:
        parts[index][1] = pickle.dumps(Code(canary, rng.randrange(8)), protocol=2)
    elif kind == 5:
        parts += [[f"archive/data/{10**6 + n}", b"\0" * 10] for n in range(300)]
    else:
        stored = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        parts.append(["archive/data/99999", bytes(10**6)])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", stored) as archive:
        for name, data in parts:
            archive.writestr(name, data)
    return out.getvalue()


def _other_object(rng: random.Random, weights: dict) -> Any:
    weights = {f"{k}.{i}": v for k, part in weights.items() if isinstance(part, dict) for i, v in part.items()} | {
        key: value for key, value in weights.items() if not isinstance(value, dict)
    }
    name = rng.choice(list(weights))
    tensor, n = weights[name].detach(), 10 ** rng.choice([3, 6, 9, 12, 15])
    one, wide = torch.ones(1), torch.ones(1).expand(n)
    things = [
        wide, wide[None], wide.expand(64, n), one.expand(tensor.shape or (5,)), tensor.to_sparse(), torch.empty(n, device="meta"),
        tensor.to(torch.int64), tensor.to(torch.complex64), tensor.to(torch.float8_e4m3fn), tensor.bool(), tensor.double(),
        torch.empty(tensor.shape, device="meta"), torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([one, one]), torch.nn.Parameter(tensor.clone(), requires_grad=False), tensor.as_strided((2, 2), (0, 0)),
        tensor.flatten(), tensor[None], tensor * float("nan"), torch.ones(0), tensor.numpy().tolist(), 5, "x", None, [tensor],
        {"a": {"b": {"c": tensor}}}, torch.device("cpu"), torch.float32, torch.Size([1]), float("nan"), 10**400,
    ]  # fmt: skip
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(things)
    if kind == 1:
        return (
            {**weights, name: rng.choice(things)}
            if rng.random() < 0.7
            else {"state_dict": {**weights, name: rng.choice(things)}}
        )
    if kind == 2:
        return {**weights, rng.choice([*TRICKS, 5, None, (1, 2), 1.5, True]): rng.choice(things)}
    if kind == 3:
        return {key: value for key, value in weights.items() if key != name}
    if kind == 4:  # a small file of a consistent, huge network
        n, hidden = min(n, 10**9), weights["unet_svd.mlp4.0.weight"].shape[0]
        big = lambda shape: torch.tensor(1.0).expand([n if size == hidden else size for size in shape])
        return {key: big(value.shape) for key, value in weights.items()}
    nested: Any = copy.copy(weights)
    for _ in range(rng.choice([1, 50, 300])):
        nested = {"a": nested}
    if rng.random() < 0.3:
        nested["self"] = nested
    return nested


def hostile_npz(rng: random.Random, content: bytes, canary: Path) -> bytes:
    """Of the bytes, of the archive's parts, or of an array's header."""
    kind = rng.choice(["bytes", "parts", "header", "header"])
    if kind == "bytes":
        return broken_bytes(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    name = rng.choice(list(parts))
    if kind == "parts":
        other = rng.choice([f"../../{canary.name}", str(canary), "arr_0", "arr_1.npy", "x.pkl"])
        changes = [{other: parts[name]}, {name: broken_bytes(rng, parts[name])}, {name: bytes(70 << 20)}, {name: b""}]
        parts |= rng.choice(changes)
        if rng.random() < 0.3:
            del parts[name]
    else:
        shapes = [
            "()",
            "(0,)",
            "(1, 4, 4)",
            "(1, 4, 4, 4)",
            "(10**12,)",
            "(1000000000000,)",
            "(-1,)",
            "x",
            "(1e9,)",
            "(True,)",
        ]
        types = ["<f4", "<f8", "<f2", "|O", "<i8", "<c8", "|S9", "|b1", "<f16", "x", "[('a', '<f4')]", "<M8[s]", ">f4"]
        header = f"{{'descr': '{rng.choice(types)}', 'fortran_order': {rng.choice(['False', 'True', '0'])}, "
        header = (header + f"'shape': {rng.choice(shapes)}, }}").encode() + b"\n"
        body = rng.choice([bytes(256), pickle.dumps(Code(canary, rng.randrange(8))), b"", b"\xff" * 256])
        parts[name] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])) as archive:
        for key, data in parts.items():
            archive.writestr(key, data)
    return out.getvalue()


# --- the watch ---

FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "subprocess.", "socket.", "shutil.", "os.remove",
             "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.putenv")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SEEN: list[str] = []
watching = False


def _audit(event: str, arguments: tuple) -> None:
    if not watching:
        return
    wrote = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    ran = event == "compile" and len(arguments) > 1 and arguments[1] == "<string>"
    if wrote or ran or event.startswith(FORBIDDEN):
        SEEN.append(f"{event} {arguments}"[:200])
        raise AssertionError(SEEN[-1])


@contextlib.contextmanager
def watched(memory: int, seconds: int = 10) -> Iterator[None]:
    """Reading may run no code, write no file, take no more than `memory` bytes and end in time; else it fails.

    The events are those of Python's audit hooks; the memory is a limit on the process's address space (Linux).
    """
    global watching
    if not getattr(sys, "attune_audit", False):
        sys.addaudithook(_audit)  # for good: Python has no way to take it off
        sys.attune_audit = True  # type: ignore[attr-defined]
    SEEN.clear()
    watching = True
    try:
        with _limited(memory), _timed(seconds):
            yield
    finally:
        watching = False
        assert not SEEN, SEEN


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """For a test's own writing."""
    global watching
    before, watching = watching, False
    try:
        yield
    finally:
        watching = before


@contextlib.contextmanager
def _limited(memory: int) -> Iterator[None]:
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _timed(seconds: int) -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_):
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
