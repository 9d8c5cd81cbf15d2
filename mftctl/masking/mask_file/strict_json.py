"""Strict JSON for the mask file: ambiguous input is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn


def parse_strict_json(text: bytes) -> object:
    """Parses one JSON text.

    Args:
        text: UTF-8 without a byte order mark.

    Raises:
        ValueError: The bytes are not UTF-8, not JSON, nested too deeply, or hold a duplicate key, NaN or Infinity.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_compact_json(value: object, *, sort_keys: bool) -> bytes:
    """The shortest UTF-8 encoding of `value`, without optional white space or optional escapes.

    Raises:
        ValueError: A string contains an unpaired surrogate, which UTF-8 cannot encode.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys, separators=(",", ":")).encode(
        "utf-8"
    )


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"duplicate key {key!r}")
        values[key] = value
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
