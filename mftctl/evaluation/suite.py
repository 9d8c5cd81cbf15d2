"""Test data and benchmarks to evaluate on: checked, prepared, and measured on one model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.data import template_clock
from mftctl.data.batching import any_images
from mftctl.data.encoding import EncodedRecords, Encoder
from mftctl.data.examples import Example
from mftctl.data.prepared.examples import data_digest
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import token_lengths
from mftctl.data.record_issues import RecordIssues
from mftctl.data.retained import RETAINED
from mftctl.data.sources import EVALUATION_SEED, DataSource
from mftctl.data.template_limits import limited
from mftctl.errors import ConfigError, EvaluationError, MftError
from mftctl.evaluation.answer_room import smaller_batches
from mftctl.evaluation.benchmarks.catalog import expand_groups
from mftctl.evaluation.data_file import DataFileResult, evaluate_examples, measure_records
from mftctl.evaluation.engine_checks import check_engine
from mftctl.experiments.measured_lines import Dataset, Metric
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.retained_records import RETAINED_DATA, encode_measured, load_held_out
from mftctl.experiments.run_folder import Run
from mftctl.files.atomic import write_text
from mftctl.files.json_files import json_lines
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import first_before_others
from mftctl.runtime.processes import is_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mftctl.evaluation.benchmarks.measure import Loaded, PreparedBenchmark


_TEST_DATA = "Test data"


@dataclass(frozen=True, slots=True)
class Suite:
    """Test data and benchmarks, read and checked.

    Attributes:
        examples: The test records.
        issues: Problems found while reading the records.
        benchmarks: The prepared benchmarks.
        retained: The held-out records of the data to retain.
        retained_issues: Problems found while reading that data.
    """

    examples: Sequence[Example]
    issues: RecordIssues
    benchmarks: list[PreparedBenchmark]
    retained: Sequence[Example] = ()
    retained_issues: RecordIssues = field(default_factory=RecordIssues)

    def issue_counts(self) -> dict[str, dict[str, int]]:
        """Number of records in each part that were refused, truncated and so on."""
        named = {_TEST_DATA: self.issues, RETAINED_DATA: self.retained_issues}
        return {name: counts for name, issues in named.items() if (counts := issues.counts())}


@dataclass(frozen=True, slots=True)
class SuiteRecords:
    """The test data and the data to retain, tokenised for a model.

    Attributes:
        encoder: Encoder for the model's tokenizer.
        records: The usable records; empty without test data.
        retained: The usable held-out records of the data to retain; empty without such data.
    """

    encoder: Encoder
    records: EncodedRecords
    retained: EncodedRecords = field(default_factory=lambda: EncodedRecords((), ()))

    @property
    def lengths_tokens(self) -> list[int]:
        """The length of each record in tokens."""
        return [*token_lengths(self.records.records), *token_lengths(self.retained.records)]


def prepare_suite(recipe: Recipe, listener: Listener) -> Suite:
    """Reads and checks the test data and benchmarks of a recipe, before any model is loaded.

    Args:
        recipe: With the `eval` section, `test_data` and `retain_data`.
        listener: Receives progress updates while model-written code runs.

    Raises:
        ConfigError: The options conflict, or there is nothing to measure.
        DataError: The data cannot be read, or no record of the data to retain is held out.
        EvaluationError: A benchmark is unknown, or its data is missing or malformed.
        SandboxError: Model-written code cannot be confined on this machine.
    """
    check_suite(recipe)
    options = recipe.eval
    tasks = expand_groups(options.tasks)
    benchmarks = []
    if tasks:
        from mftctl.evaluation.benchmarks.measure import prepare_benchmark  # lm-eval takes seconds to import

        with first_before_others():  # the others find its downloads in the cache
            benchmarks = [prepare_benchmark(task, options, listener) for task in tasks]
    if options.predictions is not None:
        return Suite([], RecordIssues(), benchmarks)
    return replace(read_test_data(recipe, listener), benchmarks=benchmarks)


def read_test_data(recipe: Recipe, listener: Listener) -> Suite:
    """Reads the test data and the data to retain of a recipe, without its benchmarks.

    Args:
        recipe: With the limit in the `eval` section, `test_data` and `retain_data`.
        listener: Receives progress updates.

    Raises:
        DataError: The data cannot be read, or no record of the data to retain is held out.
    """
    issues, retained_issues = RecordIssues(), RecordIssues()
    examples = load_examples(recipe.test_data, seed=EVALUATION_SEED, issues=issues, listener=listener)
    retained = load_held_out(recipe, retained_issues, listener)
    limit = recipe.eval.limit
    return Suite(examples[:limit], issues, [], retained[:limit], retained_issues)


def encode_test_data(suite: Suite, recipe: Recipe, encoder: Encoder, listener: Listener) -> SuiteRecords:
    """Tokenises the test data and the data to retain, and reports problems with them.

    Args:
        suite: The recipe's data and benchmarks.
        recipe: With the `eval` section.
        encoder: Encoder for the model's tokenizer.
        listener: Receives warnings about the records.

    Raises:
        DataError: Some records cannot be used.
    """
    length = recipe.eval.max_length_tokens
    test = encode_measured(_TEST_DATA, suite.examples, recipe, encoder, length, suite.issues, listener)
    issues = suite.retained_issues
    retained = encode_measured(RETAINED_DATA, suite.retained, recipe, encoder, length, issues, listener)
    return SuiteRecords(encoder, test, retained)


def require_local_images(recipe: Recipe, test: SuiteRecords) -> None:
    """Checks that data with images is measured by the engine of this process.

    Args:
        recipe: With the `eval` section.
        test: The tokenised data.

    Raises:
        ConfigError: Another engine is to answer.
    """
    if recipe.eval.engine != "hf" and (any_images(test.records.records) or any_images(test.retained.records)):
        raise ConfigError(
            "Data with images is measured only by the model in this process.",
            key="eval.engine",
            expected="hf",
            actual=recipe.eval.engine,
            hint="omit --engine, or use data without images",
        )


def with_fixed_clock(encoder: Encoder) -> PreTrainedTokenizerBase:
    """The encoder's tokenizer for benchmarks; its chat template uses the start of the run as the current time."""
    tokenizer = encoder.tokenizer
    if not tokenizer.chat_template:
        return tokenizer
    fixed = copy.deepcopy(tokenizer)
    fixed.chat_template = template_clock.at(str(tokenizer.chat_template), encoder.now)
    fixed.apply_chat_template = limited(fixed.apply_chat_template)  # type: ignore[method-assign]
    return fixed


