"""Bounded types for values read from a run folder, which may have been edited or damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_LARGEST = 1e100
"""Limit for any number, so that its square and other derived values stay finite."""
LARGEST_COUNT = 2**63 - 1
_LONGEST_PLACE = 4096


def _bounded(number: float) -> float:
    if math.isfinite(number) and abs(number) > _LARGEST:
        raise ValueError(f"a number larger than {_LARGEST:g}")
    return number


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("Input should be a finite number")
    return number


def _place(text: str) -> str:
    if "\0" in text or any(len(part.encode("utf-8", "replace")) > 255 for part in text.split("/")):
        raise ValueError("not a valid file name")
    return text


Measured = Annotated[float, AfterValidator(_bounded)]
"""A number, or NaN or infinity from diverged training."""
Number = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_bounded)]
Exact = Annotated[int | float, AfterValidator(_finite), AfterValidator(_bounded)]
"""A finite number; integers are not converted to floats."""
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Several = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Place = Annotated[str, Field(max_length=_LONGEST_PLACE), AfterValidator(_place)]
Name = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """Part of a record: types are checked, nothing is converted, and unknown keys are ignored.

    Keys that were not set are not written.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Returns the part that is stored in a record.

        Raises:
            pydantic.ValidationError: A value is missing, out of bounds or of the wrong type.
        """
        return cls.model_validate(dict(document))

    def document(self) -> dict[str, Any]:
        """Returns the part as plain data, in its stored form."""
        return self.model_dump(exclude_unset=True)
