"""What each method's training costs: speed, operations, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mftctl.errors import RunError
from mftctl.experiments.results import Outcome, TrainingCost
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import STATE_ORDER
from mftctl.reporting.state_tables import state_label

TRAINING = ("fft", "mask-train")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The trainings of one state, averaged over seeds.

    Attributes:
        origin: The pre-trained model.
        state: In the words of the comparison.
        samples_per_second: Records trained on, without validations and checkpoints.
        tokens_per_second: The same of tokens, padding left out.
        flops: Floating-point operations of all steps, as `flops_per_token` counts them; None in older records.
        peak_memory_bytes: The most of any seed: of the GPU, on a CPU of the whole process.
        tokens: Trained on.
        seconds: Of the whole command.
        processes: It was trained with.
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


def efficiencies(runs: Sequence[Run], problems: list[str]) -> list[Efficiency]:
    """One entry for each state that was trained by steps, in the order of the papers' tables.

    The newest training of each stage and seed counts. Speeds are those of the steps after the first, which prepares.

    Args:
        runs: Of a runs folder, oldest first.
        problems: Gets a line for each training that cannot be used.

    Source: GMT, table 3.
    """
    newest: dict[tuple[str, str, tuple[str, str]], dict[int, Run]] = {}
    for run in runs:
        record, result = run.record, run.result(Outcome)
        if record.command in TRAINING and record.status == "finished" and result.steps:
            maker = (record.recipe or "", record.stage or ("" if record.recipe else run.name))
            key = (str(record.inputs.get("origin")), result.state, maker)
            newest.setdefault(key, {})[int(record.config.get("seed", 0))] = run
    found = []
    for (origin, state, maker), by_seed in newest.items():
        makers = [other for model, name, other in newest if (model, name) == (origin, state)]
        measured = _measured(list(by_seed.values()), problems)
        if measured:
            found.append(_efficiency(origin, state_label(state, maker, makers), measured))
    order = {state: place for place, state in enumerate(STATE_ORDER)}
    return sorted(found, key=lambda item: (item.origin, order.get(item.state.split(" (")[0], len(order)), item.state))


@dataclass(frozen=True, slots=True)
class _Timed:
    """A training whose steps were timed: its cost, and records and tokens a second."""

    run: Run
    cost: TrainingCost
    samples_per_second: float
    tokens_per_second: float


def _measured(runs: Sequence[Run], problems: list[str]) -> list[_Timed]:
    """The trainings whose steps were timed."""
    found = []
    for run in runs:
        try:
            timed = _timed(run)
        except (RunError, ValueError, KeyError, TypeError) as error:
            problems.append(told(error, f"{run.folder}: The speed of this training cannot be read"))
            continue
        if timed is not None:
            found.append(timed)
    return found


def _timed(run: Run) -> _Timed | None:
    """The training over its steps but the first; None where steps were not timed."""
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
    samples = (last.epoch - first.epoch) * int(run.record.inputs["train_records"])
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