def measure(
    suite: Suite,
    recipe: Recipe,
    loaded: Loaded | None,
    folder: Path,
    listener: Listener,
    *,
    test: SuiteRecords | None,
    model_name: str,
    run: Run | None = None,
) -> list[Dataset]:
    """Returns each dataset with its metrics, standard errors and sample file.

    In multi-process runs the processes share the records and problems, all return the same result, and the first one
    writes the files.

    Args:
        suite: The recipe's data and benchmarks.
        recipe: With the `eval` section and `test_data`.
        loaded: Model and tokenizer, or another engine; None when existing predictions are scored.
        folder: Receives the samples.
        listener: Receives progress updates.
        test: The tokenised data; None when existing predictions are scored.
        model_name: Name of the model in the files written for a judge.
        run: Stores benchmark outputs, so that an interrupted evaluation can be resumed. Without one (during training),
            no outputs are stored and no judge is called.

    Raises:
        EvaluationError: A prompt does not fit the model's context, or a judge or chat template is missing.
        DataError: The chat template fails on a prompt.
        SandboxError: A sandboxed process could not be started.
    """
    datasets = []
    if test is not None and loaded is not None:
        files = (
            _DataFile(_data_name(recipe.test_data), "samples.jsonl", test.records, recipe.eval.generate),
            _DataFile(RETAINED, "retained-samples.jsonl", test.retained, generate=False),
        )
        given = [data for data in files if data.records.records]
        datasets += [_measured(data, test.encoder, loaded, recipe, folder, listener) for data in given]
    for benchmark in suite.benchmarks:
        from mftctl.evaluation.benchmarks.measure import measure_benchmark, output_cache

        cache = None if run is None or loaded is None else output_cache(benchmark, run)
        datasets.append(
            measure_benchmark(
                benchmark,
                recipe,
                loaded,
                folder,
                listener,
                model_name=model_name,
                cache=cache,
                is_final=run is not None,
            )
        )
    return datasets


def check_suite(recipe: Recipe) -> None:
    """Checks that a recipe names something to measure, and that each benchmark and its files exist.

    Raises:
        MftError: The first problem of `suite_problems`.
    """
    for problem in suite_problems(recipe):
        raise problem


