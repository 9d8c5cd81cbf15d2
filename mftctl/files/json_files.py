"""Reading JSON from files of anyone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mftctl.files.regular import read_regular


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: It cannot be read, or is no file.
        ValueError: It is not JSON, nested too deeply, or no object.
    """
    try:
        found = json.loads(read_regular(path))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object, but a {type(found).__name__}")
    return found


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


def json_text(document: Any, *, indent: int | None = 2) -> str:
    """Plain data as JSON in ASCII, with `null` where there is no number.

    Args:
        document: Mappings, lists, texts, numbers and None.
        indent: Of each level; None for a single line.
    """
    try:
        return json.dumps(document, indent=indent, allow_nan=False) + "\n"
    except ValueError:  # as rare as a training that diverges
        return json.dumps(_with_nulls(document), indent=indent, allow_nan=False) + "\n"


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(part) for key, part in value.items()}
    return [_with_nulls(part) for part in value] if isinstance(value, list | tuple) else value
