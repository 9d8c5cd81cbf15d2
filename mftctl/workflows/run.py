"""The `run` workflow: a whole experiment from one recipe, job by job; finished jobs are reused."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mftctl.data.sources import is_pattern, source_content_digest
from mftctl.errors import ConfigError, Interrupted, RunError
from mftctl.experiments.controls import jobs_with_controls
from mftctl.experiments.deciding_keys import deciding_keys, in_names_of_today
from mftctl.experiments.fingerprints import digest_of, file_digest, model_fingerprint
from mftctl.experiments.jobs import Job
from mftctl.experiments.model_source import MODEL_MAKERS, ModelSource, recommendation_of, source_of_run
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.results import BestLoss, Outcome
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run, list_runs, load_run
from mftctl.experiments.run_record import STAGE_BEFORE, RunStatus
from mftctl.files.locks import locked_folder
from mftctl.progress import Listener
from mftctl.runtime.stop_request import take_late_stop
from mftctl.workflows.command_run import run_to_end
from mftctl.workflows.multi_process.dispatch import launch_of
from mftctl.workflows.multi_process.process_count import Launch

State = Literal["done", "resumed", "new", "changed", "running", "failed", "elsewhere"]

_ON_STAGES = (STAGE_BEFORE, "the probe")
"""Keys that hold the digests of other stages."""

_LOOK_AGAIN_SECONDS = 1.0
"""Time between checks of another process's job while there is nothing else to do."""


@dataclass
class Planned:
    """A job of an experiment and its state.

    Attributes:
        job: The job.
        decides: Everything that determines its result, as plain data.
        digest: Digest of that, by which a finished run is recognised.
        state: `done`, `resumed` (stopped, killed or failed before), `new`, `changed`, and, once started, `running` or
            `failed`; `elsewhere` while another process works on it.
        why: The changes since the last run of this job; empty unless the state is `changed`.
        run: Its run, finished or to be resumed; None if there is none yet.
        recipe: Its recipe with values from earlier jobs, set when it starts.
        source: Its source model, set when it starts.
        resumes: Whether its run is resumed from saved state.
        launch: The number of processes that work on it.
    """

    job: Job
    decides: dict[str, Any]
    digest: str
    state: State
    why: str = ""
    run: Run | None = None
    recipe: Recipe = field(default_factory=Recipe)
    source: ModelSource = field(default_factory=lambda: ModelSource(""))
    resumes: bool = False
    launch: Launch = field(default_factory=Launch)


def plan_experiment(recipe: Recipe, name: str, root: Path, launch: Launch | None = None) -> list[Planned]:
    """Returns all jobs in order, each with its state.

    A finished job is recognised by a digest of everything that determines its result: its part of the recipe, the
    seed, the model, the training and test files, and the jobs it builds on.

    Args:
        recipe: A recipe with `stages`.
        name: The name or path of the recipe.
        root: The runs folder.
        launch: The number of processes for each job; one by default.

    Raises:
        ConfigError: The recipe has no stages or no model, or its stages are inconsistent.
    """
    if not recipe.stages:
        raise ConfigError("This recipe has no stages to run.", path=name, key="stages", hint="use it with -r instead")
    if recipe.model is None:
        raise ConfigError("This recipe does not name a model.", path=name, key="model", hint="--set model=DIR")
    runs = stage_runs(root)
    fingerprint = model_fingerprint(recipe.model)
    files: dict[str, str | None] = {}
    plan: dict[int, Planned] = {}
    for job in jobs_with_controls(recipe):
        decides = _decides(job, fingerprint, plan, files)
        its_launch = launch_of(job.command, job.recipe, launch or Launch())
        if its_launch.processes > 1 and _has_steps_that_follow_them(job):
            decides["processes"] = its_launch.processes
        plan[id(job)] = _recognise(job, decides, name, runs)
        plan[id(job)].launch = its_launch
    return list(plan.values())


