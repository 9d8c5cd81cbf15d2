"""What every command does around its workflow: find the input, settle the recipe, keep a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mftctl.cli.output import Output
from mftctl.config import Recipe, to_document
from mftctl.errors import ConfigError, RunError
from mftctl.file_names import require_short
from mftctl.lineage import Source, model_for_training, recommended_layers
from mftctl.processes import from_first, world_size
from mftctl.quickstart import NAME as QUICKSTART
from mftctl.recipe_files import load_recipe, with_changes
from mftctl.runs import Run, create_run, load_run, newest_run
from mftctl.storage import require_writable


class Session:
    """One command with its options, its console and its runs folder.

    Attributes:
        command: Name of the command.
        root: The runs folder.
        output: The console.
        yes: Whether existing results may be replaced without asking.
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
    ) -> None:
        self.command = command
        self.output = output
        self.root = root
        self.yes = yes
        self._recipe_name = recipe
        self._sets = list(sets or ())
        self._options = dict(options or {})

    def settle(self, source: Source | None = None) -> Recipe:
        """The recipe in force: options over `--set` over the recipe over what the source's run was made with."""
        name, base = self._recipe_name, None
        if name is None and source is not None:
            base = source.config
            name = QUICKSTART if base is None and source.model == QUICKSTART else None
        return load_recipe(name, base=base, sets=self._sets, options=self._options, stages=False)

    def open_training(self, *, resume: bool, output: Path | None = None) -> tuple[Run, Recipe, Source]:
        """A run to train in, new or resumed, with its recipe and its source.

        Args:
            resume: Go on with the newest unfinished run of this command, as it was configured.
            output: Where the result is wanted besides the run folder.

        Raises:
            ConfigError: Options that do not fit, or given together with a resumption.
            RunError: Nothing to resume.
        """
        if resume:
            return self._resumed()
        settled = self.settle()
        source = model_for_training(settled.model, self.root, self.command)
        if settled.model is None:
            self.output.note(f"Model: {source.model} ({source.state}{_made_by(source)})")
        self._options["model"] = source.model
        recipe = self.settle(source)
        self._check_measuring(recipe)
        drops = self.command == "mask-train" and recipe.mask_train.method == "drop"
        if not recipe.data and not drops:
            recipe = self.with_answer("data", "Training data (file or hub id)", "--data", source)
        if self.command == "mask-train" and recipe.mask_train.layers is None and not drops:
            recipe = self._with_layers(source)
        self.check_replacing(output)
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

    def check_replacing(self, path: Path | None) -> None:
        """Nothing, if `path` can be written, and is free or may be replaced.

        Raises:
            ConfigError: There is a result already, and nobody agreed.
            StorageError: Its folder is read-only, or its name too long.
        """
        if path is not None:
            require_short(path)
            require_writable(path)
        if path is None or not path.exists() or (path.is_dir() and not any(path.iterdir())) or self.yes:
            return
        if not self.output.confirm_replacing(str(path)):
            raise ConfigError("There is a result already.", path=path, hint="another --output, or --yes to replace it")

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

    def _with_layers(self, source: Source) -> Recipe:
        """The recipe with the layers that a probe of this model recommends, or all."""
        found = recommended_layers(self.root, source)
        if found is None:
            self.output.note("Layers: all, since no probe of this model says which gain most (mftctl probe)")
        else:
            self.output.note(f"Layers: {found[0]}, recommended by {found[1]}")
        self._options["mask_train.layers"] = "all" if found is None else found[0]
        return self.settle(source)

    def _resumed(self) -> tuple[Run, Recipe, Source]:
        if self._options or self._sets or self._recipe_name:
            raise ConfigError(
                "A resumed run keeps its settings.",
                actual=", ".join([*self._options, *self._sets, *filter(None, [self._recipe_name])]),
                hint=f"mftctl {self.command} --resume without them, or a new run without --resume",
            )

        def take_up() -> str:
            found = newest_run(self.root, self.command, unfinished=True)
            if found is None:
                raise RunError(f"There is no stopped {self.command} run to resume.", path=self.root)
            found.go_on()
            return str(found.folder)

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
        return run, self._for_as_many_records(load_recipe(base=run.record.config), run), source

    def _for_as_many_records(self, recipe: Recipe, run: Run) -> Recipe:
        """The recipe whose optimizer steps, with the processes there are now, have the records they began with.

        Raises:
            ConfigError: With so many processes no accumulation gives that.
        """
        if run.record.processes == world_size():
            return recipe
        section = "fft" if self.command == "fft" else "mask_train"
        steps = (recipe.fft if self.command == "fft" else recipe.mask_train).grad_accum_steps * run.record.processes
        if steps % world_size():
            raise ConfigError(
                "A resumed run keeps the records of a step, and they cannot be shared out so.",
                key="WORLD_SIZE",
                expected=f"a number of processes that divides {steps} micro-batches a step",
                actual=world_size(),
            )
        return with_changes(recipe, {f"{section}.grad_accum_steps": steps // world_size()})


def _made_by(source: Source) -> str:
    return f", made by {source.parents[-1]}" if source.parents else ", built in"
