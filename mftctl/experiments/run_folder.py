"""Run folders: the record of a command, with its inputs and its result.

`runs/<number>-<command>/` contains `run.json` (the record, written atomically), `config.yaml` (the resolved
configuration, usable as a recipe), `metrics.jsonl`, `checkpoints/` and the outputs of the command.
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
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from mftctl.errors import RunError
from mftctl.experiments.fingerprints import source_digest
from mftctl.experiments.run_record import FORMAT_VERSION, RunRecord, RunStatus, require_known_format, told_format
from mftctl.experiments.training_folder import MetricsObserver, TrainingFolder
from mftctl.experiments.yaml_numbers import NumberDumper
from mftctl.files.atomic import is_alive, write_text
from mftctl.files.names import is_recordable, require_recordable, shown_name
from mftctl.files.regular import read_regular
from mftctl.files.temporary import CONTENT, remove_leftovers, temporary_folder
from mftctl.runtime.processes import is_first, world_size
from mftctl.text import command_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from mftctl.experiments.results import Result
    from mftctl.experiments.value_types import Part

PartKind = TypeVar("PartKind", bound="Part")

_PACKAGES = ("mftctl", "torch", "transformers", "datasets", "accelerate", "safetensors", "lm_eval")
_NUMBERED = re.compile(r"\d+-")
SOURCE = "mftctl source"
"""Key of the digest of mftctl's own code among the versions."""

OPEN_RUNS: dict[Path, Run] = {}
"""The runs this process is working on."""


