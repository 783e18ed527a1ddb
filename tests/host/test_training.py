"""The whole training, from pictures to a checkpoint that the stock loader opens, with six pictures and a few steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"black": [0, 0, 0], "white": [255, 255, 255], "red": [200, 30, 35]}


@pytest.mark.nightly  # five processes that each import everything
@pytest.mark.parametrize("runs", [1, 2])
def test_pictures_become_checkpoints_and_modules(host, tmp_path, runs):
    """In one test, so that two workers do not both train."""
    printed = trained(tmp_path, runs)
    the_checkpoints_open_in_the_stock_loader_and_draw(host, tmp_path)
    the_lora_of_small_sizes_loads_in_the_stock_node(host, tmp_path)
    what_was_trained_is_written_down(tmp_path)
    assert runs == 1 or '"step"' not in printed.split("export.py")[0]  # a second run finds everything done
    the_controlnet_begins_as_none_and_opens_in_the_stock_loader(tmp_path)
    for channels in (4, 16):
        the_exported_autoencoder_computes_what_the_narrow_one_does(tmp_path, channels)


def trained(work: Path, times: int) -> str:
    """What the last of so many runs printed."""
    pictures = work / "package" / "assets"
    pictures.mkdir(parents=True)
    for i in range(6):
        image = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(image).ellipse((40, 40, 216, 180 + 10 * i), fill=(40 * i, 255 - 40 * i, 128, 255))
        image.save(pictures / f"{i}.webp")
    vocabulary = {
        "source": "a test", "objects": {f"thing{i}": str(i) for i in range(6)}, "backgrounds": COLOURS, "aliases": {},
        "background_aliases": {}, "brightness": {"dark": ["black"], "bright": ["white"]}, "filler": ["a", "the"],
    }  # fmt: skip
    (work / "vocabulary.json").write_text(json.dumps(vocabulary))
    environment = {
        **os.environ, "ATTUNE_TRAINING": str(work), "ATTUNE_VOCABULARY": str(work / "vocabulary.json"),
        "ATTUNE_WEIGHTS": str(work / "weights"), "ATTUNE_ONE_MORE_STEP": str(work / "modules"),
        "ATTUNE_LORAS": str(work / "loras"), "ATTUNE_CONTROLNET": str(work / "controlnet"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = ["--autoencoder-steps", 2, "--decoder-steps", 2, "--text-steps", 8, "--unet-steps", 2, "--flow-steps", 2]
    words += ["--one-more-step-steps", 2, "--sizes-steps", 2, "--controlnet-steps", 2]
    command = [sys.executable, str(ROOT / "training/train_demo.py"), "--threads", "1", *map(str, words)]
    for _ in range(times):
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def the_checkpoints_open_in_the_stock_loader_and_draw(host, work):
    import comfy.sd

    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(work / "weights" / "attune_demo.safetensors"))
    conditions = [host.call("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a thing1 on black", "")]
    flow, no_clip, flow_vae, _ = comfy.sd.load_checkpoint_guess_config(
        str(work / "weights" / "attune_demo_flow.safetensors")
    )
    assert no_clip is None
    for network, decoder in ((model, vae), (flow, flow_vae)):
        (out,) = host.call(
            "KSampler", model=network, seed=0, steps=2, cfg=2.0, sampler_name="euler", scheduler="simple",
            positive=conditions[0], negative=conditions[1], latent_image={"samples": torch.zeros(1, 4, 16, 16)}, denoise=1.0,
        )  # fmt: skip
        (picture,) = host.call("VAEDecode", samples=out, vae=decoder)
        assert picture.shape == (1, 128, 128, 3) and torch.isfinite(picture).all()


def the_lora_of_small_sizes_loads_in_the_stock_node(host, work):
    import comfy.sd
    import folder_paths

    plain, _, _, _ = comfy.sd.load_checkpoint_guess_config(str(work / "weights" / "attune_demo_flow.safetensors"))
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    file = shutil.copy(work / "loras" / "attune_demo_flow_sizes.safetensors", folder / "trained.safetensors")
    taught = host.call("LoraLoaderModelOnly", model=plain, lora_name=file.name, strength_model=1.0)[0]
    os.remove(file)
    assert len(taught.patches) == len(load_file(work / "loras" / "attune_demo_flow_sizes.safetensors")) // 2 > 20
    first = next(name for name in taught.patches if "x_block.attn.qkv" in name)
    ((_, lora, *_),) = taught.patches[first]
    up, down = lora.weights[:2]
    assert (up.float() @ down.float()).abs().max() > 0


def what_was_trained_is_written_down(work):
    facts = json.loads((work / "weights" / "attune_demo.json").read_text())
    assert facts["models"]["attune_demo"]["steps"] == 2
    report = json.loads((work / "modules" / "attune_demo.json").read_text())
    assert report["steps"] == 2 and 0 < report["floors"]["within_a_caption"] < report["floors"]["mean_of_all"]


def the_controlnet_begins_as_none_and_opens_in_the_stock_loader(work):
    """After two steps its zero convolutions have moved by no more than two learning rates."""
    import comfy.controlnet

    net = comfy.controlnet.load_controlnet(str(work / "controlnet" / "attune_demo_controlnet.safetensors"))
    ends = [layer[0].weight for layer in (*net.control_model.zero_convs, net.control_model.middle_block_out)]
    assert len(ends) == 7 and 0 < max(float(weight.abs().max()) for weight in ends) < 2e-3
    assert json.loads((work / "controlnet" / "attune_demo_controlnet.json").read_text())["steps"] == 2


def the_exported_autoencoder_computes_what_the_narrow_one_does(work, channels):
    """Zero-padded to the stock width and in half precision, against the network that was trained."""
    sys.path.insert(0, str(ROOT / "training"))
    try:
        import autoencoder
    finally:
        sys.path.remove(str(ROOT / "training"))
    import comfy.taesd.taesd

    state = torch.load(work / f"autoencoder{channels}.pt", weights_only=True)
    decoder_state = torch.load(work / f"decoder{channels}.pt", weights_only=True)["decoder"]
    x = torch.from_numpy(np.random.default_rng(0).random((2, 3, 64, 64), dtype=np.float32))
    narrow, stock = autoencoder.encoder(channels), comfy.taesd.taesd.Encoder(channels)
    narrow.load_state_dict(state["encoder"])
    stock.load_state_dict(autoencoder.widen(narrow, stock.state_dict()))
    again = autoencoder.narrow(narrow, stock.state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in narrow.state_dict().items())
    z = narrow(x)
    torch.testing.assert_close(stock(x), z, rtol=1e-4, atol=1e-5)
    narrow, stock = autoencoder.decoder(channels), comfy.taesd.taesd.Decoder(channels)
    narrow.load_state_dict(decoder_state)
    stock.load_state_dict(autoencoder.widen(narrow, stock.state_dict()))
    torch.testing.assert_close(stock(z), narrow(z), rtol=1e-4, atol=1e-5)
