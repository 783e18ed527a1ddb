"""Where the host finds the pack's own files, and where the pack finds the user's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import folder_paths

from ...models.calibration import SCHEDULE, Calibration
from ...models.npnet_files import PICKLED, SAFE
from ...models.store import SUFFIX, ProfileReader, is_profile_file, save_profile, shipped_profiles, update_profile

WEIGHTS = Path(__file__).resolve().parents[2] / "models" / "weights"
CONTROLNETS = WEIGHTS.with_name("controlnet")
OWN_NPNETS = Path(__file__).resolve().parents[2] / "models" / "golden_noise"
OWN_LORAS = Path(__file__).resolve().parents[2] / "models" / "loras"
NPNETS = "npnet"  # models/npnet
FOLDER = "attune"  # models/attune, or wherever extra_model_paths.yaml sends it
MODULES = "one_more_step"  # likewise: networks of One More Step
SHIPPED_MODULES = WEIGHTS.with_name(MODULES)
AT = "@"  # between a file's name and the id of what a workflow brought under it
CARRIED: dict[str, Calibration] = {}  # by name@id: what workflows brought along and models/attune lacks
READ = ProfileReader()


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


def schedule_files() -> list[str]:
    """The user's profile files that hold a schedule."""
    return list(profiles_of_kind(SCHEDULE, user_profile_names()))


def profiles_of_kind(kind: str, names: Iterable[str] | None = None) -> dict[str, Calibration]:
    """The profiles of one kind by name, of `names` or all; what cannot be read is left out here."""
    found = {}
    for name in profile_names() if names is None else names:
        with suppress(ValueError):
            found[name] = find_profile(name)
    return {name: one for name, one in found.items() if one.kind == kind}


def profile_names_of(kind: str) -> list[str]:
    return list(profiles_of_kind(kind))


def forget_profile(name: str) -> None:
    """Delete a profile file of the user's; ValueError for one of the pack's own, or where that is not allowed."""
    path = profile_path(name.partition(AT)[0])
    if path is None:
        raise ValueError(f"'{name}' is no file in {profile_folder()}: it cannot be forgotten.")
    try:
        path.unlink()
    except OSError as error:
        raise ValueError(f"'{path}' could not be deleted: {error.strerror}. Delete it by hand.") from error


def profile_stamps(kind: str) -> tuple:
    """Another value once a profile file of the user's of that kind appears, changes or goes."""
    paths = map(profile_path, profiles_of_kind(kind, user_profile_names()))
    return tuple(file_stamp(path) for path in paths if path is not None)


def profile_path(name: str) -> Path | None:
    """The file behind a name, None for the pack's own profiles and for names that are not there."""
    path = folder_paths.get_full_path(FOLDER, name) if is_profile_file(name) else None
    return None if path is None else Path(path)


def has_profile(name: object) -> bool:
    """Whether the user, or a workflow that the user opened, has a profile file of that name; any value may be asked."""
    return isinstance(name, str) and (profile_path(name.partition(AT)[0]) is not None or name in CARRIED)


def find_profile(name: object) -> Calibration:
    """The profile of that name; ValueError with the folder and the choices when there is none."""
    if not isinstance(name, str):
        raise ValueError(missing_profile(name))
    if name in shipped_profiles():
        return shipped_profiles()[name]
    if name in CARRIED:
        return CARRIED[name]
    file, _, wanted = name.partition(AT)
    path = profile_path(file)
    if path is not None and wanted in ("", READ(path).id):
        return READ(path)
    raise ValueError(missing_profile(name))


def missing_profile(name: object) -> str:
    """What to do about a profile that is not there."""
    return (
        f"There is no profile '{str(name).partition(AT)[0]}' in {profile_folder()}. Ask the maker of the workflow for "
        "that file, or for a picture saved by the workflow, which carries its profiles; put the file there and press R "
        f"to refresh. Or choose one of: {', '.join(profile_names())}."
    )


def keep_profile(profile: Calibration, name: str = "") -> Path:
    """Save `profile` where the loader finds it at once, under its own name or `name`."""
    return _kept(lambda: save_profile(profile, profile_folder(), name))


def keep_update(path: Path, old: Calibration, new: Calibration) -> Path:
    """Save `new` in the place of `old`, which an earlier part of the same fit has kept in the file at `path`."""
    return _kept(lambda: update_profile(path, old, new))


def _kept(save: Callable[[], Path]) -> Path:
    try:
        return save()
    except OSError as error:
        raise ValueError(
            f"The profile could not be saved in {profile_folder()}: {error.strerror}. Make room or allow writing "
            "there, then run again."
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
    return tuple(file_stamp(Path(path)) for path in found if path is not None)  # None: a link that leads nowhere


def file_stamp(path: Path) -> tuple:
    """Another value once the file changes, one that cannot be looked at included."""
    try:
        found = path.stat()
        return str(path), found.st_mtime_ns, found.st_size
    except OSError as error:
        return str(path), str(error)


def find_folder(name: str) -> Path:
    """A folder inside the host's input or output, by its name there or its whole path; ValueError for any other.

    A link that lies inside leads where the user who made it wanted; `..` and other whole paths do not get out.
    """
    roots = [Path(get()) for get in (folder_paths.get_input_directory, folder_paths.get_output_directory)]
    inside = [place for root in roots if (place := root / name).is_relative_to(root) and ".." not in Path(name).parts]
    if not inside or not name.strip():
        raise ValueError(
            f"'{name}' is not inside ComfyUI's input or output, where alone folders are read. Move or link the folder "
            "into one of them, and give its name there."
        )
    found = next((place for place in inside if place.is_dir()), None)
    if found is None:
        raise ValueError(
            f"There is no folder '{name}' in ComfyUI's input or output. Save latents there with SaveLatent."
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


def profile_folder() -> Path:
    """Where the user's profiles are kept."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])
