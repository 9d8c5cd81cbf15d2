"""One JSON document a line, which every text fits into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as JSON lines in readable text; half of a surrogate pair, which UTF-8 has not, is escaped.

    Args:
        rows: In order.
    """
    return "".join(f"{readable_json(row)}\n" for row in rows)


def readable_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that can be read and written.

    Args:
        value: Plain data.
        indent: Spaces a level; None for one line.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text
