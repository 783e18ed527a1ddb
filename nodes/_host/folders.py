"""Where the host finds the pack's own files, and where the pack finds the user's."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...models.calibration import SUFFIX, Calibration, load_profile, save_profile, shipped_profiles
from ...models.npnet_files import PICKLED, SAFE

WEIGHTS = Path(__file__).resolve().parents[2] / "models" / "weights"
CONTROLNETS = WEIGHTS.with_name("controlnet")
OWN_NPNETS = Path(__file__).resolve().parents[2] / "models" / "golden_noise"
OWN_LORAS = Path(__file__).resolve().parents[2] / "models" / "loras"
NPNETS = "npnet"  # models/npnet
FOLDER = "attune"  # models/attune, or wherever extra_model_paths.yaml sends it
MODULES = "one_more_step"  # likewise: networks of One More Step
SHIPPED_MODULES = WEIGHTS.with_name(MODULES)
CARRIED: dict[str, Calibration] = {}  # by file name: what workflows brought along and models/attune lacks


def register_folders() -> None:
    """List the demo's files in the stock loaders, after the user's own folders; models/attune and models/npnet."""
    folder_paths.add_model_folder_path("checkpoints", str(WEIGHTS))
    folder_paths.add_model_folder_path("controlnet", str(CONTROLNETS))
    folder_paths.add_model_folder_path("loras", str(OWN_LORAS))
    configured, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    own = os.path.join(folder_paths.models_dir, FOLDER)
    paths = [*configured, *([] if own in configured else [own])]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {SUFFIX})
    configured, _ = folder_paths.folder_names_and_paths.get(MODULES, ([], set()))
    paths = [*configured, os.path.join(folder_paths.models_dir, MODULES), str(SHIPPED_MODULES)]
    folder_paths.folder_names_and_paths[MODULES] = (list(dict.fromkeys(paths)), {".safetensors"})
    found, kinds = folder_paths.folder_names_and_paths.get(NPNETS, ([], set()))
    ours = [os.path.join(folder_paths.models_dir, name) for name in (NPNETS, "npnets")]
    paths = [*found, *(path for path in [*ours, str(OWN_NPNETS)] if path not in found)]
    folder_paths.folder_names_and_paths[NPNETS] = (paths, {*kinds, *SAFE, *PICKLED})


def user_profile_names() -> list[str]:
    """The profile files of the user, as the host lists them."""
    return folder_paths.get_filename_list(FOLDER)


def profile_names() -> list[str]:
    """Everything that can be loaded: the user's files, then the pack's own by their names."""
    return [*user_profile_names(), *shipped_profiles()]


def profile_path(name: str) -> Path | None:
    """The file behind a name, None for the pack's own profiles and for names that are not there."""
    path = folder_paths.get_full_path(FOLDER, name) if name.endswith(SUFFIX) else None
    return None if path is None else Path(path)


def has_profile(name: str) -> bool:
    """Whether the user, or a workflow that the user opened, has a profile file of that name."""
    return profile_path(name) is not None or name in CARRIED


def find_profile(name: str) -> Calibration:
    """The profile of that name; ValueError with the folder and the choices when there is none."""
    if name in shipped_profiles():
        return shipped_profiles()[name]
    path = profile_path(name)
    if path is not None:
        return load_profile(path)
    if name in CARRIED:
        return CARRIED[name]
    raise ValueError(missing_profile(name))


def missing_profile(name: str) -> str:
    """What to do about a profile that is not there."""
    return (
        f"There is no profile '{name}' in {_folder()}. Ask the maker of the workflow for that file, or for a picture "
        "saved by the workflow, which carries its profiles; put the file there and press R to refresh. Or choose one "
        f"of: {', '.join(profile_names())}."
    )


def keep_profile(profile: Calibration, name: str = "", replace: bool = False) -> Path:
    """Save `profile` where the loader finds it at once; `replace`: in the place of a file of that name."""
    try:
        return save_profile(profile, _folder(), name, replace)
    except OSError as error:
        raise ValueError(
            f"The profile could not be saved in {_folder()}: {error.strerror}. Make room or allow writing there, then "
            "run again."
        ) from error


def keep_fit(profile: Calibration) -> str:
    """Save what a fit found under its own name, and say where: nothing is lost when the graph saves nothing."""
    try:
        path = keep_profile(profile)
    except ValueError as error:
        return str(error)
    return f"Saved as '{path.name}' in {path.parent}; press R and Attune Load Profile lists it."


def module_names() -> list[str]:
    """The networks of One More Step that can be loaded, the pack's own among them."""
    return folder_paths.get_filename_list(MODULES)


def module_path(name: str) -> Path:
    """The file of that name; ValueError with the choices when there is none."""
    path = _full_path(MODULES, name)
    if path is None:
        raise ValueError(
            f"There is no '{name}' in {module_folder()}. Put the file there and press R to refresh, or choose one of: "
            f"{', '.join(module_names())}."
        )
    return Path(path)


def module_folder() -> Path:
    """Where new networks of One More Step are kept."""
    return Path(folder_paths.get_folder_paths(MODULES)[0])


def state_of(kind: str, name: str | None) -> tuple:
    """A file of a folder kind with its time and size: another value once it changes; for one that is not there, its
    name, for the node that loads it says so."""
    path = _full_path(kind, name)
    stat = None if path is None else os.stat(path)
    return (name,) if stat is None else (path, stat.st_mtime_ns, stat.st_size)


def _full_path(kind: str, name: str | None) -> str | None:
    """Where the host finds a file; None where there is none, or the name is no name."""
    return folder_paths.get_full_path(kind, name) if isinstance(name, str) else None


def installed_files() -> tuple:
    """Every profile, module and NPNet of the user's with its time and size: another value once one of them changes."""
    found = [
        folder_paths.get_full_path(kind, name)
        for kind in (FOLDER, MODULES, NPNETS)
        for name in folder_paths.get_filename_list(kind)
    ]
    paths = [Path(path) for path in found if path is not None]  # None: a link that leads nowhere
    return tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)


def find_folder(name: str) -> Path:
    """A folder by its path, or by its name inside the host's input or output; ValueError when there is none."""
    places = [Path(name), *(Path(get()) / name for get in
                            (folder_paths.get_input_directory, folder_paths.get_output_directory))]  # fmt: skip
    found = next((place for place in places if name and place.is_absolute() and place.is_dir()), None)
    if found is None:
        raise ValueError(
            f"There is no folder '{name}' in ComfyUI's input or output. Save latents there with SaveLatent, or give "
            "a whole path."
        )
    return found


def npnet_names() -> list[str]:
    return folder_paths.get_filename_list(NPNETS)


def npnet_path(name: str) -> Path:
    """The file of an NPNet; ValueError with the folder when there is none."""
    path = _full_path(NPNETS, name)
    if path is None:
        raise ValueError(f"There is no NPNet '{name}'. Put the file into {npnet_folder()} and press R to refresh.")
    return Path(path)


def npnet_folder() -> Path:
    """Where an NPNet of the user's goes."""
    return Path(folder_paths.get_folder_paths(NPNETS)[0])


def _folder() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])
