"""What diffusers runs for each maker's schedule, into makers_by_diffusers.json. Needs diffusers, which no test needs:

python -m venv other && other/bin/pip install torch diffusers && other/bin/python tests/data/makers_by_diffusers.py

Each row states the scheduler's configuration and the call of that model's pipeline, without any code of the pack.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from diffusers.pipelines.stable_audio_3.pipeline_stable_audio_3 import logsnr_sigma_schedule
from diffusers.schedulers.scheduling_minimax_h3 import MiniMaxH3Scheduler

STEPS = (1, 4, 20)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TURBO = [1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031]
FLUX = (256, 4096, 0.5, 1.15)
QWEN = (256, 8192, 0.5, 0.9)
LTX = (1024, 4096, 0.95, 2.05)


def equal(steps):
    return np.linspace(1.0, 1 / steps, steps)


def static(shift):
    return lambda steps, *_: run(FlowMatchEulerDiscreteScheduler(shift=shift), sigmas=equal(steps))


def static_without_sigmas(shift):
    return lambda steps, *_: run(FlowMatchEulerDiscreteScheduler(shift=shift), num_inference_steps=steps)


def dynamic(mu, steps, **config):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **config)
    return run(scheduler, sigmas=equal(steps), mu=mu)


def by_tokens(line, token=16, **config):
    def levels(steps, width, height, frames):
        return dynamic(calculate_shift(width // token * (height // token) * frames, *line), steps, **config)

    return levels


def run(scheduler, **call):
    scheduler.set_timesteps(**call)
    return scheduler.sigmas


def flux2(steps, width, height, _):
    return dynamic(compute_empirical_mu(width // 16 * (height // 16), steps), steps)


def turbo(width, height):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return run(scheduler, sigmas=TURBO, mu=compute_empirical_mu(width // 16 * (height // 16), len(TURBO)))


def omnigen2(steps, width, height, _):
    return dynamic(np.sqrt(width // 8 * (height // 8)) / 40, steps, time_shift_type="linear")


def karras(low):
    """Under another configuration of the same noise both makers' levels are these."""
    edm = lambda steps: run(EDMEulerScheduler(sigma_min=low, sigma_max=80.0), num_inference_steps=steps)
    return lambda steps, *_: edm(steps) if steps > 1 else [80.0, 0.0]


def ideogram4(base_mu, std):
    def levels(steps, width, height, _):
        mu = _resolution_aware_mu(height=height, width=width, base_mu=base_mu)
        return run(FlowMatchEulerDiscreteScheduler(), sigmas=_logit_normal_sigmas(steps, mu, std=std).tolist())

    return levels


def stable_audio3(steps, *_):
    return run(FlowMatchEulerDiscreteScheduler(num_train_timesteps=1), sigmas=logsnr_sigma_schedule(steps, -6.2, 2.0))


def minimax_h3(steps, *_):
    """The 0 is one of as many as are asked for."""
    scheduler = MiniMaxH3Scheduler(shift=12.0)
    scheduler.set_timesteps(steps + 1)
    return scheduler.sigmas


def self_forcing(*_):
    return run(FlowMatchEulerDiscreteScheduler(shift=5.0), sigmas=[1.0, 0.75, 0.5, 0.25])


def mochi(steps, *_):
    return [*linear_quadratic_schedule(steps, 0.025), 0.0] if steps > 1 else [1.0, 0.0]


def trailing(steps, *_):
    return run(EulerDiscreteScheduler(**SD, timestep_spacing="trailing"), num_inference_steps=steps)


def consistency(steps, *_):
    scheduler = LCMScheduler(**SD)
    scheduler.set_timesteps(steps)
    return at(scheduler.timesteps)


def at(timesteps):
    alpha_bar = LCMScheduler(**SD).alphas_cumprod[torch.as_tensor(timesteps)]
    return [*((1 - alpha_bar) / alpha_bar).sqrt(), 0.0]


