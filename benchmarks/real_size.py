"""What does a forward of a real-size network cost, and where? SD1.5, SDXL and SD3-medium with random weights.

python dev.py bench real_size [--models SD1.5 SDXL] [--pixels SDXL=512] [--dtype bf16] [--steps 4] [--compile]

The networks are the host's own classes at their published sizes; only the weights are random, which changes neither
FLOPs nor time, so no checkpoint is needed. FLOPs (2 per multiply-add) are counted operator by operator on tensors
without storage, always at the full picture size; times are taken inside the host's own sampler at the size that the
table names, after one warm-up step. Without a GPU the tables hold shares and ratios only: absolute seconds of a CPU say
nothing about the cards these models run on. With a GPU the same command reports milliseconds, memory and, with
--compile, the time after torch.compile relative to the time before.

As a library: `build(family)` gives a MODEL, `parts(network)` its parts, `count(...)` FLOPs and `Clock` times of parts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from comfy_process import Host
from results import DOCS, Table, markdown, record

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

UNET = {
    "use_checkpoint": False, "image_size": 32, "out_channels": 4, "in_channels": 4, "use_spatial_transformer": True,
    "legacy": False, "model_channels": 320, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A published network: the host's configuration class, its sizes, and the conditioning it expects."""

    config: str
    unet_config: dict
    pixels: int
    tokens: int
    text_width: int
    pooled_width: int
    # GFLOPs of one forward at `pixels`, and the encoder's share, as counted before and independently of this script.
    known: tuple[float, float] | None = None


