"""A ControlNet made by hand: its residuals depend on x, and the levels it was computed at are kept."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def controlled(encode, residuals: Callable[[Tensor], dict]) -> tuple[list, list[float]]:
    """A conditioning with a ControlNet whose answer to x_noisy is `residuals`, and the list of its levels so far."""
    import comfy.controlnet

    calls = []

    class Net(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            calls.append(float(t[0]))
            return residuals(x_noisy)

        def pre_run(self, *args):
            pass

        def get_models(self):
            return []

        def copy(self):
            return self

    (context, extra), *_ = encode("a cat on a black background")
    return [[context, {**extra, "control": Net(), "control_apply_to_uncond": True}]], calls
