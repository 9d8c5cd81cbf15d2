"""JSON that every reader takes: without NaN and infinity, which the format does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


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
