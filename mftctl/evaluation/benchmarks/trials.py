"""Runs answers on their tests, with time and memory limits derived from the reference solutions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mftctl.evaluation.sandbox.judge import judge_programs
from mftctl.evaluation.sandbox.kinds import Sandbox
from mftctl.evaluation.sandbox.program import Limits, Program, Verdict

_MULTIPLE = 4
"""An answer may take this many times the time of the reference solution."""

_MOST = Limits(cpu_seconds=300, wall_seconds=1800.0, memory_bytes=2**32)
"""Limits for a reference solution itself."""

_CLOCK = """

def mftctl_used():
    import time
    return time.process_time()
"""
_REPORT = """

import time
raise SystemExit("used %.3f %.3f" % (time.process_time(), mftctl_used()))
"""
_USED = re.compile(r"SystemExit: used (\d+\.\d+) (\d+\.\d+)")


@dataclass(frozen=True, slots=True)
class Trial:
    """An answer to test.

    Attributes:
        code: The program extracted from the answer.
        test: Source of the problem's test.
        entry_point: The function under test.
        reference: A program known to pass, which determines the limits; empty if the problem has none.
    """

    code: str
    test: str
    entry_point: str
    reference: str = ""

    @property
    def program(self) -> Program:
        """The answer as a sandbox program."""
        return Program(self.code, self.test, self.entry_point)


OnProgress = Callable[[int, int], None]


def run_trials(
    sandbox: Sandbox,
    trials: Sequence[Trial],
    *,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    on_progress: OnProgress | None = None,
) -> list[Verdict]:
    """Runs all answers and returns a verdict on each.

    All answers run within `limits` first. Those that run out of time or memory are rerun if the problem's reference
    solution, run at the same time on the same machine, shows that it needs more or that the machine is slow.

    Args:
        sandbox: The sandbox.
        trials: The answers.
        limits: The minimum limits of each answer.
        on_progress: Called with the number of answers done and the total.

    Raises:
        SandboxError: A process could not be started.
    """
    verdicts = judge_programs(sandbox, [trial.program for trial in trials], limits=limits, on_progress=on_progress)
    short = [place for place, verdict in enumerate(verdicts) if _ran_short(verdict) and trials[place].reference]
    wider = _wider_limits(sandbox, [trials[place] for place in short], limits)
    groups: dict[Limits, list[int]] = {}
    for place in short:
        own = wider.get(_problem(trials[place]))
        if own is not None and _helps(own, limits, verdicts[place]):
            groups.setdefault(own, []).append(place)
    for own, places in groups.items():
        again = judge_programs(
            sandbox, [trials[place].program for place in places], limits=own, on_progress=on_progress
        )
        for place, verdict in zip(places, again, strict=True):
            verdicts[place] = verdict
    return verdicts


def _ran_short(verdict: Verdict) -> bool:
    return verdict.outcome == "timed out" or _lacked_memory(verdict)


def _lacked_memory(verdict: Verdict) -> bool:
    # In the process that runs the answer, it is an ordinary exception.
    return verdict.outcome == "out of memory" or "MemoryError" in verdict.detail


def _helps(own: Limits, limits: Limits, verdict: Verdict) -> bool:
    if verdict.outcome != "timed out":
        return own.memory_bytes > limits.memory_bytes
    waited = "processor time" not in verdict.detail
    return waited or own.cpu_seconds > limits.cpu_seconds


def _problem(trial: Trial) -> Program:
    return Program(trial.reference + _CLOCK, trial.test + _REPORT, trial.entry_point)


def _wider_limits(sandbox: Sandbox, trials: Sequence[Trial], limits: Limits) -> dict[Program, Limits]:
    """The limits of each problem, from one run of its reference solution; omitted if that fails too."""
    waiting = list(dict.fromkeys(_problem(trial) for trial in trials))
    found: dict[Program, Limits] = {}
    # A program's memory use cannot be separated from mftctl's own, so the limits are tried in turn.
    for memory in (limits.memory_bytes, max(limits.memory_bytes, _MOST.memory_bytes)):
        if not waiting:
            break
        verdicts = judge_programs(sandbox, waiting, limits=replace(_MOST, memory_bytes=memory))
        for problem, verdict in zip(waiting, verdicts, strict=True):
            used = _USED.search(verdict.detail)
            if used is not None:
                own = _limits_for(max(float(used[1]), float(used[2])), verdict.seconds, limits)
                found[problem] = replace(own, memory_bytes=memory)
        waiting = [
            problem
            for problem, verdict in zip(waiting, verdicts, strict=True)
            if problem not in found and _lacked_memory(verdict)
        ]
    return found


def _limits_for(cpu_seconds: float, wall_seconds: float, limits: Limits) -> Limits:
    """The limits raised to a multiple of the measured use, by powers of two, so that many problems share them."""
    cpu = limits.cpu_seconds * _steps(_MULTIPLE * cpu_seconds / limits.cpu_seconds)
    patience = limits.wall_seconds / limits.cpu_seconds
    wall = max(cpu * patience, limits.wall_seconds * _steps(_MULTIPLE * wall_seconds / limits.wall_seconds))
    return replace(limits, cpu_seconds=cpu, wall_seconds=wall)


def _steps(share: float) -> int:
    return 2 ** max(0, math.ceil(math.log2(share))) if share > 0 else 1