def run_experiment(
    plan: Sequence[Planned],
    name: str,
    root: Path,
    listener: Listener,
    on_change: Callable[[Planned], None] = lambda planned: None,
) -> list[Run]:
    """Runs all jobs that are not done and returns the finished runs of all jobs.

    Args:
        plan: From `plan_experiment`; its states are updated.
        name: The name or path of the recipe, for the records.
        root: The runs folder.
        listener: Receives progress updates.
        on_change: Called whenever the state of a job changes.

    Raises:
        ConfigError: A job would fail, found before the first one starts.
        Interrupted: The user stopped it.
        MftError: A job failed, with the error of its command.
    """
    from mftctl.workflows.run_checks import check_jobs

    check_jobs([planned.job for planned in plan if planned.state != "done"], listener)
    root.mkdir(parents=True, exist_ok=True)
    take_late_stop()  # one from before this experiment
    by_job = {id(planned.job): planned for planned in plan}
    for planned in plan:
        if planned.state == "done" and planned.run is not None:
            listener.note(f"{_head(planned)}: already done in {planned.run.name}")
        if planned.state == "elsewhere":
            planned.state = "new"  # checked again, and reported, when its turn comes
    while left := [planned for planned in plan if planned.state != "done"]:
        ready = [planned for planned in left if all(by_job[id(job)].state == "done" for job in _needs(planned.job))]
        mine = next((planned for planned in ready if _claim(planned, by_job, name, root, listener)), None)
        on_change(ready[0] if mine is None else mine)
        if mine is not None:
            _work_on(mine, listener, on_change)
            _stop_if_asked(mine, plan)
        elif any(planned.state == "elsewhere" for planned in ready):
            time.sleep(_LOOK_AGAIN_SECONDS)
    return [planned.run for planned in plan if planned.run is not None]


def _stop_if_asked(last: Planned, plan: Sequence[Planned]) -> None:
    """Ends the experiment if the user asked to stop in a job's last step, which then finished.

    Raises:
        Interrupted: The user asked to stop, and jobs are left.
    """
    if take_late_stop() and any(planned.state != "done" for planned in plan):
        raise Interrupted(f"Stopped after {_head(last)}.", hint="the same mftctl run command continues")


def _head(planned: Planned) -> str:
    job = planned.job
    return f"Seed {job.seed}, {job.name}" + (f" of {job.label}" if job.label != job.name else "")


def _needs(job: Job) -> list[Job]:
    before = job.candidates or (job.after,)
    return [other for other in (*before, job.layers_from) if other is not None]


def _claim(planned: Planned, by_job: Mapping[int, Planned], name: str, root: Path, listener: Listener) -> bool:
    """Claims a job for this process; if that fails, its state is set to done or elsewhere.

    Two `run` commands in the same runs folder never work on the same job.
    """
    if planned.state == "elsewhere" and planned.run is not None and load_run(planned.run.folder).is_worked_on:
        return False
    with locked_folder(root):
        before = planned.state
        same = [run for run in stage_runs(root) if run.record.digest == planned.digest]
        found = _of_digest(same)
        if found is not None:
            planned.state, planned.run, planned.why = found
        if planned.state == "done" and planned.run is not None:
            listener.note(f"{_head(planned)}: done in {planned.run.name} by another process")
            return False
        if planned.state == "elsewhere" and planned.run is not None:
            if before != "elsewhere":
                worker = planned.run.record.worker
                listener.note(f"{_head(planned)}: waiting for {planned.run.name}, in progress in {worker}")
            return False
        listener.note(f"{_head(planned)}: {planned.state}" + (f" ({planned.why})" if planned.why else ""))
        planned.resumes = planned.state == "resumed"
        _open(planned, by_job, name, root)
        planned.state = "running"
        return True


def _of_digest(same: Sequence[Run]) -> tuple[State, Run | None, str] | None:
    """Returns the state of a job from the runs with its digest, its run, and an explanation; None without runs."""
    if not same:
        return None
    complete = next((run for run in same if _is_complete(run)), None)
    if complete is not None:
        return "done", complete, ""
    worked_on = next((run for run in same if run.is_worked_on), None)
    if worked_on is not None:
        return "elsewhere", worked_on, ""
    unfinished = [run for run in same if run.record.status != RunStatus.FINISHED]
    if unfinished:
        return "resumed", unfinished[-1], ""
    return "changed", None, f"the output of {same[-1].name} is missing"


def _decides(
    job: Job, fingerprint: str | None, plan: Mapping[int, Planned], files: dict[str, str | None]
) -> dict[str, Any]:
    keys = deciding_keys(job.recipe, job.command)
    sources = (*job.recipe.data, *job.recipe.val_data, *job.recipe.test_data, *job.recipe.retain_data)
    read = [source.path for source in sources]
    if "eval" in keys:
        read += keys["eval"]["task_data"].values()
    if job.command == "delta" and job.recipe.delta.mask is not None:
        read.append(job.recipe.delta.mask)
    if job.recipe.chat_template is not None:
        read.append(job.recipe.chat_template)
    if job.command == "fft" and job.recipe.fft.support is not None:
        read.append(job.recipe.fft.support)
    patterns = {source.path: source for source in sources if is_pattern(source)}
    for path in read:
        if path not in files:
            files[path] = source_content_digest(patterns[path]) if path in patterns else file_digest(path)
    before: str | list[str] | None = plan[id(job.after)].digest if job.after else None
    if job.candidates:
        before = [plan[id(candidate)].digest for candidate in job.candidates]
    if before is not None:
        del keys["model"]
        if job.command not in ("fft", "interpolate"):  # the fine-tuning rate is then that of the previous stage
            keys.pop("fft", None)
    return {
        "command": job.command,
        **keys,
        "files": {path: files[path] for path in read},
        "the model's weights": fingerprint if before is None else None,
        STAGE_BEFORE: before,
        "the probe": plan[id(job.layers_from)].digest if job.layers_from else None,
    }


