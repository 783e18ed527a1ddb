"""The network against recorded answers of the authors' code, stage by stage, and the properties its formula implies."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import npnets
from nightly import daily
from pack.models.npnet import NPNetConfig, canonical_signs, decompose, grid, shift_mask

RECORDED = json.loads((Path(__file__).parent / "data" / "npnet.json").read_text("utf-8"))["cases"]


@pytest.fixture(scope="module")
def sdxl():
    return npnets.seeded(NPNetConfig())


@lru_cache(maxsize=1)
def stages(case: str) -> dict[str, Tensor]:
    """Every stage of the network on the recorded input, with the signs of the machine that made the record."""
    want = RECORDED[case]
    net = npnets.seeded(NPNetConfig(width=want["width"]))
    x, text = npnets.inputs(case, want["batch"], want["width"])
    precise = x.to(getattr(torch, want["svd"]))
    u, s, vh = (factor.float() for factor in decompose(precise, replace(net.config, signs="canonical")))
    flip = torch.tensor([[1.0 if sign == "+" else -1.0 for sign in row] for row in want["signs"]])
    canonical, recorded = (u, s, vh), (u * flip[:, None], s, vh * flip[..., None])
    branch, swin = net.unet_svd, net.unet_embedding
    e = net.text_embedding(x, text.flatten(1))
    seen = swin.downconv(F.interpolate(x + e, (224, 224)))
    features = swin.swin(seen)
    rest = (2 * net.alpha.sigmoid() - 1) * e + net.beta * swin(x + e)
    svd = branch(x, recorded)
    found = {
        "text_emb": e, "scale_shift": net.text_embedding.linear(text.flatten(1)), "swin_input": seen,
        "swin_features": features, "swin_resized": F.interpolate(features, (128, 128)), "swin_branch": swin(x + e),
        "singular_values": s, "svd_branch": svd, "out": svd + rest,
        "new_singular_values": new_values(svd, recorded),
        "new_singular_values_canonical": new_values(branch(x, canonical), canonical),
        "out_canonical_sign": branch(x, canonical) + rest,
    }  # fmt: skip
    # The whole network is these stages.
    whole = npnets.seeded(NPNetConfig(width=want["width"], signs="canonical"))(x, text)
    torch.testing.assert_close(whole, found["out_canonical_sign"], rtol=0, atol=5e-4 * float(whole.abs().max()))
    return found


def new_values(branch: Tensor, factors) -> Tensor:
    u, _, vh = factors
    middle = u.mT @ as_matrix(branch) @ vh.mT
    return middle.diagonal(dim1=1, dim2=2)


def as_matrix(x: Tensor) -> Tensor:
    return torch.cat([torch.cat([x[:, 0], x[:, 1]], 2), torch.cat([x[:, 2], x[:, 3]], 2)], 1)


STAGES = [(case, stage) for case in RECORDED for stage in RECORDED[case]["stages"]]
DAILY = [
    (case, stage) for case, stage in STAGES if case in ("sdxl_b1", "dit_b2")
]  # both models, batches, decompositions


@pytest.mark.parametrize(("case", "stage"), daily(STAGES, *DAILY, names=2))
def test_every_stage_equals_the_published_networks(case, stage):
    """Within float32 arithmetic, which differs between processors, in parts of the stage's root mean square."""
    want, found = RECORDED[case]["stages"][stage], stages(case)[stage]
    assert list(found.shape) == want["shape"]
    size = want["l2"] / found.numel() ** 0.5
    sample = found.flatten()[torch.tensor(want["sample_idx"])]
    assert (sample - torch.tensor(want["sample"])).abs().max() < tolerance(case, stage) * size
    assert float(found.norm()) == pytest.approx(want["l2"], rel=2e-5)
    assert float(found.mean()) == pytest.approx(want["mean"], abs=1e-5 * size)
    assert float(found.std(correction=0)) == pytest.approx(want["std"], abs=1e-5 * size)


def tolerance(case: str, stage: str) -> float:
    """Near singular values share their vectors as the library's rounding has it: a float32 decomposition is less exact."""
    decomposed = stage in ("svd_branch", "out", "out_canonical_sign")
    return 2.5e-4 if decomposed and RECORDED[case]["svd"] == "float32" else 2e-5


def test_a_call_repeats_to_the_bit_and_draws_no_random_numbers(sdxl):
    x, text = npnets.inputs("sdxl_b1", 1, 2048)
    before = torch.get_rng_state()
    assert torch.equal(sdxl(x, text), sdxl(x, text))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in sdxl.modules())


def changed(net, **values):
    weights = {**net.state_dict(), **values}
    other = npnets.seeded(net.config)
    other.load_state_dict(weights)
    return other


def zeros(net, *names: str) -> dict[str, Tensor]:
    return {name: torch.zeros_like(net.state_dict()[name]) for name in names}


@pytest.fixture(scope="module")
def tiny():
    return npnets.seeded(npnets.TINY)


