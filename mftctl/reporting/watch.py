"""Progress of the runs in a runs folder, read while other processes write it.

A finished run costs one `stat` of its record per refresh, and each line of a metrics file is read only once.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from mftctl.errors import MftError
from mftctl.experiments.results import Outcome
from mftctl.experiments.run_contents import metrics_line
from mftctl.experiments.run_folder import Run, load_run, run_folders
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.run_record import RunRecord, RunStatus
from mftctl.experiments.training_options import TrainingOptions
from mftctl.files.atomic import is_alive
from mftctl.files.regular import open_regular
from mftctl.training.schedule import total_steps

ProgressStatus = RunStatus | Literal["killed"]

_SECTIONS = {"fft": "fft", "mask-train": "mask_train", "probe": "mask_train"}


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Progress of one run.

    Attributes:
        run: The run's name.
        command: The mftctl command.
        stage: Name of the experiment's stage; None for a stand-alone command.
        seed: The configured seed.
        status: The recorded status, but `killed` if it is `running` and the process no longer exists on this machine
            (unknown for other machines).
        part: Layers whose mask a probe is learning now.
        step: Optimizer steps done; None if nothing is trained or training has not started.
        steps: Planned optimizer steps; None if unknown.
        train_loss: Loss of the last step, per answer token.
        validation_loss: The last validation loss.
        best_validation_loss: The lowest validation loss so far.
        tokens_per_second: Training speed.
        seconds: Working time so far, over all resumptions.
        seconds_left: Estimate from the steps so far; None if the steps done or planned are unknown.
        written: Time of the last write to its record or metrics, in seconds since 1970.
        error: First line of the error message of a failed run.
    """

    run: str
    command: str
    stage: str | None
    seed: int
    status: ProgressStatus
    part: str | None
    step: int | None
    steps: int | None
    train_loss: float | None
    validation_loss: float | None
    best_validation_loss: float | None
    tokens_per_second: float | None
    seconds: float
    seconds_left: float | None
    written: float
    error: str | None


