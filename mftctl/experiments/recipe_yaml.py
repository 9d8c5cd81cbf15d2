"""Reads YAML from anyone: what it would expand to is counted while it is read, and refused before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from mftctl.errors import ConfigError
from mftctl.experiments.yaml_numbers import NumberLoader
from mftctl.files.regular import open_regular

MAX_BYTES: Final = 2**18
MAX_VALUES: Final = 5_000
"""Keys and values of one document, aliases written out."""
MAX_DEPTH: Final = 32
_MOST_DIGITS: Final = 100
_NUMBERS: Final = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

# Forbidden characters, values such as the date 2024-13-45, and tags that a value does not fit, have no error of YAML.
_YAML_ERRORS = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError)


class _BoundError(yaml.MarkedYAMLError):
    """The document is larger than one may be."""


class _Loader(NumberLoader):
    """Refuses a key that is there twice, and what would be too large with its aliases written out."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = self._characters = 0
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        values, characters = self._values, self._characters
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _BoundError(problem=f"more than {MAX_DEPTH} levels", problem_mark=mark)
        if not is_alias:
            self._count(1, 0, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            if id(node) not in self._sizes:
                raise _BoundError(problem="an alias inside of what it stands for", problem_mark=mark)
            self._count(*self._sizes[id(node)], mark)
            return node
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
                raise _BoundError(problem=f"a number of more than {_MOST_DIGITS} digits", problem_mark=mark)
            self._count(0, len(node.value), mark)
        self._sizes[id(node)] = self._values - values, self._characters - characters
        return node

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:  # noqa: N803 - the name is PyYAML's
        # The scanner is ahead of the nodes, and takes the square of the depth.
        if self.flow_level >= MAX_DEPTH:
            mark = self.get_mark()
            raise _BoundError(problem=f"more than {MAX_DEPTH} levels", problem_mark=mark)
        super().fetch_flow_collection_start(TokenClass)

    def _count(self, values: int, characters: int, mark: yaml.Mark) -> None:
        self._values += values
        self._characters += characters
        if self._values > MAX_VALUES:
            raise _BoundError(problem=f"more than {MAX_VALUES:,} keys and values, with aliases", problem_mark=mark)
        if self._characters > MAX_BYTES:
            raise _BoundError(problem=f"more than {MAX_BYTES:,} characters, with aliases", problem_mark=mark)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} twice", key.start_mark)
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, what: str, *, path: Path | None = None, key: str | None = None) -> Any:
    """The value of a YAML text; numbers such as 1e-4 are numbers.

    Args:
        text: From anyone.
        what: What it is called in a message, such as "The recipe".
        path: Its file, for the message.
        key: What it is the value of, for the message.

    Raises:
        ConfigError: It is not YAML, repeats a key, or is larger than one may be.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _BoundError as error:
        raise ConfigError(
            f"{what} is larger than one may be.",
            path=_place(path, error),
            key=key,
            expected=f"at most {MAX_VALUES:,} keys and values, {MAX_DEPTH} levels and {MAX_BYTES:,} characters, "
            f"with aliases written out, and numbers of {_MOST_DIGITS} digits",
            actual=error.problem,
        ) from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(
            f"{what} is not valid YAML.", path=_place(path, error), key=key, actual=error.problem
        ) from error
    except _YAML_ERRORS as error:
        raise ConfigError(f"{what} is not valid YAML.", path=path, key=key, actual=error) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        ConfigError: The file cannot be read, is not YAML, repeats a key, holds no mapping or is too large.
    """
    try:
        with open_regular(path) as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content.decode("utf-8") if len(content) <= MAX_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The recipe cannot be read.", path=path, actual=error) from error
    if text is None:
        raise ConfigError(
            "The recipe is larger than one may be.", path=path, expected=f"at most {MAX_BYTES:,} bytes", actual="more"
        )
    document = parse_yaml(text, "The recipe", path=path)
    if not isinstance(document, dict):
        raise ConfigError("A recipe is a mapping of keys to values.", path=path, actual=type(document).__name__)
    return document


def _place(path: Path | None, error: yaml.MarkedYAMLError) -> str | None:
    if path is None:
        return None
    return str(path) if error.problem_mark is None else f"{path}:{error.problem_mark.line + 1}"
