"""The list of nodes, in menu order, and what the host needs to know before the first of them runs."""

from __future__ import annotations

from importlib import import_module

from ._host.api import ComfyExtension, with_checked_widgets
from ._host.demo_model import register_demo_models
from ._host.folders import register_folders
from ._host.replaced import register_replacements
from ._host.workflow_profiles import register_exchange

MENU = (  # the modules of the nodes
    "auto", "schedules", "fit_sampler", "fast_sampler", "noise_shift", "one_more_step", "train_one_more_step",
    "golden_noise", "noise", "redenoise", "train_npnet", "noise_space", "noise_mask", "protect", "timestep_field",
    "long_noise", "propagation", "attention", "draft_seeds", "training_noise", "precision", "calibration_set",
    "profiles", "compare", "demo_picture",
)  # fmt: skip
NODES = [with_checked_widgets(node) for name in MENU for node in import_module(f".{name}", __package__).NODES]

register_folders()
register_demo_models()
register_exchange()


class AttuneExtension(ComfyExtension):
    async def on_load(self):
        await register_replacements()

    async def get_node_list(self):
        return NODES
