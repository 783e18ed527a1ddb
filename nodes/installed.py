"""What is installed: profiles, modules of One More Step and networks for golden noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from ..models.npnet_files import load_npnet
from ..models.one_more_step import architecture_of, latent_space_of, read_header
from ._host.api import io, say_on_node, schema, ui
from ._host.folders import (
    find_profile,
    installed_files,
    module_names,
    module_path,
    npnet_names,
    npnet_path,
    profile_names,
)
from ._host.identity import identify
from ._plan.auto import Shelf
from ._plan.installed import listing

T = TypeVar("T")


class AttuneInstalled(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="AttuneInstalled",
            display_name="Attune Installed",
            category="attune/profiles",
            description="Lists the profiles, modules and networks that are there, and those made for your model.",
            search_aliases=["list profiles", "installed", "models attune", "what do I have", "inventory"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", optional=True, tooltip="Marks the profiles that were made for this model."),
            ],
            outputs=[io.String.Output(display_name="list", tooltip="A line for each file, and why a file is unread.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return installed_files()

    @classmethod
    def execute(cls, model=None) -> io.NodeOutput:
        shelf, unread = installed()
        said = listing(shelf, unread, None if model is None else identify(model))
        say_on_node(cls, said)
        return io.NodeOutput(said, ui=ui.PreviewText(said))


def installed(modules: bool = True, npnets: bool = True) -> tuple[Shelf, list[str]]:
    """What can be loaded, and a sentence for each file that cannot be read."""
    unread: list[str] = []

    def read(names: Iterable[str], load: Callable[[str], T]) -> dict[str, T]:
        found = {}
        for name in names:
            try:
                found[name] = load(name)
            except ValueError as error:
                unread.append(str(error))
        return found

    shelf = Shelf(
        read(profile_names(), find_profile),
        read(module_names() if modules else (), _module),
        read(npnet_names() if npnets else (), _npnet),
    )
    return shelf, unread


def _module(name: str) -> tuple[str, int]:
    header = read_header(module_path(name))
    width = architecture_of(header).context_dim
    return latent_space_of(header, width), width


def _npnet(name: str):
    file = load_npnet(npnet_path(name))
    return file.net.config, file.facts.get("latent_format", "")


NODES = [AttuneInstalled]
