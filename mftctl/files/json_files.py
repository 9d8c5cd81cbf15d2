"""Reading JSON from untrusted files, and writing JSON that any reader accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mftctl.files.regular import read_regular


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: The content is not JSON, nested too deeply, or not an object.
    """
    try:
        found = json.loads(read_regular(path))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    return found


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns rows as readable JSON lines; lone surrogates, which UTF-8 cannot encode, are escaped.

    Args:
        rows: The rows in order.
    """
    return "".join(f"{readable_json(row)}\n" for row in rows)


def readable_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as readable JSON that can be encoded as UTF-8.

    Args:
        value: Plain data.
        indent: Spaces per level; None for one line.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def json_text(document: Any, *, indent: int | None = 2) -> str:
    """Returns plain data as ASCII JSON, with `null` for NaN and infinity.

    Args:
        document: Mappings, lists, texts, numbers and None.
        indent: Spaces per level; None for a single line.
    """
    try:
        return json.dumps(document, indent=indent, allow_nan=False) + "\n"
    except ValueError:  # rare, as when training diverges
        return json.dumps(_with_nulls(document), indent=indent, allow_nan=False) + "\n"


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(part) for key, part in value.items()}
    return [_with_nulls(part) for part in value] if isinstance(value, list | tuple) else value
