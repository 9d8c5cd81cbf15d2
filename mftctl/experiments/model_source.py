"""The source model of a command: given, or found in the latest suitable run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mftctl.data.quickstart.built_in import NAME as QUICKSTART
from mftctl.errors import ConfigError, RunError
from mftctl.experiments.deciding_keys import IN_THE_MODEL
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.model_origin import told_origin, was_trained
from mftctl.experiments.probe_results import Recommended
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import MadeState, Outcome
from mftctl.experiments.run_folder import Run, list_runs, load_run, newest_run
from mftctl.experiments.run_inputs import Lineage, RunInputs, Source, UsedModel
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import MASKED, PRE_TRAINED, UNKNOWN

MODEL_MAKERS = ("fft", "apply", "average", "interpolate", "delta-merge")
"""Commands that write a checkpoint."""
MASK_MAKERS = ("mask-train", "delta")
"""Commands that write a file to apply to a model."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model, optionally with a mask, and its origin.

    Attributes:
        model: Checkpoint folder, hub id or `quickstart`.
        mask: Mask file to apply to it, or None.
        state: Label of its state, as in the papers: pre-trained, FFT, continued FFT, random mask, MFT, ...
        parents: Names of the runs that made it, oldest first.
        origin: The model that the first of these runs started from; `model` itself without runs.
        base: The model that this one was made from, if known only from its own folder.
        config: The configuration of the latest of these runs, which later commands inherit; None without runs.
    """

    model: str
    mask: str | None = None
    state: str = PRE_TRAINED
    parents: tuple[str, ...] = ()
    origin: str = ""
    config: dict[str, Any] | None = None
    base: str = ""

    def as_inputs(self) -> dict[str, Any]:
        """Returns the record of this source for the `inputs` of a run."""
        # Not checked here: a new run reports a path that cannot be recorded.
        return Source.model_construct(
            model=self.model,
            mask=self.mask,
            state=self.state,
            parents=list(self.parents),
            origin=self.origin or self.model,
            base=self.base or None,
        ).document()


def source_of_run(run: Run) -> ModelSource:
    """Returns the model or mask that a finished run made as a source.

    Raises:
        RunError: The record of the run is incomplete.
    """
    inputs, state, made = run.record.inputs, run.result(MadeState).state, run.result(Outcome)
    try:
        lineage = Lineage.read(inputs)
        return ModelSource(
            model=made.model or UsedModel.read(inputs).model,
            mask=made.mask,
            state=state,
            parents=(*lineage.parents, run.name),
            origin=lineage.origin,
            config=run.record.config,
        )
    except ValidationError as error:
        path, key = run.folder / "run.json", error.errors()[0]["loc"][0]
        raise RunError("The record of this run is incomplete.", path=path, key=str(key)) from error


def source_of_model(model: str, root: Path) -> ModelSource:
    """Returns the source for a model: from the run that made its folder, otherwise from the folder's own marker.

    A folder without a marker contains a pre-trained model, unless other files in it show that it was trained.

    Args:
        model: Checkpoint folder, hub id or `quickstart`.
        root: The runs folder.
    """
    path = Path(model)
    if path.is_dir():
        for run in reversed(list_runs(root)[0]):
            # The result of mask-train also names a model: the one it left unchanged.
            made = run.result(Outcome).model if run.record.command in MODEL_MAKERS else None
            if made is not None and Path(made).resolve() == path.resolve():
                return source_of_run(run)
        told = told_origin(path)
        if told is not None:
            return ModelSource(model, state=told.state, origin=told.origin, base=told.base)
        if was_trained(path):
            return ModelSource(model, state=UNKNOWN)
    return ModelSource(model)


def source_of_mask(model: str, mask: str, root: Path) -> ModelSource:
    """Returns the source for a model with a mask file, in the state of its `mask-train` run, or just `masked`."""
    base = source_of_model(model, root)
    for run in reversed(list_runs(root)[0]):
        made = run.result(Outcome)
        copies = [made.mask, made.output]
        if any(copy is not None and Path(copy).resolve() == Path(mask).resolve() for copy in copies):
            return replace(source_of_run(run), model=model, mask=mask, parents=(*base.parents, run.name))
    return replace(base, mask=mask, state=MASKED)


def source_to_measure(model: str | None, mask: Path | None, root: Path, *, what: str, hint: str) -> ModelSource:
    """Returns the given model, with its mask if one is given, or the result of the latest run that made one.

    Args:
        model: Checkpoint folder, hub id or `quickstart`.
        mask: A mask file on this machine.
        root: The runs folder.
        what: What needs the model, such as "eval".
        hint: How to give one.

    Raises:
        ConfigError: Only a mask is given, or no model is given and no run has made one.
    """
    if model is not None:
        return source_of_model(model, root) if mask is None else source_of_mask(model, str(mask), root)
    newest = newest_source(root, *MODEL_MAKERS, *MASK_MAKERS)
    if newest is None or mask is not None:
        raise ConfigError(
            f"{what} needs a model.",
            key="MODEL",
            expected="a checkpoint folder or a hub id",
            actual="only a mask" if mask else f"none given, and no finished run in {root}",
            hint=hint,
        )
    return newest


def newest_source(root: Path, *commands: str) -> ModelSource | None:
    """Returns the result of the latest finished run of these commands; None if there is none."""
    run = newest_run(root, *commands)
    return None if run is None else source_of_run(run)


def model_for_training(model: str | None, root: Path, command: str) -> ModelSource:
    """Returns the model to fine-tune, probe or mask.

    Without a name, the latest fine-tuned model in the runs folder or, for `fft` in a folder without one, the built-in
    model.

    Raises:
        ConfigError: No model was given, and none was found.
    """
    if model is not None:
        return source_of_model(model, root)
    newest = newest_source(root, "fft")
    if newest is not None:
        return newest
    if command == "fft":
        return ModelSource(QUICKSTART)
    raise ConfigError(
        f"{command} needs a model.",
        key="--model",
        expected="a checkpoint folder or a hub id",
        actual=f"none given, and no finished fft run in {root}",
        hint=f"mftctl fft, or mftctl {command} --model DIR --data FILE",
    )


def known_base(source: ModelSource, given: str | None, *, key: str, what: str) -> str:
    """Returns the model before fine-tuning: the given one, or the one that the lineage of a model started from.

    Args:
        source: The fine-tuned model.
        given: The model before fine-tuning, if named.
        key: The recipe key that names it.
        what: What needs it, such as "The drop method".

    Raises:
        ConfigError: None is given, and none is known.
    """
    if given is not None:
        return given
    if source.origin and source.origin != source.model:
        return source.origin
    raise ConfigError(
        f"{what} needs the model before fine-tuning.",
        key=key,
        expected="a checkpoint folder or a hub id",
        actual=f"none given, and no run in the runs folder produced {source.model}",
        hint="--base MODEL",
    )


def combined_source(sources: Sequence[ModelSource]) -> ModelSource:
    """Returns several models as one source: the first one, with the runs that made any of them.

    Args:
        sources: The models, at least one.
    """
    first = sources[0]
    parents = tuple(dict.fromkeys(name for source in sources for name in source.parents))
    config = next((source.config for source in sources if source.config is not None), None)
    return replace(first, parents=parents, config=config)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What a probe recommends to mask.

    Attributes:
        layers: The layers, such as `4-7`.
        run: Name of the probe's run.
        projection: Kind of projection; None for all.
        target: The part of each layer that the probe masked.
    """

    layers: str
    run: str
    projection: str | None = None
    target: str = "both"

    def projections(self, options: MaskTrainOptions) -> list[str] | None:
        """Returns the projections to mask with these options; None if they are left as they are.

        Options that name projections, or another part of each layer than the probe's, take precedence.
        """
        has_own = options.masked_projections is not None or options.target != self.target
        if self.projection is None or has_own or options.method == "drop":  # drop compares whole models
            return None
        return [self.projection]

    def settings(self, options: MaskTrainOptions) -> dict[str, Any]:
        """Returns the recipe keys that the recommendation sets, with their values."""
        projections = self.projections(options)
        changes: dict[str, Any] = {"mask_train.layers": self.layers}
        return changes if projections is None else {**changes, "mask_train.projections": projections}


