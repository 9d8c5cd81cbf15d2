"""The `run` workflow: a whole experiment from one recipe, task by task; what was finished before is taken as it is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mftctl.errors import ConfigError, RunError
from mftctl.experiments.deciding_keys import deciding_keys, to_document
from mftctl.experiments.fingerprints import digest_of, file_digest, model_fingerprint
from mftctl.experiments.jobs import Task, spell_out
from mftctl.experiments.model_source import Source, recommendation_of, source_of_run
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.recording import recorded
from mftctl.experiments.results import Outcome
from mftctl.experiments.run_folder import Run, create_run, list_runs, load_run
from mftctl.files.locks import locked_folder
from mftctl.progress import Listener
from mftctl.workflows.multi_process.dispatch import launch_of, work
from mftctl.workflows.multi_process.process_count import Launch

State = Literal["done", "resumed", "new", "changed", "running", "failed", "elsewhere"]

_LOOK_AGAIN_SECONDS = 1.0
"""How often another process's task is looked at while there is nothing else to do."""

_MODEL_MAKERS = ("fft", "apply")


@dataclass
class Planned:
    """A task of an experiment, and how it stands.

    Attributes:
        task: The task.
        decides: Everything that decides its result, as plain data.
        digest: Digest of that, by which a finished run is recognised.
        state: `done`, `resumed` (stopped, killed or failed before), `new`, `changed`, and, while it is worked on,
            `running` or `failed`; `elsewhere` while another process works on it.
        why: What has changed since the last run of this task; empty unless the state is `changed`.
        run: Its run: finished, or to be resumed; None before it has one.
        recipe: Its recipe with what earlier tasks decided; the task's own before it is worked on.
        source: What it works on, known once it is worked on.
        resumes: Whether its work goes on from what its run has kept.
        launch: With how many processes it is worked on.
    """

    task: Task
    decides: dict[str, Any]
    digest: str
    state: State
    why: str = ""
    run: Run | None = None
    recipe: Recipe = field(default_factory=Recipe)
    source: Source = field(default_factory=lambda: Source(""))
    resumes: bool = False
    launch: Launch = field(default_factory=Launch)


