"""The host's own samplers: what is known of a SAMPLER's solver, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import nodes as host_nodes
from torch import Tensor

from .._plan.solvers import OWN_SOLVERS, SOLVERS, SolverFacts, table_name

NOISE_OPTIONS = ("eta", "s_churn")


def solver_name(sampler: Any) -> str:
    """The name of a SAMPLER's solver as in the table; GPU variants of a solver share its name."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    return table_name(name.removeprefix("sample_").removesuffix("_function"))


def facts_of(sampler: Any) -> SolverFacts | None:
    """The row of a SAMPLER's solver, None for one that is not in the table."""
    name = solver_name(sampler)
    return SOLVERS.get(name) or OWN_SOLVERS.get(name)


def on_grid(sampler: Any) -> bool:
    """Whether a SAMPLER asks the model once a step, at the step's own level; no for one that is not known."""
    facts = facts_of(sampler)
    return facts is not None and facts.on_grid


def known(sampler: Any, what: str) -> tuple[str, SolverFacts]:
    """Name and row of a SAMPLER's solver; ValueError when it is not in the table, which `what` cannot do without."""
    name = solver_name(sampler)
    if name not in SOLVERS:
        fitting = [one for one in sampler_names() if one in SOLVERS]
        raise ValueError(
            f"Attune does not know the sampler '{name}'. {what} needs to know whether a sampler adds noise and how "
            f"often it asks the model in a step: choose one of {', '.join(fitting)}."
        )
    return name, SOLVERS[name]


def adds_noise(sampler: Any) -> bool:
    """Whether a SAMPLER adds fresh noise on its way, by its kind and its options; yes for one that is not known."""
    facts, options = facts_of(sampler), getattr(sampler, "extra_options", {})
    numbers = {key: options[key] for key in NOISE_OPTIONS if isinstance(options.get(key), int | float)}
    if numbers.get("s_churn", 0) > 0 or facts is None:
        return True
    return (facts.adds_noise and numbers.get("eta", 1) > 0) or (not facts.adds_noise and numbers.get("eta", 0) > 0)


def sampler_names() -> list[str]:
    """The solvers of the host's own list."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    return list(comfy.samplers.KSampler.SCHEDULERS)


def run_stock_node(node_id: str, **inputs) -> tuple:
    """The outputs of a stock node, whether the host defines it in the old or the new node API."""
    node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
    if hasattr(node, "execute"):
        return node.execute(**inputs).result
    return getattr(node(), node.FUNCTION)(**inputs)


def sample(
    model, seed: int, cfg: float, sampler_name: str, sigmas: Tensor, positive, negative, latent: dict,
    through: Callable[[Any], Any] = lambda sampler: sampler,
) -> dict:  # fmt: skip
    """A LATENT out of the stock SamplerCustom, so that noise, masks, previews and batches are the host's business.

    through: SAMPLER -> the one that runs.
    """
    # Some samplers (uni_pc) write into the levels they are given.
    output, _ = run_stock_node(
        "SamplerCustom", model=model, add_noise=True, noise_seed=seed, cfg=cfg, positive=positive, negative=negative,
        sampler=through(comfy.samplers.sampler_object(sampler_name)), sigmas=sigmas.clone(), latent_image=latent,
    )  # fmt: skip
    return output
