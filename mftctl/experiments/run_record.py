"""The record of a run, as in its `run.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mftctl.errors import RunError

FORMAT_VERSION = 2
"""Of what is written. Records of version 1 do not name theirs; they have the same keys."""

Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class RunRecord:
    """The contents of a `run.json`.

    Attributes:
        command: The mftctl command.
        status: `finished` only where the result is complete.
        started: UTC time of the first start, ISO 8601.
        config: The resolved configuration, as in `config.yaml`.
        recipe: Name or path of the recipe that was used, None without one.
        inputs: What the command worked on: model, mask, digests, the runs they came from.
        output: Where the user wants the result besides the run folder, None for nowhere else.
        result: The command's result as it is stored, which `Run.result` reads; empty until it is finished.
        seconds: Working time, over all resumptions.
        versions: Versions of Python and the packages that decide figures, and a digest of mftctl's own code.
        stage: Name of the stage of an experiment, None for a command on its own.
        digest: Digest of everything that decides the result, to recognise finished stages; None outside `run`.
        decides: What that digest is of, to say what has changed; empty outside `run`.
        worker: Host and process id of the command that works on it, or worked on it last.
        processes: How many it was started with.
        error: The message a failed run ended with.
        device: What it computes on: `name`, whether fp32 is `tf32`, whether it is `deterministic`, and the kernels of
            `attention` that its model has.
        format_version: Of the record; 1 where it does not name one.
    """

    command: str
    status: Status
    started: str
    config: dict[str, Any]
    recipe: str | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    output: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    stage: str | None = None
    digest: str | None = None
    decides: dict[str, Any] = field(default_factory=dict)
    worker: str | None = None
    processes: int = 1
    error: str | None = None
    device: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1


def told_format(content: bytes) -> int:
    """The format version that a file names, whatever else is in it; 1 where it names none.

    Args:
        content: Of a `run.json`.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return 1
    version = document.get("format_version") if isinstance(document, dict) else None
    return version if isinstance(version, int) else 1


def require_known_format(version: int, path: Path) -> None:
    """Nothing, if a record's format is not newer than what this version of mftctl writes.

    Args:
        version: Of the format.
        path: Of the record.

    Raises:
        RunError: It is.
    """
    if version > FORMAT_VERSION:
        raise RunError(
            "This run was written by a newer version of mftctl.",
            path=path,
            key="format_version",
            expected=f"at most {FORMAT_VERSION}",
            actual=version,
            hint="pip install --upgrade mftctl",
        )
