"""How far the runs of a runs folder have come, read while others write it.

Thousands of finished runs cost one look at the time of their record each; of a metrics file each line is read once.
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
from mftctl.experiments.recipe import TrainingOptions
from mftctl.experiments.results import Outcome
from mftctl.experiments.run_contents import metrics_line
from mftctl.experiments.run_folder import Run, load_run, run_folders
from mftctl.experiments.run_record import RunRecord
from mftctl.files.atomic import is_alive
from mftctl.files.regular import open_regular
from mftctl.training.schedule import total_steps

ProgressStatus = Literal["running", "finished", "interrupted", "failed", "killed"]

_SECTIONS = {"fft": "fft", "mask-train": "mask_train", "probe": "mask_train"}


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far one run has come.

    Attributes:
        run: The run's name.
        command: The mftctl command.
        stage: Name of the experiment's stage, None for a command on its own.
        seed: Of the configuration.
        status: As in the record, but `killed` where it says `running` and the process is gone from this machine; of
            other machines that cannot be known.
        part: Of a probe, the layers whose mask is learned now.
        step: Optimizer steps done; None where nothing is trained, or not yet.
        steps: Of how many; None where that is not known.
        train_loss: Of the last step, per answer token.
        validation_loss: The last one.
        best_validation_loss: The lowest so far.
        tokens_per_second: Speed of the training.
        seconds: Working time so far, over all resumptions.
        seconds_left: Estimated from the steps so far; None where steps or their number are not known.
        written: When its record or metrics were last written, seconds since 1970.
        error: First line of the message that a failed run ended with.
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
    """Looks at a runs folder again and again.

    Attributes:
        root: The runs folder, which may be made later.
        unreadable: Names of the folders whose record could not be read the last time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unreadable: tuple[str, ...] = ()
        self._known: dict[str, _Followed] = {}

    def refresh(self) -> list[RunProgress]:
        """How far each run has come by now, oldest first."""
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
    """How far each run of a runs folder has come, oldest first, seen once."""
    return Following(root).refresh()


@dataclass(frozen=True, slots=True)
class _Stamp:
    """Tells a record from the one that takes its place."""

    inode: int
    size_bytes: int
    written: float


def _stamp(path: Path) -> _Stamp:
    found = os.stat(path)  # noqa: PTH116 - thousands of them at each refresh
    return _Stamp(found.st_ino, found.st_size, found.st_mtime)


class _Followed:
    """A run as its record was when it was last read, and its metrics as far as they have been read."""

    def __init__(self, run: Run, stamp: _Stamp, metrics: dict[Path, _Metrics]) -> None:
        self.stamp = stamp
        self.metrics = metrics
        self._run = run
        self._settled = None if run.record.status == "running" else _settled(run, stamp.written)

    def progress(self) -> RunProgress:
        """How far it has come by now."""
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
            status="killed" if killed else "running",
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
    """Of a run that nothing works on, from its record alone."""
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
    """What the lines of a growing `metrics.jsonl` say; each is read once, until the file is another one."""

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
        """Takes in what has been written since; a line that is not whole yet waits for the next time."""
        try:
            with open_regular(self._path) as stream:
                found = os.fstat(stream.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset_bytes:
                    self._start_again(found.st_ino)  # a resumed training has dropped the steps that it does again
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
            return  # half of a line that a kill left, with the next one behind it
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
        """The seconds of a step, over those since the training was begun or resumed."""
        if seconds is None:
            return
        if self._first is None or seconds < self._first[1]:
            self._first = (step, seconds)
            self.seconds_a_step = seconds if step == 1 else None
        elif step > self._first[0]:
            self.seconds_a_step = (seconds - self._first[1]) / (step - self._first[0])


def _training_folder(run: Run) -> tuple[str | None, Path]:
    """Where a run trains now; for a probe, the layers and the folder of the group that has no outcome yet."""
    if run.record.command == "probe":
        groups = run.folder / "groups"
        try:
            names = os.listdir(groups)  # noqa: PTH208 - the names are all that is wanted
        except OSError:
            names = []
        for name in names:
            if (groups / name / "metrics.jsonl").exists() and not (groups / name / "outcome.json").exists():
                return name, groups / name
    return None, run.folder


def _planned_steps(record: RunRecord) -> int | None:
    """The steps of a training; None where nothing is trained, or the records are not counted yet."""
    section, records = _SECTIONS.get(record.command), record.inputs.get("train_records")
    if section is None or records is None:
        return None
    config = dict(record.config.get(section, {}))
    probe = record.config.get("probe", {}) if record.command == "probe" else {}
    config |= {"epochs": probe["epochs"]} if "epochs" in probe else {}
    if (config.get("method") in ("random", "magnitude", "drop") and section == "mask_train") or probe.get("fast"):
        return None
    known = {key: value for key, value in config.items() if key in TrainingOptions.model_fields}
    try:
        return total_steps(int(records), TrainingOptions.model_validate(known), record.processes)
    except ValidationError:  # of another version
        return None


def _is_gone(record: RunRecord) -> bool:
    """Whether the process that worked on a run ran on this machine and has ended."""
    host, _, process = (record.worker or "").rpartition(":")
    return host == platform.node() and process.isdecimal() and not is_alive(int(process))
