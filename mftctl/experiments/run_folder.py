"""Run folders: what was done, with what, and what came out of it.

`runs/<number>-<command>/` holds `run.json` (the record, written whole or not at all), `config.yaml` (the resolved
configuration, readable as a recipe), `metrics.jsonl`, `checkpoints/` and the command's outputs.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from mftctl.errors import RunError
from mftctl.experiments.fingerprints import source_digest
from mftctl.experiments.run_record import FORMAT_VERSION, RunRecord, require_known_format, told_format
from mftctl.experiments.yaml_numbers import NumberDumper
from mftctl.files.atomic import is_alive, write_text
from mftctl.files.names import is_recordable, require_recordable, shown_name
from mftctl.files.regular import read_regular
from mftctl.files.temporary import CONTENT, remove_leftovers, temporary_folder
from mftctl.runtime.processes import is_first, world_size
from mftctl.text import command_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from mftctl.experiments.measured_lines import MetricsLine
    from mftctl.experiments.results import Result

ResultKind = TypeVar("ResultKind", bound="Result")

_PACKAGES = ("mftctl", "torch", "transformers", "datasets", "accelerate", "safetensors", "lm_eval")
_NUMBERED = re.compile(r"\d+-")
SOURCE = "mftctl source"
"""Name among the versions of the digest of mftctl's own code."""

OPEN_RUNS: dict[Path, Run] = {}
"""The runs that this process works on."""


@dataclass(frozen=True, slots=True)
class TrainingFolder:
    """Where one training keeps its state: `checkpoints/` and `metrics.jsonl`.

    Attributes:
        folder: A run folder, or the part of it that belongs to one of several trainings.
        resume_command: What to type to resume it.
    """

    folder: Path
    resume_command: str

    @property
    def checkpoints(self) -> Path:
        """Where training states go."""
        return self.folder / "checkpoints"

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        if not is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[MetricsLine]:
        """The lines of `metrics.jsonl`; none before the first, and not one that a kill has cut short.

        Raises:
            RunError: The file is damaged.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        from mftctl.experiments.run_contents import metrics_lines

        return metrics_lines(path)

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`, since a resumed training will do these steps again."""
        if not is_first():
            return
        kept = [line.document() for line in self.metrics() if line.step <= step]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


class Run:
    """One run folder, open for writing.

    Attributes:
        folder: The folder.
        record: What `run.json` says.
        resumed_with: The options that a command which resumes it is given, such as `--processes 2`.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.record = record
        self.resumed_with: tuple[str, ...] = ()
        self._clock_start_seconds = time.monotonic()

    @property
    def name(self) -> str:
        """The folder's name, such as `003-mask-train`."""
        return self.folder.name

    @property
    def started(self) -> datetime:
        """When it was begun, which no resumption changes: what chat templates take for the present.

        Raises:
            RunError: The record has no time there.
        """
        try:
            return datetime.fromisoformat(self.record.started)
        except ValueError as error:
            raise RunError(
                "The record of this run does not say when it was begun.",
                path=self.folder / "run.json",
                key="started",
                actual=self.record.started,
            ) from error

    @property
    def is_worked_on(self) -> bool:
        """Whether another process of this machine works on it now; of other machines that cannot be known."""
        host, _, process = (self.record.worker or "").rpartition(":")
        if self.record.status != "running" or host != platform.node() or not process.isdecimal():
            return False
        return int(process) != os.getpid() and is_alive(int(process))

    def go_on(self) -> None:
        """Takes up a run that was stopped, killed or failed.

        Raises:
            RunError: Another process works on it.
        """
        self.record = load_run(self.folder).record
        self._clock_start_seconds = time.monotonic()
        if self.is_worked_on:
            raise RunError(
                "Another process works on this run.",
                path=self.folder,
                actual=f"process {self.record.worker}",
                hint="wait for it, or stop it first",
            )
        self.update(status="running", worker=_worker(), versions=_then(self.record.versions, _versions()))

    def look_again(self) -> None:
        """Takes over what processes that worked for this one have put into the record."""
        self.record = replace(load_run(self.folder).record, seconds=self.record.seconds)

    @property
    def training(self) -> TrainingFolder:
        """Where this run's training keeps its state."""
        return TrainingFolder(self.folder, self.resume_command)

    @property
    def resume_command(self) -> str:
        """What to type to resume it, if it is the newest of its command."""
        words = (self.record.command, "--resume", *self.resumed_with)
        return command_line("mftctl", *words, runs=self.folder.parent)

    def update(self, **changes: Any) -> None:
        """Replaces fields of the record and rewrites `run.json`."""
        now_seconds = time.monotonic()
        seconds = self.record.seconds + now_seconds - self._clock_start_seconds
        self._clock_start_seconds = now_seconds
        self.record = replace(self.record, seconds=round(seconds, 3), format_version=FORMAT_VERSION, **changes)
        if self.record.status == "running":
            OPEN_RUNS[self.folder] = self
        else:
            OPEN_RUNS.pop(self.folder, None)
        if is_first():
            write_text(self.folder / "run.json", _to_json(self.record))

    def result(self, kind: type[ResultKind]) -> ResultKind:
        """What came out, or that part of it which a kind of result asks for.

        Raises:
            RunError: The record lacks something of it.
        """
        try:
            return kind.read(self.record.result)
        except ValueError as error:
            from mftctl.experiments.run_contents import first_fault

            fault = first_fault(error)
            raise RunError(
                f"The record of this run is not complete: {fault}.", path=self.folder / "run.json"
            ) from error

    def finish(self, result: Result) -> None:
        """Stores the result; from now on other commands build on this run, and nothing goes on from its checkpoints."""
        self.update(status="finished", result=result.document(), error=None)
        if is_first():
            shutil.rmtree(self.training.checkpoints, ignore_errors=True)


