"""The built-in model and data, small enough to ship in the wheel (built by `scripts/build_quickstart.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

NAME = "quickstart"

Split = Literal["train", "validation", "test", "retained", "preferences", "preferences_validation"]
"""`retained` has problems of the kind that the model was pre-trained on, the others of the kind to learn."""


def model_path() -> Path:
    """The folder of the built-in checkpoint (safetensors, configuration, tokenizer)."""
    return Path(__file__).parent / "model"


def data_path(split: Split) -> Path:
    """The file of one split of the built-in word problems, one JSON record per line.

    A record has `question` and `answer`, or for preferences `prompt`, `chosen` and `rejected`.
    """
    return Path(__file__).parent / "data" / f"{split}.jsonl"
