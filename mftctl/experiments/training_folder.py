"""The folder with the state of one training run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mftctl.files.atomic import write_text
from mftctl.files.regular import read_regular
from mftctl.runtime.processes import is_first

if TYPE_CHECKING:
    from mftctl.experiments.measured_lines import MetricsLine


class MetricsObserver(Protocol):
    """Receives what the trainings of a run log."""

    def logged(self, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Receives a line that was logged.

        Args:
            folder: The training's folder.
            metrics: The line.
        """

    def rewound(self, folder: Path, kept: Sequence[Mapping[str, Any]], dropped: Sequence[Mapping[str, Any]]) -> None:
        """Receives the lines logged before a training starts or is resumed.

        Args:
            folder: The training's folder.
            kept: The lines up to the step at which it is resumed.
            dropped: The lines after it, which were dropped because their steps are repeated.
        """


@dataclass(frozen=True, slots=True)
class TrainingFolder:
    """The folder with the state of one training run: `checkpoints/` and `metrics.jsonl`.

    Attributes:
        folder: A run folder, or the part of it for one of several trainings.
        resume_command: The command that resumes it.
        observer: Told of all lines that are logged or dropped; None for nobody.
    """

    folder: Path
    resume_command: str
    observer: MetricsObserver | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder for training states."""
        return self.folder / "checkpoints"

    def latest_checkpoint(self) -> Path | None:
        """Returns the latest complete checkpoint; None if there is none.

        The trainer's state is the last file of a checkpoint to be written.
        """
        for path in sorted(self.checkpoints.glob("checkpoint-*"), key=step_of, reverse=True):
            try:
                json.loads(read_regular(path / "trainer_state.json"))
            except (OSError, ValueError):
                continue
            return path
        return None

    def remove_checkpoints_after(self, step: int) -> None:
        """Removes checkpoints after `step` left by a killed process; training writes them again."""
        if not is_first():
            return
        for path in self.checkpoints.glob("checkpoint-*"):
            if step_of(path) > step:
                shutil.rmtree(path)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if not is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")
        if self.observer is not None:
            self.observer.logged(self.folder, metrics)

    def metrics(self) -> list[MetricsLine]:
        """Returns the lines of `metrics.jsonl`, without one truncated by a kill; none before the first is written.

        Raises:
            RunError: The file is damaged.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        from mftctl.experiments.run_contents import metrics_lines

        return metrics_lines(path)

    def rewind(self, step: int) -> None:
        """Drops log lines after `step`, as a resumed training run repeats these steps."""
        if not is_first():
            return
        lines = self.metrics()
        kept = [line.document() for line in lines if line.step <= step]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        if self.observer is not None:
            self.observer.rewound(self.folder, kept, [line.document() for line in lines if line.step > step])


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
