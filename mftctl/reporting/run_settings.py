"""The settings of a training or evaluation, as its run recorded them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final

from pydantic import BaseModel

from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.recipe import EvalOptions
from mftctl.experiments.run_folder import Run

SECTIONS: Final[dict[str, tuple[str, type[BaseModel]]]] = {
    "fft": ("fft", FftOptions),
    "mask-train": ("mask_train", MaskTrainOptions),
    "eval": ("eval", EvalOptions),
}
"""The configuration section that each command reads."""


def settings_of(run: Run) -> dict[str, Any]:
    """The configuration section that a run's command reads, with defaults for missing keys."""
    section, _ = SECTIONS[run.record.command]
    return {**_defaults(run.record.command), **(run.record.config.get(section) or {})}


@cache
def _defaults(command: str) -> dict[str, Any]:
    _, options = SECTIONS[command]
    values = {name: field.get_default(call_default_factory=True) for name, field in options.model_fields.items()}
    plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples as lists, as in a record
    return plain
