"""The `run` workflow: a whole experiment from one recipe, stage by stage and seed by seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mftctl.config import Recipe, Stage, deciding_keys, to_document
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError
from mftctl.lineage import Source, source_of_run
from mftctl.progress import Listener
from mftctl.recipe_files import with_changes
from mftctl.runs import Run, create_run, list_runs, recorded


def run_experiment(recipe: Recipe, name: str, root: Path, listener: Listener) -> list[Run]:
    """The runs of all stages, finished; what was finished before is taken as it is.

    A stage is recognised by a digest of everything that decides its result: its part of the recipe, the seed, the
    training and test files, and the stages it builds on. A stage that was stopped goes on where it was.

    Args:
        recipe: With `stages`.
        name: The recipe's name or path, for the records.
        root: The runs folder.
        listener: Hears progress.

    Raises:
        ConfigError: The recipe has no stages or no model.
        MftError: Anything known that can go wrong in a stage.
    """
    if not recipe.stages:
        raise ConfigError("This recipe has no stages to run.", path=name, key="stages", hint="use it with -r instead")
    if recipe.model is None:
        raise ConfigError("This recipe names no model.", path=name, key="model", hint="--set model=DIR")
    runs = []
    for seed in recipe.seeds or (recipe.seed,):
        done: dict[str, Run] = {}
        for stage_name, stage in recipe.stages.items():
            for label, source_run in _inputs(stage_name, stage, done):
                listener.note(f"Seed {seed}, {stage_name}" + (f" of {label}" if label != stage_name else ""))
                staged = _staged(recipe, stage, seed, done, source_run)
                run = _run_stage(staged, stage, label, name, root, source_run, listener)
                done.setdefault(stage_name, run)
                runs.append(run)
    return runs


def _inputs(name: str, stage: Stage, done: Mapping[str, Run]) -> list[tuple[str, Run | None]]:
    """Each input of a stage with the label of its run: the stage's own name, or that of the stage it evaluates."""
    if stage.of:
        return [(other, done[other]) for other in stage.of]
    return [(name, done[stage.after] if stage.after else None)]


def _staged(recipe: Recipe, stage: Stage, seed: int, done: Mapping[str, Run], source_run: Run | None) -> Recipe:
    changes: dict[str, Any] = {"stages": {}, "seeds": [], **stage.set, "seed": seed}
    if source_run is not None:
        changes["model"] = source_of_run(source_run).model
    if stage.layers_from:
        changes["mask_train.layers"] = done[stage.layers_from].record.result["recommended_layers"]
    return with_changes(recipe, changes)


def _run_stage(
    recipe: Recipe, stage: Stage, label: str, name: str, root: Path, source_run: Run | None, listener: Listener
) -> Run:
    """A finished run of one stage: an earlier one, a resumed one or a new one."""
    source = Source(str(recipe.model)) if source_run is None else source_of_run(source_run)
    digest = _digest(recipe, stage.command, source, source_run)
    known = [run for run in list_runs(root)[0] if run.record.digest == digest]
    for run in known:
        if run.record.status == "finished" and _outputs_exist(run):
            listener.note(f"  done by {run.name}")
            return run
    unfinished = [run for run in known if run.record.status in ("running", "interrupted")]
    run = (
        unfinished[-1]
        if unfinished
        else create_run(
            root,
            stage.command,
            to_document(recipe),
            recipe=name,
            inputs=source.as_inputs(),
            stage=label,
            digest=digest,
        )
    )
    with recorded(run):
        run.finish(_work(stage.command, recipe, source, run, listener, resume=bool(unfinished)))
    return run


def _work(
    command: str, recipe: Recipe, source: Source, run: Run, listener: Listener, *, resume: bool
) -> dict[str, Any]:
    from mftctl import applying, evaluating, fine_tuning, mask_training, probing

    if command == "fft":
        return fine_tuning.fine_tune(recipe, source, run, listener, resume=resume)
    if command == "probe":
        return probing.probe(recipe, source, run, listener, resume=resume)
    if command == "mask-train":
        return mask_training.mask_train(recipe, source, run, listener, resume=resume)
    if command == "apply":
        return applying.apply(source, run, listener, replace=True)
    return evaluating.evaluate(recipe, source, run, listener)


def _digest(recipe: Recipe, command: str, source: Source, source_run: Run | None) -> str:
    keys = deciding_keys(recipe, command)
    keys["model"] = source.model if source_run is None else [source_run.record.digest, source.mask is not None]
    files = (*recipe.data, *recipe.val_data, *recipe.test_data)
    decides = [command, keys, {part.path: _file_digest(part) for part in files}]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _file_digest(part: DataSource) -> str | None:
    """The digest of a local file; None for built-in data and hub ids, which their names identify."""
    path = Path(part.path)
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _outputs_exist(run: Run) -> bool:
    result = run.record.result
    paths = [result[key] for key in ("model", "mask") if run.record.command != "eval" and result.get(key)]
    return all(Path(path).exists() or not Path(path).is_absolute() for path in paths)
