"""Number syntax in the YAML that mftctl reads and writes: `1e-4` is a number, as in YAML 1.2."""

from __future__ import annotations

import re

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_PATTERN = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_FIRST = list("-+.0123456789")


class NumberLoader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as expected for a learning rate."""


class NumberDumper(yaml.SafeDumper):
    """Quotes a text that would be read as a number, such as the revision 71e2345."""


NumberLoader.add_implicit_resolver(_FLOAT, _PATTERN, _FIRST)
NumberDumper.add_implicit_resolver(_FLOAT, _PATTERN, _FIRST)
