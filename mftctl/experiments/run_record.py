"""The record of a run, as in its `run.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass

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
        result: The command's result; empty until it is finished.
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
