"""The host's solvers in one table: what a fit, a reference run and a step clock must know of each.

A solver that is not in the table is never guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SolverFacts:
    """calls: of the model in one step, the most. order: of convergence, as measured over many steps: multistep solvers
    that begin with a step of Euler's do not get beyond 2. sibling: the solver without added noise that walks the paths
    around which this one scatters, "" for one that adds none. on_grid: whether it asks the model once a step, at the
    step's own level, and reports the step afterwards. told: whether its step is Euler's, so that the timesteps of its
    levels can be aligned. own_levels: whether it ignores the inner levels of a schedule. jumps: whether it goes to the
    picture at every step (LCM), so that there is no path to follow. keeps_state: whether the tensor that it first asks
    the model about in a step is the state that it goes on with.
    """

    calls: int = 1
    order: int = 1
    sibling: str = ""
    on_grid: bool = True
    told: bool = False
    own_levels: bool = False
    jumps: bool = False
    keeps_state: bool = True

    @property
    def adds_noise(self) -> bool:
        return bool(self.sibling) or self.jumps


SOLVERS = {
    "euler": SolverFacts(told=True),
    "euler_cfg_pp": SolverFacts(),
    "euler_ancestral": SolverFacts(sibling="euler"),
    "euler_ancestral_cfg_pp": SolverFacts(sibling="euler_cfg_pp"),
    "heun": SolverFacts(2, 2, on_grid=False),
    "heunpp2": SolverFacts(3, on_grid=False),
    "dpm_2": SolverFacts(2, 2, on_grid=False),
    "dpm_2_ancestral": SolverFacts(2, 1, "dpm_2", on_grid=False),
    "lms": SolverFacts(order=2),
    "dpm_fast": SolverFacts(3, 3, on_grid=False, own_levels=True),
    "dpm_adaptive": SolverFacts(3, 3, on_grid=False, own_levels=True),
    "dpmpp_2s_ancestral": SolverFacts(2, 1, "dpmpp_2m", on_grid=False),
    "dpmpp_2s_ancestral_cfg_pp": SolverFacts(2, 1, "dpmpp_2m_cfg_pp", on_grid=False),
    "dpmpp_sde": SolverFacts(2, 1, "dpmpp_2m", on_grid=False),
    "dpmpp_2m": SolverFacts(order=2),
    "dpmpp_2m_cfg_pp": SolverFacts(order=2),
    "dpmpp_2m_sde": SolverFacts(sibling="dpmpp_2m"),
    "dpmpp_2m_sde_heun": SolverFacts(sibling="dpmpp_2m"),
    "dpmpp_3m_sde": SolverFacts(sibling="dpmpp_2m"),
    "ddpm": SolverFacts(sibling="euler"),
    "lcm": SolverFacts(jumps=True),
    "ipndm": SolverFacts(order=2),
    "ipndm_v": SolverFacts(order=2),
    "deis": SolverFacts(order=2),
    "res_multistep": SolverFacts(order=2),
    "res_multistep_cfg_pp": SolverFacts(order=2),
    "res_multistep_ancestral": SolverFacts(sibling="res_multistep"),
    "res_multistep_ancestral_cfg_pp": SolverFacts(sibling="res_multistep_cfg_pp"),
    "gradient_estimation": SolverFacts(),
    "gradient_estimation_cfg_pp": SolverFacts(),
    "er_sde": SolverFacts(sibling="dpmpp_2m"),
    "seeds_2": SolverFacts(2, 1, "dpmpp_2m", on_grid=False),
    "seeds_3": SolverFacts(3, 1, "dpmpp_2m", on_grid=False),
    "exp_heun_2_x0": SolverFacts(2, 2, on_grid=False),
    "exp_heun_2_x0_sde": SolverFacts(2, 1, "exp_heun_2_x0", on_grid=False),
    "sa_solver": SolverFacts(sibling="dpmpp_2m", on_grid=False, keeps_state=False),
    "sa_solver_pece": SolverFacts(2, 1, "dpmpp_2m", on_grid=False, keeps_state=False),
    "uni_pc": SolverFacts(order=2, on_grid=False, keeps_state=False),
    "uni_pc_bh2": SolverFacts(order=2, on_grid=False, keeps_state=False),
}
OWN_SOLVERS = {"attune_fitted": SolverFacts()}  # ours, which no list of the host has
ALIASES = {"ddim": "euler", "unipc": "uni_pc", "unipc_bh2": "uni_pc_bh2"}  # other names for the same steps


def table_name(name: str) -> str:
    """The name in the table of a solver as lists and functions call it; GPU variants share it."""
    plain = name.removesuffix("_gpu")
    return ALIASES.get(plain, plain)