def suite_problems(recipe: Recipe) -> Iterator[MftError]:
    """Problems of a recipe's evaluation settings, such as unknown benchmarks, and missing or unused files."""
    options = recipe.eval
    if not recipe.test_data and not recipe.retain_data and not options.tasks:
        yield ConfigError(
            "There is nothing to evaluate.",
            key="--data, --retain or --tasks; in a recipe test_data, retain_data or eval.tasks",
            expected="a data file or a benchmark",
            actual="neither",
            hint="mftctl eval MODEL --data FILE, or --tasks gsm8k",
        )
    tasks = expand_groups(options.tasks)
    checks: list[Callable[[], None]] = [partial(check_engine, recipe)]
    if tasks:
        from mftctl.evaluation.benchmarks.lm_eval_tasks import check_task  # lm-eval takes seconds to import

        checks += [partial(check_task, task, options.prompts) for task in tasks]
    for task, file in options.task_data.items():
        checks += [partial(_check_is_run, task, recipe), partial(_check_exists, task, file)]
    if options.predictions is not None:
        checks.append(partial(_check_predictions, options.predictions, tasks))
    for check in checks:
        try:
            check()
        except MftError as error:
            yield error


def _check_is_run(task: str, recipe: Recipe) -> None:
    tasks = expand_groups(recipe.eval.tasks)
    if task not in (*tasks, recipe.probe.by):
        raise ConfigError(
            "A benchmark file is given for a task that is not run.",
            key=f"eval.task_data.{task}",
            expected=f"one of the selected tasks: {', '.join(tasks) or 'none selected'}",
            actual=task,
        )


def _check_exists(task: str, file: str) -> None:
    if not Path(file).exists():
        raise EvaluationError("The benchmark's local file does not exist.", path=file, key=f"eval.task_data.{task}")


def _check_predictions(predictions: str, tasks: Sequence[str]) -> None:
    if len(tasks) != 1:
        raise ConfigError(
            "A predictions file covers exactly one benchmark.",
            key="predictions",
            expected="one task",
            actual=", ".join(tasks) or "none",
            hint="--tasks humaneval",
        )
    if not Path(predictions).is_file():
        raise EvaluationError("The predictions file does not exist.", path=predictions, key="predictions")


@dataclass(frozen=True, slots=True)
class _DataFile:
    """Records to measure as one dataset.

    Attributes:
        name: Name of the dataset.
        file: Name of its samples file.
        records: The records; empty if there is no such data.
        generate: Whether to generate answers.
    """

    name: str
    file: str
    records: EncodedRecords
    generate: bool


def _measured(
    data: _DataFile, encoder: Encoder, loaded: Loaded, recipe: Recipe, folder: Path, listener: Listener
) -> Dataset:
    found = _result(data, encoder, loaded, listener)
    rows = []
    for number, row in enumerate(found.rows):
        scores = {"loss": row.nll}
        if row.correct is not None:
            scores["exact_match"] = float(row.correct)
        rows.append(
            {
                "id": str(number),
                "where": row.where,
                "prompt": row.prompt,
                "reference": row.reference,
                "output": row.prediction,
                "scores": scores,
                "weights": {"loss": row.answer_tokens},
            }
        )
    metrics = [Metric(name="loss", value=found.loss, standard_error=found.loss_standard_error, samples=len(rows))]
    if found.exact_match is not None:
        error = found.exact_match_standard_error
        exact = Metric(name="exact_match", value=found.exact_match, standard_error=error, samples=found.predictions)
        metrics.append(exact)
    if is_first():
        write_text(folder / data.file, json_lines(rows))
    return Dataset(
        name=data.name,
        digest=":".join([data_digest(data.records.examples), *_other_engine(recipe)]),
        samples=data.file,
        max_new_tokens=found.max_new_tokens,
        metrics=metrics,
    )


def _result(data: _DataFile, encoder: Encoder, loaded: Loaded, listener: Listener) -> DataFileResult:
    def on_progress(done: int, total: int) -> None:
        listener.progress(Progress(f"evaluating {data.name}", done, total))

    if isinstance(loaded, tuple):
        return evaluate_examples(
            loaded[0],
            encoder,
            data.records,
            generate=data.generate,
            on_progress=on_progress,
            on_shortage=lambda tokens: listener.note(smaller_batches(data.name, tokens)),
        )
    measure = loaded.for_records(encoder)
    return measure_records(measure, encoder, data.records, generate=data.generate, on_progress=on_progress)


def _other_engine(recipe: Recipe) -> list[str]:
    """What distinguishes results of another engine, which are not compared with those of the local one."""
    return [] if recipe.eval.engine == "hf" else [recipe.eval.engine]


def _data_name(sources: Iterable[DataSource]) -> str:
    """The file names without their folders; built-in splits and hub ids unchanged."""
    return " + ".join(Path(source.path).name if Path(source.path).is_file() else source.path for source in sources)
