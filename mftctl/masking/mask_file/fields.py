"""Fields that the documents of all format versions share, checked one by one."""

from __future__ import annotations

import math
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mftctl.masking.dtypes import TORCH_DTYPES

MAX_DIMENSIONS: Final = 8
MAX_WEIGHTS: Final = 2**48
"""Maximum weights per tensor: far above any model, far below integer overflow of sizes."""
MAX_SCALE: Final = 1e6


class Strict(BaseModel):
    """Base class of the parts of a document: no other keys, no conversions, no infinity or NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _printable(name: str) -> str:
    if not name.isprintable() or name == "__metadata__":
        raise ValueError("a tensor name must be printable and not __metadata__")
    return name


def _known_dtype(name: str) -> str:
    if name not in TORCH_DTYPES:
        raise ValueError(f"a masked tensor must be one of {', '.join(TORCH_DTYPES)}")
    return name


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a text must not contain unpaired surrogates, which are not characters") from error
    return text


def check_counts(shape: list[int], removed: int) -> None:
    """Checks the number of weights of a tensor, and that no more are removed than it has.

    Raises:
        ValueError: A number is out of range.
    """
    weights = math.prod(shape)
    if weights > MAX_WEIGHTS:
        raise ValueError(f"a tensor must have at most {MAX_WEIGHTS} weights")
    if removed > weights:
        raise ValueError(f"a tensor of {weights} weights cannot have {removed} removed")


Text = Annotated[str, AfterValidator(_encodable)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
TensorName = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
Dtype = Annotated[str, AfterValidator(_known_dtype)]
Shape = Annotated[list[Annotated[int, Field(gt=0, le=MAX_WEIGHTS)]], Field(min_length=1, max_length=MAX_DIMENSIONS)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=1, le=MAX_SCALE)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class CheckpointEntry(Strict):
    """A model: its name or folder, and its revision on the hub."""

    model: Annotated[Text, Field(min_length=1)]
    revision: Text | None