def _recognise(job: Job, decides: dict[str, Any], name: str, runs: Sequence[Run]) -> Planned:
    digest = digest_of(decides)
    found = _of_digest([run for run in runs if run.record.digest == digest])
    if found is not None:
        state, run, why = found
        return Planned(job, decides, digest, state, why, run)
    for run in reversed(runs):
        record = run.record
        if (record.recipe, record.stage, record.command) == (name, job.label, job.command) and (
            record.config.get("seed") == job.seed
        ):
            return Planned(job, decides, digest, "changed", f"since {run.name}: {_difference(record.decides, decides)}")
    return Planned(job, decides, digest, "new")


def _has_steps_that_follow_them(job: Job) -> bool:
    """Checks whether the records per step of a job grow with the number of processes."""
    options = {"fft": job.recipe.fft, "probe": job.recipe.mask_train, "mask-train": job.recipe.mask_train}
    section = options.get(job.command)
    return section is not None and getattr(section, "global_batch_size", None) is None


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns the keys that differ, with short values: `mask_train.ratio 0.1 -> 0.2`."""
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


def _open(planned: Planned, by_job: Mapping[int, Planned], name: str, root: Path) -> None:
    """Gives a job its run, a new or a stopped one."""
    job = planned.job
    planned.source, changes = ModelSource(str(job.recipe.model)), {}
    if job.after is not None:
        planned.source = source_of_run(_source_run(job, by_job))
        changes["model"] = planned.source.model
    if job.layers_from is not None:
        recommendation = recommendation_of(_finished(by_job[id(job.layers_from)]))
        changes |= recommendation.settings(job.recipe.mask_train)
    planned.recipe = with_changes(job.recipe, changes)
    if planned.resumes and planned.run is not None:
        planned.run.go_on()
        return
    planned.run = create_run(
        root,
        job.command,
        to_document(planned.recipe),
        recipe=name,
        inputs=planned.source.as_inputs(),
        stage=job.label,
        digest=planned.digest,
        decides=planned.decides,
        processes=planned.launch.processes,
    )


def _source_run(job: Job, by_job: Mapping[int, Planned]) -> Run:
    """The run that makes a job's model; of several candidates, the first with the lowest validation loss."""
    runs = [_finished(by_job[id(other)]) for other in job.candidates or (job.after,) if other is not None]
    return min(runs, key=lambda run: run.result(BestLoss).best_loss) if job.candidates else runs[0]


def _work_on(planned: Planned, listener: Listener, on_change: Callable[[Planned], None]) -> None:
    """Runs a claimed job."""
    run = _finished(planned)
    gc.collect()  # frees the previous model, held in a reference cycle of a trainer and its callbacks
    try:
        run_to_end(run, planned.recipe, planned.source, listener, planned.launch, resume=planned.resumes)
    finally:
        planned.state = "done" if _is_complete(run) else "failed"
        on_change(planned)


def _finished(planned: Planned) -> Run:
    if planned.run is None:
        raise RunError("The run of a stage is missing.", key=planned.job.name, hint="run the experiment from its start")
    return planned.run


def _is_complete(run: Run) -> bool:
    """Checks that a run is finished and its outputs still exist."""
    if run.record.status != RunStatus.FINISHED:
        return False
    result = run.result(Outcome)
    made = (result.model, result.mask) if run.record.command in MODEL_MAKERS else (result.mask,)
    return all(Path(place).exists() for place in made if place)


def stage_runs(root: Path) -> list[Run]:
    """Returns all runs of stages in a runs folder, oldest first.

    Runs recorded under former names get the digest they would have now, as do the runs that build on them.

    Args:
        root: The runs folder.
    """
    runs, digests = [], dict[str, str]()
    for run in list_runs(root)[0]:
        record = run.record
        if record.digest is None:
            continue
        decides = _on_digests(in_names_of_today(record.decides), digests)
        if decides != record.decides:
            digests[record.digest] = digest_of(decides)
            run.record = replace(record, decides=decides, digest=digests[record.digest])
        runs.append(run)
    return runs


def _on_digests(decides: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    def current(value: Any) -> Any:
        return [current(item) for item in value] if isinstance(value, list) else digests.get(value, value)

    return {key: current(value) if key in _ON_STAGES else value for key, value in decides.items()}
