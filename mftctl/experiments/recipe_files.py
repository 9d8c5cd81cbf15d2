"""Finds, reads and completes recipes; problems are reported with their key and the nearest known key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe, Stage
from mftctl.experiments.recipe_problems import describe_problems, nearest, shortened
from mftctl.experiments.recipe_yaml import MAX_VALUES, parse_yaml, read_yaml
from mftctl.experiments.renamed import with_new_names
from mftctl.experiments.run_config import as_given
from mftctl.files.regular import is_file

_INSTALLED = Path(__file__).parents[1] / "recipes"


BUILT_IN_FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "recipes"


MAX_EXTENDED: Final = 64


MAX_JOBS: Final = 1_000
"""Maximum number of stages, expanded over seeds and swept values."""


_MOST_PROBLEMS: Final = 20


_LONGEST_PROBLEM: Final = 400


def built_in_names() -> list[str]:
    """Returns the names of the recipes in the package.

    Files whose names begin with `_` are parts of others; those in `accelerate` are for `accelerate launch`.
    """
    return sorted(
        path.relative_to(BUILT_IN_FOLDER).with_suffix("").as_posix()
        for path in BUILT_IN_FOLDER.rglob("*.yaml")
        if not path.name.startswith("_") and path.parent.name != "accelerate"
    )


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe given by path or, for a built-in recipe, by name.

    Raises:
        ConfigError: Neither such a file nor such a built-in recipe exists.
    """
    path = Path(name)
    if is_file(path):
        return path
    if name in built_in_names():
        return BUILT_IN_FOLDER / f"{name}.yaml"
    raise ConfigError(
        "The recipe does not exist.",
        path=shortened(name),
        expected=f"a YAML file, or one of the built-in recipes: {', '.join(built_in_names())}",
        hint=nearest(name, built_in_names()),
    )


def files_of_recipe(name: str) -> list[Path]:
    """Returns the file of a recipe, given by path or built-in name, and of all recipes that it extends.

    Raises:
        ConfigError: A file is missing or cannot be read.
    """
    files: list[Path] = []
    waiting = [find_recipe(name)]
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.append(path)
            waiting += [_extended(path, name) for name in _extended_names(path, read_yaml(path))]
    return files


def _extended_names(path: Path, document: dict[str, Any]) -> list[str]:
    """Removes the `extends` key from a document and returns the recipes that it names."""
    extended = document.pop("extends", [])
    names = [extended] if isinstance(extended, str) else extended
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            "extends must name recipes.", path=path, key="extends", expected="a name or a list", actual=shortened(names)
        )
    return names


def _extended(path: Path, name: str) -> Path:
    """Returns the file of an extended recipe: in the same folder, otherwise found as on the command line."""
    beside = path.parent / name
    return beside if is_file(beside) else find_recipe(name)


