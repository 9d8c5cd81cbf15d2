"""Finds a run by folder, number or name."""

from __future__ import annotations

import difflib
from pathlib import Path

from mftctl.errors import RunError
from mftctl.experiments.run_folder import Run, load_run, run_folders

_NAMED = 3
"""Number of similar names to suggest if none matches."""


def find_run(root: Path, text: str) -> Run:
    """Returns the run with this name or number in the runs folder, or the run in this folder.

    Args:
        root: The runs folder.
        text: `005-mask-train`, `5` or `005`; or the path of a run folder.

    Raises:
        RunError: No run or several runs match, or the run cannot be read.
    """
    folders = {folder.name: folder for folder in run_folders(root)}
    if text in folders:
        return load_run(folders[text])
    if text.isdecimal():
        found = [folder for folder in folders.values() if _number(folder.name) == int(text)]
        if len(found) == 1:
            return load_run(found[0])
        if found:
            names = ", ".join(folder.name for folder in found)
            raise RunError("Several runs have this number.", path=root, expected=f"one of {names}", actual=text)
    elif Path(text).is_dir():
        return load_run(Path(text))
    raise RunError(
        "There is no such run.",
        path=root,
        expected="the folder, number or name of a run",
        actual=text,
        hint=_nearest(text, list(folders)),
    )


def _nearest(text: str, names: list[str]) -> str:
    if text.isdecimal():
        near = sorted(names, key=lambda name: abs(_number(name) - int(text)))[:_NAMED]
    else:
        near = difflib.get_close_matches(Path(text).name, names, n=_NAMED, cutoff=0.3)
    return " or ".join(near or names[-_NAMED:]) or "--runs DIR; this folder has no runs"


def _number(name: str) -> int:
    return int(name.partition("-")[0])
