"""Golden noise on other sizes, what it asks of prompts and latents, and weight files of every kind, hostile ones too."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import npnets
from pack.kernels.golden_noise import mix, refine_in_windows, windows
from pack.models.npnet import NPNetConfig, prompt_texts
from pack.models.npnet_files import load_npnet, read_config, save_npnet
from pack.nodes._plan.golden_noise import GoldenSettings, check_size, golden_noise

SIZES = [(16, 16), (14, 18), (19, 13), (8, 8), (24, 24), (32, 20), (33, 50), (5, 40)]


def noise(h: int, w: int, batch: int = 1, seed: int = 0):
    return torch.randn(batch, 4, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_a_network_that_changes_nothing_gives_the_noise_to_the_bit(size):
    x = noise(*size)
    assert torch.equal(refine_in_windows(x, 16, lambda window: window.clone()), x)


@pytest.mark.parametrize("size", SIZES)
def test_a_correction_that_is_everywhere_the_same_stays_so(size):
    x = noise(*size)
    out = refine_in_windows(x, 16, lambda window: window + 0.5)
    torch.testing.assert_close(out - x, torch.full_like(x, 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [16, 17, 24, 31, 32, 33, 47, 48, 49, 100])
def test_windows_cover_the_axis_with_weights_that_sum_to_one(length):
    total = torch.zeros(length, dtype=torch.float64)
    parts = windows(length, 16, total)
    for start, weight in parts:
        total[start : start + 16] += weight
    torch.testing.assert_close(total, torch.ones_like(total))
    assert len(parts) == -(-length // 16) and parts[-1][0] == length - 16


@pytest.mark.parametrize("size", [(112, 144), (64, 64), (192, 192), (256, 160)])
def test_windows_leave_the_noise_white(size):
    # Resizing noise instead correlates neighbours by 0.12 to 0.5.
    out = refine_in_windows(noise(*size), 128, lambda window: 1.1 * window)
    for axis in (2, 3):
        a, b = out.narrow(axis, 0, out.shape[axis] - 1), out.narrow(axis, 1, out.shape[axis] - 1)
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02


def test_the_networks_own_size_is_one_direct_call():
    net, (x, text) = npnets.seeded(npnets.TINY), npnets.tiny_inputs()
    assert torch.equal(refine_in_windows(x, 16, lambda window: net(window, text)), net(x, text))


def test_strength_is_linear_and_exact_at_its_ends():
    a, b = noise(16, 16), noise(16, 16, seed=1)
    assert mix(a, b, 0) is a and mix(a, b, 1) is b
    torch.testing.assert_close(mix(a, b, 1.5), a + 1.5 * (b - a))


@pytest.fixture(scope="module")
def net():
    return npnets.seeded(npnets.TINY)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_a_sample_is_the_same_alone_in_a_batch_and_again(net, size):
    x, (_, text) = noise(*size, batch=3), npnets.tiny_inputs(3)
    before = torch.get_rng_state()
    together = golden_noise(net, x, [text], GoldenSettings())
    assert torch.equal(torch.get_rng_state(), before)
    for i in range(3):
        assert torch.equal(golden_noise(net, x[i : i + 1], [text[i : i + 1]], GoldenSettings()), together[i : i + 1])


def test_strength_zero_and_zeros_stay_as_they_are(net):
    x, text = npnets.tiny_inputs()
    assert golden_noise(net, x, [text], GoldenSettings(strength=0)) is x
    assert not golden_noise(net, torch.zeros_like(x), [text], GoldenSettings()).any()
    half, whole = (golden_noise(net, x, [text], GoldenSettings(strength=s)) for s in (0.5, 1.0))
    torch.testing.assert_close(half, (x + whole) / 2)


def test_one_frame_is_a_picture_and_two_are_not(net):
    x, text = npnets.tiny_inputs()
    out = golden_noise(net, x[:, :, None], [text], GoldenSettings())
    assert torch.equal(out[:, :, 0], golden_noise(net, x, [text], GoldenSettings()))
    with pytest.raises(ValueError, match=r"latents of pictures, .* but got \[1, 4, 2, 16, 16\]"):
        check_size(net.config, (1, 4, 2, 16, 16), "windows")


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((1, 16, 128, 128), "windows", "needs latents of 4 channels, but this model's latent has 16"),
        (
            (1, 4, 112, 144),
            "refuse",
            r"128 x 128 latents \(1024 x 1024 px\), but the sampler got 112 x 144. Set 'other_sizes'",
        ),
        ((1, 1, 4096), "windows", r"latents of pictures, .* but got a video with its sound"),
        ((1, 16, 21, 60, 104), "windows", r"latents of pictures, .* but got \[1, 16, 21, 60, 104\]"),
    ],
)
def test_latents_that_do_not_fit_are_refused_with_both_sizes(shape, sizes, message):
    with pytest.raises(ValueError, match=message):
        check_size(NPNetConfig(), shape, sizes)


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        (NPNetConfig(), (1, 77, 768), r"77 x 2048 prompt embeddings \(SDXL family\), but the conditioning has 77 x 768.*Redenoise"),
        (NPNetConfig(), (1, 40, 2048), "needs 77 tokens of a prompt, but the conditioning has 40 tokens"),
        (NPNetConfig(), None, "holds no encoded text. Connect CLIP Text Encode"),
        (NPNetConfig(text="pooled", width=768), (1, 77, 768), "needs the pooled embedding of the prompt, but the conditioning has none"),
        (NPNetConfig(text="mean", width=64), (1, 3, 32), "expects n x 64"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_refused_with_both_sizes(config, tokens, message):
    with pytest.raises(ValueError, match=message):
        prompt_texts(config, None if tokens is None else torch.zeros(tokens), None, "first part")


def test_a_pooled_embedding_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"pooled embeddings of 768 numbers, but the conditioning has 1280"):
        prompt_texts(NPNetConfig(text="pooled", width=768), None, torch.zeros(1, 1280), "first part")


def test_a_long_prompt_is_cut_or_averaged_over_its_parts(net):
    x, text = npnets.tiny_inputs()
    _, other = npnets.tiny_inputs(seed=1)
    long = torch.cat([text, other], dim=1)
    first = prompt_texts(net.config, long, None, "first part")
    assert len(first) == 1 and torch.equal(first[0], text.flatten(1))
    mean = golden_noise(net, x, prompt_texts(net.config, long, None, "average"), GoldenSettings())
    both = [golden_noise(net, x, [part], GoldenSettings()) for part in (text, other)]
    torch.testing.assert_close(mean, (both[0] + both[1]) / 2)


def test_a_damaged_network_is_named(net):
    broken = npnets.seeded(npnets.TINY)
    broken.alpha.fill_(float("nan"))
    x, text = npnets.tiny_inputs()
    with pytest.raises(ValueError, match="noise that is not finite"):
        golden_noise(broken, x, [text], GoldenSettings())


def write(folder, name: str, weights: dict, **facts: str):
    path = folder / name
    if path.suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata=facts or None)
    return path


FLAT = {"text_tokens": "16"}


@pytest.mark.parametrize(("layout", "file"), [("asagi4", "a.safetensors"), ("LucipherDev", "b.safetensors")])
def test_the_published_layouts_are_the_same_network(net, tmp_path, layout, file):
    loaded = load_npnet(write(tmp_path, file, npnets.layouts(net)[layout], **FLAT))
    x, text = npnets.tiny_inputs()
    assert torch.equal(loaded.net(x, text), net(x, text)) and not any(m.training for m in loaded.net.modules())
    assert not any(parameter.requires_grad for parameter in loaded.net.parameters())


def test_the_authors_own_files_and_prefixed_ones_load_too(tmp_path):
    # 2048 numbers are no multiple of 77 tokens of a tiny width, so this network reads 77 of 4.
    small = npnets.seeded(replace(npnets.TINY, tokens=77, width=4))
    layouts = npnets.layouts(small)
    x, text = npnets.tiny_inputs()[0], torch.randn(1, 77, 4)
    for weights in (layouts["official"], layouts["asagi4"], {f"module.{k}": v for k, v in layouts["asagi4"].items()}):
        loaded = load_npnet(write(tmp_path, "x.pth", weights))
        assert loaded.net.config == small.config and torch.equal(loaded.net(x, text), small(x, text))


def test_names_of_old_timm_versions_load(tmp_path):
    deep = npnets.seeded(replace(npnets.TINY, swin_depths=(1, 2, 1), swin_heads=(1, 2, 4)))
    renamed = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace(
            "layers.2.downsample", "layers.1.downsample"
        ): v
        for key, v in deep.state_dict().items()
    }
    assert set(renamed) != set(deep.state_dict())
    renamed["unet_embedding.swin.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    loaded = load_npnet(write(tmp_path, "old.safetensors", renamed, **FLAT))
    x, text = npnets.tiny_inputs()
    assert torch.equal(loaded.net(x, text), deep(x, text))


def test_what_is_saved_comes_back_with_its_facts(net, tmp_path):
    config = replace(net.config, signs="canonical")
    own = npnets.seeded(config)
    path = save_npnet(own, tmp_path / "own.safetensors", {"base_model": "demo", "pairs": 12})
    loaded = load_npnet(path)
    x, text = npnets.tiny_inputs()
    assert loaded.net.config == config and torch.equal(loaded.net(x, text), own(x, text))
    assert loaded.facts["base_model"] == "demo" and "pairs: 12" in loaded.describe()
    assert [file.name for file in tmp_path.iterdir()] == ["own.safetensors"]


def test_another_file_of_the_same_name_is_another_network(net, tmp_path):
    path = save_npnet(net, tmp_path / "x.safetensors", {})
    first = load_npnet(path)
    changed = npnets.seeded(npnets.TINY)
    changed.beta.fill_(0.7)
    save_npnet(changed, path, {})
    assert float(load_npnet(path).net.beta) == pytest.approx(0.7) and float(first.net.beta) == pytest.approx(0.2)


def most_memory(work) -> int:
    """Bytes that this process held at most while something ran, beyond those at its beginning."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    held = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be taken again without being seen
    reset.write_text("5")
    before = held()
    work()
    return held() - before


