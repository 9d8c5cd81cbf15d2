"""Finds, reads and completes recipes; every problem is named with its key and the nearest known key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mftctl.config import Recipe
from mftctl.errors import ConfigError, DataError

_INSTALLED = Path(__file__).parent / "recipes"
BUILT_IN_FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: `1e-4` is a number, as everyone who writes a learning rate expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError("A key stands twice.", key=str(key), path=f"line {node.start_mark.line + 1}")
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def built_in_names() -> list[str]:
    """Names of the recipes that travel in the package."""
    return sorted(path.stem for path in BUILT_IN_FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe that is named by path or, for a built-in one, by name.

    Raises:
        ConfigError: There is no such file and no such built-in recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    built_in = BUILT_IN_FOLDER / f"{name}.yaml"
    if re.fullmatch(r"[\w-]+", name) and built_in.is_file():
        return built_in
    raise ConfigError(
        "There is no such recipe.",
        path=name,
        expected=f"a YAML file, or one of the built-in recipes: {', '.join(built_in_names())}",
        hint=_nearest(name, built_in_names()),
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; numbers such as 1e-4 are numbers.

    Raises:
        ConfigError: The file cannot be read, is not YAML, repeats a key or holds no mapping.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The recipe cannot be read.", path=path, actual=error) from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ConfigError("The recipe is not valid YAML.", path=f"{path}{line}", actual=error.problem) from error
    if not isinstance(document, dict):
        raise ConfigError("A recipe is a mapping of keys to values.", path=path, actual=type(document).__name__)
    return document


def load_recipe(
    name: str | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe with all its defaults.

    Args:
        name: Path or built-in name; None starts from `base`.
        base: The configuration of an earlier run to go on with.
        sets: `a.b=value` assignments; the value is YAML.
        options: Dotted keys and values from command-line options, which win over all else.

    Raises:
        ConfigError: Any problem of the file, the assignments or their values; all of them are listed.
    """
    path = None if name is None else find_recipe(name)
    document = deepcopy(dict(base or {})) if path is None else read_yaml(path)
    for assignment in sets:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise ConfigError("--set takes a key and a value.", expected="--set a.b=value", actual=assignment)
        assign(document, key.strip(), yaml.load(value, Loader=_Loader))
    for key, value in (options or {}).items():
        assign(document, key, value)
    return parse_recipe(document, path)


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some dotted keys changed.

    Raises:
        ConfigError: A key is unknown or a value does not fit.
    """
    document = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        assign(document, key, value)
    return parse_recipe(document)


def assign(document: dict[str, Any], key: str, value: object) -> None:
    """Sets a dotted key in nested mappings, made where they are missing.

    A mask has one indicator, so that a ratio takes the place of a threshold and the other way round.

    Raises:
        ConfigError: A part of the key is no mapping.
    """
    *parents, last = key.split(".")
    place = document
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError("This key has no parts.", key=key, actual=f"{parent} is a value")
    other = {"ratio": "threshold", "threshold": "ratio"}.get(last)
    if parents and other is not None and value is not None:
        place.pop(other, None)
    place[last] = value


def parse_recipe(document: Mapping[str, Any], path: Path | None = None) -> Recipe:
    """The checked recipe of a document.

    Raises:
        ConfigError: With one line for each problem.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise ConfigError("The configuration does not fit.", path=path, problems=problems) from error
    except DataError as error:
        raise ConfigError(
            error.message, path=path or error.path, expected=error.expected, actual=error.actual
        ) from error


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        nearest = _nearest(location[-1], _known_keys(Recipe, location[:-1])) or _nearest_anywhere(location[-1])
        return f"{key}: unknown key" + (f"; {nearest}" if nearest else "")
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{key}: {text}" if key else text
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"


def _known_keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The keys allowed at a place of the recipe; none where the place takes free keys."""
    for part in location:
        field = model.model_fields.get(part)
        if field is None:
            return list(model.model_fields)
        candidates = [field.annotation, *get_args(field.annotation)]
        nested = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _nearest(name: str, known: Sequence[str]) -> str | None:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]}?" if matches else None


def _nearest_anywhere(name: str) -> str | None:
    """The nearest key of any section, with its section."""
    dotted = {
        key: f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    }
    matches = difflib.get_close_matches(name, dotted, n=1)
    return f"did you mean {dotted[matches[0]]}?" if matches else None
