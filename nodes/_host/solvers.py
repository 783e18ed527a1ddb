"""The solver of a SAMPLER, looked up in the table of solvers."""

from __future__ import annotations

from typing import Any

import comfy.samplers

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