def plan_experiment(recipe: Recipe, name: str, root: Path, launch: Launch | None = None) -> list[Planned]:
    """All tasks in their order, with what is to be done for each.

    A finished task is recognised by a digest of everything that decides its result: its part of the recipe, the seed,
    the model, the training and test files, and the tasks it builds on.

    Args:
        recipe: With `stages`.
        name: The recipe's name or path.
        root: The runs folder.
        launch: With how many processes each task is worked on; one by default.

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
        its_launch = launch_of(task.command, task.recipe, launch or Launch())
        if its_launch.processes > 1 and _has_steps_that_follow_them(task):
            decides["processes"] = its_launch.processes
        plan[id(task)] = _recognise(task, decides, name, runs)
        plan[id(task)].launch = its_launch
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
    from mftctl.workflows.run_checks import check_tasks

    check_tasks(planned.task for planned in plan if planned.state != "done")
    root.mkdir(parents=True, exist_ok=True)
    by_task = {id(planned.task): planned for planned in plan}
    for planned in plan:
        if planned.state == "done" and planned.run is not None:
            listener.note(f"{_head(planned)}: done by {planned.run.name}")
        if planned.state == "elsewhere":
            planned.state = "new"  # it is looked at again, and told, when its turn comes
    while left := [planned for planned in plan if planned.state != "done"]:
        ready = [planned for planned in left if all(by_task[id(task)].state == "done" for task in _needs(planned.task))]
        mine = next((planned for planned in ready if _claim(planned, by_task, name, root, listener)), None)
        on_change(ready[0] if mine is None else mine)
        if mine is not None:
            _work_on(mine, listener, on_change)
        elif any(planned.state == "elsewhere" for planned in ready):
            time.sleep(_LOOK_AGAIN_SECONDS)
    return [planned.run for planned in plan if planned.run is not None]


def _head(planned: Planned) -> str:
    task = planned.task
    return f"Seed {task.seed}, {task.name}" + (f" of {task.label}" if task.label != task.name else "")


def _needs(task: Task) -> list[Task]:
    return [other for other in (task.after, task.layers_from) if other is not None]


def _claim(planned: Planned, by_task: Mapping[int, Planned], name: str, root: Path, listener: Listener) -> bool:
    """Whether a task is now this process's to do; its state says otherwise whether it is done or done elsewhere.

    Another `run` in the same runs folder does no task that this one has, nor the other way round.
    """
    if planned.state == "elsewhere" and planned.run is not None and load_run(planned.run.folder).is_worked_on:
        return False
    with locked_folder(root):
        before = planned.state
        same = [run for run in list_runs(root)[0] if run.record.digest == planned.digest]
        found = _of_digest(same)
        if found is not None:
            planned.state, planned.run, planned.why = found
        if planned.state == "done" and planned.run is not None:
            listener.note(f"{_head(planned)}: done by {planned.run.name}, by another process")
            return False
        if planned.state == "elsewhere" and planned.run is not None:
            if before != "elsewhere":
                worker = planned.run.record.worker
                listener.note(f"{_head(planned)}: {planned.run.name} is being worked on by {worker}; waiting for it")
            return False
        listener.note(f"{_head(planned)}: {planned.state}" + (f" ({planned.why})" if planned.why else ""))
        planned.resumes = planned.state == "resumed"
        _open(planned, by_task, name, root)
        planned.state = "running"
        return True


def _of_digest(same: Sequence[Run]) -> tuple[State, Run | None, str] | None:
    """How a task stands by the runs that have its digest, its run, and what is to be said; None without any."""
    if not same:
        return None
    complete = next((run for run in same if _is_complete(run)), None)
    if complete is not None:
        return "done", complete, ""
    worked_on = next((run for run in same if run.is_worked_on), None)
    if worked_on is not None:
        return "elsewhere", worked_on, ""
    unfinished = [run for run in same if run.record.status != "finished"]
    if unfinished:
        return "resumed", unfinished[-1], ""
    return "changed", None, f"the output of {same[-1].name} is gone"


def _decides(
    task: Task, fingerprint: str | None, plan: Mapping[int, Planned], files: dict[str, str | None]
) -> dict[str, Any]:
    keys = deciding_keys(task.recipe, task.command)
    read = [source.path for source in (*task.recipe.data, *task.recipe.val_data, *task.recipe.test_data)]
    if "eval" in keys:
        read += keys["eval"]["task_data"].values()
    if task.recipe.chat_template is not None:
        read.append(task.recipe.chat_template)
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
    found = _of_digest([run for run in runs if run.record.digest == digest])
    if found is not None:
        state, run, why = found
        return Planned(task, decides, digest, state, why, run)
    for run in reversed(runs):
        record = run.record
        if (record.recipe, record.stage, record.command) == (name, task.label, task.command) and (
            record.config.get("seed") == task.seed
        ):
            return Planned(
                task, decides, digest, "changed", f"since {run.name}: {_difference(record.decides, decides)}"
            )
    return Planned(task, decides, digest, "new")


def _has_steps_that_follow_them(task: Task) -> bool:
    """Whether more processes make larger steps of a task: where the batch is that of a process, and not of all."""
    options = {"fft": task.recipe.fft, "probe": task.recipe.mask_train, "mask-train": task.recipe.mask_train}
    section = options.get(task.command)
    return section is not None and getattr(section, "global_batch_size", None) is None


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


def _open(planned: Planned, by_task: Mapping[int, Planned], name: str, root: Path) -> None:
    """Gives a task its run: a new one, or that which was stopped."""
    task = planned.task
    planned.source, changes = Source(str(task.recipe.model)), {}
    if task.after is not None:
        planned.source = source_of_run(_finished(by_task[id(task.after)]))
        changes["model"] = planned.source.model
    if task.layers_from is not None:
        recommendation = recommendation_of(_finished(by_task[id(task.layers_from)]))
        changes["mask_train.layers"] = recommendation.layers
    planned.recipe = with_changes(task.recipe, changes)
    if planned.resumes and planned.run is not None:
        planned.run.go_on()
        return
    planned.run = create_run(
        root,
        task.command,
        to_document(planned.recipe),
        recipe=name,
        inputs=planned.source.as_inputs(),
        stage=task.label,
        digest=planned.digest,
        decides=planned.decides,
        processes=planned.launch.processes,
    )


def _work_on(planned: Planned, listener: Listener, on_change: Callable[[Planned], None]) -> None:
    """Does a task that was claimed."""
    run = _finished(planned)
    gc.collect()  # the model of the task before, which a trainer and its callbacks hold in a circle
    try:
        with recorded(run):
            run.finish(work(planned.recipe, planned.source, run, listener, planned.launch, resume=planned.resumes))
    finally:
        planned.state = "done" if _is_complete(run) else "failed"
        on_change(planned)


def _finished(planned: Planned) -> Run:
    if planned.run is None:
        raise RunError("A stage is missing.", key=planned.task.name, hint="run the experiment from its start")
    return planned.run


def _is_complete(run: Run) -> bool:
    """Whether a run is finished and what it made is still there."""
    if run.record.status != "finished":
        return False
    result = run.result(Outcome)
    made = (result.model, result.mask) if run.record.command in _MODEL_MAKERS else (result.mask,)
    return all(Path(place).exists() for place in made if place)
