"""From how much noise a pixel gets to when it joins a run under the host's Differential Diffusion."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.noise_mask import time_share
from .clock import noise_space


def shares_of_run(model: Any, sigmas: Tensor, strength: Tensor) -> Tensor:
    """The host's mask values [b h w]: the timestep's share between the run's first level and its last.

    The host lowers its threshold from 1 at the first level to 0 at the least; what is below the mask's value joins.
    """
    if len(sigmas) < 2 or float(sigmas[0]) <= 0:
        raise ValueError("Attune Noise Mask: 'sigmas' has no step; raise its 'denoise' above 0.")
    sampling = model.get_model_object("model_sampling")
    least = max(float(sampling.sigma_min), float(sigmas[-1]))
    return time_share(strength, float(sigmas[0]), least, noise_space(sampling), sampling.timestep)
