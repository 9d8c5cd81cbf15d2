"""Checks of a run's record, and reading of its lines and parts, with errors that name the faulty value.

Only keys that are used are checked. A missing key is not an error here, since earlier versions and unfinished runs
lack some; code that needs it reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import from_json

from mftctl.errors import MftError, RunError
from mftctl.experiments.measured_lines import MetricsLine, Sample
from mftctl.experiments.result_kinds import read_result
from mftctl.experiments.results import Outcome
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.value_types import LARGEST_COUNT, Count, Number, Part, Several
from mftctl.files.regular import read_regular
from mftctl.text import visible_line

if TYPE_CHECKING:
    from mftctl.experiments.run_record import RunRecord

PartKind = TypeVar("PartKind", bound=Part)

_LONGEST_FAULT = 300
_Seed = Annotated[int, Field(ge=-LARGEST_COUNT, le=LARGEST_COUNT)]
_Worker = Annotated[str, Field(max_length=1_000)]


class _DataPart(Part):
    path: str
    count: Count | None = None


class _Training(Part):
    method: str = ""
    keep: str | None = None
    batch_size: Several = 1
    grad_accum_steps: Count | None = None
    global_batch_size: Count | None = None
    data_fraction: Number | None = None


class _Probing(Part):
    groups: list[int | str] | None = None
    data_fraction: Number | None = None
    epochs: Number | None = None
    fast: bool | None = None


class _Evaluating(Part):
    predictions: Any = None


class _Config(Part):
    seed: _Seed = 0
    data: list[str | _DataPart] = Field(default_factory=list)
    val_data: list[str | _DataPart] = Field(default_factory=list)
    revision: str | None = None
    fft: _Training = _Training()
    mask_train: _Training = _Training()
    probe: _Probing = _Probing()
    eval: _Evaluating = _Evaluating()


class _Decides(Part):
    files: dict[str, str | None] = Field(default_factory=dict)


class _Record(Part):
    seconds: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    processes: Annotated[int, Field(ge=1, le=1_000_000)]
    worker: _Worker | None
    config: _Config
    inputs: RunInputs
    result: Outcome
    decides: _Decides
    format_version: Several


def check_contents(record: RunRecord) -> None:
    """Checks types and bounds of all used parts of a record.

    Raises:
        ValueError: A part is not valid.
    """
    _Record.model_validate({name: getattr(record, name) for name in _Record.model_fields})
    try:
        read_result(record.command, record.result)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        # A null counts as a missing value: code that needs it reports it.
        fault = next((fault for fault in faults if fault["type"] != "missing" and fault["input"] is not None), None)
        if fault is not None:
            raise ValueError(_fault_text(("result", *fault["loc"]), fault["msg"])) from error


def read_part(path: Path, kind: type[PartKind]) -> PartKind:
    """Returns a part of a result that is stored in a separate file.

    Raises:
        RunError: The file cannot be read.
    """
    try:
        return kind.model_validate_json(read_regular(path))
    except (OSError, ValueError) as error:
        raise RunError("This part of a result cannot be read.", path=path, actual=first_fault(error)) from error


def metrics_line(text: bytes) -> MetricsLine:
    """Parses a line of a `metrics.jsonl`.

    Raises:
        ValueError: The line is not valid.
    """
    return _line(text, MetricsLine)


def metrics_lines(path: Path) -> list[MetricsLine]:
    """Returns the lines of a `metrics.jsonl`, without one truncated by a kill.

    Raises:
        RunError: The file cannot be read, or a line is not valid.
    """
    return _lines(path, MetricsLine, "metrics", is_growing=True)


def sample_lines(path: Path) -> list[Sample]:
    """Returns the lines of an evaluation's samples file.

    Raises:
        RunError: The file cannot be read, or a line is not valid.
    """
    return _lines(path, Sample, "samples")


def first_fault(error: Exception) -> str:
    """Describes the first fault of a record or a file in one line.

    Args:
        error: The error raised on reading it.
    """
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        text = _fault_text(fault["loc"], fault["msg"])
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


def _fault_text(loc: Sequence[int | str], message: str) -> str:
    place = ".".join(map(str, loc))
    if message == "Field required":
        return f"{loc[-1]} is missing"
    said = message.partition(" or instance of ")[0]  # the rest names a class of mftctl
    return f"{place}: {said}" if place else said


def _lines(path: Path, kind: type[PartKind], what: str, *, is_growing: bool = False) -> list[PartKind]:
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


def _line(text: bytes, kind: type[PartKind]) -> PartKind:
    return kind.model_validate(from_json(text))
