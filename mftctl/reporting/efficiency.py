"""What each method's training costs: speed, operations, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mftctl.errors import RunError
from mftctl.experiments.run_contents import told
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import place_of
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
        record = run.record
        if record.command in TRAINING and record.status == "finished" and record.result.get("steps"):
            maker = (record.recipe or "", record.stage or ("" if record.recipe else run.name))
            key = (str(record.inputs.get("origin")), str(record.result.get("state")), maker)
            newest.setdefault(key, {})[int(record.config.get("seed", 0))] = run
    found = []
    for (origin, state, maker), by_seed in newest.items():
        makers = [other for model, name, other in newest if (model, name) == (origin, state)]
        measured = _measured(list(by_seed.values()), problems)
        if measured:
            found.append((place_of(state), _efficiency(origin, state_label(state, maker, makers), measured)))
    return [item for _, item in sorted(found, key=lambda pair: (pair[1].origin, pair[0], pair[1].state))]


def _measured(runs: Sequence[Run], problems: list[str]) -> list[tuple[Run, dict[str, float]]]:
    """The trainings whose steps were timed, each with its rates."""
    found = []
    for run in runs:
        try:
            rates = _rates(run)
            _ = int(run.record.result["peak_memory_bytes"]), int(run.record.result["tokens"])
        except (RunError, ValueError, KeyError, TypeError) as error:
            problems.append(told(error, f"{run.folder}: The speed of this training cannot be read"))
            continue
        if rates:
            found.append((run, rates))
    return found


def _rates(run: Run) -> dict[str, float]:
    """Samples and tokens a second over the steps but the first; empty where steps were not timed."""
    lines = [line for line in run.training.metrics() if "step_seconds" in line]
    seconds = sum(float(line["step_seconds"]) for line in lines[1:])
    if seconds <= 0:
        return {}
    first, last = lines[0], lines[-1]
    samples = (float(last["epoch"]) - float(first["epoch"])) * int(run.record.inputs["train_records"])
    tokens = int(last["num_input_tokens_seen"]) - int(first["num_input_tokens_seen"])
    return {"samples": samples / seconds, "tokens": tokens / seconds}


def _efficiency(origin: str, state: str, measured: Sequence[tuple[Run, dict[str, float]]]) -> Efficiency:
    results = [run.record.result for run, _ in measured]
    flops = [result["flops_per_token"] * result["tokens"] for result in results if result.get("flops_per_token")]
    return Efficiency(
        origin=origin,
        state=state,
        samples_per_second=fmean(rates["samples"] for _, rates in measured),
        tokens_per_second=fmean(rates["tokens"] for _, rates in measured),
        flops=fmean(flops) if len(flops) == len(results) else None,
        peak_memory_bytes=max(int(result["peak_memory_bytes"]) for result in results),
        tokens=round(fmean(int(result["tokens"]) for result in results)),
        seconds=fmean(run.record.seconds for run, _ in measured),
        processes=max(run.record.processes for run, _ in measured),
        runs=tuple(run.name for run, _ in measured),
    )
