"""Runs answers on their tests, each with the time and memory that its problem's own solution needs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mftctl.evaluation.sandbox import Limits, Program, Sandbox, Verdict, judge_programs

_MULTIPLE = 4
"""An answer may take so many times what the reference solution takes."""

_MOST = Limits(cpu_seconds=300, wall_seconds=1800.0, memory_bytes=2**32)
"""For a reference solution itself."""

_CLOCK = """

def mftctl_used():
    import resource, time
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
_REPORT = """

import resource, time
_own = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_other = mftctl_used()
raise SystemExit("used %.3f %.3f %d %d" % (_own[0], _other[0], _own[1], _other[1]))
"""
_USED = re.compile(r"SystemExit: used (\d+\.\d+) (\d+\.\d+) (\d+) (\d+)")


@dataclass(frozen=True, slots=True)
class Trial:
    """An answer to be tried.

    Attributes:
        code: The program that the answer stands for.
        test: Source of the problem's test.
        entry_point: The function under test.
        reference: A program known to pass, from which its limits follow; empty where the problem has none.
    """

    code: str
    test: str
    entry_point: str
    reference: str = ""

    @property
    def program(self) -> Program:
        """The answer, as the sandbox takes it."""
        return Program(self.code, self.test, self.entry_point)


OnProgress = Callable[[int, int], None]


def run_trials(
    sandbox: Sandbox,
    trials: Sequence[Trial],
    *,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    on_progress: OnProgress | None = None,
) -> list[Verdict]:
    """A verdict on each answer.

    All run within `limits` first. Those that ran out of time or memory are run again if the problem's reference
    solution, run at the same time on the same machine, shows that it takes more, or that the machine is slow.

    Args:
        sandbox: Where they run.
        trials: The answers.
        limits: The least that each may use.
        on_progress: Told how many of how many have run.

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
    # Some code takes a lack of memory as a failure of its own.
    return verdict.outcome in ("timed out", "out of memory") or "MemoryError" in verdict.detail


def _helps(own: Limits, limits: Limits, verdict: Verdict) -> bool:
    if verdict.outcome != "timed out":
        return own.memory_bytes > limits.memory_bytes
    waited = "processor time" not in verdict.detail
    return waited or own.cpu_seconds > limits.cpu_seconds


def _problem(trial: Trial) -> Program:
    return Program(trial.reference + _CLOCK, trial.test + _REPORT, trial.entry_point)


def _wider_limits(sandbox: Sandbox, trials: Sequence[Trial], limits: Limits) -> dict[Program, Limits]:
    """The limits of each problem, from one run of its reference solution; none where that fails too."""
    problems = list(dict.fromkeys(_problem(trial) for trial in trials))
    if not problems:
        return {}
    found = {}
    for problem, verdict in zip(problems, judge_programs(sandbox, problems, limits=_MOST), strict=True):
        used = _USED.search(verdict.detail)
        if used is not None:
            seconds, kibibytes = max(float(used[1]), float(used[2])), max(int(used[3]), int(used[4]))
            found[problem] = _limits_for(seconds, verdict.seconds, kibibytes * 1024, limits)
    return found


def _limits_for(cpu_seconds: float, wall_seconds: float, memory_bytes: int, limits: Limits) -> Limits:
    """The limits raised to a multiple of what was used, in steps of two, so that problems have the same."""
    cpu = limits.cpu_seconds * _steps(_MULTIPLE * cpu_seconds / limits.cpu_seconds)
    patience = limits.wall_seconds / limits.cpu_seconds
    wall = max(cpu * patience, limits.wall_seconds * _steps(_MULTIPLE * wall_seconds / limits.wall_seconds))
    memory = min(limits.memory_bytes * _steps(2 * memory_bytes / limits.memory_bytes), _MOST.memory_bytes)
    return replace(limits, cpu_seconds=cpu, wall_seconds=wall, memory_bytes=max(memory, limits.memory_bytes))


def _steps(share: float) -> int:
    return 2 ** max(0, math.ceil(math.log2(share))) if share > 0 else 1
