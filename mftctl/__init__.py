"""Make a fine-tuned language model better by learning which weights to remove.

The names below are loaded on first use, so that importing mftctl does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mftctl.masking.checkpoints.apply_in_memory import apply_mask
    from mftctl.masking.mask import Mask, load_mask, save_mask

__version__ = "0.1.0"

__all__ = ["Mask", "__version__", "apply_mask", "load_mask", "save_mask"]

_HOMES = {
    "Mask": "mftctl.masking.mask",
    "load_mask": "mftctl.masking.mask",
    "save_mask": "mftctl.masking.mask",
    "apply_mask": "mftctl.masking.checkpoints.apply_in_memory",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
