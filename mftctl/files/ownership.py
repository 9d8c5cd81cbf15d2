"""Result folders of mftctl: their marker file, and when one may be replaced.

Every result folder has `mftctl.json`, which lists its files with their digests. A folder belongs to mftctl as long as
it contains these files, unchanged, and nothing else.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path

from mftctl.errors import OutputError
from mftctl.files.atomic import Permit, atomic_file, write_text
from mftctl.files.locks import locked_folder

MARKER = "mftctl.json"
_PURPOSE = "result of mftctl"
_MOST_NAMED = 3
_CHUNK_BYTES = 1 << 20


class Kind(StrEnum):
    """Kinds of result folders."""

    MODEL = "model"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class _Marker:
    """The contents of a marker file.

    Attributes:
        purpose: Always `_PURPOSE`.
        kind: The kind of result in the folder.
        files: The valid digests of each file, by its path in the folder; two while a report is being written.
        origin: For a model, how it was made.
    """

    purpose: str
    kind: Kind
    files: dict[str, list[str]] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)


def write_marker(folder: Path, kind: Kind, origin: Mapping[str, str] | None = None) -> None:
    """Writes the marker of a folder, listing all files in it.

    Args:
        folder: The folder, otherwise complete.
        kind: The kind of result in it.
        origin: For a model, how it was made, with the fields of `ModelOrigin`.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(_hashing_threads()) as pool:
        digests = pool.map(lambda name: [digest(folder / name)], names)
        files = dict(zip(names, digests, strict=True))
    files.pop(MARKER, None)
    write_text(folder / MARKER, _to_json(_Marker(_PURPOSE, kind, files, dict(origin or {}))))


def read_origin(folder: Path) -> Mapping[str, str] | None:
    """Returns how the model in a folder was made; None if its marker does not state it."""
    marker = _read_marker(folder)
    return marker.origin if marker is not None and marker.kind == Kind.MODEL and marker.origin else None


def permit_folder(kind: Kind, *, replace: bool) -> Permit:
    """Returns a permit to replace an empty folder or, if the user agreed, one made by mftctl.

    Args:
        kind: The kind of result that the folder must contain.
        replace: Whether the user agreed, with `--yes` or when asked.
    """
    return partial(_require_own_folder, kind=kind, replace=replace)


def permit_file(what: str, is_own: Callable[[Path], bool], *, replace: bool) -> Permit:
    """Returns a permit to replace a file that mftctl could have made, if the user agreed.

    Args:
        what: The required kind of file, such as "a mask file".
        is_own: Checks whether a regular file is of this kind.
        replace: Whether the user agreed, with `--yes` or when asked.
    """
    return partial(_require_own_file, what=what, is_own=is_own, replace=replace)


def _require_own_folder(folder: Path, *, kind: Kind, replace: bool) -> None:
    if folder.is_symlink() or not folder.is_dir():
        raise OutputError(
            "The output must be a folder, but a file exists there.",
            path=folder,
            expected="a new folder",
            hint="another --output",
        )
    if not any(folder.iterdir()):
        return
    found = strangers(folder, kind)
    if found:
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise OutputError(
            "The output folder contains files not written by mftctl, which would be lost.",
            path=folder,
            expected=f"a new folder, or a {kind} written by mftctl, described by its {MARKER}",
            actual=", ".join(found[:_MOST_NAMED]) + more,
            hint="another --output, or move these files elsewhere",
        )
    _require_consent(folder, replace)


def _require_own_file(path: Path, *, what: str, is_own: Callable[[Path], bool], replace: bool) -> None:
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        raise OutputError(
            "The output must be a file, but a folder exists there.", path=path, expected=what, hint="another --output"
        )
    if not stat.S_ISREG(status.st_mode) or not is_own(path):
        raise OutputError(
            f"The output exists and is not {what}, so it is not replaced.",
            path=path,
            expected=f"a new name, or {what}",
            hint="another --output",
        )
    _require_consent(path, replace)


def _require_consent(path: Path, replace: bool) -> None:
    if not replace:
        raise OutputError("A result already exists.", path=path, hint="another --output, or --yes to replace it")


def strangers(folder: Path, kind: Kind) -> list[str]:
    """Lists the content of a folder other than unchanged files of an mftctl result, as short texts.

    Args:
        folder: A folder with or without a marker.
        kind: The required kind of result.
    """
    marker = _read_marker(folder)
    if marker is None:
        return sorted(path.name for path in folder.iterdir())
    if marker.kind != kind:
        return [f"{MARKER} of a {marker.kind}"]
    own_folders = {parent for name in marker.files for parent in map(str, Path(name).parents)}
    found, files = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == MARKER and not path.is_symlink():
            continue
        if name in marker.files and stat.S_ISREG(path.lstat().st_mode):
            files.append(name)
        elif name not in own_folders or path.is_symlink() or not path.is_dir():
            found.append(name)
    with ThreadPoolExecutor(_hashing_threads()) as pool:
        unchanged = pool.map(lambda name: digest(folder / name) in marker.files[name], files)
        found += [f"{name} (modified)" for name, same in zip(files, unchanged, strict=True) if not same]
    return found


