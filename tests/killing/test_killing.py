"""Commands killed at their file changes, on a full disk, and with a read-only output.

`python -m tests.killing.everywhere` kills them at random moments, and before and during every change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.killing.commands import Command, Scene, Server, contents, make_commands, running_server

pytestmark = pytest.mark.killing
DISK = Path("/mnt")
MOUNT = f"""
mount -t tmpfs -o size=16m tmpfs {DISK}
mkdir {DISK}/read-only
cp -r "$0" {DISK}/read-only/result
mount --bind {DISK}/read-only {DISK}/read-only
mount -o remount,bind,ro {DISK}/read-only
exec "$@"
"""
"""In a namespace of its own a process without rights may mount: a small disk, and in it a folder to be read only."""


class Stage:
    """The server and other state shared by all scenes.

    Attributes:
        commands: Commands to kill, by name.
        disk: Path of the small disk in this process, or the reason why there is none.
    """

    def __init__(self, server: Server, folder: Path, disk: Path | str) -> None:
        self.server = server
        self.disk = disk
        self._folder = folder
        self._undisturbed: dict[str, tuple[Scene, list[bool]]] = {}
        self.commands: dict[str, Command] = {item.name: item for item in make_commands(folder / "given", server)}

    def scene(self, name: str, part: str, folder: Path | None = None) -> Scene:
        """A scene of a command, in the given folder or next to the others."""
        place, log = (folder or self._folder) / f"{name}-{part}", self._folder / f"{name}-{part}.log"
        return Scene(self.commands[name], self.server, place, self._folder / "given" / "tiny", log)

    def undisturbed(self, name: str) -> tuple[Scene, list[bool]]:
        """An undisturbed run of a command, and for each of its changes whether it wrote a file."""
        if name not in self._undisturbed:
            scene = self.scene(name, "undisturbed")
            answer = scene.run()
            assert answer.code == 0, scene.log()
            self._undisturbed[name] = scene, answer.writes
        return self._undisturbed[name]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("killing")
    (folder / "older").mkdir()
    (folder / "older" / "old.txt").write_text("an older result")
    within: list[str] = []
    disk: Path | str = "unshare is missing"
    if shutil.which("unshare"):
        mounting = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(DISK)]
        tried = subprocess.run(mounting, capture_output=True, text=True)
        disk = tried.stderr.strip()
        if tried.returncode == 0:
            within = ["unshare", "-rm", "sh", "-euc", MOUNT, str(folder / "older")]
    with running_server(*within) as server:
        yield Stage(server, folder, server.root / DISK.relative_to("/") if within else disk)


@pytest.fixture
def disk(stage: Stage) -> Path:
    if isinstance(stage.disk, str):
        pytest.skip(f"nothing can be mounted here: {stage.disk}")
    return stage.disk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place", "torn"),
    [
        ("fft", 0.05, False),
        ("fft", 0.3, True),
        ("fft", 0.6, True),
        ("fft", 0.93, False),
        ("mask-train", 0.35, True),
        ("mask-train", 0.7, False),
        ("mask-train", 0.95, True),
        ("probe", 0.4, True),
        ("probe", 0.8, False),
        ("apply", 0.1, True),
        ("apply", 0.5, True),
        ("apply", 0.75, False),
        ("apply", 0.95, False),
    ],
)
def test_a_killed_command_ends_as_if_nothing_had_happened(stage: Stage, name: str, place: float, torn: bool) -> None:
    """Killed before a file change or with the file half-written, then resumed or run again."""
    undisturbed, writes = stage.undisturbed(name)
    event = 1 + int(place * len(writes))
    while torn and not writes[event - 1]:
        event -= 1
    scene = stage.scene(name, f"{event}-{torn}")
    assert scene.run(kill_at_event=event, torn=torn).code == -9
    scene.check_killed(undisturbed)
    scene.go_on()
    scene.check_result(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "free_kb"), [("fft", 0), ("fft", 512), ("fft", 1500), ("mask-train", 256), ("probe", 256), ("apply", 32)]
)
def test_a_full_disk(stage: Stage, disk: Path, name: str, free_kb: int) -> None:
    """One clear message; the older result stays, with more space the command continues as if nothing had happened."""
    undisturbed, _ = stage.undisturbed(name)
    scene, ballast = stage.scene(name, "full", disk), disk / "ballast"
    try:
        free = os.statvfs(disk)
        ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - free_kb * 1024))
        assert scene.run().code == 1
        assert "Traceback" not in scene.log()
        assert "written" in scene.log()
        assert "space" in scene.log()
        scene.check_killed(undisturbed)
        ballast.unlink()
        scene.go_on()
        scene.check_result(undisturbed)
    finally:
        ballast.unlink(missing_ok=True)
        shutil.rmtree(scene.folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fft", "mask-train", "apply"])
def test_a_read_only_output_is_reported_before_any_work(stage: Stage, disk: Path, name: str) -> None:
    scene = stage.scene(name, "read-only")
    command = stage.commands[name]
    before = contents(disk / "read-only")
    answer = scene.run([command.name, *command.arguments, "-o", f"{DISK}/read-only/result", "--yes"])
    assert answer.code == 1
    assert "cannot be written" in scene.log()
    assert "Traceback" not in scene.log()
    assert contents(disk / "read-only") == before == {"result/old.txt": b"an older result"}
    assert contents(scene.folder) == scene.before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fft", "mask-train", "probe", "apply"])
def test_a_read_only_runs_folder(stage: Stage, disk: Path, name: str) -> None:
    scene = stage.scene(name, "read-only-runs")
    answer = scene.run([*stage.commands[name].line, "--runs", f"{DISK}/read-only/runs"])
    assert answer.code == 1
    assert "The run folder cannot be written" in scene.log()
    assert "Traceback" not in scene.log()
    assert contents(scene.folder) == scene.before
