"""What a shell offers when Tab is pressed: recipes, runs, recipe keys, layers and the choices of an option."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer
from pydantic import BaseModel

from mftctl.errors import MftError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import built_in_names

_RECIPE_ENDINGS = (".yaml", ".yml")


def choices(values: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns a completion that offers the choices of an option."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Returns the built-in recipes, and the folders and YAML files at the path typed so far."""
    return [name for name in [*built_in_names(), *_recipe_files(incomplete)] if name.startswith(incomplete)]


def settings(incomplete: str) -> list[str]:
    """Returns the recipe keys with an equals sign, for `--set`."""
    return [f"{key}=" for key in _keys(Recipe) if key.startswith(incomplete)]


def runs(context: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of the runs in the runs folder."""
    found = _runs_folder(context)
    names = sorted(folder.parent.name for folder in found.glob("*/run.json")) if found.is_dir() else []
    return [name for name in names if name.startswith(incomplete)]


def layers(context: typer.Context, incomplete: str) -> list[str]:
    """Returns `all` and the groups of the latest probe, best first."""
    return [text for text in [*_probed_layers(_runs_folder(context)), "all"] if text.startswith(incomplete)]


def _recipe_files(incomplete: str) -> list[str]:
    head, slash, _ = incomplete.rpartition("/")
    try:
        entries = sorted(Path(head + slash or ".").iterdir())
    except OSError:
        return []
    folders = [f"{head}{slash}{entry.name}/" for entry in entries if entry.is_dir()]
    return [*folders, *(f"{head}{slash}{entry.name}" for entry in entries if entry.suffix in _RECIPE_ENDINGS)]


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _runs_folder(context: typer.Context) -> Path:
    return Path(context.params.get("runs") or os.environ.get("MFTCTL_RUNS") or "runs")


def _probed_layers(root: Path) -> list[str]:
    from mftctl.experiments.probe_results import GroupProbe
    from mftctl.experiments.run_folder import newest_run

    try:
        probe = newest_run(root, "probe")
        groups = [] if probe is None else probe.result(GroupProbe).groups
        return list(dict.fromkeys(group.layers for group in groups))
    except MftError:  # a damaged run folder must not print into the command line
        return []
