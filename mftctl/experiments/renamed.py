"""Former names of recipe keys, values and options, used in hints and to read earlier run folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_SECTIONS = ("fft", "mask_train")
KEYS: Final = {"eval_steps": "val_steps", "eval_every": "benchmark_every", "eval_limit": "benchmark_limit"}
"""Former and current keys in the sections `fft` and `mask_train`."""
VALUES: Final = {("start", "magnitude"): "weights", ("ranking", "magnitude"): "absolute"}
"""Current values by key and former value, in the section `mask_train`."""
OPTIONS: Final = {f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in KEYS.items()}


def with_new_names(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's configuration with current names.

    Args:
        document: The configuration as recorded; it need not be valid.
    """
    renamed = dict(document)
    for name in _SECTIONS:
        section = renamed.get(name)
        if isinstance(section, dict):
            renamed[name] = {KEYS.get(key, key): _value(key, value) for key, value in section.items()}
    return renamed


def _value(key: str, value: object) -> object:
    return VALUES.get((key, value), value) if isinstance(value, str) else value
