"""Where a result may go: never over an input, the runs folder, the current folder or a repository."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mftctl.errors import OutputError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import files_of_recipe
from mftctl.files.atomic import require_writable
from mftctl.files.json_files import read_json_object
from mftctl.files.names import require_short

_ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Input:
    """Something that a command reads, or works in, and that its output must not touch.

    Attributes:
        path: A file or folder; may be missing, such as a hub id that looks like a path.
        what: What it is called in a message, such as "the data".
    """

    path: Path
    what: str


def inputs_of(recipe: Recipe, *, models: Iterable[str | None] = (), recipe_name: str | None = None) -> list[Input]:
    """Everything local that a command with this recipe reads.

    Args:
        recipe: Settled.
        models: Models and masks beside the recipe's own; None is left out.
        recipe_name: The recipe's name or path.
    """
    options = recipe.eval
    data = [source.path for source in (*recipe.data, *recipe.val_data, *recipe.test_data)]
    named = [
        *((path, "the data") for path in data),
        *((path, "a benchmark's data") for path in options.task_data.values()),
        *((path, "a model or mask that is read") for path in (recipe.model, recipe.mask_train.base, *models)),
        (options.predictions, "the predictions"),
        (recipe.chat_template, "the chat template"),
    ]
    found = [Input(Path(path).expanduser(), what) for path, what in named if path]
    found += [Input(base, "the base of an adapter") for item in found for base in _adapter_base(item.path)]
    if recipe_name is not None:
        found += [Input(path, "the recipe") for path in files_of_recipe(recipe_name)]
    return [item for item in found if os.path.lexists(item.path)]


def _adapter_base(folder: Path) -> Iterator[Path]:
    """The model that a LoRA adapter belongs to, as its configuration names it."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        base = Path(read_json_object(folder / _ADAPTER_FILE)["base_model_name_or_path"])
        os.path.lexists(base)  # which refuses what no file can be called
        yield base


def check_output(output: Path, inputs: Iterable[Input], runs: Path) -> Path:
    """The output's path without links, if a result can be put there and nothing of the user's is in danger.

    What stands at the path itself is for the permit to judge.

    Args:
        output: As given.
        inputs: What the command reads.
        runs: The runs folder.

    Raises:
        OutputError: It is, holds or lies in something it must not touch.
        StorageError: Its folder is read-only, or its name too long.
    """
    try:
        resolved = output.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise OutputError("The output is a link that leads nowhere.", path=output, hint="another --output") from error
    require_short(resolved)
    for place in (Input(Path.cwd(), "the current folder"), Input(runs, "the runs folder")):
        if _is_within(place.path.resolve(), resolved):
            raise _refusal(resolved, place, "is or holds")
    for item in (*inputs, Input(runs, "the runs folder")):
        path = item.path.resolve()
        if _is_within(path, resolved):
            raise _refusal(resolved, item, "is or holds")
        if _is_within(resolved, path):
            raise _refusal(resolved, item, "lies in")
    if os.path.lexists(resolved / ".git"):
        raise _refusal(resolved, Input(resolved / ".git", "a repository"), "is or holds")
    _require_folders_above(resolved)
    require_writable(resolved)
    return resolved


def _refusal(output: Path, item: Input, relation: str) -> OutputError:
    return OutputError(
        f"The output {relation} {item.what}, which is never replaced.",
        path=output,
        actual=item.path,
        hint="another --output",
    )


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or file, or lies in it, by name or by what the system says it is."""
    if path.is_relative_to(folder):
        return True
    wanted = _identity(folder)
    return wanted is not None and any(_identity(place) == wanted for place in (path, *path.parents))


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; None for what is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _require_folders_above(path: Path) -> None:
    for place in path.parents:
        if os.path.lexists(place):
            if not place.is_dir():
                raise OutputError("The output would lie in a file.", path=path, actual=place, hint="another --output")
            return
