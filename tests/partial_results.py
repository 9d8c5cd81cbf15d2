"""Incomplete results, such as those of manually edited records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict

from mftctl.experiments.results import Result


class PartialResult(Result):
    """A result with arbitrary keys."""

    model_config = ConfigDict(extra="allow")


def partial_result(document: Mapping[str, Any]) -> PartialResult:
    """A result stored as this document."""
    return PartialResult.model_validate(dict(document))
