"""Steps common to all commands: find the input, resolve the recipe, create or resume a run, check the output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mftctl.cli.measuring_options import check_measuring, check_scoring
from mftctl.cli.output import Output
from mftctl.cli.resumption import check_settings_kept, source_of_resumed, take_up, with_same_step_records
from mftctl.data.quickstart.built_in import NAME as QUICKSTART
from mftctl.errors import StorageError
from mftctl.experiments.combined_results import InterpolateResult
from mftctl.experiments.deciding_keys import IN_THE_MODEL, OF_THE_MACHINE
from mftctl.experiments.mask_results import MaskTrainResult
from mftctl.experiments.model_source import ModelSource, model_for_training, recommended_layers
from mftctl.experiments.outputs import Input, check_output, inputs_of
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.results import FftResult
from mftctl.experiments.run_folder import Run, newest_run
from mftctl.experiments.run_inputs import Source
from mftctl.experiments.tracking.names import warn_of_missing
from mftctl.files.atomic import Permit
from mftctl.runtime.process_group import from_first
from mftctl.runtime.processes import world_size
from mftctl.workflows.command_run import new_run, use_device
from mftctl.workflows.multi_process.dispatch import launch_of
from mftctl.workflows.multi_process.process_count import Launch

MakePermit = Callable[[bool], Permit]
"""Makes the permit for a kind of result, with or without the user's consent to replace an existing one."""


