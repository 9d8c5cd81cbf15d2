"""Configuration of a run: all effective values, and a list of those that were derived rather than given.

A derived value depends on others, such as the preset. It is derived again when a configuration is reused and one of
those values is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final

from pydantic import ValidationError

from mftctl.errors import ConfigError
from mftctl.experiments.presets import SETTLED
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.renamed import with_new_names

NOT_GIVEN: Final = "not_given"
"""Key of a configuration that lists the dotted keys whose values were derived from others."""


def to_document(recipe: Recipe) -> dict[str, Any]:
    """Returns the `config` of a run: a recipe without its stages as plain data, which reads back as the same recipe."""
    document = recipe.model_dump(mode="json", exclude={"stages", "seeds"}, exclude_none=True)
    not_given = [
        f"{name}.{key}"
        for name, keys in SETTLED.items()
        for key in keys
        if key in document[name] and key not in getattr(recipe, name).model_fields_set
    ]
    return {**document, **({NOT_GIVEN: not_given} if not_given else {})}


def as_given(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration without its derived values, as it was given.

    A value that would now be derived differently, or was changed by hand, counts as given.

    Raises:
        ConfigError: The value of `not_given` is not a list of keys.
    """
    given = deepcopy(dict(document))
    listed = given.pop(NOT_GIVEN, [])
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise ConfigError(
            "not_given must be a list of keys.", key=NOT_GIVEN, expected="such as [mask_train.start]", actual=listed
        )
    stripped = _without(given, listed)
    settled = settled_sections(stripped)
    if settled is None:
        return given
    return _without(given, [key for key in listed if _value(given, key) == _value(settled, key)])


def in_force(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recorded configuration with current key names and all effective values.

    Earlier versions recorded only the values that were given.

    Args:
        config: The recorded configuration; returned with current names only if it is not valid in this version.
    """
    renamed = with_new_names(config)
    settled = None if NOT_GIVEN in renamed else settled_sections(renamed)
    if settled is None:
        return renamed
    not_given = [
        f"{name}.{key}"
        for name, keys in SETTLED.items()
        for key in keys
        if name in renamed and renamed[name].get(key) is None and settled[name][key] is not None
    ]
    for dotted in not_given:
        name, _, key = dotted.partition(".")
        renamed[name] = {**renamed[name], key: settled[name][key]}
    return {**renamed, **({NOT_GIVEN: not_given} if not_given else {})}


def settled_sections(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the sections that have derived values, with these filled in; None if they are not valid in this version.

    Args:
        document: A configuration with these sections, or parts of them.
    """
    try:
        recipe = Recipe.model_validate({name: document[name] for name in SETTLED if name in document})
    except ValidationError:
        return None
    return recipe.model_dump(mode="json", include=set(SETTLED))


def _without(document: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    found = dict(document)
    for dotted in keys:
        name, _, key = dotted.partition(".")
        section = found.get(name)
        if key in SETTLED.get(name, ()) and isinstance(section, dict):
            found[name] = {other: value for other, value in section.items() if other != key}
    return found


def _value(document: Mapping[str, Any], dotted: str) -> object:
    name, _, key = dotted.partition(".")
    section = document.get(name)
    return section.get(key) if isinstance(section, dict) else None
