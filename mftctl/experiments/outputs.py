"""Checks of output paths: never over an input, the runs folder, the current folder or a repository."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mftctl.data.sources import local_files
from mftctl.errors import OutputError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import files_of_recipe
from mftctl.files.atomic import require_writable
from mftctl.files.json_files import read_json_object
from mftctl.files.names import require_short

_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Input:
    """A path that a command reads or works in, which its output must not touch.

    Attributes:
        path: A file or folder, possibly missing, such as a hub id that looks like a path.
        what: Its description in messages, such as "the data".
    """

    path: Path
    what: str


def inputs_of(recipe: Recipe, *, models: Iterable[str | None] = (), recipe_name: str | None = None) -> list[Input]:
    """Returns all local inputs of a command with this recipe.

    Args:
        recipe: The resolved recipe.
        models: Models and masks in addition to those of the recipe; None is skipped.
        recipe_name: The name or path of the recipe.
    """
    options = recipe.eval
    sources = (*recipe.data, *recipe.val_data, *recipe.test_data, *recipe.retain_data)
    bases = (recipe.mask_train.base, recipe.interpolate.base, recipe.fft.support, recipe.delta.base, recipe.delta.mask)
    data = [path for source in sources for path in (source.path, *map(str, local_files(source)))]
    named = [
        *((path, "the data") for path in data),
        *((path, "a benchmark's data") for path in options.task_data.values()),
        *((path, "an input model or mask") for path in (recipe.model, *bases, *models)),
        (options.predictions, "the predictions"),
        (recipe.chat_template, "the chat template"),
    ]
    found = [Input(Path(path).expanduser(), what) for path, what in named if path]
    found += [Input(base, "the base of an adapter") for item in found for base in _adapter_base(item.path)]
    if recipe_name is not None:
        found += [Input(path, "the recipe") for path in files_of_recipe(recipe_name)]
    return [item for item in found if os.path.lexists(item.path)]


def _adapter_base(folder: Path) -> Iterator[Path]:
    """Yields the base model named in an adapter's configuration."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        base = Path(read_json_object(folder / _ADAPTER_FILE)["base_model_name_or_path"])
        os.path.lexists(base)  # rejects invalid file names
        yield base


def check_output(output: Path, inputs: Iterable[Input], runs: Path) -> Path:
    """Returns the output path with links resolved, if a result can be written there safely.

    Existing content at the path itself is left for the permit to check.

    Args:
        output: The path as given.
        inputs: The inputs of the command.
        runs: The runs folder.

    Raises:
        OutputError: The output is, contains or is inside something it must not touch.
        StorageError: Its folder is read-only, or its name is too long.
    """
    try:
        resolved = output.expanduser().resolve()
        if os.path.lexists(resolved):
            resolved.resolve(strict=True)  # from Python 3.13 on, only this refuses circular links
    except (OSError, RuntimeError) as error:  # of circular links
        raise OutputError("The output is a broken or circular link.", path=output, hint="another --output") from error
    require_short(resolved)
    for place in (Input(Path.cwd(), "the current folder"), Input(runs, "the runs folder")):
        if _is_within(place.path.resolve(), resolved):
            raise _refusal(resolved, place, "is or contains")
    for item in (*inputs, Input(runs, "the runs folder")):
        path = item.path.resolve()
        if _is_within(path, resolved):
            raise _refusal(resolved, item, "is or contains")
        if _is_within(resolved, path):
            raise _refusal(resolved, item, "is inside")
    if os.path.lexists(resolved / ".git"):
        raise _refusal(resolved, Input(resolved / ".git", "a repository"), "is or contains")
    _require_folders_above(resolved)
    require_writable(resolved)
    return resolved


def _refusal(output: Path, item: Input, relation: str) -> OutputError:
    return OutputError(
        f"The output {relation} {item.what}, which must not be replaced.",
        path=output,
        actual=item.path,
        hint="another --output",
    )


def _is_within(path: Path, folder: Path) -> bool:
    """Checks whether a path is, or is inside, a folder or file, by name or by inode."""
    if path.is_relative_to(folder):
        return True
    wanted = _identity(folder)
    return wanted is not None and any(_identity(place) == wanted for place in (path, *path.parents))


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns device and inode; None for a missing path."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _require_folders_above(path: Path) -> None:
    for place in path.parents:
        if os.path.lexists(place):
            if not place.is_dir():
                raise OutputError(
                    "A parent folder of the output is a file.", path=path, actual=place, hint="another --output"
                )
            return
