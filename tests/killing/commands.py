"""Commands to kill, conditions that must hold afterwards, and how to continue."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mftctl.experiments.run_folder import create_run
from mftctl.files.ownership import Kind, write_marker
from tests.workflow_fixtures import make_workspace

TIMES = ("started", "seconds", "worker", "peak_memory_bytes", "prefix_reuse")
"""What differs between two runs of the same: times, the process, and what it used of the machine."""


@dataclass(frozen=True)
class Order:
    """A command for the server.

    Attributes:
        folder: Working folder; must exist.
        arguments: After `mftctl`.
        log: File for its output.
        kill_at_event: `kill_at` of `tests.killing.server.Writes`.
        torn: `torn` of `tests.killing.server.Writes`.
        kill_after_seconds: Time after which to kill it; None for never.
    """

    folder: str
    arguments: list[str]
    log: str
    kill_at_event: int = 0
    torn: bool = False
    kill_after_seconds: float | None = None


@dataclass(frozen=True)
class Answer:
    """How a command ended.

    Attributes:
        code: Its exit code; -9 if it was killed.
        writes: For each change it made to its folder, whether a file was written.
        seconds: Its run time.
    """

    code: int
    writes: list[bool]
    seconds: float


class Server:
    """A running `tests.killing.server`.

    Attributes:
        root: Its root folder, as this process sees it.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.root = Path(f"/proc/{process.pid}/root")

    def sees(self, path: Path) -> str:
        """The server's view of a path of this process."""
        return str(Path("/") / path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    def run(self, order: Order) -> Answer:
        """Runs a command to its end."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(asdict(order)) + "\n")
        stdin.flush()
        return Answer(**json.loads(stdout.readline()))


@contextmanager
def running_server(*within: str) -> Iterator[Server]:
    """Runs a server during the block.

    Args:
        within: A command that executes the command line appended to it.
    """
    command = [*within, sys.executable, "-m", "tests.killing.server"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield Server(process)
        process.communicate()


@dataclass(frozen=True)
class Command:
    """A command to kill.

    Attributes:
        name: Name of the command.
        arguments: Arguments without the output path.
        result: File or folder that it replaces; None if it writes nothing but its run.
        resumes: Whether it has `--resume`; otherwise it is run again.
    """

    name: str
    arguments: list[str]
    result: str | None
    resumes: bool = True

    @property
    def line(self) -> list[str]:
        """All command-line arguments."""
        place = [] if self.result is None else ["-o", self.result, "--yes"]
        return [self.name, *self.arguments, *place]


def make_commands(workspace: Path, server: Server, steps: int = 6) -> list[Command]:
    """The four commands on a tiny model.

    Args:
        workspace: An empty folder for their inputs.
        server: Makes the mask that `apply` applies.
        steps: Steps of fft and mask-train, with a validation and a checkpoint every third step.
    """
    make_workspace(workspace)
    model, train, validation = (str(workspace / name) for name in ("tiny", "train.jsonl", "val.jsonl"))
    data = ["-m", model, "-d", train, "--val-data", validation, "--seed", "0"]
    length = f"--batch-size 4 --max-steps {steps} --val-steps {steps // 3}".split()
    sets = "--set mask_train.batch_size=4 --set mask_train.val_steps=2".split()
    mask = str(workspace / "given.bits")
    given = ["mask-train", *data, "--method", "magnitude", "--layers", "1-2", "-o", mask, "--yes"]
    answer = server.run(Order(str(workspace), given, str(workspace / "log")))
    assert answer.code == 0, (workspace / "log").read_text()
    return [
        Command("fft", [*data, *length, "--lr", "3e-3"], "result"),
        Command("mask-train", [*data, *length, "--preset", "paper", "--layers", "1-2"], "result"),
        Command("probe", [*data, *"--preset paper --groups 2 --data-fraction 0.25".split(), *sets], None),
        Command("apply", [model, mask], "result", resumes=False),
    ]


class Scene:
    """One command in its own folder, with an older result at its output path."""

    def __init__(self, command: Command, server: Server, folder: Path, older: Path, log: Path | None = None) -> None:
        self.command = command
        self._log = log or folder.with_name(f"{folder.name}.log")
        self.folder = folder
        self._server = server
        folder.mkdir(parents=True)
        if command.result is not None:
            if command.name == "mask-train":
                shutil.copyfile(older.with_name("given.bits"), folder / command.result)
            else:
                shutil.copytree(older, folder / command.result)
                write_marker(folder / command.result, Kind.MODEL)
        self.before = contents(folder)

    def run(self, arguments: list[str] | None = None, **kill: Any) -> Answer:
        """Runs the command, or a different one."""
        return self._server.run(
            Order(self._server.sees(self.folder), arguments or self.command.line, str(self._log), **kill)
        )

    def log(self) -> str:
        """Output of the last command."""
        return self._log.read_text()

    def go_on(self) -> None:
        """Acts as a user after the kill: resumes, starts again if nothing can be resumed, or runs something else."""
        if any(run["status"] == "finished" for run in self.runs()):
            shutil.rmtree(create_run(self.folder / "runs", "report", {}).folder)
            return
        if self.command.resumes and self.runs():
            answer = self.run([self.command.name, "--resume", *([] if self.command.result is None else ["--yes"])])
        else:
            answer = self.run()
        assert answer.code == 0, self.log()

    def runs(self) -> list[dict[str, Any]]:
        """The records of all runs; every folder has a readable record."""
        folders = [path for path in (self.folder / "runs").glob("*") if not path.name.startswith(".")]
        return [json.loads((path / "run.json").read_text()) for path in sorted(folders)]

    def check_killed(self, undisturbed: Scene) -> None:
        """Checks that no partial result is in place, and that every run recorded as finished has its result."""
        if self.command.result is not None:
            now = below(contents(self.folder), self.command.result)
            old, new = (below(scene, self.command.result) for scene in (self.before, contents(undisturbed.folder)))
            assert now in (old, new)
        for run in self.runs():
            if run["status"] == "finished":
                assert _same(run["result"], self.folder) == _same(undisturbed.runs()[0]["result"], undisturbed.folder)

    def check_result(self, undisturbed: Scene) -> None:
        """Checks that the finished run and its result equal those of an undisturbed command, without leftovers."""
        mine, right = (self._finished(scene.folder) for scene in (self, undisturbed))
        assert mine.keys() == right.keys(), {name: {**mine, **right}[name] for name in mine.keys() ^ right.keys()}
        for name in mine:
            assert mine[name] == right[name], name
        hidden = [path for path in self.folder.rglob("*") if path.name.startswith(".")]
        if self.command.resumes:
            assert hidden == []
            assert list(self.folder.rglob("checkpoint*")) == []

    @staticmethod
    def _finished(folder: Path) -> dict[str, Any]:
        """Files of the result and of the finished run without times, whatever the run's number."""
        run = next(
            path for path in sorted((folder / "runs").glob("[0-9]*")) if '"finished"' in (path / "run.json").read_text()
        )
        found: dict[str, Any] = {}
        for name, content in contents(folder).items():
            if name.startswith(f"runs/{run.name}/"):
                found[name.replace(run.name, "run", 1)] = _without_times(name, content, folder, run.name)
            elif not name.startswith("runs/"):
                found[name] = content
        return found


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def below(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """The files that are `name` or inside it."""
    return {path: content for path, content in files.items() if path == name or path.startswith(f"{name}/")}


def _without_times(name: str, content: bytes, folder: Path, run: str) -> Any:
    if name.endswith("run.json"):
        return _same(json.loads(content), folder, run)
    if name.endswith("metrics.jsonl"):
        return [
            {key: value for key, value in json.loads(line).items() if "runtime" not in key and "second" not in key}
            for line in content.splitlines()
        ]
    return content


def _same(record: dict[str, Any], folder: Path, run: str = "") -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in TIMES}
    if "result" in kept:
        kept["result"] = {key: value for key, value in kept["result"].items() if key not in TIMES}
    text = json.dumps(kept).replace(str(folder.resolve()), "FOLDER")
    found: dict[str, Any] = json.loads(text.replace(run, "run") if run else text)
    return found
