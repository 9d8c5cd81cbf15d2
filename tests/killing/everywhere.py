"""Kills fft, mask-train, probe and apply at random moments, and before and during each of their file changes.

python -m tests.killing.everywhere --moments 30
python -m tests.killing.everywhere --moments 0 --every-change
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.killing.commands import Command, Scene, Server, make_commands, running_server


def phase(scene: Scene) -> str:
    """The phase in which a command was killed, judged by its files."""
    runs = scene.runs()
    if runs and runs[-1]["status"] == "finished":
        return "after"
    halves = [path for path in scene.folder.rglob(".*") if path.name.startswith(".")]
    halves += [
        path
        for path in scene.folder.rglob("checkpoint-*")
        if path.is_dir() and not (path / "trainer_state.json").is_file()
    ]
    if halves:
        return "amid a write"
    trains = any('"loss"' in path.read_text() for path in scene.folder.rglob("metrics.jsonl"))
    return "in training" if trains else "before training"


def kills(command: Command, undisturbed: Scene, moments: int, every_change: bool) -> Iterator[dict[str, Any]]:
    """Kill points: moments spread over the run time, and file changes."""
    answer = undisturbed.run()
    assert answer.code == 0, undisturbed.log()
    generator = random.Random(command.name)
    for _ in range(moments):
        yield {"kill_after_seconds": generator.uniform(0, answer.seconds)}
    for number, writes in enumerate(answer.writes if every_change else [], start=1):
        for torn in (False, True)[: 1 + writes]:
            yield {"kill_at_event": number, "torn": torn}


def kill_everywhere(folder: Path, server: Server, options: argparse.Namespace) -> Iterator[str]:
    """One line per command with the number of kills per phase; raises if a check fails."""
    commands = make_commands(folder / "given", server, options.steps)
    for command in commands:
        undisturbed = Scene(command, server, folder / command.name / "undisturbed", folder / "given" / "tiny")
        found: Counter[str] = Counter()
        for number, kill in enumerate(kills(command, undisturbed, options.moments, options.every_change)):
            scene = Scene(command, server, folder / command.name / str(number), folder / "given" / "tiny")
            answer = scene.run(**kill)
            found["not killed" if answer.code == 0 else phase(scene)] += 1
            try:
                scene.check_killed(undisturbed)
                scene.go_on()
                scene.check_result(undisturbed)
            except AssertionError as error:
                error.add_note(f"{command.name}, killed by {kill}: {scene.folder}")
                raise
            shutil.rmtree(scene.folder)
        yield f"{command.name}: {found.total()} kills; {', '.join(f'{count} {what}' for what, count in found.items())}"


def main() -> None:
    """Prints the number of kills per phase; stops at the first failed check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30, help="random ones of each command")
    parser.add_argument("--steps", type=int, default=6, help="of fft and mask-train")
    parser.add_argument("--every-change", action="store_true", help="before and amid each change to a file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mftctl-kill-"))
    with running_server() as server:
        for line in kill_everywhere(folder, server, options):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
