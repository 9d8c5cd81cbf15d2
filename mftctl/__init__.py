"""Make a fine-tuned language model better by learning which weights to remove.

The names below are loaded at first use, so that importing mftctl loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mftctl.masking.bits import Mask, load_mask, save_mask
    from mftctl.masking.checkpoint import apply_mask

__version__ = "0.1.0"

__all__ = ["Mask", "__version__", "apply_mask", "load_mask", "save_mask"]

_HOMES = {
    "Mask": "mftctl.masking.bits",
    "load_mask": "mftctl.masking.bits",
    "save_mask": "mftctl.masking.bits",
    "apply_mask": "mftctl.masking.checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
