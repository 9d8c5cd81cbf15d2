"""Reads untrusted YAML: its expanded size is counted while parsing, and rejected before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from mftctl.errors import ConfigError
from mftctl.experiments.yaml_numbers import NumberLoader
from mftctl.files.regular import open_regular

MAX_BYTES: Final = 2**18
MAX_VALUES: Final = 5_000
"""Maximum number of keys and values in one document, with aliases expanded."""
MAX_DEPTH: Final = 32
_MOST_DIGITS: Final = 100
_NUMBERS: Final = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

# Forbidden characters, values such as the date 2024-13-45, and wrong tags raise no YAMLError.
_YAML_ERRORS = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError)


class _BoundError(yaml.MarkedYAMLError):
    """The document is too large."""


class _Loader(NumberLoader):
    """Rejects duplicate keys, and documents that are too large with their aliases expanded."""

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
                raise _BoundError(problem="an alias inside its own anchor", problem_mark=mark)
            self._count(*self._sizes[id(node)], mark)
            return node
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
                raise _BoundError(problem=f"a number with more than {_MOST_DIGITS} digits", problem_mark=mark)
            self._count(0, len(node.value), mark)
        self._sizes[id(node)] = self._values - values, self._characters - characters
        return node

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:  # noqa: N803 - the name is PyYAML's
        # The scanner runs ahead of the nodes, and takes time quadratic in the depth.
        if self.flow_level >= MAX_DEPTH:
            mark = self.get_mark()
            raise _BoundError(problem=f"more than {MAX_DEPTH} levels", problem_mark=mark)
        super().fetch_flow_collection_start(TokenClass)

    def _count(self, values: int, characters: int, mark: yaml.Mark) -> None:
        self._values += values
        self._characters += characters
        if self._values > MAX_VALUES:
            raise _BoundError(
                problem=f"more than {MAX_VALUES:,} keys and values, with aliases expanded", problem_mark=mark
            )
        if self._characters > MAX_BYTES:
            raise _BoundError(problem=f"more than {MAX_BYTES:,} characters, with aliases expanded", problem_mark=mark)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, what: str, *, path: Path | None = None, key: str | None = None) -> Any:
    """Parses a YAML text; values such as 1e-4 are numbers.

    Args:
        text: The untrusted text.
        what: Its description in messages, such as "The recipe".
        path: Its file, for messages.
        key: The key that it is the value of, for messages.

    Raises:
        ConfigError: The text is not valid YAML, repeats a key, or is too large.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _BoundError as error:
        raise ConfigError(
            f"{what} is too large.",
            path=_place(path, error),
            key=key,
            expected=f"at most {MAX_VALUES:,} keys and values, {MAX_DEPTH} levels and {MAX_BYTES:,} characters, "
            f"with aliases expanded, and numbers of at most {_MOST_DIGITS} digits",
            actual=error.problem,
        ) from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(
            f"{what} is not valid YAML.", path=_place(path, error), key=key, actual=error.problem
        ) from error
    except _YAML_ERRORS as error:
        raise ConfigError(f"{what} is not valid YAML.", path=path, key=key, actual=error) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping in a recipe file.

    Raises:
        ConfigError: The file cannot be read, is not valid YAML, repeats a key, is not a mapping or is too large.
    """
    try:
        with open_regular(path) as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content.decode("utf-8") if len(content) <= MAX_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The recipe cannot be read.", path=path, actual=error) from error
    if text is None:
        raise ConfigError("The recipe is too large.", path=path, expected=f"at most {MAX_BYTES:,} bytes", actual="more")
    document = parse_yaml(text, "The recipe", path=path)
    if not isinstance(document, dict):
        raise ConfigError("A recipe must be a mapping of keys to values.", path=path, actual=type(document).__name__)
    return document


def _place(path: Path | None, error: yaml.MarkedYAMLError) -> str | None:
    if path is None:
        return None
    return str(path) if error.problem_mark is None else f"{path}:{error.problem_mark.line + 1}"
