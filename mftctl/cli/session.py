"""What every command does around its workflow: find the input, settle the recipe, keep a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mftctl.cli.output import Output
from mftctl.data.quickstart.built_in import NAME as QUICKSTART
from mftctl.errors import ConfigError, RunError, StorageError
from mftctl.experiments.deciding_keys import IN_THE_MODEL, OF_THE_MACHINE, to_document
from mftctl.experiments.model_source import Source, model_for_training, recommended_layers
from mftctl.experiments.outputs import Input, check_output, inputs_of
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe, with_changes
from mftctl.experiments.results import FftResult, MaskTrainResult
from mftctl.experiments.run_folder import Run, create_run, load_run, newest_run
from mftctl.files.atomic import Permit
from mftctl.runtime.process_group import from_first
from mftctl.runtime.processes import world_size
from mftctl.workflows.multi_process.dispatch import launch_of
from mftctl.workflows.multi_process.process_count import Launch, require_devices
from mftctl.workflows.probe_by import check_by

MakePermit = Callable[[bool], Permit]
"""The permit for a kind of result, with the user's agreement to replace one or without."""

_OPEN_TO_RESUMED = ("device", "attention", "check_memory")
"""Keys that decide where something is computed and whether to try, and no result."""


class Session:
    """One command with its options, its console and its runs folder.

    Attributes:
        command: Name of the command.
        root: The runs folder.
        output: The console.
        replaces: Whether the user agreed that an existing result is replaced, with `--yes` or when asked.
        launch: With how many processes the work is done.
    """

    def __init__(
        self,
        command: str,
        output: Output,
        root: Path,
        *,
        recipe: str | None = None,
        sets: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
        yes: bool = False,
        launch: Launch | None = None,
    ) -> None:
        self.command = command
        self.output = output
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
            return self._resumed(permit)
        settled = self.settle()
        source = model_for_training(settled.model, self.root, self.command)
        if settled.model is None:
            self.output.note(f"Model: {source.model} ({source.state}{_made_by(source)})")
        self._options["model"] = source.model
        recipe = self.settle(source)
        self._check_measuring(recipe)
        self._check_scoring(recipe)
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
        self.output.note(f"Run: {run.folder}")
        return run

    def with_answer(self, key: str, question: str, option: str, source: Source) -> Recipe:
        """The recipe with a missing value asked for on a terminal.

        Raises:
            ConfigError: Nobody is there to answer; names the option.
        """
        self._options[key] = [self.output.ask(question, option)]
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
            self.replaces = self.output.confirm_replacing(str(output))
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

    def end(self, result: FftResult | MaskTrainResult) -> None:
        """Nothing, if the result is where it was wanted.

        Raises:
            StorageError: It is in the run folder alone, since something else is at the output by now.
        """
        if result.output_refused is not None:
            raise StorageError(
                "The result is not at the output, where something else is by now.",
                path=result.mask if isinstance(result, MaskTrainResult) else result.model,
                actual=result.output_refused,
                hint="copy it from the run folder, where it is whole",
            )

    def _check_measuring(self, recipe: Recipe) -> None:
        """Nothing, if benchmarks that were asked for are measured at some step."""
        section = recipe.fft if self.command == "fft" else recipe.mask_train
        if "eval.tasks" in self._options and section.eval_every is None:
            raise ConfigError(
                "Benchmarks are measured while training only where it is said how often.",
                key="--eval-every",
                expected="a number of steps",
                actual=f"none given, and --tasks {','.join(self._options['eval.tasks'])}",
                hint=f"mftctl {self.command} --eval-every 100 --tasks ..., or mftctl eval --tasks ... afterwards",
            )

    def _check_scoring(self, recipe: Recipe) -> None:
        """Nothing, if what a probe is told of problems is of those that it scores."""
        if self.command != "probe":
            return
        check_by(recipe)
        files, by = self._options.get("eval.task_data", {}), recipe.probe.by
        unused = [f"--task-data {task}={file}" for task, file in files.items() if task != by]
        unused += ["--limit"] if "eval.limit" in self._options and by == "loss" else []
        if unused:
            raise ConfigError(
                "A probe scores no problems but those it ranks groups by.",
                key="--by",
                expected="the benchmark that the file is of, or for --limit exact_match or a benchmark",
                actual=f"{by}, and {' '.join(unused)}",
                hint=f"mftctl probe --by {next(iter(files), 'exact_match')} ...",
            )

    def _with_layers(self, source: Source) -> Recipe:
        """The recipe with the layers that a probe of this model recommends, or all."""
        found = recommended_layers(self.root, source)
        if found is None:
            self.output.note("Layers: all, since no probe of this model says which gain most (mftctl probe)")
        else:
            self.output.note(f"Layers: {found.layers}, recommended by {found.run}")
        self._options["mask_train.layers"] = "all" if found is None else found.layers
        return self.settle(source)

    def _resumed(self, permit: MakePermit | None) -> tuple[Run, Recipe, Source]:
        changes = [key for key in self._options if key not in _OPEN_TO_RESUMED]
        if changes or self._sets or self._recipe_name:
            raise ConfigError(
                "A resumed run keeps its settings, but for the device, its attention and the memory check.",
                actual=", ".join([*changes, *self._sets, *filter(None, [self._recipe_name])]),
                hint=f"mftctl {self.command} --resume without them, or a new run without --resume",
            )

        def take_up() -> str:
            found = newest_run(self.root, self.command, unfinished=True)
            if found is None:
                raise RunError(f"There is no stopped {self.command} run to resume.", path=self.root)
            if found.record.output is not None and permit is not None:
                recipe = load_recipe(base=found.record.config)
                inputs = inputs_of(recipe, models=(found.record.inputs["model"], found.record.inputs["origin"]))
                self.settle_output(Path(found.record.output), inputs, permit)
            found.go_on()
            return str(found.folder)

        # Processes find each other on the device, so that each looks for itself where the run was.
        stopped = newest_run(self.root, self.command, unfinished=True)
        if stopped is not None:
            use_device(load_recipe(base=stopped.record.config, options=self._options), self.launch)
        run = load_run(Path(from_first(take_up)))
        self.output.note(f"Resuming: {run.folder}")
        inputs = run.record.inputs
        source = Source(
            inputs["model"],
            inputs["mask"],
            inputs["state"],
            tuple(inputs["parents"]),
            inputs["origin"],
            run.record.config,
        )
        recipe = load_recipe(base=run.record.config, options=self._options)
        return run, self._for_as_many_records(recipe, run), source

    def _processes(self, recipe: Recipe) -> int:
        """How many work on a run, started by this command or beside it."""
        return max(world_size(), launch_of(self.command, recipe, self.launch).processes)

    def _for_as_many_records(self, recipe: Recipe, run: Run) -> Recipe:
        """The recipe whose optimizer steps, with the processes there are now, have the records they began with.

        Raises:
            ConfigError: With so many processes no accumulation gives that.
        """
        section = "fft" if self.command == "fft" else "mask_train"
        options = recipe.fft if self.command == "fft" else recipe.mask_train
        processes = self._processes(recipe)
        if run.record.processes == processes or options.global_batch_size is not None:
            return recipe
        steps = (options.grad_accum_steps or 1) * run.record.processes
        if options.batch_tokens is not None:  # which shares out any number of records
            records = steps * options.batch_size
            return with_changes(recipe, {f"{section}.grad_accum_steps": None, f"{section}.global_batch_size": records})
        if steps % processes:
            raise ConfigError(
                "A resumed run keeps the records of a step, and they cannot be shared out so.",
                key="WORLD_SIZE" if world_size() > 1 else "--processes",
                expected=f"a number of processes that divides {steps} micro-batches a step",
                actual=processes,
                hint="next time --global-batch-size with --batch-tokens, whose runs go on with any number of processes",
            )
        return with_changes(recipe, {f"{section}.grad_accum_steps": steps // processes})


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
