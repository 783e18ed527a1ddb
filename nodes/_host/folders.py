"""Where the host finds the pack's own files, and where the pack finds the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import folder_paths

from ...models.calibration import SCHEDULE, Calibration
from ...models.npnet_files import PICKLED, SAFE
from ...models.store import SUFFIX, ProfileReader, is_profile_file, save_profile, shipped_profiles, update_profile

OWN = Path(__file__).resolve().parents[2] / "models"
PROFILES = "attune"  # models/attune, or wherever extra_model_paths.yaml sends it: profiles
MODULES = "one_more_step"  # likewise: networks of One More Step
NPNETS = "npnet"  # likewise: networks for golden noise
NOISE_MAPS = "noise_maps"  # likewise: inverted pictures
CALLED = {MODULES: "One More Step module", NPNETS: "NPNet", NOISE_MAPS: "file of noise maps"}
AT = "@"  # between a file's name and the id of what a workflow brought under it
CARRIED: dict[str, Calibration] = {}  # by name@id: what workflows brought along and models/attune lacks
READ = ProfileReader()


def own_pictures() -> dict[str, Path]:
    """The pack's hand-drawn pictures by name."""
    return {path.stem: path for path in sorted((OWN / "pictures").glob("*.png"))}


def register_folders() -> None:
    """List the demo's files in the stock loaders, after the user's own folders; models/attune and models/npnet."""
    for kind, own in (("checkpoints", "weights"), ("controlnet", "controlnet"), ("loras", "loras")):
        folder_paths.add_model_folder_path(kind, str(OWN / own))
    models = Path(folder_paths.models_dir)
    for kind, suffixes, places in (
        (PROFILES, (SUFFIX,), [models / PROFILES]),
        (MODULES, (".safetensors",), [models / MODULES, OWN / MODULES]),
        (NPNETS, (*SAFE, *PICKLED), [models / NPNETS, models / "npnets", OWN / "golden_noise"]),
        (NOISE_MAPS, (".safetensors",), [models / NOISE_MAPS, OWN / NOISE_MAPS]),
    ):
        configured, known = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        paths = dict.fromkeys([*configured, *map(str, places)])
        folder_paths.folder_names_and_paths[kind] = (list(paths), {*known, *suffixes})


def file_names(kind: str) -> list[str]:
    """The files of a folder kind, as the host lists them: the user's, then the pack's own where it has a folder."""
    try:
        return folder_paths.get_filename_list(kind)
    except FileNotFoundError:  # a folder was deleted since the host listed it: without its list it looks again
        folder_paths.filename_list_cache.pop(kind, None)
        return folder_paths.get_filename_list(kind)


def profile_names() -> list[str]:
    """Everything that can be loaded: the user's files, then the pack's own by their names."""
    return [*file_names(PROFILES), *shipped_profiles()]


def schedule_files() -> list[str]:
    """The user's profile files that hold a schedule."""
    return list(profiles_of_kind(SCHEDULE, file_names(PROFILES)))


def profiles_of_kind(kind: str, names: Iterable[str] | None = None) -> dict[str, Calibration]:
    """The profiles of one kind by name, of `names` or all; what cannot be read is left out here."""
    found = {name: readable_profile(name) for name in (profile_names() if names is None else names)}
    return {name: one for name, one in found.items() if one is not None and one.kind == kind}


def forget_profile(name: str) -> None:
    """Delete a profile file of the user's; ValueError for one of the pack's own, or where that is not allowed."""
    path = profile_path(file_and_id(name)[0])
    if path is None:
        raise ValueError(f"'{name}' is no file in {folder_of(PROFILES)}: it cannot be forgotten.")
    try:
        path.unlink()
    except OSError as error:
        raise ValueError(f"'{path}' could not be deleted: {error.strerror}. Delete it by hand.") from error


def profile_stamps(kind: str) -> tuple:
    """Another value once a profile file of the user's of that kind appears, changes or goes."""
    paths = map(profile_path, profiles_of_kind(kind, file_names(PROFILES)))
    return tuple(file_stamp(path) for path in paths if path is not None)


def readable_profile(name: str) -> Calibration | None:
    """The profile of that name, None where none can be read: the node that loads it says why."""
    try:
        return find_profile(name)
    except ValueError:
        return None