FAMILIES = {
    "SD1.5": Family(
        "SD15",
        UNET | {
            "adm_in_channels": None, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": False,
            "context_dim": 768, "num_heads": 8,
        },
        pixels=512, tokens=77, text_width=768, pooled_width=768, known=(803.0, 31.0),
    ),
    "SDXL": Family(
        "SDXL",
        UNET | {
            "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
            "context_dim": 2048, "num_head_channels": 64,
        },
        pixels=1024, tokens=77, text_width=2048, pooled_width=1280, known=(6761.0, 31.6),
    ),
    "SD3-medium": Family(
        "SD3",
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 24, "input_size": None,
            "adm_in_channels": 2048, "pos_embed_scaling_factor": None, "pos_embed_max_size": 192,
            "num_patches": 192 * 192,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536},
            },
        },
        pixels=1024, tokens=154, text_width=4096, pooled_width=2048,
    ),
}  # fmt: skip
FLUX = Family(  # 24 GB of weights: for its shapes alone
    "Flux",
    {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768,
        "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19,
        "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    },
    pixels=1024, tokens=512, text_width=4096, pooled_width=768,
)  # fmt: skip


# --- networks ---------------------------------------------------------------------------------------------------------


def build(family: str | Family, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A MODEL of the host's own classes with random weights; on device "meta" it has shapes but no storage."""
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[family] if isinstance(family, str) else family
    config = getattr(comfy.supported_models, family.config)(family.unet_config | asked_besides(family))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=torch.device("meta"))
    if device != "meta":
        model.diffusion_model.to_empty(device=device)
        fill(model.diffusion_model)
    target = torch.device(device)
    return comfy.model_patcher.ModelPatcher(model, load_device=target, offload_device=target)


def asked_besides(family: Family) -> dict:
    """What newer hosts ask of a configuration besides."""
    from comfy.ldm.flux.model import FluxParams

    newer = family.config == "Flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__
    return {"txt_ids_dims": []} if newer else {}


def fill(network: nn.Module) -> None:
    """Weights of the usual spread, cheaply: one random block repeated. Vectors become 1 (norms) or 0 (biases)."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if value.ndim < 2:
                value.fill_(0 if name.endswith("bias") else 1)
                continue
            flat, scaled = value.view(-1), (block / value[0].numel() ** 0.5).to(value)
            for start in range(0, flat.numel(), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(scaled[: len(part)])


def gigabytes(family: Family, dtype: torch.dtype) -> float:
    """Memory of the weights, from the shapes alone."""
    network = build(family, "meta", dtype).model.diffusion_model
    return sum(p.numel() * p.element_size() for p in network.parameters()) / 1e9


def parts(network: nn.Module) -> dict[str, list[nn.Module]]:
    """The parts of a UNet or MMDiT in the order they run; no module stands in two of them.

    A UNet's blocks are named by level, with its levels' numbers of the first and last block. The host calls the layers
    of a block, not the block, so the layers are what stands in the lists.
    """
    if not hasattr(network, "input_blocks"):
        embedders = [network.t_embedder, network.y_embedder, network.context_embedder]
        blocks, third = list(network.joint_blocks), -(-len(network.joint_blocks) // 3)
        return {
            "embeddings": [m for m in (network.x_embedder, *embedders) if m is not None],
            **{
                f"joint blocks {i}-{min(i + third, len(blocks)) - 1}": blocks[i : i + third]
                for i in range(0, len(blocks), third)
            },
            "final layer": [network.final_layer],
        }
    found = {"time embedding": [network.time_embed]}
    if network.num_classes is not None:
        found["time embedding"].append(network.label_emb)
    found |= _levels("input", network.input_blocks, "Downsample")
    found["middle"] = list(network.middle_block)
    found |= _levels("output", network.output_blocks, "Upsample")
    found["out"] = [network.out]
    return found


def _levels(side: str, blocks: nn.ModuleList, change: str) -> dict[str, list[nn.Module]]:
    """Blocks up to and including each change of resolution."""
    found, first, layers = {}, 0, []
    for i, block in enumerate(blocks):
        layers += list(block)
        if i + 1 == len(blocks) or any(type(layer).__name__ == change for layer in block):
            found[f"{side} {first}-{i}"] = layers
            first, layers = i + 1, []
    return found


def shares(values: dict[str, float]) -> dict[str, float]:
    """Percent of the total per part, "rest" included."""
    total = sum(values.values())
    return {name: 100 * value / total for name, value in values.items()}


def side(values: dict[str, float], *names: str) -> float:
    """The sum of the parts whose name begins with one of `names`."""
    return sum(value for name, value in values.items() if name.startswith(names))


# --- FLOPs ------------------------------------------------------------------------------------------------------------


class _Meter:
    """Adds up what `read()` grows by while the modules of each part run."""

    def __init__(self, modules: dict[str, list[nn.Module]], read: Callable):
        self.read, self.spans, self.handles = read, {name: [] for name in modules}, []
        for name, members in modules.items():
            for module in members:
                self.handles.append(module.register_forward_pre_hook(self._enter(name)))
                self.handles.append(module.register_forward_hook(self._leave(name)))

    def _enter(self, name: str):
        return lambda *_: self.spans[name].append([self.read()])

    def _leave(self, name: str):
        return lambda *_: self.spans[name][-1].append(self.read())

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def count(run: Callable[[], object], modules: dict[str, list[nn.Module]]) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of `run()` per part, with "rest" for what runs outside of them, and per kind of operation.

    Kinds: convolution; attention (the products of queries, keys and values, without projections); linear (every other
    matrix product). The parts, and the kinds, sum to the total.
    """
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        meter = _Meter(modules, counter.get_total_flops)
        try:
            run()
        finally:
            meter.remove()
    total = counter.get_total_flops()
    per_part = {name: sum(end - start for start, end in spans) for name, spans in meter.spans.items()}
    kinds = {"convolution": 0, "attention": 0, "linear": 0}
    for operator, flops in counter.get_flop_counts().get("Global", {}).items():
        kinds[_kind(str(operator))] += flops
    return {**per_part, "rest": total - sum(per_part.values())}, kinds


def _attention_flops(q: tuple, k: tuple, v: tuple, *_, **__) -> int:
    return sdpa_flop_count(q, k, v)


# torch counts the attention of every backend but the processor's own.
UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _kind(operator: str) -> str:
    if "convolution" in operator:
        return "convolution"
    return "attention" if "bmm" in operator or "attention" in operator else "linear"


def feed_forward(network: nn.Module) -> list[nn.Module]:
    """The two-layer networks of all transformer blocks."""
    return [module for module in network.modules() if type(module).__name__ in ("FeedForward", "Mlp")]


def inputs(family: Family, pixels: int, device: str, dtype: torch.dtype, batch: int = 1) -> dict[str, Tensor]:
    """What the network itself is called with."""
    height = width = pixels // 8
    given = {
        "x": torch.zeros(batch, family.unet_config["in_channels"], height, width, device=device, dtype=dtype),
        "timesteps": torch.full((batch,), 500.0, device=device),
        "context": torch.zeros(batch, family.tokens, family.text_width, device=device, dtype=dtype),
    }
    if pooled := family.unet_config["adm_in_channels"]:
        given["y"] = torch.zeros(batch, pooled, device=device, dtype=dtype)
    return given


def forward_flops(family: str | Family, pixels: int | None = None) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of one forward of one picture: per part, and per kind with "feed-forward" taken out of "linear"."""
    from comfy.ldm.modules.attention import attention_pytorch

    family = FAMILIES[family] if isinstance(family, str) else family
    network = build(family, "meta", torch.float32).model.diffusion_model
    # Whatever attention the host chose for this machine: the products are the same, and this one needs no storage.
    options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
    given = inputs(family, pixels or family.pixels, "meta", torch.float32)

    def run() -> None:
        with torch.no_grad():
            network(transformer_options=dict(options), **given)

    per_part, kinds = count(run, parts(network))
    transformer, _ = count(run, {"feed-forward": feed_forward(network)})
    kinds["feed-forward"] = transformer["feed-forward"]
    kinds["linear"] -= transformer["feed-forward"]
    return per_part, kinds


# --- time -------------------------------------------------------------------------------------------------------------


class Clock:
    """Times the parts of a network, and the whole, in every forward while it is open.

    On a GPU the marks are events in the stream, read after the run: nothing waits inside it. On a CPU it is the
    processor's time, so that other work on the machine does not count.
    """

    def __init__(self, network: nn.Module):
        self.cuda = next(network.parameters()).is_cuda
        self.modules = parts(network)
        self.meters = [_Meter({"total": [network]}, self._now), _Meter(self.modules, self._now)]

    def _now(self):
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_) -> None:
        for meter in self.meters:
            meter.remove()

    def forwards(self) -> list[dict[str, float]]:
        """Seconds per part of each forward, with "rest" for what runs outside of the parts."""
        if self.cuda:
            torch.cuda.synchronize()
        wholes = self.meters[0].spans["total"]
        found = []
        for i, (start, end) in enumerate(wholes):
            seconds = {}
            for name, members in self.modules.items():
                spans = self.meters[1].spans[name][i * len(members) : (i + 1) * len(members)]
                seconds[name] = sum(self._between(a, b) for a, b in spans)
            found.append({**seconds, "rest": self._between(start, end) - sum(seconds.values())})
        return found

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


def sample(host: Host, model, family: Family, pixels: int, steps: int, batch: int = 1) -> float:
    """Seconds of a run of the host's sampler with Euler at cfg 1: one forward of `batch` rows per step."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, family.tokens, family.text_width, generator=generator)
    pooled = torch.randn(1, family.pooled_width, generator=generator)
    conditioning = [[context, {"pooled_output": pooled}]]
    latent = {"samples": torch.zeros(batch, family.unet_config["in_channels"], pixels // 8, pixels // 8)}
    (sampler,) = host.call("KSamplerSelect", sampler_name="euler")
    (sigmas,) = host.call("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    synchronize()
    began = time.perf_counter()
    out, _ = host.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=1.0, positive=conditioning,
        negative=conditioning, sampler=sampler, sigmas=sigmas, latent_image=latent,
    )  # fmt: skip
    synchronize()
    if not out["samples"].isfinite().all():
        raise RuntimeError("The random network overflowed: times of infinities would not be those of a real run.")
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_parts(host: Host, model, family: Family, pixels: int, steps: int, batch: int = 1) -> list[dict[str, float]]:
    """Seconds per part of `steps` forwards inside the host's sampler; one forward before them warms up."""
    with Clock(model.model.diffusion_model) as clock:
        sample(host, model, family, pixels, steps + 1, batch)
        return clock.forwards()[1:]


def time_compiled(host: Host, model, family: Family, pixels: int, steps: int, repeats: int = 3) -> list[float]:
    """Time per run after torch.compile relative to before: one ratio per pair of neighbouring runs."""
    (compiled,) = host.call("TorchCompileModel", model=model, backend="inductor")
    for warm in (model, compiled):
        sample(host, warm, family, pixels, 2)
    ratios = []
    for _ in range(repeats):
        before = sample(host, model, family, pixels, steps)
        ratios.append(sample(host, compiled, family, pixels, steps) / before)
    return ratios


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float | None]]:
    """Largest memory in use within the block, in GB: of the GPU, or of this process (Linux; elsewhere None)."""
    peak: list[float | None] = [None]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated() / 1e9
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak
    yield peak
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        peak[0] = int(status.partition("VmHWM:")[2].split()[0]) / 1e6


def free_gigabytes() -> float:
    """Memory that a network may still take: of the GPU, or of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 1e9
    import psutil

    return psutil.virtual_memory().available / 1e9


def lacking(family: Family, dtype: torch.dtype, most: float) -> str:
    """What a network needs and what of `most` GB is free; "" where it fits, with its activations and the host."""
    needed, free = 1.3 * gigabytes(family, dtype) + 1, min(free_gigabytes(), most)
    return f"it needs about {needed:.1f} GB, and {free:.1f} GB are free" if needed > free else ""


# --- tables -----------------------------------------------------------------------------------------------------------


def flops_table(name: str, family: Family, pixels: int) -> tuple[list[Table], dict]:
    per_part, kinds = forward_flops(family, pixels)
    total = sum(per_part.values())
    percent = shares(per_part)
    rows = [[part, flops / 1e9, percent[part]] for part, flops in per_part.items() if flops]
    note = "Of the total: " + ", ".join(f"{kind} {100 * flops / total:.1f} %" for kind, flops in kinds.items()) + "."
    if family.known and pixels == family.pixels:
        known, share = family.known
        encoder = side(percent, "input", "time")
        note += (
            f" Encoder (time embedding and input blocks): {encoder:.1f} %. An earlier, independent count gave "
            f"{known:.0f} GFLOPs and {share:.1f} %: {100 * (total / 1e9 / known - 1):+.2f} % and "
            f"{encoder - share:+.2f} points here."
        )
    rows.append(["total", total / 1e9, 100.0])
    table = Table(f"{name} at {pixels} px: FLOPs of one forward", ["part", "GFLOPs", "%"], rows, note)
    return [table], {"total": total, "parts": per_part, "kinds": kinds}


def time_table(
    name: str, pixels: int, dtype: str, runs: list[dict[str, float]], peak: float | None, flops: dict[str, int]
) -> Table:
    """Shares of the time and their spread over the forwards; seconds only from a GPU."""
    columns = ["part", "time %", "smallest", "largest", "FLOPs %", "time % / FLOPs %"]
    percent, of_flops = [shares(run) for run in runs], shares(flops)
    totals = [sum(run.values()) for run in runs]
    rows = []
    for part in runs[0]:
        values = [p[part] for p in percent]
        median = statistics.median(values)
        ratio = median / of_flops[part] if of_flops[part] > 0.005 else None
        rows.append([part, median, min(values), max(values), of_flops[part], ratio])
    if torch.cuda.is_available():
        columns.insert(1, "ms")
        for row in rows:
            row.insert(1, 1000 * statistics.median(run[row[0]] for run in runs))
        rows.append(["total", 1000 * statistics.median(totals), 100.0, None, None, 100.0, 1.0])
    spread = 100 * (max(totals) - min(totals)) / statistics.median(totals)
    memory = "" if peak is None else f" Peak memory {peak:.1f} GB."
    clock = "" if torch.cuda.is_available() else " Processor time."
    note = (
        f"Median, smallest and largest of {len(runs)} forwards inside the host's sampler; the whole forward varied by "
        f"{spread:.0f} %. {'rest'!r} is what runs between the parts (joining skips, positions, casts).{clock}{memory}"
    )
    return Table(f"{name} at {pixels} px, {dtype}: time of one forward", columns, rows, note)


def measure(host: Host, name: str, args: argparse.Namespace) -> tuple[list[Table], dict]:
    """Tables and raw numbers of one family."""
    import comfy.model_management

    family = FAMILIES[name]
    tables, raw = flops_table(name, family, family.pixels)
    pixels, dtype = args.pixels.get(name, family.pixels), args.dtype
    device = str(comfy.model_management.get_torch_device())
    if pixels == 0:
        return tables, raw
    if said := lacking(family, DTYPES[dtype], args.memory):
        title = f"{name} at {pixels} px, {dtype}: time of one forward"
        return [*tables, Table(title, ["part"], [], f"Not timed: {said}.")], raw
    flops = raw["parts"] if pixels == family.pixels else forward_flops(family, pixels)[0]
    with peak_memory() as peak:
        model = build(name, device, DTYPES[dtype])
        runs = time_parts(host, model, family, pixels, args.steps, args.batch)
    tables.append(time_table(name, pixels, dtype, runs, peak[0], flops))
    raw["runs"] = runs if torch.cuda.is_available() else list(map(shares, runs))
    raw["timed"] = {"pixels": pixels, "dtype": dtype, "batch": args.batch}
    if args.compile:
        ratios = time_compiled(host, model, family, pixels, args.steps)
        row = [statistics.median(ratios), min(ratios), max(ratios)]
        title = f"{name} at {pixels} px, {dtype}: time after torch.compile, relative to before"
        tables.append(Table(title, ["median", "smallest", "largest"], [row], "Whole runs of the sampler, interleaved."))
    del model
    gc.collect()  # a network and its patcher know each other; the next one needs the memory
    return tables, raw


def _pixels(word: str) -> tuple[str, int]:
    name, _, pixels = word.partition("=")
    if name not in FAMILIES or not pixels.isdigit() or int(pixels) % 64:
        raise argparse.ArgumentTypeError(
            f"'{word}' is not MODEL=PIXELS with one of {', '.join(FAMILIES)} and a multiple of 64 (0: FLOPs only)"
        )
    return name, int(pixels)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--pixels", nargs="+", type=_pixels, default=[], metavar="MODEL=PIXELS", help="size to time at")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--steps", type=int, default=4, help="timed forwards, after one that warms up")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", type=float, default=9.0 if not torch.cuda.is_available() else 1e9, metavar="GB")
    parser.add_argument("--cache", type=Path, help="not used: nothing here is worth keeping")
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()
    args.pixels = dict(args.pixels)
    tables, data = [], {}
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        for name in args.models:
            own, data[name] = measure(host, name, args)
            tables += own
            print("\n".join(map(markdown, own)), flush=True)
    notes = [
        "Networks of the published sizes with random weights, built and sampled through the host's own classes, so "
        "that claims about speed rest on real shapes. A multiply-add is two FLOPs, counted at the full size.",
    ]
    if not torch.cuda.is_available():
        notes.append("Without a GPU only shares and ratios are reported: seconds of a CPU say nothing about a card.")
    record("real_size", "Where a real-size forward spends its time", tables, began, (), notes, args.out, data)


if __name__ == "__main__":
    main()
