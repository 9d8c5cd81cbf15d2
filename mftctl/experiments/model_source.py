"""What a command works on: given, or found in the newest suitable run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mftctl.data.quickstart.built_in import NAME as QUICKSTART
from mftctl.errors import ConfigError, RunError
from mftctl.experiments.deciding_keys import IN_THE_MODEL
from mftctl.experiments.model_origin import told_origin, was_trained
from mftctl.experiments.recipe import FftOptions, Recipe
from mftctl.experiments.results import MadeState, Outcome, Recommended
from mftctl.experiments.run_folder import Run, list_runs, load_run, newest_run
from mftctl.experiments.state_names import PRE_TRAINED, UNKNOWN


@dataclass(frozen=True, slots=True)
class Source:
    """A model, possibly under a mask, and where it comes from.

    Attributes:
        model: Checkpoint folder, hub id or `quickstart`.
        mask: Mask file to be applied to it, or None.
        state: What it is in the words of the papers: pre-trained, FFT, continued FFT, random mask, MFT, ...
        parents: Names of the runs that made it, oldest first.
        origin: The model that the first of these runs started from; `model` itself without one.
        base: The model that this one was made from, where its own folder tells and no run.
        config: The configuration of the newest of these runs, which later commands go on with; None without one.
    """

    model: str
    mask: str | None = None
    state: str = PRE_TRAINED
    parents: tuple[str, ...] = ()
    origin: str = ""
    config: dict[str, Any] | None = None
    base: str = ""

    def as_inputs(self) -> dict[str, Any]:
        """The record of this source in another run's `inputs`."""
        return {
            "model": self.model,
            "mask": self.mask,
            "state": self.state,
            "parents": list(self.parents),
            "origin": self.origin or self.model,
            **({"base": self.base} if self.base else {}),
        }


def source_of_run(run: Run) -> Source:
    """What a finished `fft`, `mask-train` or `apply` run has made.

    Raises:
        RunError: Its record lacks something.
    """
    inputs, state, made = run.record.inputs, run.result(MadeState).state, run.result(Outcome)
    try:
        return Source(
            model=made.model or inputs["model"],
            mask=made.mask,
            state=state,
            parents=(*inputs["parents"], run.name),
            origin=inputs["origin"],
            config=run.record.config,
        )
    except KeyError as error:
        path = run.folder / "run.json"
        raise RunError("The record of this run is not complete.", path=path, key=str(error.args[0])) from error


def source_of_model(model: str, root: Path) -> Source:
    """A model given by name: a run's own if its folder was made by one, else what its folder tells.

    A folder that tells nothing holds a pre-trained model, unless something in it shows that it was trained.

    Args:
        model: Checkpoint folder, hub id or `quickstart`.
        root: The runs folder.
    """
    path = Path(model)
    if path.is_dir():
        for run in reversed(list_runs(root)[0]):
            # The result of mask-train names a model too: the one it left as it is.
            made = run.result(Outcome).model if run.record.command in ("fft", "apply") else None
            if made is not None and Path(made).resolve() == path.resolve():
                return source_of_run(run)
        told = told_origin(path)
        if told is not None:
            return Source(model, state=told.state, origin=told.origin, base=told.base)
        if was_trained(path):
            return Source(model, state=UNKNOWN)
    return Source(model)


def source_of_mask(model: str, mask: str, root: Path) -> Source:
    """A model under a mask file: the state of the `mask-train` run that wrote it, else simply `masked`."""
    base = source_of_model(model, root)
    for run in reversed(list_runs(root)[0]):
        made = run.result(Outcome)
        copies = [made.mask, made.output]
        if any(copy is not None and Path(copy).resolve() == Path(mask).resolve() for copy in copies):
            return replace(source_of_run(run), model=model, mask=mask, parents=(*base.parents, run.name))
    return replace(base, mask=mask, state="masked")


def newest_source(root: Path, *commands: str) -> Source | None:
    """What the newest finished run of one of these commands has made; None if there is none."""
    run = newest_run(root, *commands)
    return None if run is None else source_of_run(run)


def model_for_training(model: str | None, root: Path, command: str) -> Source:
    """The model to fine-tune, probe or mask.

    Without a name: the newest fine-tuned model of the runs folder, or, for `fft` in a folder without one, the
    built-in model.

    Raises:
        ConfigError: No name, and nothing to fall back on.
    """
    if model is not None:
        return source_of_model(model, root)
    newest = newest_source(root, "fft")
    if newest is not None:
        return newest
    if command == "fft":
        return Source(QUICKSTART)
    raise ConfigError(
        f"{command} needs a model.",
        key="--model",
        expected="a checkpoint folder or a hub id",
        actual=f"none given, and no finished fft run in {root}",
        hint=f"mftctl fft, or mftctl {command} --model DIR --data FILE",
    )


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What a probe recommends to mask.

    Attributes:
        layers: Such as `4-7`.
        run: Name of the probe.
    """

    layers: str
    run: str


def recommendation_of(run: Run) -> Recommendation:
    """What a finished probe recommends.

    Raises:
        RunError: Its record does not say.
    """
    return Recommendation(run.result(Recommended).recommended_layers, run.name)


def recommended_layers(root: Path, source: Source) -> Recommendation | None:
    """What the newest probe of this very model recommends; None without one that does."""
    for run in reversed(list_runs(root)[0]):
        record = run.record
        if record.command == "probe" and record.status == "finished" and record.inputs.get("model") == source.model:
            with suppress(RunError):
                return recommendation_of(run)
    return None


def fft_learning_rate(source: Source, recipe: Recipe) -> float:
    """The learning rate that a model was fine-tuned with: of the run that made it, else of the recipe.

    That of an adapter says nothing of the model's own weights: then it is the default of fine-tuning.
    """
    options = recipe.fft if source.config is None else FftOptions.model_validate(source.config.get("fft", {}))
    return FftOptions().learning_rate if options.method == "lora" else options.learning_rate


def ancestry(root: Path, source: Source) -> list[Source]:
    """The states a source went through, the pre-trained model first and the source itself last.

    A state that was reached twice, such as by `mask-train` and then `apply`, is its newest.

    Args:
        root: The runs folder.
        source: With the runs that made it.

    Raises:
        RunError: One of these runs cannot be read.
    """
    if not source.parents:
        return [source]
    made = [source_of_run(load_run(root / name)) for name in source.parents]
    first = made[0].config or {}
    template = {key: first[key] for key in IN_THE_MODEL if key in first}  # which the model of others has
    newest: dict[str, Source] = {}
    for step in (Source(source.origin, config={**(source.config or {}), **template}), *made):
        newest.pop(step.state, None)
        newest[step.state] = step
    return list(newest.values())
