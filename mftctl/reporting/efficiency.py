"""Training cost of each method: speed, operations, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mftctl.errors import RunError
from mftctl.experiments.results import Outcome, TrainingCost
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import RunInputs, TrainRecords
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import place_of
from mftctl.reporting.state_tables import state_label

TRAINING = ("fft", "mask-train")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Training cost of one state, averaged over seeds.

    Attributes:
        origin: The pre-trained model.
        state: Name of the state, as in the comparison.
        samples_per_second: Training records per second, without validation and checkpoints.
        tokens_per_second: Training tokens per second, without padding.
        flops: Floating-point operations of all steps, as counted by `flops_per_token`; None for older records.
        peak_memory_bytes: Highest peak of any seed: of the GPU, or of the whole process on a CPU.
        tokens: Number of training tokens.
        seconds: Duration of the whole command.
        processes: Number of training processes.
        runs: Names of the training runs.
    """

    origin: str
    state: str
    samples_per_second: float
    tokens_per_second: float
    flops: float | None
    peak_memory_bytes: int
    tokens: int
    seconds: float
    processes: int
    runs: tuple[str, ...]


def efficiencies(runs: Sequence[Run]) -> tuple[list[Efficiency], list[str]]:
    """One entry per state that was trained in steps, in the order of the papers' tables.

    Uses the latest training of each stage and seed. Speeds exclude the first step, which includes warm-up work.

    Args:
        runs: The runs of a runs folder, oldest first.

    Returns:
        The entries, and one line per training run that cannot be used.

    Source: GMT, table 3.
    """
    newest: dict[tuple[str, str, tuple[str, str]], dict[int, Run]] = {}
    for run in runs:
        record, result = run.record, run.result(Outcome)
        if record.command in TRAINING and record.status == RunStatus.FINISHED and result.steps:
            maker = (record.recipe or "", record.stage or ("" if record.recipe else run.name))
            key = (RunInputs.read(record.inputs).origin, result.state, maker)
            newest.setdefault(key, {})[int(record.config.get("seed", 0))] = run
    found, problems = [], []
    for (origin, state, maker), by_seed in newest.items():
        makers = [other for model, name, other in newest if (model, name) == (origin, state)]
        measured, unreadable = _measured(list(by_seed.values()))
        problems += unreadable
        if measured:
            found.append((place_of(state), _efficiency(origin, state_label(state, maker, makers), measured)))
    found.sort(key=lambda pair: (pair[1].origin, pair[0], pair[1].state))
    return [item for _, item in found], problems


@dataclass(frozen=True, slots=True)
class _Timed:
    """A training run whose steps were timed: its cost, and records and tokens per second."""

    run: Run
    cost: TrainingCost
    samples_per_second: float
    tokens_per_second: float


def _measured(runs: Sequence[Run]) -> tuple[list[_Timed], list[str]]:
    """Training runs with timed steps, each with its rates, and one line per run that cannot be read."""
    found, problems = [], []
    for run in runs:
        try:
            timed = _timed(run)
        except (RunError, ValueError, KeyError, TypeError) as error:
            problems.append(told(error, f"{run.folder}: the speed of this training run cannot be read"))
            continue
        if timed is not None:
            found.append(timed)
    return found, problems


def _timed(run: Run) -> _Timed | None:
    """Samples and tokens per second over all steps but the first; None if steps were not timed."""
    lines = [line for line in run.training.metrics() if line.step_seconds is not None]
    seconds = sum(line.step_seconds or 0.0 for line in lines[1:])
    cost = run.result(TrainingCost)
    if seconds <= 0:
        return None
    first, last = lines[0], lines[-1]
    if first.epoch is None or last.epoch is None:
        raise KeyError("epoch")
    if first.num_input_tokens_seen is None or last.num_input_tokens_seen is None:
        raise KeyError("num_input_tokens_seen")
    samples = (last.epoch - first.epoch) * TrainRecords.read(run.record.inputs).train_records
    tokens = int(last.num_input_tokens_seen) - int(first.num_input_tokens_seen)
    return _Timed(run, cost, samples / seconds, tokens / seconds)


def _efficiency(origin: str, state: str, measured: Sequence[_Timed]) -> Efficiency:
    costs = [timed.cost for timed in measured]
    flops = [cost.flops_per_token * cost.tokens for cost in costs if cost.flops_per_token]
    return Efficiency(
        origin=origin,
        state=state,
        samples_per_second=fmean(timed.samples_per_second for timed in measured),
        tokens_per_second=fmean(timed.tokens_per_second for timed in measured),
        flops=fmean(flops) if len(flops) == len(costs) else None,
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in costs),
        tokens=round(fmean(cost.tokens for cost in costs)),
        seconds=fmean(timed.run.record.seconds for timed in measured),
        processes=max(timed.run.record.processes for timed in measured),
        runs=tuple(timed.run.name for timed in measured),
    )
