"""The sensitive parts of the field's networks by name, and rounding errors against what rounding allows."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from pack.kernels import precision as kernel
from pack.models.full_precision import full_weights

PARTS = {
    "time_embed.0.weight": kernel.TIME, "t_embedder.mlp.2.weight": kernel.TIME, "time_in.in_layer.bias": kernel.TIME,
    "input_blocks.1.0.emb_layers.1.weight": kernel.PROJECTION, "double_blocks.3.img_mod.lin.weight": kernel.PROJECTION,
    "joint_blocks.0.x_block.adaLN_modulation.1.weight": kernel.PROJECTION, "blocks.7.modulation": kernel.PROJECTION,
    "input_blocks.0.0.weight": kernel.OUTER, "out.2.weight": kernel.OUTER, "head.head.weight": kernel.OUTER,
    "final_layer.linear.weight": kernel.OUTER, "pos_embed": kernel.OUTER, "txt_in.weight": kernel.OUTER,
    "output_blocks.2.0.out_layers.3.weight": kernel.OTHER, "blocks.0.attn.to_out.0.weight": kernel.OTHER,
    "middle_block.1.proj_in.weight": kernel.OTHER,
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_weights_part_is_read_from_its_name(name):
    assert kernel.sensitive_part(name, 2) == PARTS[name]


def test_norms_and_biases_are_told_by_their_shape():
    assert kernel.sensitive_part("output_blocks.2.0.in_layers.0.weight", 1) == kernel.VECTOR


def test_the_outermost_blocks_are_the_first_and_the_last():
    unet = [f"{stack}.{i}.0.weight" for stack, n in (("input_blocks", 4), ("output_blocks", 3)) for i in range(n)]
    assert kernel.outermost(["time_embed.0.weight", *unet]) == {"input_blocks.1.0.weight", "output_blocks.2.0.weight"}
    flux = [f"{stack}.{i}.lin.weight" for stack, n in (("double_blocks", 2), ("single_blocks", 12)) for i in range(n)]
    assert kernel.outermost(flux) == {"double_blocks.0.lin.weight", "single_blocks.11.lin.weight"}
    assert kernel.outermost(["conv.weight"]) == set()


def test_the_embedding_is_that_of_a_network_of_the_field():
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3)).double()
    times = torch.tensor([0.0, 1.0, 500.0], dtype=torch.float64)
    angles = [[t * 10000 ** (-i / 4) for i in range(4)] for t in times.tolist()]
    embedded = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]).double()
    layers = [(mlp[0].weight, mlp[0].bias), (mlp[2].weight, mlp[2].bias)]
    torch.testing.assert_close(kernel.time_embedding(times, layers), mlp(embedded), rtol=1e-6, atol=1e-6)


def test_rounding_to_three_bits_errs_by_what_is_uniform_within_a_step():
    """x in [1, 2) is rounded to eighths: the error is uniform in +-1/16, its rms 1/(8 sqrt(12)); that of x sqrt(7/3)."""
    x = 1 + torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    found = kernel.relative_error(x.to(torch.float8_e4m3fn), x)
    assert found == pytest.approx(1 / (8 * math.sqrt(12) * math.sqrt(7 / 3)), rel=0.01)
    assert kernel.relative_error(x.to(torch.float8_e5m2), x) == pytest.approx(2 * found, rel=0.01)


KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("kind", KINDS)
def test_spacing_is_that_of_the_types_own_values(kind):
    values = torch.arange(256, dtype=torch.uint8).view(kind).float()
    values = values[values.isfinite() & (values >= 0)].unique()
    torch.testing.assert_close(kernel.spacing(values[:-1], kind), values.diff(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 3])
def test_each_bit_put_back_halves_the_error(kind, bits):
    """Exactly where the error is uniform within a spacing, as of even weights inside of a binade."""
    step = float(kernel.spacing(torch.ones(1), kind))
    even = torch.rand(16, 9999, generator=torch.Generator().manual_seed(2))  # no multiple of eight
    full = 1 + step / 2 + (1 - step) * even
    low = full.to(kind)
    more = kernel.MoreBits.of(low, full, bits)
    error = lambda found: float((found - full).square().mean().sqrt())
    assert error(low.float()) / error(more(low.float())) == pytest.approx(2**bits, rel=0.02)
    assert more.size == bits * math.ceil(full.numel() / 8) + 4 * 16
    half = more(low.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and error(half.float()) < 1.05 * error(more(low.float()))


@pytest.mark.parametrize(("kind", "worth"), [(torch.float8_e4m3fn, 5.8), (torch.float8_e5m2, 5.5)])
def test_of_normal_weights_a_bit_is_worth_a_little_less(kind, worth):
    """Next to a power of two half of a weight's place is empty."""
    full = torch.randn(64, 4096, generator=torch.Generator().manual_seed(4))
    low = full.to(kind)
    left = (kernel.MoreBits.of(low, full, 1)(low.float()) - full).square().mean()
    assert float(10 * torch.log10((low.float() - full).square().mean() / left)) == pytest.approx(worth, abs=0.1)


def test_no_channel_gets_farther_away_not_even_one_that_nothing_was_taken_off():
    full = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    full[0], full[1] = 0, full[1].to(torch.float8_e4m3fn).float()
    low = full.to(torch.float8_e4m3fn)
    found = kernel.MoreBits.of(low, full, 1)(low.float())
    torch.testing.assert_close(found[:2], full[:2], rtol=0, atol=0)
    assert (found[2] - full[2]).norm() < 0.6 * (low[2].float() - full[2]).norm()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "full.safetensors"
    weights = {"a.weight": torch.eye(3).half(), "b.weight": torch.ones(2).to(torch.float8_e4m3fn), "c": torch.ones(4)}
    save_file({f"model.diffusion_model.{name}": one for name, one in weights.items()}, path)
    return path


def test_only_the_wanted_weights_are_read_and_none_that_the_file_rounds(file):
    found = full_weights(file, {"a.weight": (3, 3), "b.weight": (2,)})
    assert list(found) == ["a.weight"] and torch.equal(found["a.weight"], torch.eye(3).half())


def test_another_models_file_is_refused_before_anything_is_read(file):
    with pytest.raises(ValueError, match=r"'full.safetensors' has no weight 'd.weight', so it is not this model"):
        full_weights(file, {"a.weight": (3, 3), "d.weight": (1,)})
    with pytest.raises(ValueError, match=r"weight 'c' has the shape \[4\], in this MODEL \[5\]: it is another model"):
        full_weights(file, {"c": (5,)})


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10" + 7 * b"\0" + b'{"a": 1, "a": 2}'])
def test_what_is_no_safetensors_file_is_told_so(tmp_path, content):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'odd.safetensors' (cannot be read as a safetensors file|has no weight)"):
        full_weights(path, {"a": (1,)})
