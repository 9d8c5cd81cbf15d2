"""Resuming a stopped run with the same settings and the same number of records per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mftctl.errors import ConfigError, RunError
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.run_folder import Run, load_run, newest_run
from mftctl.experiments.run_inputs import Source
from mftctl.runtime.process_group import from_first
from mftctl.runtime.processes import world_size

_MAY_CHANGE = ("device", "attention", "check_memory", "track")
"""Keys that do not affect the result, only where it is computed and tracked, and whether memory is checked first."""


def check_settings_kept(command: str, given: Sequence[str]) -> None:
    """Checks that no setting was given that a resumed run cannot change.

    Args:
        command: The resumed command.
        given: Recipe keys of options, `--set` assignments and recipe names.

    Raises:
        ConfigError: Such a setting was given.
    """
    changes = [key for key in given if key not in _MAY_CHANGE]
    if changes:
        raise ConfigError(
            "A resumed run keeps its settings, except for the device, its attention, the memory check and trackers.",
            actual=", ".join(changes),
            hint=f"mftctl {command} --resume without these options, or a new run without --resume",
        )


def take_up(command: str, root: Path, settle_output: Callable[[Run], None]) -> Run:
    """Returns the latest stopped run of a command, marked as running; the same run in all processes.

    Args:
        command: The resumed command.
        root: The runs folder.
        settle_output: Checks that the result can be written to the run's output path.

    Raises:
        RunError: There is no stopped run.
    """

    def in_first() -> str:
        found = newest_run(root, command, unfinished=True)
        if found is None:
            raise RunError(f"There is no stopped {command} run to resume.", path=root)
        settle_output(found)
        found.go_on()
        return str(found.folder)

    return load_run(Path(from_first(in_first)))


def source_of_resumed(run: Run) -> ModelSource:
    """Returns the source model of a run, from its record.

    Raises:
        RunError: The record is incomplete.
    """
    source = run.inputs(Source)
    return ModelSource(source.model, source.mask, source.state, tuple(source.parents), source.origin, run.record.config)


def with_same_step_records(recipe: Recipe, run: Run, processes: int) -> Recipe:
    """Returns the recipe adjusted so that, with the current processes, each step keeps its number of records.

    Args:
        recipe: The recipe of the run.
        run: The resumed run.
        processes: Number of processes that resume it.

    Raises:
        ConfigError: The records cannot be divided among this number of processes.
    """
    section = "fft" if run.record.command == "fft" else "mask_train"
    options = recipe.fft if run.record.command == "fft" else recipe.mask_train
    if run.record.processes == processes or options.global_batch_size is not None:
        return recipe
    steps = (options.grad_accum_steps or 1) * run.record.processes
    if options.batch_tokens is not None:  # any number of records can then be divided
        records = steps * options.batch_size
        return with_changes(recipe, {f"{section}.grad_accum_steps": None, f"{section}.global_batch_size": records})
    if steps % processes:
        raise ConfigError(
            "A resumed run keeps its number of records per step, which cannot be divided among these processes.",
            key="WORLD_SIZE" if world_size() > 1 else "--processes",
            expected=f"a number of processes that divides {steps}, the micro-batches per step",
            actual=processes,
            hint="runs with --global-batch-size and --batch-tokens can be resumed with any number of processes",
        )
    return with_changes(recipe, {f"{section}.grad_accum_steps": steps // processes})