def recommendation_of(run: Run) -> Recommendation:
    """Returns the recommendation of a finished probe.

    Raises:
        RunError: Its record contains none.
    """
    found = run.result(Recommended)
    target = run.record.config.get("mask_train", {}).get("target", "both")
    return Recommendation(found.recommended_layers, run.name, found.recommended_projection, target)


def recommended_layers(root: Path, source: ModelSource) -> Recommendation | None:
    """Returns the recommendation of the latest probe of this model; None without one."""
    for run in reversed(list_runs(root)[0]):
        record, inputs = run.record, RunInputs.read(run.record.inputs)
        if record.command == "probe" and record.status == RunStatus.FINISHED and inputs.model == source.model:
            with suppress(RunError):
                return recommendation_of(run)
    return None


def fft_learning_rate(source: ModelSource, recipe: Recipe) -> float:
    """Returns the learning rate of a model's fine-tuning: from the run that made it, otherwise from the recipe.

    The rate of an adapter does not apply to the model's own weights; the default of fine-tuning is used instead.
    """
    options = recipe.fft if source.config is None else FftOptions.model_validate(source.config.get("fft", {}))
    return FftOptions().learning_rate if options.trains_adapter else options.learning_rate


def ancestry(root: Path, source: ModelSource) -> list[ModelSource]:
    """Returns the states a source went through, from the pre-trained model to the source itself.

    Of a state reached twice, such as by `mask-train` and then `apply`, only the latest is kept.

    Args:
        root: The runs folder.
        source: The source, with the runs that made it.

    Raises:
        RunError: One of these runs cannot be read.
    """
    if not source.parents:
        return [source]
    made = [source_of_run(load_run(root / name)) for name in source.parents]
    first = made[0].config or {}
    template = {key: first[key] for key in IN_THE_MODEL if key in first}  # later states have it in their model
    newest: dict[str, ModelSource] = {}
    for step in (ModelSource(source.origin, config={**(source.config or {}), **template}), *made):
        newest.pop(step.state, None)
        newest[step.state] = step
    return list(newest.values())
