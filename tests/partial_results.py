"""Results that are not complete, such as those of records that somebody has edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict

from mftctl.experiments.results import Result


class PartialResult(Result):
    """A result with whatever keys it is given."""

    model_config = ConfigDict(extra="allow")


def partial_result(document: Mapping[str, Any]) -> PartialResult:
    """A result that is stored as this document."""
    return PartialResult.model_validate(dict(document))
