"""Builds the content of a report from the run folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mftctl.errors import RunError
from mftctl.experiments.results import Outcome
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run, list_runs
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.progress import Listener, Progress
from mftctl.reporting.answers import AnswerChanges, answer_changes
from mftctl.reporting.comparability import flags
from mftctl.reporting.efficiency import Efficiency, efficiencies
from mftctl.reporting.figures.curves import curve_figures
from mftctl.reporting.figures.frontier import frontier_figures
from mftctl.reporting.figures.heads_and_neurons import structure_figures
from mftctl.reporting.figures.probe import probe_figures
from mftctl.reporting.figures.removal import removal_figures
from mftctl.reporting.figures.style import Figure
from mftctl.reporting.figures.surface import surface_figures
from mftctl.reporting.figures.sweeps import sweep_figures
from mftctl.reporting.frontier import Frontier, frontiers
from mftctl.reporting.next_step import Advice, next_step
from mftctl.reporting.overview import Overview, overviews
from mftctl.reporting.preferences import PreferenceRow, preference_rows
from mftctl.reporting.reproduction import reproduction
from mftctl.reporting.state_tables import MetricTable, Row, metric_tables

TASK = "reporting"
_MOST_LISTED = 10
_LINE_END = "\n"


@dataclass(frozen=True, slots=True)
class RunSource:
    """A run that numbers in the report come from.

    Attributes:
        name: Name of the run.
        folder: Folder of the run.
        made: Short description of its result.
        started: UTC time, ISO 8601.
        seconds: Working time.
        seed: The seed.
        versions: Versions of the code that made it.
        reproduction: The command that reproduces it.
    """

    name: str
    folder: Path
    made: str
    started: str
    seconds: float
    seed: int
    versions: dict[str, str]
    reproduction: str


@dataclass(frozen=True, slots=True)
class Report:
    """The content of a report.

    Attributes:
        root: The runs folder.
        tables: One table per model, dataset and metric.
        overviews: Methods by benchmark.
        frontiers: What each state learned against what it kept.
        preferences: The validation of each training on preferences.
        efficiency: Training costs.
        figures: The figures that have data.
        answers: The answers that each state changed.
        sources: The runs that all numbers come from, oldest first.
        unfinished: One line per recent run that is unfinished or failed, with the command to resume it.
        problems: One line per run that could not be used.
        advice: The recommended next step.
    """

    root: Path
    tables: tuple[MetricTable, ...]
    overviews: tuple[Overview, ...]
    frontiers: tuple[Frontier, ...]
    preferences: tuple[PreferenceRow, ...]
    efficiency: tuple[Efficiency, ...]
    figures: tuple[Figure, ...]
    answers: tuple[AnswerChanges, ...]
    sources: tuple[RunSource, ...]
    unfinished: tuple[str, ...]
    problems: tuple[str, ...]
    advice: Advice


def make_report(root: Path, listener: Listener) -> Report:
    """Returns the report of a runs folder.

    Args:
        root: The runs folder.
        listener: Receives progress updates.

    Raises:
        RunError: There are no runs, or none with results yet.
    """
    runs, errors = list_runs(root)
    by_name = {run.name: run for run in runs}
    compared, left_out = metric_tables(runs, listener)
    tables = [_with_flags(table, by_name) for table in compared]
    efficiency, untimed = efficiencies(runs)
    preferences = preference_rows(runs)
    figures, undrawn = _figures(tables, runs, listener)
    answers, unread = answer_changes(runs)
    problems = [*(told(error, str(error.path)) for error in errors), *left_out, *untimed, *undrawn, *unread]
    unfinished = _unfinished(runs)
    if not tables and not efficiency and not figures:
        raise RunError(
            "There is nothing to report: no finished run has trained or measured anything.",
            path=root,
            actual="; ".join([*problems, *unfinished])
            or ("no runs" if not runs else f"runs without results: {len(runs)}"),
            hint="mftctl eval" if runs else "mftctl fft, or --runs DIR",
        )
    named = [name for table in tables for row in table.rows for name in row.runs]
    named += [name for item in efficiency for name in item.runs]
    named += [name for row in preferences for name in row.runs]
    named += [name for figure in figures for name in figure.runs]
    sources, irreproducible = _sources(_with_makers(named, runs, by_name))
    return Report(
        root=root,
        tables=tuple(tables),
        overviews=tuple(overviews(tables)),
        frontiers=tuple(frontiers(tables)[0]),
        preferences=tuple(preferences),
        efficiency=tuple(efficiency),
        figures=tuple(figures),
        answers=tuple(answers),
        sources=tuple(sources),
        unfinished=unfinished,
        problems=tuple(dict.fromkeys([*problems, *irreproducible])),
        advice=next_step(tables, runs),
    )


def _figures(tables: Sequence[MetricTable], runs: Sequence[Run], listener: Listener) -> tuple[list[Figure], list[str]]:
    """All figures, and one line per run, mask or model that they leave out."""
    makers = (
        partial(curve_figures, runs),
        partial(probe_figures, runs),
        partial(structure_figures, runs),
        partial(frontier_figures, tables, runs),
        partial(sweep_figures, tables, runs),
        partial(removal_figures, runs),
        partial(surface_figures, runs),
    )
    figures, problems = [], []
    for done, make in enumerate(makers):
        listener.progress(Progress(TASK, done, len(makers)))
        made, left_out = make()
        figures += made
        problems += left_out
    listener.progress(Progress(TASK, len(makers), len(makers)))
    return figures, problems


def _with_flags(table: MetricTable, by_name: dict[str, Run]) -> MetricTable:
    """The table with flags on rows that are not comparable with their baseline."""
    baselines = {row.state: row.runs for row in table.rows if row.is_baseline}

    def flagged(row: Row) -> Row:
        own = (row.state,) if row.is_baseline else row.against
        if not own and len(baselines) == 1:  # then the flags say why it could not be compared
            own = tuple(baselines)
        baseline = [by_name[name] for state in own for name in baselines.get(state, ())]
        return replace(row, flags=flags([by_name[name] for name in row.runs], baseline, by_name))

    return replace(table, rows=tuple(flagged(row) for row in table.rows))


def _with_makers(names: Sequence[str], runs: Sequence[Run], by_name: dict[str, Run]) -> list[Run]:
    """The named runs and the runs that made their inputs, oldest first."""
    wanted = set(names)
    for name in names:
        if name in by_name:
            wanted.update(RunInputs.read(by_name[name].record.inputs).parents)
    return [run for run in runs if run.name in wanted]


def _sources(runs: Sequence[Run]) -> tuple[list[RunSource], list[str]]:
    """The runs with their commands, and one line per run whose command is unknown."""
    sources, problems = [], []
    for run in runs:
        try:
            command = reproduction(run)
        except RunError as error:
            problems.append(told(error, run.name))
            command = f"# unknown: {error.message}"
        sources.append(_source(run, command))
    return sources, problems


def _source(run: Run, command: str) -> RunSource:
    record = run.record
    state = run.result(Outcome).state or RunInputs.read(record.inputs).state or record.command
    made = {"eval": f"measures {state}", "probe": f"probes {state}"}.get(record.command, f"makes {state}")
    return RunSource(
        run.name,
        run.folder,
        made,
        record.started,
        record.seconds,
        int(record.config.get("seed", 0)),
        record.versions,
        command,
    )


def _unfinished(runs: Sequence[Run]) -> tuple[str, ...]:
    """One line per recent unfinished run, and one that counts the rest."""
    found = [run for run in runs if run.record.status != RunStatus.FINISHED and not run.is_worked_on]
    lines = [f"{run.name}: {_ending(run)}" for run in reversed(found[-_MOST_LISTED:])]
    older = Counter(_status(run) for run in found[:-_MOST_LISTED])
    if older:
        lines.append(f"older runs: {', '.join(f'{count} {status}' for status, count in sorted(older.items()))}")
    working = [run.name for run in runs if run.is_worked_on]
    return (*lines, *(f"{name}: running now" for name in working))


def _status(run: Run) -> str:
    return "killed" if run.record.status == RunStatus.RUNNING else run.record.status


def _ending(run: Run) -> str:
    if run.record.status == RunStatus.FAILED:
        return f"failed: {(run.record.error or 'the reason was not recorded').partition(_LINE_END)[0]}"
    if run.record.command in ("fft", "probe", "mask-train", "eval"):
        return f"{_status(run)}; {run.resume_command} resumes the latest run of this command"
    return _status(run)