def create_run(
    root: Path,
    command: str,
    config: Mapping[str, Any],
    *,
    recipe: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    output: Path | None = None,
    stage: str | None = None,
    digest: str | None = None,
    decides: Mapping[str, Any] | None = None,
    processes: int | None = None,
) -> Run:
    """A new run folder with the next free number.

    Args:
        root: The runs folder, made where it is missing.
        command: The mftctl command.
        config: The resolved configuration, as plain data.
        recipe: Name or path of the recipe.
        inputs: What the command works on.
        output: Where the user wants the result besides the run folder.
        stage: Name of the experiment's stage.
        digest: Digest of everything that decides the result.
        decides: What that digest is of.
        processes: How many will work on it; None for those that there are.

    Raises:
        RunError: The folder cannot be made.
        ConfigError: A path, or a text of the configuration, is not UTF-8.
    """
    record = RunRecord(
        command=command,
        status="running",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        config=dict(config),
        recipe=recipe,
        inputs=dict(inputs or {}),
        output=None if output is None else str(output.absolute()),
        versions=_versions(),
        stage=stage,
        digest=digest,
        decides=dict(decides or {}),
        worker=_worker(),
        processes=processes or world_size(),
        format_version=FORMAT_VERSION,
    )
    places = (root, output, *((inputs or {}).get(name) for name in ("model", "mask", "origin")))
    require_recordable(places, asdict(record))
    try:
        folder = _new_folder(root, record)
    except OSError as error:
        raise RunError(
            "The run folder cannot be written.", path=root, actual=error.strerror or error, hint="--runs DIR"
        ) from error
    OPEN_RUNS[folder] = run = Run(folder, record)
    return run


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, SOURCE: source_digest()}


def _to_json(record: RunRecord) -> str:
    document = asdict(record)
    return json.dumps({"format_version": document.pop("format_version"), **document}, indent=2) + "\n"


def _then(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """The versions of a run that goes on: `A, then B` where it goes on with another."""
    found = dict(before)
    for name, newest in now.items():
        earlier = before.get(name, "not recorded")
        found[name] = earlier if earlier.split(", then ")[-1] == newest else f"{earlier}, then {newest}"
    return found


def _to_yaml(config: Mapping[str, Any]) -> str:
    return yaml.dump(config, Dumper=NumberDumper, sort_keys=False, allow_unicode=True)


def _worker() -> str:
    return f"{platform.node()}:{os.getpid()}"


def load_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        RunError: The folder has no readable `run.json`, or what is in it is of another type than it should be.
    """
    path = folder / "run.json"
    if not is_recordable(folder.name):
        raise RunError("The name of this run folder is not UTF-8.", path=shown_name(folder), hint="rename or remove it")
    from mftctl.experiments.run_contents import check_contents, first_fault

    content = b""
    try:
        content = read_regular(path)
        record = _record_reader().validate_json(content)
    except (OSError, ValueError) as error:
        require_known_format(told_format(content), path)
        raise RunError(
            "This is not a readable run folder.",
            path=path,
            expected=f"a JSON record with {', '.join(item.name for item in fields(RunRecord)[:4])}",
            actual=first_fault(error),
        ) from error
    require_known_format(record.format_version, path)
    try:
        check_contents(record)
    except ValueError as error:
        raise RunError(f"This run's record is not sound: {first_fault(error)}.", path=path) from error
    return Run(folder, record)


@cache
def _record_reader() -> TypeAdapter[RunRecord]:
    from pydantic import TypeAdapter

    return TypeAdapter(RunRecord)


def run_folders(root: Path) -> list[Path]:
    """The run folders below `root`, whatever is in them, oldest first; none where there is no such folder."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if _NUMBERED.match(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [root / name for name in sorted(names, key=lambda name: (int(name.split("-")[0]), name))]


def list_runs(root: Path) -> tuple[list[Run], list[RunError]]:
    """All runs below `root`, oldest first, and an error for each folder that cannot be read."""
    runs, errors = [], []
    for folder in run_folders(root):
        try:
            runs.append(load_run(folder))
        except RunError as error:
            errors.append(error)
    return runs, errors


def newest_run(root: Path, *commands: str, unfinished: bool = False) -> Run | None:
    """The newest finished run of one of these commands, or the newest that was stopped or killed; None if none is.

    A damaged run folder is passed over: an older one may be sound.
    """
    wanted = ("running", "interrupted") if unfinished else ("finished",)
    for run in reversed(list_runs(root)[0]):
        if run.record.command in commands and run.record.status in wanted:
            return run
    return None


def _new_folder(root: Path, record: RunRecord) -> Path:
    """A folder with record and configuration under the next free number; there is none without them at any time."""
    root.mkdir(parents=True, exist_ok=True)
    _tidy_up(root)
    with temporary_folder(root) as parent:
        temporary = parent / CONTENT
        temporary.mkdir()
        temporary.chmod(root.stat().st_mode & 0o777)
        write_text(temporary / "config.yaml", _to_yaml(record.config))
        write_text(temporary / "run.json", _to_json(record))
        number = max((int(path.name.split("-")[0]) for path in run_folders(root)), default=0) + 1
        while True:
            folder = root / f"{number:03d}-{record.command}"
            try:
                return temporary.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                number += 1  # another process took it a moment ago


def _tidy_up(root: Path) -> None:
    """Removes what killed commands left in a runs folder: half of a result, or checkpoints of a finished training."""
    remove_leftovers(root)
    for run in list_runs(root)[0]:
        remove_leftovers(run.folder)
        if run.record.status == "finished":
            shutil.rmtree(run.training.checkpoints, ignore_errors=True)