def file_and_id(name: str) -> tuple[str, str]:
    """The file that a name is of, which may hold an @, and the id of the content that is asked for, or ""."""
    file, at, wanted = name.rpartition(AT)
    return (file, wanted) if at and not is_profile_file(name) else (name, "")


def profile_path(name: str) -> Path | None:
    """The file behind a name, None for the pack's own profiles and for names that are not there."""
    return _full_path(PROFILES, name) if is_profile_file(name) else None


def has_profile(name: object) -> bool:
    """Whether the user, or a workflow that the user opened, has a profile file of that name; any value may be asked."""
    return isinstance(name, str) and (profile_path(file_and_id(name)[0]) is not None or name in CARRIED)


def find_profile(name: object) -> Calibration:
    """The profile of that name; ValueError with the folder and the choices when there is none."""
    if not isinstance(name, str):
        raise ValueError(missing_profile(name))
    if name in shipped_profiles():
        return shipped_profiles()[name]
    if name in CARRIED:
        return CARRIED[name]
    file, wanted = file_and_id(name)
    path = profile_path(file)
    if path is not None and wanted in ("", READ(path).id):
        return READ(path)
    raise ValueError(missing_profile(name))


def missing_profile(name: object) -> str:
    """What to do about a profile that is not there."""
    return (
        f"There is no profile '{file_and_id(str(name))[0]}' in {folder_of(PROFILES)}. Ask the maker of the workflow "
        "for that file, or for a picture saved by the workflow, which carries its profiles; put the file there and "
        f"press R to refresh. Or choose one of: {', '.join(profile_names())}."
    )


def keep_profile(profile: Calibration, name: str = "") -> Path:
    """Save `profile` where the loader finds it at once, under its own name or `name`."""
    return _kept(lambda: save_profile(profile, folder_of(PROFILES), name))


def keep_update(path: Path, old: Calibration, new: Calibration) -> Path:
    """Save `new` in the place of `old`, which an earlier part of the same fit has kept in the file at `path`."""
    return _kept(lambda: update_profile(path, old, new))


def _kept(save: Callable[[], Path]) -> Path:
    try:
        return save()
    except OSError as error:
        raise ValueError(
            f"The profile could not be saved in {folder_of(PROFILES)}: {error.strerror}. Make room or allow writing "
            "there, then run again."
        ) from error


def keep_fit(profile: Calibration, more: Callable[[Path], str] = lambda _: "") -> str:
    """Save what a fit found under its own name, and say where: nothing is lost when the graph saves nothing.

    more: what to do beside the file, and to say of it.
    """
    try:
        path = keep_profile(profile)
    except ValueError as error:
        return str(error)
    return f"Saved as '{path.name}' in {path.parent}; press R and Attune Load Profile lists it. {more(path)}".strip()


def file_path(kind: str, name: str) -> Path:
    """The file of that name; ValueError with the folder and the choices when there is none."""
    path = _full_path(kind, name)
    if path is None:
        raise ValueError(
            f"There is no {CALLED[kind]} '{name}'. Put the file into {folder_of(kind)} and press R to refresh, or "
            f"choose one of: {', '.join(file_names(kind))}."
        )
    return path


def state_of(kind: str, name: str | None) -> tuple:
    """A file of a folder kind with its time and size: another value once it changes; for one that is not there, its
    name, for the node that loads it says so."""
    path = _full_path(kind, name)
    return (name,) if path is None else file_stamp(path)


def _full_path(kind: str, name: str | None) -> Path | None:
    """Where the host finds a file; None where there is none (a link that leads nowhere), or the name is no name."""
    path = folder_paths.get_full_path(kind, name) if isinstance(name, str) else None
    return None if path is None else Path(path)


def installed_files() -> tuple:
    """Every profile, module and NPNet of the user's with its time and size: another value once one of them changes."""
    found = [_full_path(kind, name) for kind in (PROFILES, MODULES, NPNETS) for name in file_names(kind)]
    return tuple(file_stamp(path) for path in found if path is not None)


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


def folder_of(kind: str) -> Path:
    """Where new files of the user's of a folder kind are kept."""
    return Path(folder_paths.get_folder_paths(kind)[0])