TELLS = Path("/proc/self/clear_refs").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not TELLS, reason="tells its memory otherwise")
@pytest.mark.parametrize("layout", ["official", "asagi4", "LucipherDev", "own"])
def test_the_shape_of_a_network_is_read_without_its_numbers(tmp_path, layout):
    small = npnets.seeded(replace(npnets.TINY, tokens=77, width=10_000))  # 25 MB
    path = tmp_path / ("x.pth" if layout == "official" else "x.safetensors")
    if layout == "own":
        save_npnet(small, path, {"latent_format": "SD15"})
    else:
        write(tmp_path, path.name, npnets.layouts(small)[layout])
    read_config(path)  # also imports what is imported at the first use
    assert most_memory(lambda: read_config(path)) < 5 << 20 < 20 << 20 < most_memory(lambda: load_npnet(path))
    (config, facts), whole = read_config(path), load_npnet(path)
    assert config == whole.net.config == small.config and facts == whole.facts
    assert facts.get("latent_format") == ("SD15" if layout == "own" else None)


class Malicious:
    def __reduce__(self):
        return os.system, ("echo ran > ran",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "evil.pth", {"alpha": Malicious()})
    with pytest.raises(ValueError, match=r"evil.pth: refused by the safe loader \(it contains (posix|nt)\.system\)"):
        load_npnet(path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_npnet_are_named_with_what_is_missing(net, tmp_path):
    weights = npnets.layouts(net)["asagi4"]
    del weights["unet_svd.mlp3.0.bias"]
    with pytest.raises(ValueError, match=r"m.safetensors is not an NPNet: missing unet_svd.mlp3.0.bias. Expected"):
        load_npnet(write(tmp_path, "m.safetensors", weights, **FLAT))
    with pytest.raises(ValueError, match=r"n.pth is not an NPNet: missing alpha, .*more\).*Attune Redenoise"):
        load_npnet(write(tmp_path, "n.pth", {"model": {"weight": torch.ones(2)}}))
    with pytest.raises(ValueError, match=r"n.pth is not an NPNet"):
        load_npnet(write(tmp_path, "n.pth", [1, 2]))
    with pytest.raises(ValueError, match=r"unexpected extra.weight"):
        load_npnet(
            write(tmp_path, "e.safetensors", {**npnets.layouts(net)["asagi4"], "extra.weight": torch.ones(1)}, **FLAT)
        )


@pytest.mark.parametrize("end", [".safetensors", ".pth"])
def test_truncated_and_random_files_are_damaged(net, tmp_path, end):
    small = npnets.seeded(replace(npnets.TINY, tokens=77, width=4))
    path = write(tmp_path, f"x{end}", npnets.layouts(small)["asagi4"])
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 200):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x{end} is damaged"):
            load_npnet(path)


