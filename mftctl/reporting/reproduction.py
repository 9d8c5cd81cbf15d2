"""Builds the command that reproduces a run from its record."""

from __future__ import annotations

import shlex

from pydantic import ValidationError

from mftctl.errors import RunError
from mftctl.experiments.results import Outcome
from mftctl.experiments.run_contents import PartKind
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import (
    AppliedMask,
    AveragedCheckpoints,
    MergedDeltas,
    Origin,
    RunInputs,
    StartingState,
    SurfaceSize,
    UsedModel,
)
from mftctl.experiments.state_names import known_state


def reproduction(run: Run) -> str:
    """Returns the shell command that repeats a run from its own configuration, in a new run folder.

    Paths are as recorded, so relative paths are relative to the folder that mftctl was called in. A result outside the
    run folder is written to the same place again; an existing one is replaced only with the user's consent.

    Args:
        run: A run of any command.

    Raises:
        RunError: The record lacks a value that the command needs.
    """
    record = run.record
    if record.command == "surface":
        return shlex.join(["mftctl", *_surface(run), "--runs", str(run.folder.parent)])
    makers = {
        "apply": _apply,
        "average": _average,
        "delta": _delta,
        "delta-merge": _delta_merge,
        "eval": _eval,
        "mask-train": _mask_train,
    }
    arguments = makers.get(record.command, _configured)(run)
    program = ["mftctl"]
    if record.processes > 1:
        program = ["torchrun", "--nproc-per-node", str(record.processes), "-m", "mftctl"]
    return shlex.join([*program, *_words(record.command), *arguments, "--runs", str(run.folder.parent)])


def _configured(run: Run) -> list[str]:
    return ["--recipe", str(run.folder / "config.yaml"), *_output(run)]


def _mask_train(run: Run) -> list[str]:
    # The mask is always written outside the run folder too; the default file is shared and may already exist.
    elsewhere = [] if run.record.output else ["-o", f"{run.name}.bits"]
    return [*_configured(run), *elsewhere]


def _delta(run: Run) -> list[str]:
    base = run.record.config.get("delta", {}).get("base")
    elsewhere = [] if run.record.output else ["-o", f"{run.name}.delta"]
    return [str(base), _inputs(run, UsedModel).model, *_configured(run), *elsewhere]


def _delta_merge(run: Run) -> list[str]:
    inputs = _inputs(run, MergedDeltas)
    options = [f"--method={inputs.method}", f"--weights={','.join(map(repr, inputs.weights))}"]
    options += [f"--scale={inputs.scale!r}", f"--values={inputs.values}", "--base", _inputs(run, UsedModel).model]
    return [*inputs.deltas, *options, *_output(run)]


def _words(command: str) -> list[str]:
    return command.split("-") if command == "delta-merge" else [command]


def _apply(run: Run) -> list[str]:
    inputs = _inputs(run, AppliedMask)
    model, mask = inputs.model, inputs.mask
    base = run.result(Outcome).base
    if base is None:  # an unfinished run, or one of an earlier version
        state = known_state(_inputs(run, StartingState).state)
        base = _inputs(run, Origin).origin if state is not None and state.resets else model
    tuned = [] if base == model else ["--tuned", model]
    return [str(base), mask, *tuned, *_output(run)]


def _average(run: Run) -> list[str]:
    inputs = _inputs(run, AveragedCheckpoints)
    weights = [] if inputs.weights is None else [f"--weights={','.join(map(repr, inputs.weights))}"]
    return [*inputs.checkpoints, *weights, *_output(run)]


def _eval(run: Run) -> list[str]:
    config = ["--recipe", str(run.folder / "config.yaml")]
    if run.record.config.get("eval", {}).get("predictions") is not None:
        return config  # the configuration names the scored outputs; there is no model
    applied = RunInputs.read(run.record.inputs).mask
    mask = ["--mask", applied] if applied else []
    return [_inputs(run, UsedModel).model, *mask, *config, "--again"]


def _surface(run: Run) -> list[str]:
    # If the run folder exists, the surface is already measured; without it, the same models are found and measured.
    size = _inputs(run, SurfaceSize)
    sizes = ["--surface-points", str(size.points), "--surface-records", str(size.records)]
    return ["report", "--surface", *sizes]


def _output(run: Run) -> list[str]:
    return ["-o", run.record.output] if run.record.output else []


def _inputs(run: Run, kind: type[PartKind]) -> PartKind:
    """Returns inputs from the record.

    Raises:
        RunError: The record does not have one of them.
    """
    try:
        return kind.read(run.record.inputs)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise RunError(f"The record of {run.name} lacks its {name}.", path=run.folder / "run.json", key=name) from error