class Session:
    """One command with its options, its console and its runs folder.

    Attributes:
        command: Name of the command.
        root: The runs folder.
        console: The console.
        replaces: Whether the user agreed to replace an existing result, with `--yes` or when asked.
        launch: The number of processes that do the work.
    """

    def __init__(
        self,
        command: str,
        console: Output,
        root: Path,
        *,
        recipe: str | None = None,
        sets: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
        yes: bool = False,
        launch: Launch | None = None,
    ) -> None:
        self.command = command
        self.console = console
        self.root = root
        self.replaces = yes
        self.launch = launch or Launch()
        self._recipe_name = recipe
        self._sets = list(sets or ())
        self._options = dict(options or {})

    def settle(self, source: ModelSource | None = None) -> Recipe:
        """Returns the resolved recipe: options over `--set` over the recipe over the source run's configuration."""
        name, base = self._recipe_name, None
        if name is None and source is not None:
            base = inherited(source)
            name = QUICKSTART if base is None and source.model == QUICKSTART else None
        return load_recipe(name, base=base, sets=self._sets, options=self._options, stages=False)

    def settle_with_model(self, command: str) -> tuple[Recipe, ModelSource]:
        """Returns the resolved recipe for the given model, or for the one that a training command would use.

        Args:
            command: That command.

        Raises:
            ConfigError: Options are not valid, or no model was given and none was found.
        """
        settled = self.settle()
        source = model_for_training(settled.model, self.root, command)
        if settled.model is None:
            self.console.note(f"Model: {source.model} ({source.state}{_made_by(source)})")
        self._options["model"] = source.model
        return self.settle(source), source

    def open_training(
        self, *, resume: bool, output: Path | None = None, permit: MakePermit | None = None
    ) -> tuple[Run, Recipe, ModelSource]:
        """Returns a training run, new or resumed, with its recipe and its source.

        Args:
            resume: Resume the latest unfinished run of this command, with its own configuration.
            output: Where to write the result in addition to the run folder.
            permit: The permit for that kind of result; None without an output.

        Raises:
            ConfigError: Options are invalid, or given together with `resume`.
            OutputError: The output would replace something that must be kept.
            RunError: There is no run to resume.
        """
        if resume:
            return self._resume(permit)
        recipe, source = self.settle_with_model(self.command)
        check_measuring(self.command, recipe, self._options)
        check_scoring(self.command, recipe, self._options)
        drops = self.command == "mask-train" and recipe.mask_train.method == "drop"
        if not recipe.data and not drops:
            recipe = self.with_answer("data", "Training data (file or hub id)", "--data", source)
        has_layers = not drops and recipe.mask_train.target != "projector"
        if self.command == "mask-train" and recipe.mask_train.layers is None and has_layers:
            recipe = self._with_layers(source)
        use_device(recipe, self.launch)
        output = self._settle_training_output(output, recipe, source, permit)
        return self.create(recipe, source, output=output), recipe, source

    def create(self, recipe: Recipe, source: ModelSource, *, output: Path | None = None) -> Run:
        """Creates a run of this command and returns it in all processes that work on it."""
        run = new_run(
            self.root,
            self.command,
            recipe,
            source,
            recipe_name=self._recipe_name,
            output=output,
            processes=self._processes(recipe),
        )
        warn_of_missing(recipe.track, self.console)
        self.console.note(f"Run: {run.folder}")
        return run

    def with_answer(self, key: str, question: str, option: str, source: ModelSource) -> Recipe:
        """Asks for a missing value on the terminal and returns the recipe with it.

        Raises:
            ConfigError: No user can answer; names the option.
        """
        self._options[key] = [self.console.ask(question, option)]
        return self.settle(source)

    def settle_output(self, output: Path, inputs: Iterable[Input], permit: MakePermit) -> Path:
        """Returns the output path with links resolved, if it can be written; asks before replacing a result.

        Args:
            output: The path as given.
            inputs: The files that the command reads.
            permit: The permit for the kind of result.

        Raises:
            OutputError: It would replace a file of the user, or a result without their consent.
            StorageError: The folder is read-only.
        """
        path = check_output(output, inputs, self.root)
        if not os.path.lexists(path):
            return path
        permit(True)(path)
        is_empty = path.is_dir() and not any(path.iterdir())
        if not self.replaces and not is_empty:
            self.replaces = self.console.confirm_replacing(str(output))
            permit(self.replaces)(path)
        return path

    def _settle_training_output(
        self, output: Path | None, recipe: Recipe, source: ModelSource, permit: MakePermit | None
    ) -> Path | None:
        if output is None or permit is None:
            return None
        models = (source.model, source.mask, source.origin)
        inputs = inputs_of(recipe, models=models, recipe_name=self._recipe_name)
        return Path(from_first(lambda: str(self.settle_output(output, inputs, permit))))

    def end(self, result: FftResult | MaskTrainResult | InterpolateResult) -> None:
        """Checks that the result was written to the requested output.

        Raises:
            StorageError: The result is only in the run folder, as something else has appeared at the output meanwhile.
        """
        if result.output_refused is not None:
            raise StorageError(
                "The result was not written to the output, where another file has appeared meanwhile.",
                path=result.mask if isinstance(result, MaskTrainResult) else result.model,
                actual=result.output_refused,
                hint="copy it from the run folder, where it is complete",
            )

    def _with_layers(self, source: ModelSource) -> Recipe:
        """Returns the recipe with the layers recommended by a probe of this model, or all layers."""
        found = recommended_layers(self.root, source)
        if found is None:
            self.console.note("Layers: all, as there is no probe of this model yet (mftctl probe)")
            self._options["mask_train.layers"] = "all"
            return self.settle(source)
        options = self.settle(source).mask_train
        projections = found.projections(options)
        text = f"{found.layers}, projections: {projections[0]}" if projections else found.layers
        self.console.note(f"Layers: {text}, recommended by {found.run}")
        if found.projection is not None and projections is None:
            self.console.note(f"Projections: as in the options; {found.run} recommends {found.projection}")
        self._options |= found.settings(options)
        return self.settle(source)

    def _resume(self, permit: MakePermit | None) -> tuple[Run, Recipe, ModelSource]:
        check_settings_kept(self.command, [*self._options, *self._sets, *filter(None, [self._recipe_name])])
        # Processes connect on the device, so each first looks up the device of the run by itself.
        stopped = newest_run(self.root, self.command, unfinished=True)
        if stopped is not None:
            use_device(load_recipe(base=stopped.record.config, options=self._options), self.launch)
        run = take_up(self.command, self.root, lambda found: self._settle_resumed_output(found, permit))
        self.console.note(f"Resuming: {run.folder}")
        recipe = load_recipe(base=run.record.config, options=self._options)
        warn_of_missing(recipe.track, self.console)
        return run, with_same_step_records(recipe, run, self._processes(recipe)), source_of_resumed(run)

    def _settle_resumed_output(self, run: Run, permit: MakePermit | None) -> None:
        if run.record.output is not None and permit is not None:
            recipe = load_recipe(base=run.record.config)
            source = run.inputs(Source)
            inputs = inputs_of(recipe, models=(source.model, source.origin))
            self.settle_output(Path(run.record.output), inputs, permit)

    def _processes(self, recipe: Recipe) -> int:
        """Returns the number of processes that work on a run, started by this command or by a launcher."""
        return max(world_size(), launch_of(self.command, recipe, self.launch).processes)


def inherited(source: ModelSource) -> dict[str, Any] | None:
    """Returns the configuration of the run that made a model, without machine settings and keys stored in the model.

    Args:
        source: The model; None is returned if no run made it.
    """
    if source.config is None:
        return None
    has_template = bool(source.parents) and source.parents[-1].endswith("-fft")
    left_out = (*OF_THE_MACHINE, *(IN_THE_MODEL if has_template else ()))
    return {key: value for key, value in source.config.items() if key not in left_out}


def _made_by(source: ModelSource) -> str:
    return f", from {source.parents[-1]}" if source.parents else ", built in"


def mask_file_permit(agreed: bool) -> Permit:
    """Returns a permit that lets a mask file be replaced if the user agreed."""
    from mftctl.masking.mask import mask_permit

    return mask_permit(replace=agreed)
