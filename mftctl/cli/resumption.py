"""A stopped training taken up again: its settings are kept, and so are the records of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mftctl.errors import ConfigError, RunError
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.run_folder import Run, load_run, newest_run
from mftctl.runtime.process_group import from_first
from mftctl.runtime.processes import world_size

_MAY_CHANGE = ("device", "attention", "check_memory")
"""Keys that decide where something is computed and whether to try, and no result."""


def check_settings_kept(command: str, given: Sequence[str]) -> None:
    """Checks that no setting is given that a resumed run would have to change.

    Args:
        command: What is resumed.
        given: Recipe keys of options, `--set` assignments and recipe names.

    Raises:
        ConfigError: One is.
    """
    changes = [key for key in given if key not in _MAY_CHANGE]
    if changes:
        raise ConfigError(
            "A resumed run keeps its settings, except for the device, its attention and the memory check.",
            actual=", ".join(changes),
            hint=f"mftctl {command} --resume without these options, or a new run without --resume",
        )


def take_up(command: str, root: Path, settle_output: Callable[[Run], None]) -> Run:
    """The newest stopped run of a command, marked as running, the same in all processes that work on it.

    Args:
        command: What is resumed.
        root: The runs folder.
        settle_output: Checks that the result can go where the run wants it.

    Raises:
        RunError: There is none.
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
    """What a run worked on, as its record says."""
    inputs = run.record.inputs
    return ModelSource(
        inputs["model"],
        inputs["mask"],
        inputs["state"],
        tuple(inputs["parents"]),
        inputs["origin"],
        run.record.config,
    )


def with_same_step_records(recipe: Recipe, run: Run, processes: int) -> Recipe:
    """Returns the recipe adjusted so that, with the current processes, each step keeps its number of records.

    Args:
        recipe: Of the run.
        run: The resumed run.
        processes: Those that continue it.

    Raises:
        ConfigError: No accumulation achieves that with this number of processes.
    """
    section = "fft" if run.record.command == "fft" else "mask_train"
    options = recipe.fft if run.record.command == "fft" else recipe.mask_train
    if run.record.processes == processes or options.global_batch_size is not None:
        return recipe
    steps = (options.grad_accum_steps or 1) * run.record.processes
    if options.batch_tokens is not None:  # which distributes any number of records
        records = steps * options.batch_size
        return with_changes(recipe, {f"{section}.grad_accum_steps": None, f"{section}.global_batch_size": records})
    if steps % processes:
        raise ConfigError(
            "A resumed run keeps its records per step, which cannot be divided among these processes.",
            key="WORLD_SIZE" if world_size() > 1 else "--processes",
            expected=f"a number of processes that divides {steps} micro-batches per step",
            actual=processes,
            hint="next time --global-batch-size and --batch-tokens, to resume with any number of processes",
        )
    return with_changes(recipe, {f"{section}.grad_accum_steps": steps // processes})
