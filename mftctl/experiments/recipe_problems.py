"""Problems of a recipe, one line each, with the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from mftctl.experiments.recipe import Recipe
from mftctl.experiments.renamed import KEYS, VALUES
from mftctl.text import counted


def shortened(value: object, most: int = 200) -> str:
    """Returns a value as text, shortened for a message.

    Args:
        value: A text, or any other value as its `repr`.
        most: Maximum number of characters.
    """
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def describe_problems(problems: Sequence[Any]) -> list[str]:
    """Returns one line per invalid place.

    A key with several types gives one error per type; those about the given type are kept, if there are any.

    Args:
        problems: Errors of pydantic.
    """
    places: dict[tuple[str, ...], list[Any]] = {}
    for problem in problems:
        places.setdefault(tuple(_without_types(Recipe, [str(part) for part in problem["loc"]])), []).append(problem)
    lines = []
    for location, found in places.items():
        if any(len(other) > len(location) and other[: len(location)] == location for other in places):
            continue
        told = [problem for problem in found if problem["type"] not in _OTHER_TYPE] or found
        lines.append(_describe({**told[0], "msg": " or ".join(_lowered(problem["msg"]) for problem in told)}, location))
    return lines


_OTHER_TYPE = {"float_type", "int_type", "dict_type", "literal_error"}


def _without_types(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Returns a place in the recipe without the type name that pydantic adds for a key with several types."""
    for number, part in enumerate(location):
        field = model.model_fields.get(part)
        if field is None:
            break
        types = _several_types(field.annotation) or [field.annotation]
        if len(types) > 1:
            return [*location[: number + 1], *location[number + 2 :]]
        if get_origin(types[0]) is tuple and _several_types(get_args(types[0])[0]):
            return [*location[: number + 2], *location[number + 3 :]]
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return list(location)


def _several_types(annotation: Any) -> list[Any]:
    """Returns the types of a union without None; empty for anything else."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return [item for item in parts if item is not type(None)]


def _describe(problem: Any, location: Sequence[str]) -> str:
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        name, known = KEYS.get(location[-1], location[-1]), _known_keys(Recipe, location[:-1])
        question = nearest(name, known) or _nearest_anywhere(name)
        return f"{key}: unknown key" + (f"; {question}" if question else "")
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{key}: {text}" if key else text
    if problem["type"] in ("too_short", "too_long", "tuple_type"):
        return f"{key}: {_list_problem(problem)}, got {shortened(repr(problem['input']))}"
    now = VALUES.get((location[-1], problem["input"])) if isinstance(problem["input"], str) else None
    hint = f"; did you mean {now}?" if now else ""
    return f"{key}: {_lowered(problem['msg'])}, got {shortened(repr(problem['input']))}{hint}"


def _list_problem(problem: Any) -> str:
    """What is wrong with the length of a list, or with a value that is none."""
    match problem["type"]:
        case "too_short":
            return f"at least {counted(problem['ctx']['min_length'], 'value')} expected"
        case "too_long":
            return f"at most {counted(problem['ctx']['max_length'], 'value')} expected"
        case _:
            return "a list such as [a, b] expected"


def _lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _known_keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Returns the keys allowed at a place in the recipe; none where any key is allowed."""
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


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Returns a question with the closest known word; None if no word is close."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]}?" if matches else None


def _nearest_anywhere(name: str) -> str | None:
    """Returns a question with the closest top-level key, or the sections that have the key; None if no key is close."""
    dotted: dict[str, list[str]] = {}
    for section, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for key in field.annotation.model_fields:
                dotted.setdefault(key, []).append(f"{section}.{key}")
    dotted |= {key: [key] for key in Recipe.model_fields}
    matches = difflib.get_close_matches(name, dotted, n=1)
    if not matches:
        return None
    *others, last = dotted[matches[0]]
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"
