"""Runs the work of a command, in its own process or in several worker processes."""

from __future__ import annotations

from dataclasses import replace

from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import Result
from mftctl.experiments.run_folder import Run
from mftctl.experiments.tracking.session import tracked
from mftctl.masking.checkpoints.remote_code import trusting_code
from mftctl.progress import Listener
from mftctl.workflows.multi_process.process_count import Launch, Shard


def work(
    recipe: Recipe,
    source: ModelSource,
    run: Run,
    listener: Listener,
    launch: Launch,
    *,
    resume: bool = False,
    may_replace: bool = False,
) -> Result:
    """Runs the command of a run and returns its result.

    Args:
        recipe: The resolved recipe.
        source: The source model.
        run: An open run, with the command in its record.
        listener: Receives progress updates.
        launch: The requested number of processes.
        resume: Whether to resume from the run's saved state.
        may_replace: Whether to replace a result at the run's output.

    Raises:
        MftError: The command failed, with the error of its workflow.
    """
    launch = launch_of(run.record.command, recipe, launch)
    run.resumed_with = launch.words
    if launch.processes == 1:
        return work_here(recipe, source, run, listener, resume=resume, may_replace=may_replace)
    from mftctl.workflows.multi_process.launcher import work_together

    return work_together(recipe, source, run, listener, launch, resume=resume, may_replace=may_replace)


def launch_of(command: str, recipe: Recipe, launch: Launch) -> Launch:
    """Returns the launch of one command of an experiment, with one process if its work cannot be divided.

    Args:
        command: The mftctl command.
        recipe: The recipe of the command.
        launch: The launch of the experiment.
    """
    drops = command == "mask-train" and recipe.mask_train.method == "drop"
    scores_alone = command == "eval" and recipe.eval.predictions is not None
    if command in ("apply", "interpolate", "delta") or drops or scores_alone:
        return Launch()
    return replace(launch, shard=Shard.DDP) if command == "eval" else launch


def work_here(
    recipe: Recipe, source: ModelSource, run: Run, listener: Listener, *, resume: bool, may_replace: bool
) -> Result:
    """Runs the command of a run, or this process's part of it, and returns its result.

    Raises:
        MftError: The command failed, with the error of its workflow.
    """
    with trusting_code(recipe.trust_remote_code), tracked(run, recipe.track, listener) as take_result:
        result = _result(recipe, source, run, listener, resume=resume, may_replace=may_replace)
        take_result(result.document())
        return result


def _result(
    recipe: Recipe, source: ModelSource, run: Run, listener: Listener, *, resume: bool, may_replace: bool
) -> Result:
    match run.record.command:
        case "fft":
            from mftctl.workflows.fft import fine_tune

            return fine_tune(recipe, source, run, listener, resume=resume, may_replace=may_replace)
        case "probe":
            from mftctl.workflows.probe import probe

            return probe(recipe, source, run, listener, resume=resume)
        case "mask-train":
            from mftctl.workflows.mask_train import mask_train

            return mask_train(recipe, source, run, listener, resume=resume, may_replace=may_replace)
        case "apply":
            from mftctl.workflows.apply import apply

            return apply(source, run, listener)
        case "interpolate":
            from mftctl.workflows.interpolate import interpolate

            return interpolate(recipe, source, run, listener, may_replace=may_replace)
        case "delta":
            from mftctl.workflows.delta import store_delta

            return store_delta(recipe, source, run, listener, may_replace=may_replace)
        case "eval":
            from mftctl.workflows.eval import evaluate

            return evaluate(recipe, source, run, listener)
        case other:
            raise ValueError(f"{other} is not a command with a run")