def test_a_shape_that_contradicts_the_others_is_refused_before_a_network_is_made(net, tmp_path):
    for name, shape in (
        ("unet_svd.mlp1.0.weight", (64, 10**4)),
        ("unet_svd.attention.proj.bias", (7,)),
        ("unet_embedding.downconv.weight", (3, 400, 1, 1)),
        ("text_embedding.linear.weight", (8, 17)),
        ("alpha", (2,)),
    ):
        weights = {**npnets.layouts(net)["asagi4"], name: torch.zeros(shape)}
        with pytest.raises(ValueError, match=r"bad.safetensors is damaged"):
            load_npnet(write(tmp_path, "bad.safetensors", weights, **FLAT))


def test_a_tensor_larger_than_its_file_is_refused(net, tmp_path):
    small = npnets.seeded(replace(npnets.TINY, tokens=77, width=4))
    weights = dict(small.state_dict()) | {"unet_svd.mlp4.2.weight": torch.zeros(1).expand(10**6, 10**6)}
    path = write(tmp_path, "huge.pth", weights)
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"huge.pth is damaged: its weights are larger than the file"):
        load_npnet(path)


@pytest.mark.parametrize("name", ["unet_embedding.downconv.weight", "unet_svd.mlp4.0.weight"])
def test_a_small_file_of_a_huge_but_consistent_network_is_refused_at_once(tmp_path, name):
    """Every number of a network 10^8 wide, once: no layer of it fits another layer badly."""
    small = npnets.seeded(replace(npnets.TINY, tokens=77, width=4))
    wide = small.state_dict()[name].shape[1 if name.endswith("downconv.weight") else 0]
    grown = (
        lambda value: value.flatten()[:1]
        .view([1] * value.ndim)
        .expand([10**8 if n == wide else n for n in value.shape])
    )
    weights = {key: grown(value) if wide in value.shape else value for key, value in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"wide.pth is damaged: its weights are larger than the file"):
        load_npnet(write(tmp_path, "wide.pth", weights))


