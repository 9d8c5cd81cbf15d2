"""The result class of each command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mftctl.experiments.combined_results import AverageResult, DeltaResult, InterpolateResult, MergeResult
from mftctl.experiments.mask_results import MaskTrainResult
from mftctl.experiments.probe_results import ProbeResult
from mftctl.experiments.results import ApplyResult, EvalResult, FftResult, Outcome, Result, SurfaceResult

RESULTS: Mapping[str, type[Result]] = {
    "fft": FftResult,
    "probe": ProbeResult,
    "mask-train": MaskTrainResult,
    "apply": ApplyResult,
    "average": AverageResult,
    "interpolate": InterpolateResult,
    "delta": DeltaResult,
    "delta-merge": MergeResult,
    "eval": EvalResult,
    "surface": SurfaceResult,
}
"""Result class of each command."""


def read_result(command: str, document: Mapping[str, Any]) -> Result:
    """Returns a complete result from its stored form, or from that sent by another process.

    Raises:
        pydantic.ValidationError: It is not a result of that command.
    """
    return RESULTS.get(command, Outcome).read(document)
