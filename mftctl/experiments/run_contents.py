"""Types and bounds of those parts of a run's record that are used, checked once on reading.

Missing keys are not errors here: runs of earlier versions, and unfinished ones, lack some. Code that needs a key
reports it. Unused keys may hold anything.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from mftctl.errors import MftError, RunError
from mftctl.files.regular import read_regular
from mftctl.text import visible_line

if TYPE_CHECKING:
    from mftctl.experiments.run_record import RunRecord

_LARGEST = 1e100
"""Limit for any number, so that its square and other derived values stay finite."""
_LARGEST_COUNT = 2**63 - 1
_LONGEST_PLACE = 4096
_LONGEST_FAULT = 300


def _bounded(number: float) -> float:
    if math.isfinite(number) and abs(number) > _LARGEST:
        raise ValueError(f"a number larger than {_LARGEST:g}")
    return number


def _place(text: str) -> str:
    if "\0" in text or any(len(part.encode("utf-8", "replace")) > 255 for part in text.split("/")):
        raise ValueError("not a valid file name")
    return text


Measured = Annotated[float, AfterValidator(_bounded)]
"""A number, or NaN or infinity from diverged training."""
Number = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_bounded)]
Count = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
Several = Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
_Seed = Annotated[int, Field(ge=-_LARGEST_COUNT, le=_LARGEST_COUNT)]
_Place = Annotated[str, Field(max_length=_LONGEST_PLACE), AfterValidator(_place)]
_Worker = Annotated[str, Field(max_length=1_000)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _DataPart(_Part):
    path: str
    count: Count | None = None


class _Training(_Part):
    method: str = ""
    keep: str | None = None
    batch_size: Several = 1
    grad_accum_steps: Count | None = None
    global_batch_size: Count | None = None
    data_fraction: Number | None = None


class _Probing(_Part):
    groups: list[int | str] | None = None
    data_fraction: Number | None = None
    epochs: Number | None = None
    fast: bool | None = None


class _Evaluating(_Part):
    predictions: Any = None


class _Config(_Part):
    seed: _Seed = 0
    data: list[str | _DataPart] = []
    val_data: list[str | _DataPart] = []
    revision: str | None = None
    fft: _Training = _Training()
    mask_train: _Training = _Training()
    probe: _Probing = _Probing()
    eval: _Evaluating = _Evaluating()


class _Corner(_Part):
    run: str


class _Inputs(_Part):
    model: _Place | None = None
    mask: _Place | None = None
    state: str = ""
    parents: list[str] = []
    origin: _Place = ""
    base: _Place | None = None
    digests: dict[str, str | None] = {}
    train_records: Count | None = None
    validation_records: Count | None = None
    test_records: Count | None = None
    corners: list[_Corner] = []
    points: Annotated[int, Field(ge=2, le=10_000)] | None = None
    records: Count | None = None


class _Metric(_Part):
    name: str
    value: Measured = 0.0
    standard_error: Measured | None = None
    samples: Several = 1


class _Dataset(_Part):
    name: str = ""
    task: str | None = None
    digest: str = ""
    samples: _Place = ""
    metrics: list[_Metric] = []
    generated_tokens: Count | None = None
    seconds: Number | None = None


class _Score(_Part):
    metric: str
    value: Measured
    standard_error: Measured | None = None
    samples: Several
    higher_is_better: bool = True


class _Group(_Part):
    layers: str = ""
    size: Several = 1
    start_loss: Measured | None = None
    best_loss: Measured | None = None
    change: Measured = 0.0
    score: Measured | None = None
    score_change: Measured | None = None


class _Agreement(_Part):
    rank_correlation: Measured = 0.0
    run: str = ""


class _Result(_Part):
    state: Annotated[str, Field(min_length=1)] = "-"
    model: _Place | None = None
    mask: _Place | None = None
    output: _Place | None = None
    base: _Place | None = None
    steps: Count | None = None
    best_step: Count | None = None
    start_loss: Measured | None = None
    best_loss: Measured | None = None
    last_loss: Measured | None = None
    unmasked_loss: Measured | None = None
    tokens: Count | None = None
    peak_memory_bytes: Count | None = None
    flops_per_token: Number | None = None
    datasets: list[_Dataset] = []
    fast: bool | None = None
    groups: list[_Group] = []
    by: str | None = None
    unmasked_score: _Score | None = None
    recommended_layers: str | None = None
    agreement: _Agreement | None = None


class _Decides(_Part):
    files: dict[str, str | None] = {}


class _Record(_Part):
    seconds: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    processes: Annotated[int, Field(ge=1, le=1_000_000)]
    worker: _Worker | None
    config: _Config
    inputs: _Inputs
    result: _Result
    decides: _Decides


class _MetricsLine(_Part):
    step: Count
    epoch: Number | None = None
    loss: Measured | None = None
    eval_loss: Measured = 0.0
    num_input_tokens_seen: Number | None = None
    train_runtime: Number | None = None
    train_tokens_per_second: Number | None = None
    step_seconds: Number = 0.0
    dataset: str = ""
    digest: str = ""
    metrics: list[_Metric] = []
    x: Number = 0.0
    y: Number = 0.0
    train_loss: Measured | None = None
    test_loss: Measured | None = None
    mark: str | None = None


class _Sample(_Part):
    id: str
    scores: dict[str, Measured]
    weights: dict[str, Annotated[Number, Field(ge=0)]] = {}


def check_contents(record: RunRecord) -> None:
    """Checks types and bounds of all used parts of a record.

    Raises:
        pydantic.ValidationError: A part is not valid.
    """
    _Record.model_validate({name: getattr(record, name) for name in _Record.model_fields})


def metrics_line(text: bytes) -> dict[str, Any]:
    """Parses a line of a `metrics.jsonl`.

    Raises:
        ValueError: The line is not valid.
    """
    return _line(text, _MetricsLine)


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, without one truncated by a kill.

    Raises:
        RunError: The file cannot be read, or a line is not valid.
    """
    return _lines(path, _MetricsLine, "metrics", is_growing=True)


