"""What Attune Auto sees of the models people use: facts as the host states them, and how each is usually run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pack.models.calibration import ModelIdentity
from pack.models.npnet import NPNetConfig
from pack.models.store import shipped_profiles
from pack.nodes._plan.auto import ALWAYS, FAITHFUL, Facts, Run, Shelf, Wishes

SIGMA = (0.0292, 14.6146)  # of Stable Diffusion's betas
DEMO_UNET, DEMO_FLOW = "57718664cfbd15e4", "a65b66ff95190fab"  # the networks' configurations, as in their profiles


@dataclass(frozen=True)
class Case:
    facts: Facts
    run: Run


def ve(family: str, prediction: str = "eps", sigmas=SIGMA, config: str = "theirs") -> ModelIdentity:
    return ModelIdentity((family,), "ve", *sigmas, prediction, config)


def flow(family: str, shift: float, config: str = "theirs") -> ModelIdentity:
    return ModelIdentity((family,), "flow", 0.001, 1.0, "flow", config, shift)


def unet(model: ModelIdentity, latents: str, width: int, side: int, text: int, **more) -> Facts:
    return Facts(model, "unet", latents, 4, (side, side), width * width, text_width=text, **more)


def transformer(model: ModelIdentity, latents: str, size: tuple[int, int], blocks: int, channels: int = 16) -> Facts:
    return Facts(model, "transformer", latents, channels, size, size[0] * size[1] // 64, blocks)


SD15 = unet(ve("SD15"), "SD15", 64, 512, 768)
SDXL = unet(ve("SDXL"), "SDXL", 128, 1024, 2048, deep=True)
SD3 = transformer(flow("SD3", 3.0), "SD3", (1024, 1024), 24)
FAMILIES = {
    "SD 1.5": Case(SD15, Run(20, "dpmpp_2m", 7.0, prompt_width=1024)),
    "SD 1.5 with LCM": Case(replace(SD15, distilled=True), Run(6, "lcm", 1.5, prompt_width=1024)),
    "SD 2.x v": Case(unet(ve("SD20", "v"), "SD15", 96, 768, 1024), Run(20, "dpmpp_2m", 7.0, prompt_width=1024)),
    "SDXL": Case(SDXL, Run(20, "dpmpp_2m", 7.0, prompt_width=2048)),
    "SDXL, below native size": Case(
        replace(SDXL, size=(512, 512), area=64 * 64), Run(25, "euler", 7.0, prompt_width=2048)
    ),
    "SDXL Turbo, Lightning": Case(SDXL, Run(4, "euler", 1.0, prompt_width=2048)),
    "SD3, SD3.5": Case(SD3, Run(28, "euler", 4.5)),
    "SD3, few steps": Case(SD3, Run(8, "dpmpp_2m", 4.5)),
    "SD3.5 Large Turbo": Case(SD3, Run(4, "euler", 1.0)),
    "Flux": Case(transformer(flow("Flux", 1.15), "Flux", (1024, 1024), 57), Run(20, "euler", 1.0)),
    "Flux.2 klein": Case(
        transformer(replace(flow("Flux2", 2.02), families=("Flux2", "Flux")), "Flux2", (1024, 1024), 25, 128),
        Run(4, "euler", 1.0),
    ),
    "Qwen-Image": Case(transformer(flow("QwenImage", 1.15), "Wan21", (1328, 1328), 60), Run(20, "euler", 4.0)),
    "Wan": Case(transformer(flow("WAN21_T2V", 8.0), "Wan21", (832, 480), 30), Run(30, "uni_pc", 6.0)),
    "AuraFlow": Case(transformer(flow("AuraFlow", 1.73), "SDXL", (1024, 1024), 36, 4), Run(25, "euler", 3.5)),
    "demo UNet": Case(
        unet(ve("AttuneDemo", "v", config=DEMO_UNET), "DemoLatent", 16, 128, 128),
        Run(8, "dpmpp_2m", 3.0, prompt_width=128),
    ),
    "demo flow": Case(transformer(flow("SD3", 3.0, DEMO_FLOW), "SD3", (128, 128), 3), Run(8, "euler", 3.0)),
    "unknown model": Case(
        Facts(flow("NewModel", 1.0), "", "NewLatent", 8, (1024, 1024), 128 * 128), Run(20, "euler", 5.0)
    ),
}
OWN_MODULES = {"attune_demo.safetensors": ("DemoLatent", 128)}
OWN_NPNETS = {"attune_demo_npnet.safetensors": (NPNetConfig(side=16, tokens=16, width=128), "DemoLatent")}
FRESH = Shelf(shipped_profiles(), OWN_MODULES, OWN_NPNETS)
FULL = Shelf(
    shipped_profiles(),
    {
        "oms_b_openclip_15_21": ("SD15", 1024), "oms_b_openclip_xl": ("SDXL", 1024),
        "oms_l_mixclip_xl": ("SDXL", 2048), **OWN_MODULES,
    },
    {"npnet-sdxl": (NPNetConfig(), ""), **OWN_NPNETS},
)  # fmt: skip
EVERYTHING = Wishes(ALWAYS, ALWAYS, ALWAYS, ALWAYS, FAITHFUL)
