"""The configuration of a run: every value in force, and which of them nobody gave.

A value that was not given hangs on others, such as the preset; whoever starts from a configuration and changes one of
those gets what the change stands for.
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
"""Key of a configuration that lists the dotted keys whose value follows from others."""


def to_document(recipe: Recipe) -> dict[str, Any]:
    """A recipe without its stages as plain data that reads back as the same recipe: the `config` of a run."""
    document = recipe.model_dump(mode="json", exclude={"stages", "seeds"}, exclude_none=True)
    not_given = [
        f"{name}.{key}"
        for name, keys in SETTLED.items()
        for key in keys
        if key in document[name] and key not in getattr(recipe, name).model_fields_set
    ]
    return {**document, **({NOT_GIVEN: not_given} if not_given else {})}


def as_given(document: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it was before anything was filled in: without the values that follow from others.

    A value that would be another today, or was changed by hand, counts as given.

    Raises:
        ConfigError: What was not given is no list of keys.
    """
    given = deepcopy(dict(document))
    listed = given.pop(NOT_GIVEN, [])
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise ConfigError(
            "What was not given is a list of keys.", key=NOT_GIVEN, expected="such as [mask_train.start]", actual=listed
        )
    stripped = _without(given, listed)
    settled = settled_sections(stripped)
    if settled is None:
        return given
    return _without(given, [key for key in listed if _value(given, key) == _value(settled, key)])


def in_force(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a run's record has, in the names of today and with every value in force.

    Earlier versions wrote down only what was given.

    Args:
        config: As recorded, whatever it is; what is none of this version stays as it is.
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
    """The sections that hold settled values, filled in; None where they are none of this version.

    Args:
        document: With these sections or parts of them.
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