SQUARE, WIDE = (1024, 1024, 1), (1536, 640, 1)
P480, P720 = (832, 480, 13), (720, 1280, 21)
ROWS = {  # schedule -> (sizes and latent frames, steps and size -> sigmas)
    "FLUX.1 dev": ((SQUARE, WIDE, (2048, 2048, 1)), by_tokens(FLUX)),
    "FLUX.1 schnell": ((SQUARE,), static(1.0)),
    "FLUX.2": ((SQUARE, WIDE, (2048, 2048, 1)), flux2),
    "FLUX.2 klein": ((SQUARE, (2048, 2048, 1)), flux2),
    "Chroma": ((SQUARE, WIDE), by_tokens(FLUX)),
    "Ideogram 4": ((SQUARE, (2048, 2048, 1)), ideogram4(0.0, 1.5)),
    "Ideogram 4 Default": ((SQUARE, (2048, 2048, 1)), ideogram4(0.0, 1.75)),
    "Ideogram 4 Turbo": ((SQUARE, (2048, 2048, 1)), ideogram4(0.5, 1.75)),
    "HiDream-O1 Full": (((2048, 2048, 1),), static(3.0)),
    "ACE-Step": ((SQUARE,), static_without_sigmas(3.0)),
    "Cosmos Predict1": ((P720,), karras(0.0002)),
    "Cosmos Predict2": ((SQUARE,), karras(0.002)),
    "HuMo": ((P720,), static(5.0)),
    "Wan 2.1 Fun": ((P480,), static(3.0)),
    "Wan 2.1 Fun Camera": ((P720,), static(5.0)),
    "Wan 2.2 Fun Camera": ((P480,), static(3.0)),
    "Qwen-Image": (((1328, 1328, 1), WIDE, (2048, 2048, 1)), by_tokens(QWEN, shift_terminal=0.02)),
    "Qwen-Image 2.1": ((SQUARE, (2048, 2048, 1)), by_tokens(QWEN, shift_terminal=0.02)),
    "Qwen-Image Lightning": ((SQUARE,), lambda steps, *_: dynamic(np.log(3), steps)),
    "Z-Image": ((SQUARE,), static(3.0)),
    "Z-Image-Turbo": ((SQUARE,), static(3.0)),
    "Wan 2.1 T2V": ((P480,), static(3.0)),
    "Wan 2.1 I2V": ((P720,), static(5.0)),
    "Wan 2.1 T2V 1.3B": ((P480,), static(8.0)),
    "Wan 2.1 VACE": ((P480,), static(16.0)),
    "Wan 2.1 FLF2V": ((P720,), static(16.0)),
    "Wan 2.2 I2V A14B": ((P480,), static(3.0)),
    "Wan 2.2 TI2V 5B": (((1280, 704, 31),), static(5.0)),
    "Wan 2.2 S2V": ((P480,), static(3.0)),
    "Wan 2.2 Animate": ((P720,), static(5.0)),
    "Wan 2.2 T2V A14B": ((P720,), static(12.0)),
    "Wan 2.2 Lightning T2V": ((P720,), static(5.0)),
    "Wan 2.2 Lightning I2V": ((P720,), static(5.0)),
    "LTX-Video": (((768, 512, 13), (960, 544, 13)), by_tokens(LTX, token=32, shift_terminal=0.1)),
    "LTX-2": ((P720,), lambda steps, *_: dynamic(2.05, steps, shift_terminal=0.1)),
    "HunyuanVideo": ((P720,), static(7.0)),
    "HunyuanVideo 1.5": ((P720,), static(9.0)),
    "HunyuanVideo 1.5 I2V": ((P720,), static(7.0)),
    "HunyuanVideo 1.5 I2V step distilled": ((P480,), static(7.0)),
    "HunyuanVideo 1.5 SR": (((1920, 1088, 21),), static(2.0)),
    "HunyuanImage 2.1": (((2048, 2048, 1),), static(5.0)),
    "HunyuanImage 2.1 distilled": (((2048, 2048, 1),), static(4.0)),
    "SD3": ((SQUARE,), static_without_sigmas(3.0)),
    "Lumina-Image 2.0": ((SQUARE,), static(6.0)),
    "HiDream-I1 Full": ((SQUARE,), static(3.0)),
    "HiDream-I1 Dev": ((SQUARE,), static_without_sigmas(6.0)),
    "HiDream-I1 Fast": ((SQUARE,), static_without_sigmas(3.0)),
    "OmniGen2": ((SQUARE, WIDE), omnigen2),
    "Mochi 1": (((848, 480, 28),), mochi),
    "Kandinsky 5 video": (((768, 512, 31),), static(10.0)),
    "Kandinsky 5 image": ((SQUARE,), static(3.0)),
    "Krea 2 Raw": ((SQUARE, (2048, 2048, 1)), by_tokens((256, 6400, 0.5, 1.15))),
    "Krea 2 Turbo": (((2048, 2048, 1),), lambda steps, *_: dynamic(1.15, steps)),
    "LongCat-Image": (((1344, 768, 1),), by_tokens(FLUX)),
    "Anima": ((SQUARE,), static(3.0)),
    "JoyImage": ((SQUARE,), static(1.5)),
    "SDXL Lightning": ((SQUARE,), trailing),
    "Hyper-SDXL": ((SQUARE,), trailing),
    "LCM SDXL": ((SQUARE,), consistency),
    "ACE-Step 1.5": ((SQUARE,), static(3.0)),
    "ACE-Step 1.5 Turbo": ((SQUARE,), static(3.0)),
    "AuraFlow": ((SQUARE,), static_without_sigmas(1.73)),
    "Boogu-Image": ((SQUARE,), lambda steps, *_: dynamic(1.15, steps)),
    "HunyuanImage 2.1 refiner": (((2048, 2048, 1),), static(4.0)),
    "HunyuanVideo-I2V": ((P720,), static(7.0)),
    "HunyuanVideo-I2V dynamic": ((P720,), static(17.0)),
    "Lens": ((SQUARE, (1440, 1440, 1)), flux2),
    "Lens Turbo": ((SQUARE, (1440, 1440, 1)), flux2),
    "Mage-Flow": ((SQUARE,), static(6.0)),
    "Mage-Flow Turbo": ((SQUARE,), static(6.0)),
    "MiniMax H3": ((P720,), minimax_h3),
    "MiniMax Music 3": ((SQUARE,), static(1.0)),
    "SCAIL": ((P480,), static(5.0)),
    "SCAIL 2": ((P480,), static(5.0)),
    "SeedVR2": ((P720,), static(1.0)),
    "SkyReels V1 I2V": ((P720,), static(7.0)),
    "Stable Audio 3": ((SQUARE,), stable_audio3),
    "TRELLIS.2 structure": ((SQUARE,), static(5.0)),
    "TRELLIS.2 shape and texture": ((SQUARE,), static(3.0)),
    "TripoSplat": ((SQUARE,), static(3.0)),
    "Wan-Animate 2": ((P480,), static(5.0)),
    "Wan-Dancer": ((P480,), static(5.0)),
}
FIXED = {"Hyper-SDXL one step": at([800]), "DMD2 SDXL": at([999, 749, 499, 249]), "DMD2 SDXL one step": at([399])}


def main():
    runs = [
        [name, list(size), [float(f"{level:.9g}") for level in levels(steps, *size)]]
        for name, (sizes, levels) in ROWS.items()
        for size in sizes
        for steps in STEPS
    ]
    runs += [[name, list(SQUARE), [float(f"{level:.9g}") for level in levels]] for name, levels in FIXED.items()]
    runs.append(["Self Forcing", list(P480), [float(f"{level:.9g}") for level in self_forcing()]])
    runs += [
        ["FLUX.2 turbo", [side, side, 1], [float(f"{one:.9g}") for one in turbo(side, side)]] for side in (1024, 2048)
    ]
    runs = [row for row in runs if all(np.isfinite(row[2]))]  # diffusers divides 0 by 0 where one step is stretched
    lines = ",\n".join(f"  {json.dumps(row)}" for row in runs)
    head = json.dumps({"made by": "tests/data/makers_by_diffusers.py", "diffusers": diffusers.__version__})[:-1]
    Path(__file__).with_suffix(".json").write_text(f'{head}, "runs": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