def test_an_archive_that_begins_as_another_format_is_not_unpacked(net, tmp_path):
    """torch would take the file for one of its first versions', and unpack it into a folder."""
    path = write(tmp_path, "old.pth", npnets.layouts(net)["asagi4"])
    path.write_bytes(b"\x80\x02tar" + path.read_bytes())
    with pytest.raises(ValueError, match=r"old.pth is damaged or no file of torch.save: it does not begin as a zip"):
        load_npnet(path)


def test_a_compressed_archive_is_refused(net, tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 10**6)
    with pytest.raises(ValueError, match=r"bomb.pth is compressed inside"):
        load_npnet(path)


def test_oversized_files_other_endings_and_newer_formats_are_refused(net, tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ValueError, match=r"big.safetensors is no NPNet: it has 1,073,741,825 bytes"):
        load_npnet(path)
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.ckpt is not an NPNet: its name must end in .safetensors"):
        load_npnet(tmp_path / "x.ckpt")
    for facts, what in (({"npnet_version": "2"}, "format 2"), ({"arch": '{"attention": false}'}, "without attention")):
        with pytest.raises(ValueError, match=f"needs NPNet {what}|needs NPNet format {what}"):
            load_npnet(write(tmp_path, "new.safetensors", npnets.layouts(net)["asagi4"], **FLAT, **facts))


def test_only_the_used_weights_are_kept(net, tmp_path):
    path = write(tmp_path, "x.safetensors", npnets.layouts(net)["asagi4"], **FLAT)
    assert "unet_embedding.swin.head.fc.weight" in load_file(path)
    assert set(load_npnet(path).net.state_dict()) == set(net.state_dict())