class Run:
    """One run folder, open for writing.

    Attributes:
        folder: The folder.
        record: The contents of `run.json`.
        resumed_with: The options for a command that resumes it, such as `--processes 2`.
        observer: Told of all lines logged by this run's trainings; None for nobody.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.record = record
        self.resumed_with: tuple[str, ...] = ()
        self.observer: MetricsObserver | None = None
        self._clock_start_seconds = time.monotonic()

    @property
    def name(self) -> str:
        """The folder's name, such as `003-mask-train`."""
        return self.folder.name

    @property
    def started(self) -> datetime:
        """The time of the first start, unchanged when resumed; the current date for chat templates.

        Raises:
            RunError: The record has no valid time.
        """
        try:
            return datetime.fromisoformat(self.record.started)
        except ValueError as error:
            raise RunError(
                "The record of this run has no valid start time.",
                path=self.folder / "run.json",
                key="started",
                actual=self.record.started,
            ) from error

    @property
    def is_worked_on(self) -> bool:
        """True if another process of this machine is working on it; unknown for other machines."""
        host, _, process = (self.record.worker or "").rpartition(":")
        if self.record.status != RunStatus.RUNNING or host != platform.node() or not process.isdecimal():
            return False
        return int(process) != os.getpid() and is_alive(int(process))

    def go_on(self) -> None:
        """Resumes a run that was stopped, killed or failed.

        Raises:
            RunError: Another process is working on it.
        """
        self.record = load_run(self.folder).record
        self._clock_start_seconds = time.monotonic()
        if self.is_worked_on:
            raise RunError(
                "Another process is working on this run.",
                path=self.folder,
                actual=f"process {self.record.worker}",
                hint="wait for it, or stop it first",
            )
        self.update(status=RunStatus.RUNNING, worker=_worker(), versions=_then(self.record.versions, _versions()))

    def look_again(self) -> None:
        """Reloads the record after worker processes have updated it."""
        self.record = replace(load_run(self.folder).record, seconds=self.record.seconds)

    @property
    def training(self) -> TrainingFolder:
        """The folder with the state of this run's training."""
        return self.training_in(self.folder)

    def training_in(self, folder: Path) -> TrainingFolder:
        """Returns the folder with the state of one of several trainings.

        Args:
            folder: A folder below the run folder.
        """
        return TrainingFolder(folder, self.resume_command, self.observer)

    @property
    def resume_command(self) -> str:
        """The command that resumes it, if it is the latest run of its command."""
        words = (self.record.command, "--resume", *self.resumed_with)
        return command_line("mftctl", *words, runs=self.folder.parent)

    def update(self, **changes: Any) -> None:
        """Replaces fields of the record and rewrites `run.json`."""
        now_seconds = time.monotonic()
        seconds = self.record.seconds + now_seconds - self._clock_start_seconds
        self._clock_start_seconds = now_seconds
        self.record = replace(self.record, seconds=round(seconds, 3), format_version=FORMAT_VERSION, **changes)
        if self.record.status == RunStatus.RUNNING:
            OPEN_RUNS[self.folder] = self
        else:
            OPEN_RUNS.pop(self.folder, None)
        if is_first():
            write_text(self.folder / "run.json", _to_json(self.record))

    def result(self, kind: type[PartKind]) -> PartKind:
        """Returns the result of the run, or the fields of it that the given class reads.

        Raises:
            RunError: A field is missing in the record.
        """
        return self._read(kind, self.record.result)

    def inputs(self, kind: type[PartKind]) -> PartKind:
        """Returns the inputs of the run that the given class reads.

        Raises:
            RunError: One of them is missing in the record.
        """
        return self._read(kind, self.record.inputs)

    def _read(self, kind: type[PartKind], document: Mapping[str, Any]) -> PartKind:
        try:
            return kind.read(document)
        except ValueError as error:
            from mftctl.experiments.run_contents import first_fault

            fault = first_fault(error)
            raise RunError(f"The record of this run is incomplete: {fault}.", path=self.folder / "run.json") from error

    def finish(self, result: Result) -> None:
        """Stores the result; other commands can build on the run from now on, and its checkpoints are removed."""
        self.update(status=RunStatus.FINISHED, result=result.document(), error=None)
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
    """Creates a run folder with the next free number.

    Args:
        root: The runs folder, created if missing.
        command: The mftctl command.
        config: The resolved configuration, as plain data.
        recipe: The name or path of the recipe.
        inputs: The inputs of the command.
        output: Where the user wants the result in addition to the run folder.
        stage: The stage name in the experiment.
        digest: Digest of everything that determines the result.
        decides: The content of that digest.
        processes: The number of processes that will work on it; None for the current number.

    Raises:
        RunError: The folder cannot be created.
        ConfigError: A path, or a text in the configuration, is not UTF-8.
    """
    from mftctl.experiments.run_inputs import PLACES

    record = RunRecord(
        command=command,
        status=RunStatus.RUNNING,
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
    places = (root, output, *((inputs or {}).get(name) for name in PLACES))
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
    """Returns the versions of a resumed run: `A, then B` where a version has changed."""
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
    """Returns the run in a folder.

    Raises:
        RunError: The folder has no readable `run.json`, or its contents have the wrong types.
    """
    path = folder / "run.json"
    if not is_recordable(folder.name):
        raise RunError(
            "The name of this run folder is not valid UTF-8.", path=shown_name(folder), hint="rename or remove it"
        )
    from mftctl.experiments.run_config import in_force
    from mftctl.experiments.run_contents import check_contents, first_fault

    content = b""
    try:
        content = read_regular(path)
        record = _record_reader().validate_json(content)
        record = replace(record, config=in_force(record.config))
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
        raise RunError(f"The record of this run is not valid: {first_fault(error)}.", path=path) from error
    return Run(folder, record)


@cache
def _record_reader() -> TypeAdapter[RunRecord]:
    from pydantic import TypeAdapter

    return TypeAdapter(RunRecord)


def run_folders(root: Path) -> list[Path]:
    """Returns the run folders below `root`, oldest first, regardless of their contents; none if `root` is missing."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if _NUMBERED.match(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [root / name for name in sorted(names, key=lambda name: (int(name.split("-")[0]), name))]


def list_runs(root: Path) -> tuple[list[Run], list[RunError]]:
    """Returns all runs below `root`, oldest first, and an error for each unreadable folder."""
    runs, errors = [], []
    for folder in run_folders(root):
        try:
            runs.append(load_run(folder))
        except RunError as error:
            errors.append(error)
    return runs, errors


def newest_run(root: Path, *commands: str, unfinished: bool = False) -> Run | None:
    """Returns the latest finished run of these commands, or the latest stopped or killed one if `unfinished`, or None.

    Damaged run folders are skipped, as an older one may be valid.
    """
    wanted = (RunStatus.RUNNING, RunStatus.INTERRUPTED) if unfinished else (RunStatus.FINISHED,)
    for run in reversed(list_runs(root)[0]):
        if run.record.command in commands and run.record.status in wanted:
            return run
    return None


def _new_folder(root: Path, record: RunRecord) -> Path:
    """Creates a folder with the next free number; it never exists without its record and configuration."""
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
                number += 1  # another process has just taken it


def _tidy_up(root: Path) -> None:
    """Removes leftovers of killed commands from a runs folder: partial results, or checkpoints of finished training."""
    remove_leftovers(root)
    for run in list_runs(root)[0]:
        remove_leftovers(run.folder)
        if run.record.status == RunStatus.FINISHED:
            shutil.rmtree(run.training.checkpoints, ignore_errors=True)