class Following:
    """Watches a runs folder.

    Attributes:
        root: The runs folder, which may not exist yet.
        unreadable: Names of the folders whose record could not be read at the last refresh.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unreadable: tuple[str, ...] = ()
        self._known: dict[str, _Followed] = {}

    def refresh(self) -> list[RunProgress]:
        """Returns the current progress of each run, oldest first."""
        known: dict[str, _Followed] = {}
        found, unreadable = [], []
        for folder in run_folders(self.root):
            try:
                followed = known[folder.name] = self._look_at(folder)
                found.append(followed.progress())
            except (OSError, MftError, KeyError, TypeError, ValueError, AttributeError):
                unreadable.append(folder.name)
        self._known, self.unreadable = known, tuple(unreadable)
        return found

    def _look_at(self, folder: Path) -> _Followed:
        stamp = _stamp(folder / "run.json")
        followed = self._known.get(folder.name)
        if followed is not None and followed.stamp == stamp:
            return followed
        return _Followed(load_run(folder), stamp, {} if followed is None else followed.metrics)


def follow(root: Path) -> list[RunProgress]:
    """Returns the progress of each run in a runs folder once, oldest first."""
    return Following(root).refresh()


@dataclass(frozen=True, slots=True)
class _Stamp:
    """Identifies one version of a record file."""

    inode: int
    size_bytes: int
    written: float


def _stamp(path: Path) -> _Stamp:
    found = os.stat(path)  # noqa: PTH116 - called thousands of times per refresh
    return _Stamp(found.st_ino, found.st_size, found.st_mtime)


class _Followed:
    """A run with its record and metrics as last read."""

    def __init__(self, run: Run, stamp: _Stamp, metrics: dict[Path, _Metrics]) -> None:
        self.stamp = stamp
        self.metrics = metrics
        self._run = run
        self._settled = None if run.record.status == RunStatus.RUNNING else _settled(run, stamp.written)

    def progress(self) -> RunProgress:
        """The current progress."""
        return self._settled or self._working()

    def _working(self) -> RunProgress:
        record = self._run.record
        part, folder = _training_folder(self._run)
        metrics = self.metrics.setdefault(folder / "metrics.jsonl", _Metrics(folder / "metrics.jsonl"))
        metrics.refresh()
        steps = _planned_steps(record)
        left = None
        if steps is not None and metrics.step is not None and metrics.seconds_a_step is not None:
            left = max(0, steps - metrics.step) * metrics.seconds_a_step
        killed = _is_gone(record)
        written = max(self.stamp.written, metrics.written)
        seen = written if killed else time.time()
        return RunProgress(
            run=self._run.name,
            command=record.command,
            stage=record.stage,
            seed=int(record.config.get("seed", 0)),
            status="killed" if killed else RunStatus.RUNNING,
            part=part,
            step=metrics.step,
            steps=steps,
            train_loss=metrics.train_loss,
            validation_loss=metrics.validation_loss,
            best_validation_loss=metrics.best_validation_loss,
            tokens_per_second=metrics.tokens_per_second,
            seconds=record.seconds + max(0.0, seen - self.stamp.written),
            seconds_left=None if killed else left,
            written=written,
            error=None,
        )


def _settled(run: Run, written: float) -> RunProgress:
    """Progress of a run that is not being worked on, from its record alone."""
    record = run.record
    result = run.result(Outcome)
    return RunProgress(
        run=run.name,
        command=record.command,
        stage=record.stage,
        seed=int(record.config.get("seed", 0)),
        status=record.status,
        part=None,
        step=result.steps,
        steps=result.steps,
        train_loss=None,
        validation_loss=result.last_loss,
        best_validation_loss=result.best_loss,
        tokens_per_second=None,
        seconds=record.seconds,
        seconds_left=None,
        written=written,
        error=record.error.split("\n")[0] if record.error else None,
    )


class _Metrics:
    """Reads a growing `metrics.jsonl`, each line once, and restarts when the file is replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start_again(None)

    def _start_again(self, inode: int | None) -> None:
        self.step: int | None = None
        self.train_loss: float | None = None
        self.validation_loss: float | None = None
        self.best_validation_loss: float | None = None
        self.tokens_per_second: float | None = None
        self.seconds_a_step: float | None = None
        self.written = 0.0
        self._inode = inode
        self._offset_bytes = 0
        self._first: tuple[int, float] | None = None

    def refresh(self) -> None:
        """Reads the lines added since the last call; an incomplete last line is left for the next one."""
        try:
            with open_regular(self._path) as stream:
                found = os.fstat(stream.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset_bytes:
                    self._start_again(found.st_ino)  # a resumed training run dropped the steps that it repeats
                self.written = found.st_mtime
                stream.seek(self._offset_bytes)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    self._offset_bytes += len(line)
                    self._take(line)
        except FileNotFoundError:
            self._start_again(None)

    def _take(self, text: bytes) -> None:
        try:
            line = metrics_line(text)
        except ValueError:
            return  # a line cut off by a kill, joined with the next one
        self.step = line.step
        if line.eval_loss is not None:
            loss = self.validation_loss = line.eval_loss
            best = self.best_validation_loss
            self.best_validation_loss = loss if best is None else min(best, loss)
        if line.loss is not None:
            self.train_loss = line.loss
            self.tokens_per_second = line.train_tokens_per_second
            self._take_time(self.step, line.train_runtime)

    def _take_time(self, step: int, seconds: float | None) -> None:
        """Updates the seconds per step since training was started or resumed."""
        if seconds is None:
            return
        if self._first is None or seconds < self._first[1]:
            self._first = (step, seconds)
            self.seconds_a_step = seconds if step == 1 else None
        elif step > self._first[0]:
            self.seconds_a_step = (seconds - self._first[1]) / (step - self._first[0])


def _training_folder(run: Run) -> tuple[str | None, Path]:
    """The folder a run is training in; for a probe, also the layers of the group without an outcome yet."""
    if run.record.command == "probe":
        groups = run.folder / "groups"
        try:
            names = os.listdir(groups)  # noqa: PTH208 - only the names are needed
        except OSError:
            names = []
        for name in names:
            if (groups / name / "metrics.jsonl").exists() and not (groups / name / "outcome.json").exists():
                return name, groups / name
    return None, run.folder


def _planned_steps(record: RunRecord) -> int | None:
    """The planned training steps; None if nothing is trained or the records are not counted yet."""
    section, records = _SECTIONS.get(record.command), RunInputs.read(record.inputs).train_records
    if section is None or records is None:
        return None
    config = dict(record.config.get(section, {}))
    probe = record.config.get("probe", {}) if record.command == "probe" else {}
    config |= {"epochs": probe["epochs"]} if "epochs" in probe else {}
    if (config.get("method") in ("random", "magnitude", "drop") and section == "mask_train") or probe.get("fast"):
        return None
    known = {key: value for key, value in config.items() if key in TrainingOptions.model_fields}
    try:
        return total_steps(records, TrainingOptions.model_validate(known), record.processes)
    except ValidationError:  # written by a different version
        return None


def _is_gone(record: RunRecord) -> bool:
    """True if the run's process was on this machine and has ended."""
    host, _, process = (record.worker or "").rpartition(":")
    return host == platform.node() and process.isdecimal() and not is_alive(int(process))