def test_without_a_correction_the_noise_comes_back(tiny):
    same = changed(tiny, **zeros(tiny, "alpha", "beta", "unet_svd.mlp4.2.weight", "unet_svd.mlp4.2.bias"))
    x, text = npnets.tiny_inputs(3)
    torch.testing.assert_close(same(x, text), x, rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize(
    "names", [("alpha", "beta"), ("text_embedding.linear.weight",)], ids=["no text branch", "no text layer"]
)
def test_a_prompt_that_cannot_enter_has_no_effect(tiny, names):
    deaf = changed(tiny, **zeros(tiny, *names))
    x, text = npnets.tiny_inputs()
    assert torch.equal(deaf(x, text), deaf(x, 2 * text + 1))
    assert not torch.equal(tiny(x, text), tiny(x, 2 * text + 1))


def test_the_prompt_enters_through_a_scale_and_a_shift_per_channel(tiny):
    x, text = npnets.tiny_inputs()
    matrix = tiny.text_embedding.linear.weight.double()
    move = torch.randn(2048, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    move = move - torch.linalg.pinv(matrix) @ (matrix @ move)
    moved = text + 8 * move.float().reshape(text.shape)
    torch.testing.assert_close(tiny(x, moved), tiny(x, text), rtol=0, atol=1e-4 * float(x.abs().max()))


def test_the_svd_branch_keeps_the_singular_vectors(tiny):
    x, _ = npnets.tiny_inputs()
    u, s, vh = decompose(x, tiny.config)
    middle = u.mT @ as_matrix(tiny.unet_svd(x, (u, s, vh))) @ vh.mT
    assert (middle - torch.diag_embed(middle.diagonal(dim1=1, dim2=2))).abs().max() < 1e-5 * middle.abs().max()


def test_the_swin_branch_is_constant_in_seven_bands(sdxl):
    x, _ = npnets.inputs("sdxl_b1", 1, 2048)
    branch = sdxl.unet_embedding(x)
    features = sdxl.unet_embedding.swin(sdxl.unet_embedding.downconv(F.interpolate(x, (224, 224))))
    column = torch.arange(128) * 7 // 128
    explicit = features[:, :, column][..., 6 * torch.arange(128)]
    torch.testing.assert_close(branch, sdxl.unet_embedding.upconv(explicit), rtol=0, atol=1e-6)


def test_a_batch_equals_its_samples_and_one_prompt_serves_all(tiny):
    x, text = npnets.tiny_inputs(3)
    singly = torch.cat([tiny(a, b) for a, b in zip(x.split(1), text.split(1), strict=True)])
    within = 1e-5 * float(singly.abs().max())
    torch.testing.assert_close(tiny(x, text), singly, rtol=0, atol=within)
    torch.testing.assert_close(tiny(x, text[:1]), tiny(x, text[:1].expand(3, -1, -1)), rtol=0, atol=within)


def test_canonical_signs_do_not_depend_on_the_librarys(tiny):
    x, text = npnets.tiny_inputs()
    u, s, vh = decompose(x, tiny.config)
    flip = torch.where(torch.rand(u.shape[-1], generator=torch.Generator().manual_seed(2)) < 0.5, -1.0, 1.0)
    flipped = (u * flip, s, vh * flip[:, None])
    assert not torch.allclose(tiny.unet_svd(x, (u, s, vh)), tiny.unet_svd(x, flipped), atol=1e-6)
    for one, other in zip(canonical_signs(u, vh), canonical_signs(flipped[0], flipped[2]), strict=True):
        assert torch.equal(one, other)
    canonical = npnets.seeded(replace(tiny.config, signs="canonical"))
    assert not torch.equal(canonical(x, text), tiny(x, text))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_noise_is_computed_in_float32(tiny, dtype):
    x, text = npnets.tiny_inputs()
    out = tiny(x.to(dtype), text)
    assert out.dtype == dtype and torch.equal(out, tiny(x.to(dtype).float(), text).to(dtype))


def test_our_swin_equals_torchvisions(sdxl):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    theirs, ours = models.swin_t(weights=None).eval(), sdxl.unet_embedding.swin
    renamed = {}
    for key, value in ours.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "patch_embed":
            key = f"features.0.{'0' if rest.startswith('proj') else '2'}.{rest.rpartition('.')[2]}"
        elif part == "layers":
            i, kind, tail = rest.split(".", 2)
            i = int(i)
            key = f"features.{2 * i}.{tail}" if kind == "downsample" else f"features.{2 * i + 1}.{tail}"
            key = key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        renamed[key] = value
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not unexpected and all(name.startswith("head.") or "position_index" in name for name in missing)
    y = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        want = theirs.norm(theirs.features(y))
        torch.testing.assert_close(ours(y), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("channels", "want"), [(4, (2, 2)), (12, (3, 4)), (16, (4, 4)), (48, (6, 8)), (128, (8, 16)), (3, (1, 3))])  # fmt: skip
def test_channels_are_laid_out_nearly_square(channels, want):
    assert grid(channels) == want


@pytest.mark.parametrize("channels", [3, 12, 16])
def test_other_channel_counts_work(channels):
    net = npnets.seeded(replace(npnets.TINY, channels=channels, text="pooled", width=24))
    x = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    u, s, vh = decompose(x, net.config)
    assert u.shape[-1] == s.shape[-1] == vh.shape[-2] == net.config.rank
    assert net(x, torch.randn(2, 24)).shape == x.shape


def test_the_shifted_windows_mask_what_was_not_adjacent():
    mask = shift_mask(14, 14, 3)
    assert mask.shape == (4, 49, 49) and not mask[0].any()
    assert mask[1, 0, 6] == -100 and mask[1, 0, 3] == 0 and mask[3, 0, 48] == -100
