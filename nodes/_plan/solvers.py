"""The host's solvers in one table: what a fit, a reference run and a step clock must know of each.

A solver that is not in the table is never guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SolverFacts:
    """calls: of the model in one step, the most. order: of convergence, as measured over many steps: multistep solvers
    that begin with a step of Euler's do not get beyond 2. sibling: the solver without added noise that
    walks the paths around which this one scatters, "" for one that adds none. on_grid: whether it asks the model once a
    step, at the step's own level, and reports the step afterwards. told: whether its step is Euler's, so that the
    timesteps of its levels can be aligned. amplification: by how much more than Euler it spreads errors of the model's
    answers that are independent from step to step. own_levels: whether it ignores the inner levels of a schedule.
    jumps: whether it goes to the picture at every step (LCM), so that there is no path to follow. keeps_state: whether
    the tensor that it first asks the model about in a step is the state that it goes on with.
    """

    calls: int = 1
    order: int = 1
    sibling: str = ""
    on_grid: bool = True
    told: bool = False
    amplification: float = 1.0
    own_levels: bool = False
    jumps: bool = False
    keeps_state: bool = True

    @property
    def adds_noise(self) -> bool:
        return bool(self.sibling) or self.jumps


SOLVERS = {
    "euler": SolverFacts(told=True),
    "euler_cfg_pp": SolverFacts(),
    "euler_ancestral": SolverFacts(sibling="euler", amplification=1.41),
    "euler_ancestral_cfg_pp": SolverFacts(sibling="euler_cfg_pp", amplification=1.41),
    "heun": SolverFacts(2, 2, on_grid=False, amplification=0.73),
    "heunpp2": SolverFacts(3, on_grid=False),
    "dpm_2": SolverFacts(2, 2, on_grid=False, amplification=1.13),
    "dpm_2_ancestral": SolverFacts(2, 1, "dpm_2", on_grid=False, amplification=1.83),
    "lms": SolverFacts(order=2, amplification=1.33),
    "dpm_fast": SolverFacts(3, 3, on_grid=False, own_levels=True, amplification=1.71),
    "dpm_adaptive": SolverFacts(3, 3, on_grid=False, own_levels=True),
    "dpmpp_2s_ancestral": SolverFacts(2, 1, "dpmpp_2m", on_grid=False, amplification=1.41),
    "dpmpp_2s_ancestral_cfg_pp": SolverFacts(2, 1, "dpmpp_2m_cfg_pp", on_grid=False, amplification=2.41),
    "dpmpp_sde": SolverFacts(2, 1, "dpmpp_2m", on_grid=False, amplification=1.4),
    "dpmpp_2m": SolverFacts(order=2, amplification=1.15),
    "dpmpp_2m_cfg_pp": SolverFacts(order=2, amplification=1.15),
    "dpmpp_2m_sde": SolverFacts(sibling="dpmpp_2m", amplification=1.77),
    "dpmpp_2m_sde_heun": SolverFacts(sibling="dpmpp_2m", amplification=1.8),
    "dpmpp_3m_sde": SolverFacts(sibling="dpmpp_2m", amplification=2.17),
    "ddpm": SolverFacts(sibling="euler", amplification=1.41),
    "lcm": SolverFacts(jumps=True, amplification=2.9),
    "ipndm": SolverFacts(order=2, amplification=1.86),
    "ipndm_v": SolverFacts(order=2, amplification=1.48),
    "deis": SolverFacts(order=2, amplification=1.2),
    "res_multistep": SolverFacts(order=2, amplification=1.16),
    "res_multistep_cfg_pp": SolverFacts(order=2, amplification=1.16),
    "res_multistep_ancestral": SolverFacts(sibling="res_multistep", amplification=1.8),
    "res_multistep_ancestral_cfg_pp": SolverFacts(sibling="res_multistep_cfg_pp", amplification=1.8),
    "gradient_estimation": SolverFacts(amplification=1.36),
    "gradient_estimation_cfg_pp": SolverFacts(amplification=1.36),
    "er_sde": SolverFacts(sibling="dpmpp_2m", amplification=1.17),
    "seeds_2": SolverFacts(2, 1, "dpmpp_2m", on_grid=False, amplification=1.4),
    "seeds_3": SolverFacts(3, 1, "dpmpp_2m", on_grid=False, amplification=1.16),
    "exp_heun_2_x0": SolverFacts(2, 2, on_grid=False, amplification=0.71),
    "exp_heun_2_x0_sde": SolverFacts(2, 1, "exp_heun_2_x0", on_grid=False),
    "sa_solver": SolverFacts(sibling="dpmpp_2m", on_grid=False, keeps_state=False),
    "sa_solver_pece": SolverFacts(2, 1, "dpmpp_2m", on_grid=False, keeps_state=False, amplification=0.78),
    "uni_pc": SolverFacts(order=2, on_grid=False, keeps_state=False, amplification=1.1),
    "uni_pc_bh2": SolverFacts(order=2, on_grid=False, keeps_state=False, amplification=1.1),
}
OWN_SOLVERS = {"attune_fitted": SolverFacts()}  # ours, which no list of the host has
ALIASES = {"ddim": "euler", "unipc": "uni_pc", "unipc_bh2": "uni_pc_bh2"}  # other names for the same steps


def table_name(name: str) -> str:
    """The name in the table of a solver as lists and functions call it; GPU variants share it."""
    plain = name.removesuffix("_gpu")
    return ALIASES.get(plain, plain)
