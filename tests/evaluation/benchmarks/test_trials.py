"""Answers get the time and memory that the problem's own solution needs, or the floor if that is higher."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mftctl.evaluation.benchmarks.trials import Trial, _limits_for, run_trials
from mftctl.evaluation.sandbox.find import find_sandbox
from mftctl.evaluation.sandbox.program import Limits, Verdict

FLOOR = Limits(cpu_seconds=1, wall_seconds=30.0)
TEST = "assert f(3) == 3\n"
ENDLESS = "def f(x):\n    while True:\n        pass\n"
QUICK = "def f(x):\n    return x\n"


def busy(seconds: float) -> str:
    return f"import time\n\ndef f(x):\n    while time.process_time() < {seconds}:\n        pass\n    return x\n"


def outcomes(*trials: Trial, limits: Limits = FLOOR) -> list[str]:
    return [verdict.outcome for verdict in run_trials(find_sandbox(), trials, limits=limits)]


@pytest.mark.slow
def test_an_answer_as_slow_as_the_solution_passes_and_a_wrong_one_fails() -> None:
    calls: list[tuple[int, int]] = []
    slow = busy(1.3)
    humaneval = "def check(candidate):\n    assert candidate(3) == 3\n\n\ncheck(f)\n"
    trials = [Trial(slow, humaneval, "f", slow), Trial(slow.replace("return x", "return -x"), TEST, "f", slow)]
    verdicts = run_trials(find_sandbox(), trials, limits=FLOOR, on_progress=lambda *call: calls.append(call))
    assert [verdict.outcome for verdict in verdicts] == ["passed", "failed"]
    assert calls == [(1, 2), (2, 2)] * 2


@pytest.mark.slow
def test_an_answer_slower_than_the_floor_and_the_solution_times_out() -> None:
    assert outcomes(Trial(ENDLESS, TEST, "f", QUICK), Trial(QUICK, TEST, "f", QUICK)) == ["timed out", "passed"]


@pytest.mark.slow
def test_a_slow_answer_without_a_solution_to_compare_with_has_the_floor() -> None:
    assert outcomes(Trial(busy(1.3), TEST, "f")) == ["timed out"]


@pytest.mark.slow
def test_a_solution_that_fails_widens_nothing() -> None:
    assert outcomes(Trial(busy(1.3), TEST, "f", busy(1.3).replace("return x", "return -x"))) == ["timed out"]


@pytest.mark.slow
def test_an_answer_that_needs_the_memory_of_the_solution_passes() -> None:
    large = "def f(x):\n    return x if len(bytearray(b'x') * (3 * 2**28)) else 0\n"
    floor = Limits(memory_bytes=2**29)
    found = outcomes(Trial(large, TEST, "f", large), Trial(large, TEST, "f", QUICK), limits=floor)
    assert found == ["passed", "out of memory"]


@pytest.mark.slow
def test_an_answer_that_waited_for_a_busy_machine_runs_again() -> None:
    sleeps = "import time\n\ndef f(x):\n    time.sleep(2.5)\n    return x\n"
    impatient = Limits(cpu_seconds=1, wall_seconds=2.0)
    assert outcomes(Trial(sleeps, TEST, "f", sleeps), limits=impatient) == ["passed"]


@pytest.mark.parametrize(
    ("cpu", "wall", "expected"),
    [
        (0.0, 0.0, (10, 60.0)),
        (2.5, 5.0, (10, 60.0)),
        (2.6, 5.0, (20, 120.0)),
        (15.0, 20.0, (80, 480.0)),
        (1.0, 100.0, (10, 480.0)),
    ],
)
def test_limits_are_a_multiple_of_what_the_solution_used_in_steps_of_two(
    cpu: float, wall: float, expected: tuple[int, float]
) -> None:
    found = _limits_for(cpu, wall, Limits())
    assert (found.cpu_seconds, found.wall_seconds) == expected
    assert replace(found, cpu_seconds=10, wall_seconds=60.0) == Limits()


@pytest.mark.slow
def test_no_answers_give_no_verdicts() -> None:
    found: list[Verdict] = run_trials(find_sandbox(), [])
    assert found == []
