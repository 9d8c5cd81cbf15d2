"""A command as a run, with or without a console: created in all processes at once, worked on, and recorded."""

from __future__ import annotations

from pathlib import Path

from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recording import recorded
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run, load_run
from mftctl.progress import Listener
from mftctl.runtime.process_group import from_first
from mftctl.workflows.multi_process.dispatch import work
from mftctl.workflows.multi_process.process_count import Launch, require_devices


def use_device(recipe: Recipe, launch: Launch) -> None:
    """Connects the processes of this command on the recipe's device, before anything of a run is created.

    Raises:
        ConfigError: The device is not available, or not for each process.
    """
    from mftctl.runtime.devices import find_device, join_on, require_attention

    require_devices(launch, recipe.device)
    require_attention(recipe.attention, find_device(recipe.device))
    join_on(recipe.device)


def new_run(
    root: Path,
    command: str,
    recipe: Recipe,
    source: ModelSource,
    *,
    recipe_name: str | None = None,
    output: Path | None = None,
    processes: int = 1,
) -> Run:
    """Creates a run and returns it in all processes that work on it.

    Args:
        root: The runs folder.
        command: The command.
        recipe: Its resolved recipe.
        source: The source model.
        recipe_name: The name or path of the recipe, for the record.
        output: Where to write the result in addition to the run folder.
        processes: Number of processes that work on it.

    Raises:
        StorageError: The runs folder cannot be written.
    """

    def in_first() -> str:
        made = create_run(
            root,
            command,
            to_document(recipe),
            recipe=recipe_name,
            inputs=source.as_inputs(),
            output=output,
            processes=processes,
        )
        return str(made.folder)

    return load_run(Path(from_first(in_first)))


def run_to_end(
    run: Run,
    recipe: Recipe,
    source: ModelSource,
    listener: Listener,
    launch: Launch,
    *,
    resume: bool = False,
    may_replace: bool = False,
) -> None:
    """Does the work of a run and records its result, or how it ended.

    Args:
        run: The open run.
        recipe: Its resolved recipe.
        source: The source model.
        listener: Receives progress updates.
        launch: The requested number of processes.
        resume: Whether to resume from the run's saved state.
        may_replace: Whether to replace a result at the run's output.

    Raises:
        MftError: The command failed, with the error of its workflow.
    """
    with recorded(run):
        run.finish(work(recipe, source, run, listener, launch, resume=resume, may_replace=may_replace))
