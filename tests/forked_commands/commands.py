"""How tests start commands through a server that forks them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ForkedCommands:
    """The beginnings of command lines whose processes are forked, with all imports done.

    Attributes:
        address: The socket of a running server.
    """

    address: str

    @property
    def python(self) -> list[str]:
        """In place of `python -m`."""
        return [sys.executable, "-I", "-S", str(ROOT / "tests" / "forked_commands" / "forward.py"), self.address]

    @property
    def mftctl(self) -> list[str]:
        """In place of `python -m mftctl`."""
        return [*self.python, "mftctl"]

    @property
    def module(self) -> tuple[str, ...]:
        """The module that a launcher starts, before the module to run; it needs the project as `PYTHONPATH`."""
        return ("tests.forked_commands.forward", self.address)


@contextmanager
def running_server() -> Iterator[ForkedCommands]:
    """Runs a server during the block, beyond the reach of a Ctrl-C in the terminal of the tests."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        command = [sys.executable, "-m", "tests.forked_commands.server", address]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True, process_group=0
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            yield ForkedCommands(address)
            process.communicate()
