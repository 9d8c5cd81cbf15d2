"""The base class of recipe sections."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Strict base class of recipe sections: unknown keys, text for a number, infinity and NaN are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def given(self) -> dict[str, Any]:
        """Returns the keys that were set explicitly, with their values."""
        return {key: getattr(self, key) for key in self.model_fields_set}