def write_listed(folder: Path, contents: Mapping[str, bytes], kind: Kind) -> None:
    """Writes files into a folder that may also contain files of the user, and removes those written before.

    Only unchanged files listed in the marker are replaced or removed. A kill at any moment leaves a folder that can be
    written to again.

    Args:
        folder: The folder, created if missing.
        contents: File contents by path in the folder.
        kind: The kind of result.

    Raises:
        OutputError: A file of the user would be replaced; nothing was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder):
        before = _own_files(folder, kind)
        require_free(folder, list(contents), kind)
        after = {name: [_digest_of(content)] for name, content in contents.items()}
        # During writing, each file is either the old one or the new one.
        either = {name: before.get(name, []) + after.get(name, []) for name in before | after}
        write_text(folder / MARKER, _to_json(_Marker(_PURPOSE, kind, either)))
        for name, content in contents.items():
            with atomic_file(folder / name) as temporary:
                temporary.write_bytes(content)
        for name in before.keys() - after.keys():
            _remove_unchanged(folder / name, before[name], folder)
        write_text(folder / MARKER, _to_json(_Marker(_PURPOSE, kind, after)))


def _remove_unchanged(path: Path, digests: list[str], top: Path) -> None:
    """Removes a file written by mftctl, and its folder if that is empty then."""
    if _is_unchanged(path, digests):
        path.unlink()
        if path.parent != top and not any(path.parent.iterdir()):
            path.parent.rmdir()


def require_free(folder: Path, names: list[str], kind: Kind, *, folders: Sequence[str] = ()) -> None:
    """Checks that writing files into a folder would not replace files of the user.

    Args:
        folder: The folder, which may be missing.
        names: Paths in the folder.
        kind: The kind of result.
        folders: Folders in it that will be written to.

    Raises:
        OutputError: A file of the user would be replaced.
    """
    own = _own_files(folder, kind) if folder.is_dir() else {}
    taken = [
        name for name in names if os.path.lexists(folder / name) and not _is_unchanged(folder / name, own.get(name))
    ]
    marker = _read_marker(folder)
    if os.path.lexists(folder / MARKER) and (marker is None or marker.kind != kind):
        taken.append(MARKER)
    parents = {*folders, *(Path(name).parts[0] for name in names if len(Path(name).parts) > 1)}
    taken += [name for name in sorted(parents) if os.path.lexists(folder / name) and not _is_real_folder(folder / name)]
    if taken:
        more = f" and {len(taken) - _MOST_NAMED} more" if len(taken) > _MOST_NAMED else ""
        raise OutputError(
            f"Files that are not from an mftctl {kind}, or were modified since, would be replaced.",
            path=folder,
            actual=", ".join(taken[:_MOST_NAMED]) + more,
            hint="another --output, or move these files elsewhere",
        )


def _own_files(folder: Path, kind: Kind) -> dict[str, list[str]]:
    marker = _read_marker(folder)
    return dict(marker.files) if marker is not None and marker.kind == kind else {}


def _is_unchanged(path: Path, digests: list[str] | None) -> bool:
    return digests is not None and not path.is_symlink() and path.is_file() and digest(path) in digests


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def digest(path: Path) -> str:
    """Returns the 128-bit XXH3 digest of a file in hex, which detects changes ten times faster than SHA-256."""
    import xxhash

    found = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while size_bytes := stream.readinto(buffer):
            found.update(buffer[:size_bytes])
    return str(found.hexdigest())


def _digest_of(content: bytes) -> str:
    import xxhash

    return str(xxhash.xxh3_128(content).hexdigest())


def _read_marker(folder: Path) -> _Marker | None:
    """Returns the marker of a folder; None if there is none, or it is not valid."""
    path = folder / MARKER
    if path.is_symlink() or not path.is_file():
        return None
    try:
        read = _Marker(**json.loads(path.read_bytes()))
        marker = _Marker(
            read.purpose, Kind(read.kind), {name: list(found) for name, found in read.files.items()}, dict(read.origin)
        )
    except (ValueError, TypeError, AttributeError):
        return None
    is_inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in marker.files)
    return marker if marker.purpose == _PURPOSE and is_inside else None


def _to_json(marker: _Marker) -> str:
    document = {key: value for key, value in asdict(marker).items() if key != "origin" or value}
    return json.dumps(document, indent=1) + "\n"


def _hashing_threads() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
