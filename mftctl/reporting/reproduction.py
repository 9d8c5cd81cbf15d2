"""How a run can be made again, from what its record says."""

from __future__ import annotations

import shlex

from mftctl.errors import RunError
from mftctl.experiments.results import Outcome
from mftctl.experiments.run_folder import Run

_DROP = " drop"
"""How the name of a state ends that a drop has made."""


def reproduction(run: Run) -> str:
    """The shell command that makes a run again, in a new folder beside it, from its own configuration.

    Paths are as the record has them, so that those that are relative hold in the folder that mftctl was called in. A
    result that was wanted elsewhere goes there again; one that is still there is replaced only where the user agrees.

    Args:
        run: Of any command that keeps a run.

    Raises:
        RunError: Its record lacks what the command needs.
    """
    record = run.record
    if record.command == "surface":
        return shlex.join(["mftctl", *_surface(run), "--runs", str(run.folder.parent)])
    arguments = {"apply": _apply, "eval": _eval, "mask-train": _mask_train}.get(record.command, _configured)(run)
    program = ["mftctl"]
    if record.processes > 1:
        program = ["torchrun", "--nproc-per-node", str(record.processes), "-m", "mftctl"]
    return shlex.join([*program, record.command, *arguments, "--runs", str(run.folder.parent)])


def _configured(run: Run) -> list[str]:
    return ["--recipe", str(run.folder / "config.yaml"), *_output(run)]


def _mask_train(run: Run) -> list[str]:
    # The mask always goes somewhere besides the run folder: by default each to the same file, where one may be.
    elsewhere = [] if run.record.output else ["-o", f"{run.name}.bits"]
    return [*_configured(run), *elsewhere]


def _apply(run: Run) -> list[str]:
    model, mask = _input(run, "model"), _input(run, "mask")
    base = run.result(Outcome).base
    if base is None:  # the record of a run of an earlier version, or of one that is not finished
        base = _input(run, "origin") if _input(run, "state").endswith(_DROP) else model
    tuned = [] if base == model else ["--tuned", model]
    return [str(base), mask, *tuned, *_output(run)]


def _eval(run: Run) -> list[str]:
    inputs, config = run.record.inputs, ["--recipe", str(run.folder / "config.yaml")]
    if run.record.config.get("eval", {}).get("predictions") is not None:
        return config  # it names the outputs that were scored; there is no model
    mask = ["--mask", str(inputs["mask"])] if inputs.get("mask") else []
    return [_input(run, "model"), *mask, *config, "--again"]


def _surface(run: Run) -> list[str]:
    # Measured already where its folder is still there: with that away, the same models are found and measured.
    sizes = ["--surface-points", _input(run, "points"), "--surface-records", _input(run, "records")]
    return ["report", "--surface", *sizes]


def _output(run: Run) -> list[str]:
    return ["-o", run.record.output] if run.record.output else []


def _input(run: Run, name: str) -> str:
    """What the record says of an input.

    Raises:
        RunError: It says nothing of it.
    """
    value = run.record.inputs.get(name)
    if value is None:
        raise RunError(f"The record of {run.name} lacks its {name}.", path=run.folder / "run.json", key=name)
    return str(value)