class _Family:
    """A recipe and those that it extends; each is read only once."""

    def __init__(self) -> None:
        self._merged: dict[Path, dict[str, Any]] = {}
        self._names = self._values = 0

    def merged(self, path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
        """Returns the mapping of a recipe file, merged over those of the recipes that it extends."""
        place = path.resolve()
        if place in chain:
            circle = " -> ".join(item.name for item in (*chain, path))
            raise ConfigError(
                "Recipes extend each other in a cycle.", path=path, key="extends", actual=shortened(circle)
            )
        if place not in self._merged:
            document = _read_given(path)
            names = _extended_names(path, document)
            self._names += len(names)
            self._values += _count_values(document)
            if self._names > MAX_EXTENDED or self._values > MAX_VALUES:
                raise ConfigError(
                    "The recipe and those that it extends are too large.",
                    path=path,
                    key="extends",
                    expected=f"at most {MAX_EXTENDED} recipe names and {MAX_VALUES:,} keys and values in total",
                    actual=f"{self._names} names and {self._values:,} keys and values up to this file",
                )
            merged: dict[str, Any] = {}
            for name in names:
                merged = _merge(merged, self.merged(_extended(path, name), (*chain, place)))
            self._merged[place] = _merge(merged, document)
        return self._merged[place]


def _read_given(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file; former names are accepted in the configuration of a run folder."""
    document = read_yaml(path)
    is_of_run = path.name == "config.yaml" and is_file(path.with_name("run.json"))
    return as_given(with_new_names(document) if is_of_run else document)


def _count_values(value: object) -> int:
    if isinstance(value, Mapping):
        return sum(1 + _count_values(part) for part in value.values())
    return 1 + sum(map(_count_values, value)) if isinstance(value, list | tuple | set) else 1


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges mappings key by key, `above` over `below`; null removes a whole mapping, such as a stage."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(merged.get(key), dict) and value is None:
            del merged[key]
        elif isinstance(merged.get(key), dict) and isinstance(value, dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def load_recipe(
    name: str | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    stages: bool = True,
) -> Recipe:
    """Loads a recipe with all defaults.

    Args:
        name: Path or built-in name; None starts from `base`.
        base: The configuration of an earlier run to start from.
        sets: `a.b=value` assignments; the value is YAML.
        options: Dotted keys and values from command-line options, which take precedence.
        stages: Whether to keep the stages; a single command drops them, as its options need not fit them.

    Raises:
        ConfigError: The file, the assignments or their values have problems, which are all listed.
    """
    path = None if name is None else find_recipe(name)
    document = as_given(base or {}) if path is None else _Family().merged(path)
    assign(document, [_parse_assignment(text) for text in sets])
    assign(document, list((options or {}).items()))
    if not stages:
        document.pop("stages", None)
    return parse_recipe(document, path)


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with some dotted keys changed.

    Raises:
        ConfigError: A key is unknown or a value is not valid.
    """
    document = recipe.model_dump(mode="json", exclude_unset=True)
    assign(document, list(changes.items()))
    return parse_recipe(document)


def assign(document: dict[str, Any], changes: Sequence[tuple[str, object]]) -> None:
    """Sets dotted keys in nested mappings, which are created if missing.

    A mask uses either a ratio, a threshold or a pattern, so setting one removes earlier values of the others; likewise
    for the size of a step and for the groups of a probe, which are of layers. If the changes contain both, they stay
    for the recipe's validation to reject.

    Raises:
        ConfigError: A part of a key is not a mapping.
    """
    for key, value in changes:
        for replaced in _IN_PLACE_OF.get(key.rpartition(".")[2], ()):
            if value is not None and (replaced, value) not in _KEPT:
                _open_section(document, key).pop(replaced, None)
    for key, value in changes:
        _open_section(document, key)[key.rpartition(".")[2]] = value


_IN_PLACE_OF = {
    "ratio": ("threshold", "pattern", "budget"),
    "threshold": ("ratio", "pattern", "budget"),
    "pattern": ("ratio", "threshold", "budget"),
    "global_batch_size": ("grad_accum_steps",),
    "grad_accum_steps": ("global_batch_size",),
    "groups": ("unit",),
    "unit": ("groups",),
}
_KEPT = (("budget", "auto"), ("groups", "layer"))
"""Keys, each with the value of another that does not replace it."""


def _open_section(document: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns the mapping for the last part of a dotted key, copied because YAML aliases share mappings."""
    place = document
    for parent in key.split(".")[:-1]:
        inner = place.get(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError("This key has no subkeys.", key=key, actual=f"{parent} is a value")
        place[parent] = dict(inner)
        place = place[parent]
    return place


def _parse_assignment(text: str) -> tuple[str, object]:
    """Splits `a.b=value` into key and value."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError("--set needs a key and a value.", expected="--set a.b=value", actual=text)
    return key.strip(), parse_yaml(value, "The value of --set", key=key.strip())


def parse_recipe(document: Mapping[str, Any], path: Path | None = None) -> Recipe:
    """Validates a document and returns it as a recipe.

    Raises:
        ConfigError: The document is not valid; has one line per problem.
    """
    try:
        recipe = Recipe.model_validate(as_given(document))
    except ValidationError as error:
        found = error.errors()
        raise _not_fitting(describe_problems(found[:_MOST_PROBLEMS]), len(found) - _MOST_PROBLEMS, path) from error
    _require_few_jobs(recipe, path)
    bare, stages = recipe.model_copy(update={"stages": {}}), recipe.stages.items()
    problems = [f"stages.{name}.{problem}" for name, stage in stages for problem in _stage_problems(bare, stage)]
    if problems:
        raise _not_fitting(problems[:_MOST_PROBLEMS], len(problems) - _MOST_PROBLEMS, path)
    return recipe


def _not_fitting(problems: Sequence[str], more: int, path: Path | None) -> ConfigError:
    told = [shortened(problem, _LONGEST_PROBLEM) for problem in problems]
    return ConfigError(
        "The configuration is not valid.",
        path=path,
        problems=[*told, *([f"and {more:,} more"] if more > 0 else [])],
    )


def _require_few_jobs(recipe: Recipe, path: Path | None) -> None:
    """Checks that the swept values do not expand to too many stages."""
    seeds = max(1, len(recipe.seeds))
    jobs = sum(seeds * math.prod(map(len, stage.sweep.values())) for stage in recipe.stages.values())
    if jobs > MAX_JOBS:
        raise too_many_jobs(jobs, path)


def too_many_jobs(jobs: int, path: Path | None = None) -> ConfigError:
    """Returns the error for an experiment with too many stages.

    Args:
        jobs: A lower bound for their number.
        path: The recipe.
    """
    return ConfigError(
        "The recipe has too many stages.",
        path=path,
        key="stages",
        expected=f"at most {MAX_JOBS:,} stages, counting all seeds and swept values",
        actual=f"{jobs:,}" if jobs < 10**15 else "more than can be counted",
        hint="sweep fewer values, or divide them among several recipes",
    )


def _stage_problems(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """Returns problems of the keys changed by a stage, before any earlier stage is trained."""
    found = [f"set.{problem}" for problem in _change_problems(recipe, stage.set)]
    for key, values in stage.sweep.items():
        for value in values:
            swept = _change_problems(recipe, {**stage.set, key: value})
            found += [f"sweep.{problem}" for problem in swept if f"set.{problem}" not in found]
    return tuple(found)


def _change_problems(recipe: Recipe, changes: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        with_changes(recipe, {"stages": {}, **changes})
    except ConfigError as error:
        return error.problems or (f"{error.key}: {error.message}",)
    return ()
