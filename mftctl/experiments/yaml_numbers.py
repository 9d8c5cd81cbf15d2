"""Number syntax in the YAML that mftctl reads and writes: `1e-4` is a number and `2:4` is none, as in YAML 1.2."""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_NUMBERS = (_FLOAT, "tag:yaml.org,2002:int")
_TEXT = "tag:yaml.org,2002:str"
_PATTERN = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_FIRST = list("-+.0123456789")


class NumberLoader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as expected for a learning rate, and `2:4` as text, not as 124 in base 60."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """The tag of a node."""
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _TEXT if kind is yaml.ScalarNode and tag in _NUMBERS and ":" in value else tag


class NumberDumper(yaml.SafeDumper):
    """Quotes a text that would be read as a number, such as the revision 71e2345."""


NumberLoader.add_implicit_resolver(_FLOAT, _PATTERN, _FIRST)
NumberDumper.add_implicit_resolver(_FLOAT, _PATTERN, _FIRST)
