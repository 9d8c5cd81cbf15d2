"""Reading JSON from files of anyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mftctl.regular_files import read_regular


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
