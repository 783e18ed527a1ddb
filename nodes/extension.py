"""The list of nodes, in menu order, and what the host needs to know before the first of them runs."""

from __future__ import annotations

from . import (
    auto,
    compare,
    fast_sampler,
    fit_sampler,
    golden_noise,
    noise,
    noise_shift,
    one_more_step,
    profiles,
    propagation,
    redenoise,
    schedules,
    train_npnet,
    train_one_more_step,
)
from ._host.api import ComfyExtension
from ._host.demo_model import register_demo_model
from ._host.folders import register_folders
from ._host.replaced import register_replacements
from ._host.workflow_profiles import register_exchange

NODES = [
    *auto.NODES,
    *schedules.NODES,
    *fit_sampler.NODES,
    *fast_sampler.NODES,
    *noise_shift.NODES,
    *one_more_step.NODES,
    *train_one_more_step.NODES,
    *golden_noise.NODES,
    *noise.NODES,
    *redenoise.NODES,
    *train_npnet.NODES,
    *propagation.NODES,
    *profiles.NODES,
    *compare.NODES,
]

register_folders()
register_demo_model()
register_exchange()


class AttuneExtension(ComfyExtension):
    async def on_load(self):
        await register_replacements()

    async def get_node_list(self):
        return NODES
