"""Graphs that people build around a KSampler, small: each takes a MODEL -> MODEL node and returns the final latent.

`GRAPHS[name](kit, node)` puts the node where a user would: behind the loader, LoRA and patches included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

SIDE = 8  # of latents of 64 px: the demo models draw nothing of use there, but every line of the host runs
STEPS = 8  # the fewest with which propagation does anything
CHECKPOINTS = {"unet": "attune_demo.safetensors", "flow": "attune_demo_flow.safetensors"}
Node = Callable  # MODEL -> MODEL


COMPILED: list = []  # the graphs that torch.compile has made


def _count(graph, _):
    COMPILED.append(graph)
    return graph.forward


class Kit:
    """One demo model in the host, its conditionings, and the stock samplers."""

    def __init__(self, host, name: str):
        self.host, self.name, self.file = host, name, CHECKPOINTS[name]
        self.model, clip, _ = host.call("CheckpointLoaderSimple", ckpt_name=self.file)
        self.clip = clip or host.call("CheckpointLoaderSimple", ckpt_name=CHECKPOINTS["unet"])[1]
        self.positive, self.negative = self.encode("a cat on a black background"), self.encode("")
        self.network_graphs = 0  # of the compiled network, once it has run
        self.channels = self.model.model.latent_format.latent_channels

    @cached_property
    def compiled(self):
        """The model with a compiled network, one for all runs."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = self.model.clone()
        set_torch_compile_wrapper(model, backend=_count)
        return model

    def encode(self, text: str):
        return self.host.call("CLIPTextEncode", clip=self.clip, text=text)[0]

    def empty(self, batch: int = 1) -> dict:
        return {"samples": torch.zeros(batch, self.channels, SIDE, SIDE)}

    def picture(self, batch: int = 1) -> dict:
        """A latent to start from in img2img."""
        noise = torch.randn(batch, self.channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        return {"samples": 0.5 * noise}

    def weight(self, model) -> tuple[str, Tensor]:
        """Name and value of a weight in the middle of the network, for LoRA."""
        wanted = (
            "output_blocks.2.0.in_layers.2.weight" if self.name == "unet" else "joint_blocks.1.x_block.mlp.fc1.weight"
        )
        key = f"diffusion_model.{wanted}"
        return key, model.model.state_dict()[key]

    def ksampler(self, model, sampler: str = "euler", **changed) -> Tensor:
        inputs = {
            "model": model, "seed": 3, "steps": STEPS, "cfg": 3.0, "sampler_name": sampler, "scheduler": "normal",
            "positive": self.positive, "negative": self.negative, "latent_image": self.empty(), "denoise": 1.0, **changed,
        }  # fmt: skip
        return self.host.call("KSampler", **inputs)[0]["samples"]

    def advanced(self, model, guider) -> Tensor:
        """SamplerCustomAdvanced with the noise, levels and solver of `ksampler`."""
        call = self.host.call
        return call(
            "SamplerCustomAdvanced", noise=call("RandomNoise", noise_seed=3)[0], guider=guider,
            sampler=call("KSamplerSelect", sampler_name="euler")[0],
            sigmas=call("BasicScheduler", model=model, scheduler="normal", steps=STEPS, denoise=1.0)[0],
            latent_image=self.empty(),
        )[0]["samples"]  # fmt: skip


# --- samplers and guiders ---


def ksampler(kit: Kit, node: Node) -> Tensor:
    return kit.ksampler(node(kit.model))


def two_stages(kit: Kit, node: Node) -> Tensor:
    """KSampler (Advanced) twice: the first leaves noise, the second adds none."""
    model, latent = node(kit.model), kit.empty()
    for add, start, end, leave in (("enable", 0, STEPS, "enable"), ("disable", STEPS, 10000, "disable")):
        (latent,) = kit.host.call(
            "KSamplerAdvanced", model=model, add_noise=add, noise_seed=3, steps=2 * STEPS, cfg=3.0, sampler_name="euler",
            scheduler="normal", positive=kit.positive, negative=kit.negative, latent_image=latent,
            start_at_step=start, end_at_step=end, return_with_leftover_noise=leave,
        )  # fmt: skip
    return latent["samples"]


def sampler_custom(kit: Kit, node: Node) -> Tensor:
    model = node(kit.model)
    return kit.host.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=3, cfg=3.0, positive=kit.positive,
        negative=kit.negative, sampler=kit.host.call("KSamplerSelect", sampler_name="euler")[0],
        sigmas=kit.host.call("BasicScheduler", model=model, scheduler="normal", steps=STEPS, denoise=1.0)[0],
        latent_image=kit.empty(),
    )[0]["samples"]  # fmt: skip


def cfg_guider(kit: Kit, node: Node) -> Tensor:
    model = node(kit.model)
    inputs = {"positive": kit.positive, "negative": kit.negative, "cfg": 3.0}
    return kit.advanced(model, kit.host.call("CFGGuider", model=model, **inputs)[0])


