from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mftctl.cli import watch_view
from mftctl.cli.output import Output
from mftctl.cli.watch_view import view, watch
from mftctl.experiments.run_folder import create_run
from mftctl.reporting.watch import RunProgress
from tests.partial_results import partial_result
from tests.reporting.test_watch import start, train, validate

PROGRAM = """
import sys
from pathlib import Path
from mftctl.cli.watch_view import watch
from mftctl.cli.output import Output
with Output() as console:
    watch(console, Path(sys.argv[1]), interval_seconds=0.1)
print("after it")
"""
RUNNING = RunProgress(
    run="020-fft",
    command="fft",
    stage="gmt[ratio=0.2]",
    seed=1,
    status="running",
    part=None,
    step=120,
    steps=320,
    train_loss=0.51234,
    validation_loss=0.6443,
    best_validation_loss=0.6432,
    tokens_per_second=2310.4,
    seconds=125.0,
    seconds_left=3725.0,
    written=1000.0,
    error=None,
)


def rendered(*items: RunProgress, unreadable: tuple[str, ...] = (), now: float = 1000.0, watching: bool = True) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(view(items, unreadable, Path("runs"), now, watching=watching))
    return console.export_text()


def test_running_run_is_shown_in_full() -> None:
    text = rendered(RUNNING)
    assert "▸ 020-fft (gmt[ratio=0.2], seed 1)" in text
    assert "120/320  2:05 so far, about 1:02:05 left" in text
    assert "loss 0.5123, validation 0.6443, best 0.6432, 2,310 tokens/s" in text
    assert "1 run: 1 running. Press Ctrl-C to stop watching." in text


def test_run_without_recent_output_says_so() -> None:
    quiet = "no output for"
    assert quiet not in rendered(RUNNING, now=1300.0)
    assert f"{quiet} 5:01" in rendered(RUNNING, now=1301.0)


def test_newest_other_runs_are_shown_and_the_rest_counted() -> None:
    others = [replace(RUNNING, run=f"{number:03d}-fft", status="finished", written=number) for number in range(9)]
    others[2] = replace(others[2], status="failed", error="It broke [badly].", written=90.0)
    others[3] = replace(others[3], status="killed", written=91.0)
    text = rendered(*others, RUNNING, unreadable=("x",))
    assert re.findall(r"\d{3}-fft", text) == ["020-fft", "006-fft", "007-fft", "008-fft", "002-fft", "003-fft"]
    assert "It broke [badly]." in text
    assert "11 runs: 7 finished, 1 failed, 1 killed, 1 running, 1 unreadable." in " ".join(text.split())


def test_without_running_runs_the_view_says_that_it_keeps_watching() -> None:
    goes_on = "No runs in progress in runs; waiting for the next run until Ctrl-C."
    assert goes_on in " ".join(rendered(replace(RUNNING, status="finished")).split())
    assert goes_on in " ".join(rendered().split())
    assert goes_on not in rendered(watching=False)


# Without a terminal


def after_each_look(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> None:
    """Performs one action after each refresh, and presses Ctrl-C after the last."""
    waiting = iter(actions)

    def sleep(seconds: float) -> None:
        action = next(waiting, None)
        if action is None:
            raise KeyboardInterrupt
        action()

    monkeypatch.setattr(watch_view.time, "sleep", sleep)


def test_each_change_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path).finish(partial_result({}))
    run = start(tmp_path, fft={"max_steps": 40})
    after_each_look(
        monkeypatch,
        lambda: train(run, 1),
        lambda: train(run, 2, 3),  # less than a tenth of the steps
        lambda: train(run, 4, first_seconds=16.0),
        lambda: validate(run, 4, 0.5),
        lambda: None,
        lambda: run.update(status="failed", error="It broke."),
    )
    with Output() as console:
        watch(console, tmp_path)
    captured = capsys.readouterr()
    lines = [re.sub(r", \d+ s( so far(, about [\d:]+( s)? left)?)?", "", line) for line in captured.out.splitlines()]
    assert lines == [
        "002-fft (stage, seed 3): running",
        "002-fft (stage, seed 3): running, step 1/40, loss 1.0000, 100 tokens/s",
        "002-fft (stage, seed 3): running, step 4/40, loss 0.2500, 100 tokens/s",
        "002-fft (stage, seed 3): running, step 4/40, loss 0.2500, validation 0.5000, best 0.5000, 100 tokens/s",
        "002-fft (stage, seed 3): failed, It broke.",
    ]
    assert (
        captured.err.split()
        == (
            f"No runs in progress in {tmp_path}; waiting for the next run until Ctrl-C. 2 runs: 1 finished, 1 failed."
        ).split()
    )


def test_with_json_each_change_is_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path)
    after_each_look(monkeypatch, lambda: run.finish(partial_result({"best_loss": 0.5})))
    with Output(as_json=True) as console:
        watch(console, tmp_path)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["run"], line["status"], line["best_validation_loss"]) for line in lines] == [
        ("001-fft", "running", None),
        ("001-fft", "finished", 0.5),
    ]


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "runs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert "No runs in progress" in process.stderr.readline()
        create_run(tmp_path / "runs", "fft", {})
        assert process.stdout.readline().startswith("001-fft (seed 0): running")  # at once, not when a buffer is full
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "after it\n"
    assert process.returncode == 0


@pytest.mark.slow
def test_on_a_terminal_the_view_is_live_and_its_last_state_stays(tmp_path: Path) -> None:
    run = create_run(tmp_path, "fft", {})
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(COLUMNS="100", LINES="30", TERM="xterm-256color")
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, str(tmp_path)])
    shown, deadline_seconds = "", time.monotonic() + 120
    actions = {
        "Press Ctrl-C to stop watching.": lambda: run.finish(partial_result({})),
        "No runs in progress in": lambda: os.write(terminal, b"\x03"),
    }
    while time.monotonic() < deadline_seconds:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            shown += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the program has closed its end
            break
        for text in [text for text in actions if text in shown]:
            actions.pop(text)()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).rpartition("^C")[2]
    assert "✓ 001-fft" in last
    assert "1 run: 1 finished." in last
    assert "after it" in last
