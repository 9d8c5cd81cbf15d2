"""The commands as functions: the same recipes, runs and results as on the command line, without a console."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mftctl.experiments.mask_results import MaskTrainResult
from mftctl.experiments.model_source import ModelSource, model_for_training, source_to_measure
from mftctl.experiments.outputs import check_output, inputs_of
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.results import EvalResult, FftResult, Result
from mftctl.experiments.tracking.names import warn_of_missing
from mftctl.files.atomic import Permit
from mftctl.files.ownership import Kind, permit_folder
from mftctl.masking.hub_masks import local_mask
from mftctl.masking.mask import mask_permit
from mftctl.progress import Progress
from mftctl.runtime.processes import world_size
from mftctl.workflows.command_run import new_run, run_to_end, use_device
from mftctl.workflows.multi_process.process_count import Launch

R = TypeVar("R", bound=Result)
OnProgress = Callable[[Progress], None]

_log = logging.getLogger("mftctl")


@dataclass(frozen=True, slots=True)
class Finished(Generic[R]):
    """A finished run.

    Attributes:
        folder: Its run folder.
        result: Its result, as in `run.json`.
    """

    folder: Path
    result: R


def fine_tune(
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    replace: bool = False,
    runs: str | Path = "runs",
    on_progress: OnProgress | None = None,
) -> Finished[FftResult]:
    """Fine-tunes a model, as `mftctl fft` does.

    Args:
        recipe: Names the model and the data, and has the section `fft`.
        output: Folder for the model; by default `model/` in the run folder.
        replace: Whether to replace a model that mftctl wrote there.
        runs: The runs folder.
        on_progress: Called with each progress update; messages go to the logger `mftctl`.

    Raises:
        MftError: As for the command: options, data, model or output cannot be used, or the training fails.
    """
    source = model_for_training(recipe.model, Path(runs), "fft")
    permit = permit_folder(Kind.MODEL, replace=replace)
    return _finished("fft", FftResult, recipe, source, Path(runs), on_progress, output, permit, replace=replace)


def learn_mask(
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    replace: bool = False,
    runs: str | Path = "runs",
    on_progress: OnProgress | None = None,
) -> Finished[MaskTrainResult]:
    """Learns which weights of a fine-tuned model to remove, as `mftctl mask-train` does.

    Args:
        recipe: Names the data, and has the section `mask_train`; all layers are masked unless it names some. The model
            is that of the recipe, or of the latest `fft` run.
        output: File for the mask; it is always in the run folder as well.
        replace: Whether to replace a mask file there.
        runs: The runs folder.
        on_progress: Called with each progress update; messages go to the logger `mftctl`.

    Raises:
        MftError: As for the command: options, data, model or output cannot be used, or the training fails.
    """
    source = model_for_training(recipe.model, Path(runs), "mask-train")
    permit = mask_permit(replace=replace)
    return _finished(
        "mask-train", MaskTrainResult, recipe, source, Path(runs), on_progress, output, permit, replace=replace
    )


def evaluate(
    recipe: Recipe,
    *,
    mask: str | Path | None = None,
    runs: str | Path = "runs",
    on_progress: OnProgress | None = None,
) -> Finished[EvalResult]:
    """Measures a model on a data file and on benchmarks, as `mftctl eval` does.

    Args:
        recipe: Names the test data or benchmarks, in the section `eval`. The model is that of the recipe, or of the
            latest run that made one.
        mask: Mask file to apply to the model in memory, or one on the hub.
        runs: The runs folder.
        on_progress: Called with each progress update; messages go to the logger `mftctl`.

    Raises:
        ConfigError: No model is given, and no run has made one.
        MftError: As for the command: options, data, model or mask cannot be used, or the evaluation fails.
    """
    path, root = None if mask is None else local_mask(mask), Path(runs)
    source = source_to_measure(recipe.model, path, root, what="evaluate", hint="name it in the recipe")
    return _finished("eval", EvalResult, recipe, source, root, on_progress)


def _finished(
    command: str,
    kind: type[R],
    recipe: Recipe,
    source: ModelSource,
    root: Path,
    on_progress: OnProgress | None,
    output: str | Path | None = None,
    permit: Permit | None = None,
    *,
    replace: bool = False,
) -> Finished[R]:
    """Runs a command in this process, or in this process of several."""
    recipe = with_changes(recipe, {"model": source.model, "stages": {}, "seeds": []})
    launch = Launch()
    use_device(recipe, launch)
    path = None
    if output is not None:
        inputs = inputs_of(recipe, models=(source.model, source.mask, source.origin))
        path = check_output(Path(output), inputs, root)
        if permit is not None and os.path.lexists(path):
            permit(path)
    listener = _Hooks(on_progress)
    warn_of_missing(recipe.track, listener)
    run = new_run(root, command, recipe, source, output=path, processes=world_size())
    run_to_end(run, recipe, source, listener, launch, may_replace=replace)
    return Finished(run.folder, run.result(kind))


class _Hooks:
    """A listener that passes progress to a callback and messages to the log."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress

    def progress(self, state: Progress) -> None:
        """Passes a progress update to the callback."""
        if self._on_progress is not None:
            self._on_progress(state)

    def note(self, text: str) -> None:
        """Logs a message."""
        _log.info(text)

    def warn(self, text: str) -> None:
        """Logs a warning."""
        _log.warning(text)
