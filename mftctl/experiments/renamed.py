"""Names that recipe keys, their values and options had before: known to hints, and where a run folder has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_SECTIONS = ("fft", "mask_train")
KEYS: Final = {"eval_steps": "val_steps", "eval_every": "benchmark_every", "eval_limit": "benchmark_limit"}
"""Of both sections that train."""
VALUES: Final = {("start", "magnitude"): "weights", ("ranking", "magnitude"): "absolute"}
"""By key, of `mask_train`."""
OPTIONS: Final = {f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in KEYS.items()}


def with_new_names(document: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration in the names of today.

    Args:
        document: As a run folder has it, whatever it is.
    """
    renamed = dict(document)
    for name in _SECTIONS:
        section = renamed.get(name)
        if isinstance(section, dict):
            renamed[name] = {KEYS.get(key, key): _value(key, value) for key, value in section.items()}
    return renamed


def _value(key: str, value: object) -> object:
    return VALUES.get((key, value), value) if isinstance(value, str) else value
