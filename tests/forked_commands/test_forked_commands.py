"""A forked command starts and ends as one that Python starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked_commands.commands import ForkedCommands

pytestmark = pytest.mark.slow
STATE = """
import json, os, random, signal, sys, tempfile
import numpy, torch
handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
streams = [(stream.encoding, stream.errors, stream.line_buffering) for stream in (sys.stdin, sys.stdout, sys.stderr)]
is_own = [getattr(sys, name) is getattr(sys, f"__{name}__") for name in ("stdin", "stdout", "stderr")]
found = {"handlers": [text.split(" at ")[0] for text in handlers], "streams": streams, "own": is_own}
found |= {"folder": os.getcwd(), "arguments": sys.argv[1:], "name": __name__, "path": sys.path[0]}
found |= {"variable": os.environ.get("ONLY_HERE")}
print(json.dumps(found))
name = next(tempfile._get_candidate_names())
print(random.random(), numpy.random.random(), name, torch.rand(1).item(), file=sys.stderr)
"""


def test_the_state_at_the_start(forked_commands: ForkedCommands, tmp_path: Path) -> None:
    (tmp_path / "state.py").write_text(STATE)
    environment = {**os.environ, "ONLY_HERE": "yes", "PYTHONPATH": str(Path(__file__).parents[2])}
    ends = [
        subprocess.run(
            [*start, "state", "a b"], cwd=tmp_path, env=environment, capture_output=True, text=True, input=""
        )
        for start in ([sys.executable, "-m"], forked_commands.python, forked_commands.python)
    ]
    assert [end.returncode for end in ends] == [0, 0, 0], [end.stderr for end in ends]
    real, *forked = (json.loads(end.stdout) for end in ends)
    assert forked == [real, real]
    drawn = [set(end.stderr.split()) for end in ends]
    assert [len(numbers) for numbers in drawn] == [4, 4, 4]
    assert len(set.union(*drawn)) == 12


@pytest.mark.parametrize("end", ["sys.exit(3)", "raise ValueError('why')", "os.kill(os.getpid(), 9)", "os._exit(7)"])
def test_the_end(forked_commands: ForkedCommands, tmp_path: Path, end: str) -> None:
    (tmp_path / "ending.py").write_text(f"import os, sys, atexit\natexit.register(print, 'at exit')\n{end}\n")
    real, forked = (
        subprocess.run([*start, "ending"], cwd=tmp_path, capture_output=True, text=True)
        for start in ([sys.executable, "-m"], forked_commands.python)
    )
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    assert forked.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_it(forked_commands: ForkedCommands, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "waiting.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    command = [*forked_commands.python, "waiting"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        own = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(timeout=20) == -number
        deadline_seconds = time.monotonic() + 20
        while Path(f"/proc/{own}").exists():
            assert time.monotonic() < deadline_seconds
            time.sleep(0.01)