def basic_guider(kit: Kit, node: Node) -> Tensor:
    model = node(kit.model)
    return kit.advanced(model, kit.host.call("BasicGuider", model=model, conditioning=kit.positive)[0])


def dual_guider(kit: Kit, node: Node) -> Tensor:
    model = node(kit.model)
    inputs = {"cond1": kit.positive, "cond2": kit.encode("a red heart"), "negative": kit.negative}
    scales = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": "regular"}
    return kit.advanced(model, kit.host.call("DualCFGGuider", model=model, **inputs, **scales)[0])


# --- latents ---


def img2img(kit: Kit, node: Node) -> Tensor:
    return kit.ksampler(node(kit.model), latent_image=kit.picture(), denoise=0.6)


def inpaint(kit: Kit, node: Node) -> Tensor:
    """The left half is kept."""
    mask = torch.zeros(1, 1, 8 * SIDE, 8 * SIDE)
    mask[..., 4 * SIDE :] = 1
    kept = kit.picture()
    out = kit.ksampler(node(kit.model), latent_image={**kept, "noise_mask": mask})
    torch.testing.assert_close(out[..., : SIDE // 2 - 1], kept["samples"][..., : SIDE // 2 - 1], rtol=0, atol=1e-4)
    return out


def batch(kit: Kit, node: Node) -> Tensor:
    return kit.ksampler(node(kit.model), latent_image=kit.empty(3))


def batch_index(kit: Kit, node: Node) -> Tensor:
    """The second and fourth of a batch of four, drawn alone."""
    return kit.ksampler(node(kit.model), latent_image={**kit.empty(2), "batch_index": [1, 3]})


# --- conditionings ---


def areas(kit: Kit, node: Node) -> Tensor:
    """One prompt for all, another in an area of its own."""
    (left,) = kit.host.call(
        "ConditioningSetArea", conditioning=kit.encode("a red heart"), width=32, height=64, x=0, y=0, strength=1.0
    )
    (both,) = kit.host.call("ConditioningCombine", conditioning_1=left, conditioning_2=kit.positive)
    return kit.ksampler(node(kit.model), positive=both)


def ranges(kit: Kit, node: Node) -> Tensor:
    """Two prompts, one after the other, and a longer one."""
    span = lambda cond, start, end: kit.host.call(
        "ConditioningSetTimestepRange", conditioning=cond, start=start, end=end
    )[0]
    first, then = span(kit.positive, 0.0, 0.5), span(kit.encode("a red heart " * 40), 0.5, 1.0)
    (both,) = kit.host.call("ConditioningCombine", conditioning_1=first, conditioning_2=then)
    return kit.ksampler(node(kit.model), positive=both)


def hooked(kit: Kit, node: Node, keyframes=None) -> Tensor:
    """A LoRA that only the positive prompt has, in the strength of `keyframes`."""
    import comfy.hooks

    key, weight = kit.weight(kit.model)
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    hook = hooks.hooks[0]
    hook.weights, hook.need_weight_init = {key: ("diff", (0.05 * torch.ones_like(weight),))}, False
    hooks.set_keyframes_on_hooks(keyframes)
    return kit.ksampler(node(kit.model), positive=comfy.hooks.set_hooks_for_conditioning(kit.positive, hooks))


def scheduled(kit: Kit, node: Node) -> Tensor:
    """The same, fading in over the first half of the run."""
    (keyframes,) = kit.host.call(
        "CreateHookKeyframesInterpolated", strength_start=0.0, strength_end=1.0, interpolation="linear", start_percent=0.0,
        end_percent=0.5, keyframes_count=3,
    )  # fmt: skip
    return hooked(kit, node, keyframes)


def controlnet(kit: Kit, node: Node) -> Tensor:
    """A ControlNet whose residuals depend on x, on the positive prompt alone."""
    import comfy.controlnet

    class Net(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            level = 0.1 * x_noisy.mean(dim=(1, 2, 3), keepdim=True) + 0.5
            if kit.name == "flow":
                width = kit.model.model.diffusion_model.joint_blocks[0].x_block.mlp.fc1.in_features
                return {"output": [level[..., 0].expand(-1, (SIDE // 2) ** 2, width)]}
            widths, sides = [32, 32, 32, 128, 128, 160], [SIDE, SIDE, SIDE // 2, SIDE // 2, SIDE // 4, SIDE // 4]
            found = [level.expand(-1, w, s, s) for w, s in zip(widths, sides, strict=True)]
            return {"input": [], "middle": [level.expand(-1, 160, SIDE // 4, SIDE // 4)], "output": found}

        def pre_run(self, *args):
            pass

        def get_models(self):
            return []

        def copy(self):
            return self

    (context, extra), *_ = kit.positive
    return kit.ksampler(node(kit.model), positive=[[context, {**extra, "control": Net()}]])


# --- models ---


def lora(kit: Kit, node: Node) -> Tensor:
    patched = kit.model.clone()
    key, weight = kit.weight(patched)
    patched.add_patches({key: ("diff", (0.05 * torch.ones_like(weight),))}, 1.0)
    return kit.ksampler(node(patched))


def rescale_cfg(kit: Kit, node: Node) -> Tensor:
    return kit.ksampler(kit.host.call("RescaleCFG", model=node(kit.model), multiplier=0.7)[0])


def context_windows(kit: Kit, node: Node) -> Tensor:
    """Windows over the height. (Over a batch, the host of 0.3.75 compares a level per picture with the schedule.)"""
    asked = kit.host.nodes.NODE_CLASS_MAPPINGS["ContextWindowsManual"].GET_SCHEMA().inputs
    newer = {"freenoise": False} if any(one.id == "freenoise" for one in asked) else {}
    (model,) = kit.host.call(
        "ContextWindowsManual", model=node(kit.model), context_length=4, context_overlap=2,
        context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2, **newer,
    )  # fmt: skip
    return kit.ksampler(model)


def compiled(kit: Kit, node: Node) -> Tensor:
    """Behind the host's own torch.compile wrapper: the bits of the same graph without, and no endless recompiling.

    Where features are reused the network is compiled once more, with the patch that records them; elsewhere a few parts
    are, for one condition in place of two. Another attention may break it into more parts, once for all runs.
    """
    before = len(COMPILED)
    out = kit.ksampler(node(kit.compiled))
    made = len(COMPILED) - before
    kit.network_graphs = kit.network_graphs or made
    if made > 2 * kit.network_graphs:
        before = len(COMPILED)
        kit.ksampler(node(kit.compiled))
        assert len(COMPILED) == before
    assert torch.equal(out, kit.ksampler(node(kit.model)))
    return out


def _stored(kit: Kit, node: Node, dtype: torch.dtype) -> Tensor:
    """The checkpoint with its weights stored in another type, and cast for every layer."""
    import comfy.sd
    import comfy.utils
    import folder_paths

    weights = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("checkpoints", kit.file))
    model, *_ = comfy.sd.load_state_dict_guess_config(
        weights, output_vae=False, output_clip=False, output_clipvision=False, model_options={"dtype": dtype}
    )
    assert {p.dtype for p in model.model.diffusion_model.parameters()} >= {dtype}
    return kit.ksampler(node(model))


def half(kit: Kit, node: Node) -> Tensor:
    return _stored(kit, node, torch.float16)


def fp8(kit: Kit, node: Node) -> Tensor:
    return _stored(kit, node, torch.float8_e4m3fn)


def low_vram(kit: Kit, node: Node) -> Tensor:
    """The host keeps no weight on the device and casts them one by one, with a LoRA to apply on the way."""
    with _no_vram():
        return lora(kit, node)


@contextlib.contextmanager
def _no_vram() -> Iterator[None]:
    import comfy.model_management as management

    kept = management.is_device_cpu, management.vram_state
    management.unload_all_models()
    management.is_device_cpu, management.vram_state = (lambda device: False), management.VRAMState.NO_VRAM
    try:
        yield
    finally:
        management.is_device_cpu, management.vram_state = kept
        management.unload_all_models()


GRAPHS: dict[str, Callable[[Kit, Node], Tensor]] = {
    "KSampler": ksampler,
    "KSampler (Advanced), two stages": two_stages,
    "SamplerCustom": sampler_custom,
    "SamplerCustomAdvanced, CFGGuider": cfg_guider,
    "SamplerCustomAdvanced, BasicGuider": basic_guider,
    "SamplerCustomAdvanced, DualCFGGuider": dual_guider,
    "img2img": img2img,
    "inpaint mask": inpaint,
    "batch": batch,
    "batch_index": batch_index,
    "areas": areas,
    "prompts in turn": ranges,
    "LoRA hook on one prompt": hooked,
    "LoRA schedule on one prompt": scheduled,
    "ControlNet": controlnet,
    "LoRA": lora,
    "RescaleCFG": rescale_cfg,
    "context windows": context_windows,
    "torch.compile": compiled,
    "fp16 weights": half,
    "fp8 weights": fp8,
    "low VRAM": low_vram,
}

# Graphs in which a picture is inverted and replayed exactly: those whose KSampler can be replaced by the two.
REPLAYED = [
    "KSampler", "img2img", "batch", "batch_index", "areas", "prompts in turn", "LoRA hook on one prompt",
    "LoRA schedule on one prompt", "ControlNet", "LoRA", "RescaleCFG", "context windows", "torch.compile", "fp16 weights",
    "fp8 weights", "low VRAM",
]  # fmt: skip
