"""Make a fine-tuned language model better by learning which weights to remove.

The names below are loaded on first use, so that importing mftctl does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mftctl.api import Finished, evaluate, fine_tune, learn_mask
    from mftctl.experiments.recipe import Recipe
    from mftctl.experiments.recipe_files import load_recipe
    from mftctl.masking.checkpoints.apply_in_memory import apply_mask
    from mftctl.masking.checkpoints.own_training import attach_masks, collect_mask
    from mftctl.masking.layers import detach_masks
    from mftctl.masking.mask import Mask, load_mask, save_mask

__version__ = "0.1.0"

__all__ = [
    "Finished",
    "Mask",
    "Recipe",
    "__version__",
    "apply_mask",
    "attach_masks",
    "collect_mask",
    "detach_masks",
    "evaluate",
    "fine_tune",
    "learn_mask",
    "load_mask",
    "load_recipe",
    "save_mask",
]

_HOMES = {
    "Finished": "mftctl.api",
    "evaluate": "mftctl.api",
    "fine_tune": "mftctl.api",
    "learn_mask": "mftctl.api",
    "Recipe": "mftctl.experiments.recipe",
    "load_recipe": "mftctl.experiments.recipe_files",
    "Mask": "mftctl.masking.mask",
    "load_mask": "mftctl.masking.mask",
    "save_mask": "mftctl.masking.mask",
    "apply_mask": "mftctl.masking.checkpoints.apply_in_memory",
    "attach_masks": "mftctl.masking.checkpoints.own_training",
    "collect_mask": "mftctl.masking.checkpoints.own_training",
    "detach_masks": "mftctl.masking.layers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
