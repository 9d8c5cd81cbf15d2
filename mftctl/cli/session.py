"""What every command does around its workflow: find the input, settle the recipe, keep a run."""

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
from mftctl.experiments.deciding_keys import IN_THE_MODEL, OF_THE_MACHINE, to_document
from mftctl.experiments.model_source import Source, model_for_training, recommended_layers
from mftctl.experiments.outputs import Input, check_output, inputs_of
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.run_folder import Run, create_run, load_run, newest_run
from mftctl.files.atomic import Permit
from mftctl.runtime.process_group import from_first
from mftctl.runtime.processes import world_size
from mftctl.workflows.multi_process.dispatch import launch_of
from mftctl.workflows.multi_process.process_count import Launch, require_devices

MakePermit = Callable[[bool], Permit]
"""The permit for a kind of result, with the user's agreement to replace one or without."""


class Session:
    """One command with its options, its console and its runs folder.

    Attributes:
        command: Name of the command.
        root: The runs folder.
        console: Where it reports and asks.
        replaces: Whether the user agreed that an existing result is replaced, with `--yes` or when asked.
        launch: With how many processes the work is done.
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

    def settle(self, source: Source | None = None) -> Recipe:
        """The recipe in force: options over `--set` over the recipe over what the source's run was made with."""
        name, base = self._recipe_name, None
        if name is None and source is not None:
            base = _inherited(source)
            name = QUICKSTART if base is None and source.model == QUICKSTART else None
        return load_recipe(name, base=base, sets=self._sets, options=self._options, stages=False)

    def open_training(
        self, *, resume: bool, output: Path | None = None, permit: MakePermit | None = None
    ) -> tuple[Run, Recipe, Source]:
        """A run to train in, new or resumed, with its recipe and its source.

        Args:
            resume: Go on with the newest unfinished run of this command, as it was configured.
            output: Where the result is wanted besides the run folder.
            permit: For that kind of result; None where there is no output.

        Raises:
            ConfigError: Options that do not fit, or given together with a resumption.
            OutputError: The output is in the way of something that is not to be replaced.
            RunError: Nothing to resume.
        """
        if resume:
            return self._resume(permit)
        settled = self.settle()
        source = model_for_training(settled.model, self.root, self.command)
        if settled.model is None:
            self.console.note(f"Model: {source.model} ({source.state}{_made_by(source)})")
        self._options["model"] = source.model
        recipe = self.settle(source)
        check_measuring(self.command, recipe, self._options)
        check_scoring(self.command, recipe, self._options)
        drops = self.command == "mask-train" and recipe.mask_train.method == "drop"
        if not recipe.data and not drops:
            recipe = self.with_answer("data", "Training data (file or hub id)", "--data", source)
        if self.command == "mask-train" and recipe.mask_train.layers is None and not drops:
            recipe = self._with_layers(source)
        use_device(recipe, self.launch)
        output = self._settle_training_output(output, recipe, source, permit)
        return self.create(recipe, source, output=output), recipe, source

    def create(self, recipe: Recipe, source: Source, *, output: Path | None = None) -> Run:
        """A new run of this command, in all processes that work on it."""
        made = from_first(
            lambda: str(
                create_run(
                    self.root,
                    self.command,
                    to_document(recipe),
                    recipe=self._recipe_name,
                    inputs=source.as_inputs(),
                    output=output,
                    processes=self._processes(recipe),
                ).folder
            )
        )
        run = load_run(Path(made))
        self.console.note(f"Run: {run.folder}")
        return run

    def with_answer(self, key: str, question: str, option: str, source: Source) -> Recipe:
        """The recipe with a missing value asked for on a terminal.

        Raises:
            ConfigError: Nobody is there to answer; names the option.
        """
        self._options[key] = [self.console.ask(question, option)]
        return self.settle(source)

    def settle_output(self, output: Path, inputs: Iterable[Input], permit: MakePermit) -> Path:
        """The output's path without links, if a result can go there; asks before one is replaced.

        Args:
            output: As given.
            inputs: What the command reads.
            permit: For the kind of result.

        Raises:
            OutputError: It would replace what is the user's, or a result without their agreement.
            StorageError: Its folder is read-only.
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
        self, output: Path | None, recipe: Recipe, source: Source, permit: MakePermit | None
    ) -> Path | None:
        if output is None or permit is None:
            return None
        models = (source.model, source.mask, source.origin)
        inputs = inputs_of(recipe, models=models, recipe_name=self._recipe_name)
        return Path(from_first(lambda: str(self.settle_output(output, inputs, permit))))

    def end(self, result: Mapping[str, Any]) -> None:
        """Nothing, if the result is where it was wanted.

        Raises:
            StorageError: It is in the run folder alone, since something else is at the output by now.
        """
        refused = result.get("output_refused")
        if refused is not None:
            raise StorageError(
                "The result is not at the output, where something else is by now.",
                path=result.get("mask") or result["model"],
                actual=refused,
                hint="copy it from the run folder, where it is whole",
            )

    def _with_layers(self, source: Source) -> Recipe:
        """The recipe with the layers that a probe of this model recommends, or all."""
        found = recommended_layers(self.root, source)
        if found is None:
            self.console.note("Layers: all, since no probe of this model says which gain most (mftctl probe)")
        else:
            self.console.note(f"Layers: {found[0]}, recommended by {found[1]}")
        self._options["mask_train.layers"] = "all" if found is None else found[0]
        return self.settle(source)

    def _resume(self, permit: MakePermit | None) -> tuple[Run, Recipe, Source]:
        check_settings_kept(self.command, [*self._options, *self._sets, *filter(None, [self._recipe_name])])
        # Processes find each other on the device, so that each looks for itself where the run was.
        stopped = newest_run(self.root, self.command, unfinished=True)
        if stopped is not None:
            use_device(load_recipe(base=stopped.record.config, options=self._options), self.launch)
        run = take_up(self.command, self.root, lambda found: self._settle_resumed_output(found, permit))
        self.console.note(f"Resuming: {run.folder}")
        recipe = load_recipe(base=run.record.config, options=self._options)
        return run, with_same_step_records(recipe, run, self._processes(recipe)), source_of_resumed(run)

    def _settle_resumed_output(self, run: Run, permit: MakePermit | None) -> None:
        if run.record.output is not None and permit is not None:
            recipe = load_recipe(base=run.record.config)
            inputs = inputs_of(recipe, models=(run.record.inputs["model"], run.record.inputs["origin"]))
            self.settle_output(Path(run.record.output), inputs, permit)

    def _processes(self, recipe: Recipe) -> int:
        """How many work on a run, started by this command or beside it."""
        return max(world_size(), launch_of(self.command, recipe, self.launch).processes)


def use_device(recipe: Recipe, launch: Launch) -> None:
    """Makes the recipe's device that on which the processes of this command find each other.

    Raises:
        ConfigError: It is not there, or not for each process, before anything of a run is.
    """
    from mftctl.runtime.devices import find_device, join_on, require_attention

    require_devices(launch, recipe.device)
    require_attention(recipe.attention, find_device(recipe.device))
    join_on(recipe.device)


def _inherited(source: Source) -> dict[str, Any] | None:
    """The configuration of the run that made a model, but for where it computed and what it wrote into the model."""
    if source.config is None:
        return None
    has_template = bool(source.parents) and source.parents[-1].endswith("-fft")
    left_out = (*OF_THE_MACHINE, *(IN_THE_MODEL if has_template else ()))
    return {key: value for key, value in source.config.items() if key not in left_out}


def _made_by(source: Source) -> str:
    return f", made by {source.parents[-1]}" if source.parents else ", built in"


def mask_file_permit(agreed: bool) -> Permit:
    """What lets a mask file be replaced, if the user agreed."""
    from mftctl.masking.mask import mask_permit

    return mask_permit(replace=agreed)
