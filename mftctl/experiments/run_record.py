"""The record of a run, as in its `run.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from mftctl.errors import RunError

STAGE_BEFORE = "the stage before"
"""Key of `decides` with the digest of the job that a job builds on, or those of several to choose from."""

FORMAT_VERSION = 2
"""Format version written. Records of version 1 do not state theirs; their keys are the same."""


class RunStatus(StrEnum):
    """How far a run has come."""

    RUNNING = "running"
    """Worked on, or killed without a chance to say so."""
    FINISHED = "finished"
    """Its result is complete."""
    INTERRUPTED = "interrupted"
    """Stopped; it can be resumed."""
    FAILED = "failed"
    """Ended by an error that would come again."""


@dataclass(frozen=True)
class RunRecord:
    """The contents of a `run.json`.

    Attributes:
        command: The mftctl command.
        status: How far it has come.
        started: The UTC time of the first start, ISO 8601.
        config: The resolved configuration, as in `config.yaml`.
        recipe: The name or path of the recipe, None without one.
        inputs: The inputs of the command as stored, read by the classes of `run_inputs`.
        output: Where the user wants the result in addition to the run folder, or None.
        result: The result of the command as stored, read by `Run.result`; empty until it is finished.
        seconds: The working time, including resumed parts.
        versions: Versions of Python and of packages that affect results, and a digest of mftctl's own code.
        stage: The stage name in an experiment, None for a single command.
        digest: Digest of everything that determines the result, to recognise finished stages; None outside `run`.
        decides: The content of that digest, to report what has changed; empty outside `run`.
        worker: Host and process id of the command that works on the run or did so last.
        processes: The number of processes it was started with.
        error: The error message of a failed run.
        device: The device it computes on: `name`, whether fp32 is `tf32`, whether it is `deterministic`, and the
            `attention` kernels of its model.
        format_version: Format version of the record; 1 if not stated.
    """

    command: str
    status: RunStatus
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

    @property
    def chose_its_model(self) -> bool:
        """True if validation chose the model among several jobs, as for a control."""
        return isinstance(self.decides.get(STAGE_BEFORE), list)


def told_format(content: bytes) -> int:
    """Returns the format version stated in a file, even if the file is not valid; 1 if not stated.

    Args:
        content: Content of a `run.json`.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return 1
    version = document.get("format_version") if isinstance(document, dict) else None
    return version if isinstance(version, int) else 1


def require_known_format(version: int, path: Path) -> None:
    """Checks that this version of mftctl can read a record's format.

    Args:
        version: Format version of the record.
        path: Path of the record.

    Raises:
        RunError: The format is newer.
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
