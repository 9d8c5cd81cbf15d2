"""The `eval` workflow: loss and exact match on a data file, and benchmarks, for one model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from mftctl.data import template_clock
from mftctl.data.encoding import EncodedRecords, Encoder
from mftctl.data.examples import Example
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import DataSource, data_digest, load_examples
from mftctl.data.template_limits import limited
from mftctl.errors import ConfigError, EvaluationError
from mftctl.evaluation.answer_room import smaller_batches
from mftctl.evaluation.benchmarks.catalog import expand_groups
from mftctl.evaluation.benchmarks.lm_eval_tasks import check_task
from mftctl.evaluation.data_file import evaluate_examples
from mftctl.experiments.measured_lines import Dataset, Metric
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import (
    added_system_text,
    encode_part,
    require_records,
    tell_issues,
)
from mftctl.experiments.run_folder import Run
from mftctl.files.atomic import write_text
from mftctl.files.json_files import json_lines
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import first_before_others
from mftctl.runtime.processes import is_first, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mftctl.evaluation.benchmarks.measure import Loaded, PreparedBenchmark


@dataclass(frozen=True, slots=True)
class Measures:
    """What is measured, read and checked.

    Attributes:
        examples: The records of the test data.
        issues: What is wrong with records that were read.
        benchmarks: The benchmarks, ready to be asked.
    """

    examples: list[Example]
    issues: RecordIssues
    benchmarks: list[PreparedBenchmark]


@dataclass(frozen=True, slots=True)
class MeasuredRecords:
    """The test data as a model takes it.

    Attributes:
        encoder: Of the model's tokenizer.
        records: Those that can be used; none where no data is measured on.
    """

    encoder: Encoder
    records: EncodedRecords


def prepare_measures(recipe: Recipe, listener: Listener) -> Measures:
    """The test data and benchmarks of a recipe; whatever is wrong with them is found here, before any model is loaded.

    Args:
        recipe: With the `eval` section and `test_data`.
        listener: Hears how far the running of model-written code has come.

    Raises:
        MftError: A task, a file or the sandbox is not what it should be.
    """
    check_measures(recipe)
    options = recipe.eval
    tasks = expand_groups(options.tasks)
    benchmarks = []
    if tasks:
        from mftctl.evaluation.benchmarks.measure import prepare_benchmark  # lm-eval takes seconds to import

        with first_before_others():  # which find in the cache what it has fetched
            benchmarks = [prepare_benchmark(task, options, listener) for task in tasks]
    with_model = options.predictions is None
    issues = RecordIssues()
    examples = load_examples(recipe.test_data, seed=recipe.seed, issues=issues)[: options.limit] if with_model else []
    return Measures(examples, issues, benchmarks)


def encode_test_data(measures: Measures, recipe: Recipe, encoder: Encoder, listener: Listener) -> MeasuredRecords:
    """The test data as a model takes it; whatever is wrong with it is said here.

    Args:
        measures: Of the recipe.
        recipe: With the `eval` section.
        encoder: Of the model's tokenizer.
        listener: Is told what is to be known of records.

    Raises:
        DataError: Records cannot be used.
    """
    length, issues = recipe.eval.max_length_tokens, measures.issues
    used = encode_part(measures.examples, encoder, length, issues, listener)
    issues.settle(recipe.bad_records)
    tell_issues("Test data", issues, length, listener)
    if measures.examples or issues.records:
        require_records("Test data", used, issues, length)
    added = added_system_text(encoder, used.examples)
    if added is not None:
        listener.note(f"Test data: {added}")
    return MeasuredRecords(encoder, used)


def with_fixed_clock(encoder: Encoder) -> PreTrainedTokenizerBase:
    """The encoder's tokenizer for benchmarks, whose chat template takes the run's start for the present."""
    tokenizer = encoder.tokenizer
    if not tokenizer.chat_template:
        return tokenizer
    fixed = copy.deepcopy(tokenizer)
    fixed.chat_template = template_clock.at(str(tokenizer.chat_template), encoder.now)
    fixed.apply_chat_template = limited(fixed.apply_chat_template)  # type: ignore[method-assign]
    return fixed


def measure(
    measures: Measures,
    recipe: Recipe,
    loaded: Loaded | None,
    folder: Path,
    listener: Listener,
    *,
    test: MeasuredRecords | None,
    model_name: str,
    run: Run | None = None,
) -> list[Dataset]:
    """Each data set with its metrics, their standard errors and its sample file.

    Several processes share out records and problems; all of them have the same result, and the first one writes.

    Args:
        measures: Of the recipe.
        recipe: With the `eval` section and `test_data`.
        loaded: Model and tokenizer, or what vLLM runs; None where outputs written before are scored.
        folder: Gets the samples.
        listener: Hears progress.
        test: The test data as the model takes it; None where outputs written before are scored.
        model_name: What the model is called where outputs are written for a judge.
        run: Keeps the outputs of benchmarks, so that an interrupted evaluation goes on. Without one, while a model is
            trained, nothing is kept and no judge asked.

    Raises:
        MftError: Anything known that can go wrong.
    """
    datasets = []
    if test is not None and test.records.records and isinstance(loaded, tuple):
        datasets.append(_data_file(test, recipe, loaded[0], folder, listener))
    for benchmark in measures.benchmarks:
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
                ask_judge=run is not None,
            )
        )
    return datasets


def check_measures(recipe: Recipe) -> None:
    """Nothing, if the recipe says what to measure and on what.

    Raises:
        ConfigError: There is nothing to measure, or a benchmark file that no task reads.
        EvaluationError: A benchmark is unknown, or its local file is missing.
    """
    options = recipe.eval
    if not recipe.test_data and not options.tasks:
        raise ConfigError(
            "eval needs something to measure.",
            key="--data or --tasks",
            expected="a data file or a benchmark",
            actual="neither",
            hint="mftctl eval MODEL --data FILE, or --tasks gsm8k",
        )
    tasks = expand_groups(options.tasks)
    if options.engine == "vllm":
        _check_vllm(recipe)
    for task in tasks:
        check_task(task, options.prompts)
    for task, file in options.task_data.items():
        if task not in (*tasks, recipe.probe.by):
            raise ConfigError(
                "A benchmark file is given for a task that is not run.",
                key=f"task_data.{task}",
                expected=f"one of the tasks: {', '.join(tasks) or 'none given'}",
                actual=task,
            )
        if not Path(file).exists():
            raise EvaluationError("The benchmark's local file does not exist.", path=file, key=f"task_data.{task}")
    if options.predictions is not None:
        _check_predictions(options.predictions, tasks)


def _check_vllm(recipe: Recipe) -> None:
    if world_size() > 1:
        raise ConfigError(
            "vLLM starts its own processes.",
            key="--processes",
            expected="1 with --engine vllm",
            actual=world_size(),
        )
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed.",
            key="eval.engine",
            actual="vllm",
            hint="pip install 'mftctl[vllm]', or --engine hf",
        )
    if recipe.device in ("cpu", "mps", "xpu") or recipe.attention != "auto":
        raise ConfigError(
            "vLLM computes on what it was built for, with attention that it chooses itself.",
            key="eval.engine",
            expected="the device auto, cuda or cuda:N, and the attention auto",
            actual=f"{recipe.device}, {recipe.attention}",
            hint="leave --device and --attention out, or --engine hf",
        )
    if recipe.test_data:
        raise ConfigError(
            "vLLM answers benchmarks; the loss on a data file is measured with transformers.",
            key="eval.engine",
            actual=f"vllm, and the data {recipe.test_data[0].path}",
            hint="two commands: one with --data, one with --tasks and --engine vllm",
        )


def _check_predictions(predictions: str, tasks: Sequence[str]) -> None:
    if len(tasks) != 1:
        raise ConfigError(
            "A file of predictions is for one benchmark.",
            key="predictions",
            expected="one task",
            actual=", ".join(tasks) or "none",
            hint="--tasks humaneval",
        )
    if not Path(predictions).is_file():
        raise EvaluationError("The file of predictions does not exist.", path=predictions, key="predictions")


def _data_file(
    test: MeasuredRecords,
    recipe: Recipe,
    model: PreTrainedModel,
    folder: Path,
    listener: Listener,
) -> Dataset:
    name = _data_name(recipe.test_data)
    found = evaluate_examples(
        model,
        test.encoder,
        test.records,
        generate=recipe.eval.generate,
        on_progress=lambda done, total: listener.progress(Progress(f"evaluating {name}", done, total)),
        on_shortage=lambda tokens: listener.note(smaller_batches(name, tokens)),
    )
    rows = []
    for number, row in enumerate(found.rows):
        scores = {"loss": row.nll}
        if row.correct is not None:
            scores["exact_match"] = float(row.correct)
        rows.append(
            {
                "id": str(number),
                "where": row.where,
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
    return Dataset(
        name=name,
        digest=data_digest(test.records.examples),
        samples=_write_samples(folder, rows),
        max_new_tokens=found.max_new_tokens,
        metrics=metrics,
    )


def _write_samples(folder: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    file = "samples.jsonl"
    if is_first():
        write_text(folder / file, json_lines(rows))
    return file


def _data_name(sources: Iterable[DataSource]) -> str:
    """The file names without their folders; built-in splits and hub ids as they are."""
    return " + ".join(Path(source.path).name if Path(source.path).is_file() else source.path for source in sources)