def sample_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of an evaluation's samples file.

    Raises:
        RunError: The file cannot be read, or a line is not valid.
    """
    return _lines(path, _Sample, "samples")


def first_fault(error: Exception) -> str:
    """Describes the first fault of a record or a file in one line.

    Args:
        error: The error raised on reading it.
    """
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        said = fault["msg"].partition(" or instance of ")[0]  # names a class of this module
        text = f"{place}: {said}" if place else said
    elif isinstance(error, KeyError):
        text = f"{error.args[0]} is missing"
    else:
        text = error.message if isinstance(error, MftError) else str(error).partition("\n")[0]
    line = visible_line(text)
    return line if len(line) <= _LONGEST_FAULT else f"{line[:_LONGEST_FAULT]}…"


def told(error: Exception, otherwise: str) -> str:
    """Returns one line for a list of problems, the same for all problems caused by the same file.

    Args:
        error: The error raised on reading it.
        otherwise: What could not be done, if the error does not name a file.
    """
    if isinstance(error, RunError) and error.path is not None:
        return f"{visible_line(error.path)}: {first_fault(error)}"
    return f"{otherwise}: {first_fault(error)}"


def _lines(path: Path, kind: type[_Part], what: str, *, is_growing: bool = False) -> list[dict[str, Any]]:
    place = f"{path.parent.name}/{path.name}"
    try:
        # Only \n ends a line; a text may contain any other line separator.
        *lines, rest = read_regular(path).split(b"\n")
    except OSError as error:
        raise RunError(f"The {what} in {place} cannot be read.", path=path, actual=repr(error)) from error
    found = []
    for number, text in enumerate([*lines, *([rest] if rest and not is_growing else [])], start=1):
        try:
            found.append(_line(text, kind))
        except ValueError as error:
            reason = first_fault(error)
            raise RunError(f"The {what} in {place}:{number} cannot be read: {reason}.", path=path) from error
    return found


def _line(text: bytes, kind: type[_Part]) -> dict[str, Any]:
    document = from_json(text)
    kind.model_validate(document)
    return dict(document)
