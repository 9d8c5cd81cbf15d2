"""No sandboxed process outlives mftctl, however mftctl ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mftctl.evaluation.sandbox.find import why_it_leaks
from mftctl.evaluation.sandbox.kinds import Sandbox, candidates
from mftctl.evaluation.sandbox.python_files import find_installation

WORK = """
import sys
from mftctl.evaluation.sandbox.judge import judge_programs
from mftctl.evaluation.sandbox.program import Program
from mftctl.evaluation.sandbox.python_files import find_installation
from mftctl.evaluation.sandbox.kinds import Sandbox, candidates
from mftctl.runtime.signals import end_as_on_interrupt
end_as_on_interrupt()
kinds = [*candidates(find_installation()), Sandbox("none", find_installation())]
box = next(box for box in kinds if box.kind == sys.argv[1])
code = "def f():\\n    import time\\n    time.sleep(10**6)\\n"
judge_programs(box, [Program(code, "f()", "f")] * 2, workers=2)
"""

KINDS = [*candidates(find_installation()), Sandbox("none", find_installation())]


def wait_until(holds: object, seconds: float = 20) -> bool:
    """Whether a condition becomes true before the timeout."""
    deadline_seconds = time.monotonic() + seconds
    while time.monotonic() < deadline_seconds:
        if holds():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def programs(pid: int) -> list[psutil.Process]:
    """The sandboxed child processes of a process."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if any("bootstrap.py" in word for word in child.cmdline())
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sandbox", KINDS, ids=lambda sandbox: sandbox.kind)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_no_process_is_left(tmp_path: Path, sandbox: Sandbox, number: signal.Signals) -> None:
    if sandbox.kind != "none" and why_it_leaks(sandbox) is not None:
        pytest.skip(f"{sandbox.kind} does not hold here")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", WORK, sandbox.kind]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: len(programs(process.pid)) >= 4)
    assert len(list(tmp_path.glob("mftctl-sandbox-*"))) == 2
    time.sleep(0.5)
    running = programs(process.pid)
    process.send_signal(number)
    process.wait(timeout=20)
    assert wait_until(lambda: not any(program.is_running() for program in running))
    assert wait_until(lambda: list(tmp_path.iterdir()) == [])
