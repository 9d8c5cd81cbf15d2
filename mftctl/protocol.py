"""The `run` workflow: a whole experiment from one recipe, task by task; what was finished before is taken as it is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mftctl.config import Recipe, deciding_keys, to_document
from mftctl.errors import ConfigError, RunError
from mftctl.fingerprints import digest_of, file_digest, model_fingerprint
from mftctl.lineage import Source, source_of_run
from mftctl.progress import Listener
from mftctl.recipe_files import with_changes
from mftctl.runs import Run, create_run, list_runs, recorded
from mftctl.stages import Task, spell_out

State = Literal["done", "resumed", "new", "changed", "running", "failed"]

_MODEL_MAKERS = ("fft", "apply")


@dataclass
class Planned:
    """A task of an experiment, and how it stands.

    Attributes:
        task: The task.
        decides: Everything that decides its result, as plain data.
        digest: Digest of that, by which a finished run is recognised.
        state: `done`, `resumed` (stopped, killed or failed before), `new`, `changed`, and, while it is worked on,
            `running` or `failed`.
        why: What has changed since the last run of this task; empty unless the state is `changed`.
        run: Its run: finished, or to be resumed; None before it has one.
    """

    task: Task
    decides: dict[str, Any]
    digest: str
    state: State
    why: str = ""
    run: Run | None = None


def plan_experiment(recipe: Recipe, name: str, root: Path) -> list[Planned]:
    """All tasks in their order, with what is to be done for each.

    A finished task is recognised by a digest of everything that decides its result: its part of the recipe, the seed,
    the model, the training and test files, and the tasks it builds on.

    Args:
        recipe: With `stages`.
        name: The recipe's name or path.
        root: The runs folder.

    Raises:
        ConfigError: The recipe has no stages or no model, or its stages do not fit together.
    """
    if not recipe.stages:
        raise ConfigError("This recipe has no stages to run.", path=name, key="stages", hint="use it with -r instead")
    if recipe.model is None:
        raise ConfigError("This recipe names no model.", path=name, key="model", hint="--set model=DIR")
    runs = [run for run in list_runs(root)[0] if run.record.digest is not None]
    fingerprint = model_fingerprint(recipe.model)
    files: dict[str, str | None] = {}
    plan: dict[int, Planned] = {}
    for task in spell_out(recipe):
        decides = _decides(task, fingerprint, plan, files)
        plan[id(task)] = _recognise(task, decides, name, runs)
    return list(plan.values())


def run_experiment(
    plan: Sequence[Planned],
    name: str,
    root: Path,
    listener: Listener,
    on_change: Callable[[Planned], None] = lambda planned: None,
) -> list[Run]:
    """The runs of all tasks, finished.

    Args:
        plan: From `plan_experiment`; its states follow the work.
        name: The recipe's name or path, for the records.
        root: The runs folder.
        listener: Hears progress.
        on_change: Called whenever the state of a task changes.

    Raises:
        ConfigError: A task cannot work out, found before the first starts.
        MftError: Anything known that can go wrong in a task.
    """
    from mftctl.preflight import check_tasks

    check_tasks(planned.task for planned in plan if planned.state != "done")
    by_task = {id(planned.task): planned for planned in plan}
    for planned in plan:
        head = f"Seed {planned.task.seed}, {planned.task.name}"
        if planned.task.label != planned.task.name:
            head += f" of {planned.task.label}"
        if planned.state == "done" and planned.run is not None:
            listener.note(f"{head}: done by {planned.run.name}")
            continue
        listener.note(f"{head}: {planned.state}" + (f" ({planned.why})" if planned.why else ""))
        resume = planned.state == "resumed"
        planned.state = "running"
        on_change(planned)
        gc.collect()  # the model of the task before, which a trainer and its callbacks hold in a circle
        try:
            _run(planned, by_task, name, root, listener, resume=resume)
        finally:
            planned.state = "done" if planned.run is not None and _is_complete(planned.run) else "failed"
            on_change(planned)
    return [planned.run for planned in plan if planned.run is not None]


def _decides(
    task: Task, fingerprint: str | None, plan: Mapping[int, Planned], files: dict[str, str | None]
) -> dict[str, Any]:
    keys = deciding_keys(task.recipe, task.command)
    read = [source.path for source in (*task.recipe.data, *task.recipe.val_data, *task.recipe.test_data)]
    if "eval" in keys:
        read += task.recipe.eval.task_data.values()
    for path in read:
        if path not in files:
            files[path] = file_digest(path)
    before = plan[id(task.after)].digest if task.after else None
    if before is not None:
        del keys["model"]
        if task.command != "fft":  # the rate of fine-tuning is then that of the stage before
            keys.pop("fft", None)
    return {
        "command": task.command,
        **keys,
        "files": {path: files[path] for path in read},
        "the model's weights": fingerprint if before is None else None,
        "the stage before": before,
        "the probe": plan[id(task.layers_from)].digest if task.layers_from else None,
    }


def _recognise(task: Task, decides: dict[str, Any], name: str, runs: Sequence[Run]) -> Planned:
    digest = digest_of(decides)
    same = [run for run in runs if run.record.digest == digest]
    for run in same:
        if _is_complete(run):
            return Planned(task, decides, digest, "done", run=run)
    unfinished = [run for run in same if run.record.status != "finished"]
    if unfinished:
        return Planned(task, decides, digest, "resumed", run=unfinished[-1])
    if same:
        return Planned(task, decides, digest, "changed", f"the output of {same[-1].name} is gone")
    for run in reversed(runs):
        record = run.record
        if (record.recipe, record.stage, record.command) == (name, task.label, task.command) and (
            record.config.get("seed") == task.seed
        ):
            return Planned(
                task, decides, digest, "changed", f"since {run.name}: {_difference(record.decides, decides)}"
            )
    return Planned(task, decides, digest, "new")


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The keys that differ, with short values: `mask_train.ratio 0.1 -> 0.2`."""
    old, new = _flat(before), _flat(after)
    parts = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) == new.get(key):
            continue
        texts = [str(side.get(key)) for side in (old, new)]
        told = all(len(text) < 32 for text in texts)
        parts.append(f"{key} {texts[0]} -> {texts[1]}" if told else f"{key} changed")
    return ", ".join(parts)


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _run(
    planned: Planned, by_task: Mapping[int, Planned], name: str, root: Path, listener: Listener, *, resume: bool
) -> None:
    task = planned.task
    source = Source(str(task.recipe.model))
    changes: dict[str, Any] = {}
    if task.after is not None:
        source = source_of_run(_finished(by_task[id(task.after)]))
        changes["model"] = source.model
    if task.layers_from is not None:
        probe = _finished(by_task[id(task.layers_from)])
        changes["mask_train.layers"] = probe.record.result["recommended_layers"]
    recipe = with_changes(task.recipe, changes)
    if planned.run is None:
        planned.run = create_run(
            root,
            task.command,
            to_document(recipe),
            recipe=name,
            inputs=source.as_inputs(),
            stage=task.label,
            digest=planned.digest,
            decides=planned.decides,
        )
    elif resume:
        planned.run.go_on()
    with recorded(planned.run):
        planned.run.finish(_work(task.command, recipe, source, planned.run, listener, resume=resume))


def _finished(planned: Planned) -> Run:
    if planned.run is None:
        raise RunError("A stage is missing.", key=planned.task.name, hint="run the experiment from its start")
    return planned.run


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
        return applying.apply(source, run, listener)
    return evaluating.evaluate(recipe, source, run, listener)


def _is_complete(run: Run) -> bool:
    """Whether a run is finished and what it made is still there."""
    result = run.record.result
    if run.record.status != "finished":
        return False
    kinds = ("model", "mask") if run.record.command in _MODEL_MAKERS else ("mask",)
    return all(Path(result[kind]).exists() for kind in kinds if result.get(kind))
