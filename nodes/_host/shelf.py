"""What is installed: profiles, modules of One More Step and networks for golden noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from ...models.npnet import NPNetConfig
from ...models.npnet_files import read_config
from ...models.one_more_step import architecture_of, latent_space_of, read_header
from .._plan.auto import Shelf
from .folders import MODULES, NPNETS, file_names, file_path, find_profile, profile_names

T = TypeVar("T")


def installed(modules: bool = True, npnets: bool = True) -> tuple[Shelf, list[str]]:
    """What can be loaded, and a sentence for each file that cannot be read; no such file stops the others."""
    unread: list[str] = []

    def read(names: Iterable[str], load: Callable[[str], T]) -> dict[str, T]:
        found = {}
        for name in names:
            try:
                found[name] = load(name)
            except ValueError as error:
                unread.append(str(error))
            except OSError as error:
                unread.append(f"{name} cannot be read: {error.strerror}. Allow reading it, or take it away.")
        return found

    shelf = Shelf(
        read(profile_names(), find_profile),
        read(file_names(MODULES) if modules else (), _module),
        read(file_names(NPNETS) if npnets else (), _npnet),
    )
    return shelf, unread


def _module(name: str) -> tuple[str, int]:
    header = read_header(file_path(MODULES, name))
    width = architecture_of(header).context_dim
    return latent_space_of(header, width), width


def _npnet(name: str) -> tuple[NPNetConfig, str]:
    config, facts = read_config(file_path(NPNETS, name))
    return config, facts.get("latent_format", "")
