"""The `eval` workflow: loss and exact match on a data file, and benchmarks, for one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.errors import ConfigError
from mftctl.evaluation.suite import Suite, SuiteRecords, encode_test_data, measure, prepare_suite, with_fixed_clock
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import (
    load_encoder,
    template_record,
)
from mftctl.experiments.results import EvalResult
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import EvaluationData, UsedServer
from mftctl.masking.checkpoints.apply_in_memory import apply_mask, base_folder
from mftctl.masking.checkpoints.check import check_checkpoint, check_lengths, tell_remarks
from mftctl.masking.checkpoints.gpu_maps import gpu_map
from mftctl.masking.checkpoints.load import evaluation_dtype, load_model
from mftctl.masking.checkpoints.locate import is_adapter, resolve_checkpoint
from mftctl.masking.mask import open_mask
from mftctl.progress import Listener
from mftctl.runtime.devices import best_device, visible_alone
from mftctl.runtime.peak_memory import peak_memory_bytes, restart_peak_memory
from mftctl.workflows.planning.less_memory import evaluation_with_less_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.evaluation.benchmarks.measure import Loaded
    from mftctl.evaluation.lm.served import ServedAnswers
    from mftctl.evaluation.lm.vllm import VllmAnswers


def evaluate(recipe: Recipe, source: ModelSource, run: Run, listener: Listener) -> EvalResult:
    """Evaluates one model; returns each dataset with its metrics, standard errors and sample file.

    Every sample is written to a `.jsonl` file in the run folder with `id` (its number), `reference`, `output`, `scores`
    and `weights`. A metric is the sum of its scores over the sum of its weights; weights default to 1.

    Args:
        recipe: With the `eval` section, `test_data` and `retain_data`.
        source: The model, optionally with a mask.
        run: Open run; receives the samples and the result.
        listener: Receives progress updates.

    Raises:
        ConfigError: The options conflict, or there is nothing to measure.
        DataError: The data cannot be read or used.
        DeviceMemoryError: The GPU runs out of memory.
        EvaluationError: A benchmark or its data is missing, or a prompt does not fit the model's context.
        MaskFileError: The mask is damaged or does not match the model.
        ModelError: The checkpoint cannot be loaded.
        SandboxError: Model-written code cannot be confined on this machine.
        ServerError: A server cannot be reached, or refuses a request.
    """
    suite = prepare_suite(recipe, listener)
    run.update(inputs=source.as_inputs())
    test = None
    if recipe.eval.predictions is None:
        checkpoint = resolve_checkpoint(source.model, recipe.revision, adapters=True)
        encoder = load_encoder(checkpoint, recipe, run.started)
        check = check_checkpoint(checkpoint, encoder.tokenizer)
        tell_remarks(check, listener)
        test = encode_test_data(suite, recipe, encoder, listener)
        check_lengths(check, test.lengths_tokens, checkpoint)
        data = EvaluationData(
            chat_template=template_record(encoder, recipe),
            record_issues=suite.issue_counts(),
            model_remarks=list(check.remarks),
        )
        run.update(inputs={**source.as_inputs(), **data.document()})
    with device_for(
        run,
        listener,
        less_memory=evaluation_with_less_memory(recipe.eval),
        device=recipe.device,
        attention=recipe.attention,
    ):
        restart_peak_memory()
        with _engine(source, recipe, suite, test, run, listener) as loaded:
            datasets = measure(suite, recipe, loaded, run.folder, listener, test=test, model_name=source.model, run=run)
        if recipe.eval.engine == "openai" and test is not None:
            return EvalResult(state=source.state, datasets=datasets)  # the server's memory is not known
        return EvalResult(state=source.state, datasets=datasets, peak_memory_bytes=peak_memory_bytes())


@contextmanager
def _engine(
    source: ModelSource,
    recipe: Recipe,
    suite: Suite,
    test: SuiteRecords | None,
    run: Run,
    listener: Listener,
) -> Iterator[Loaded | None]:
    """The model and its tokenizer in memory, or another engine that is ready to answer; None for predictions."""
    if test is None:
        yield None
        return
    checkpoint = resolve_checkpoint(source.model, recipe.revision, adapters=True)
    tokenizer = with_fixed_clock(test.encoder)
    if recipe.eval.engine != "hf":
        _require_complete(checkpoint, source, recipe.eval.engine)
    if recipe.eval.engine == "vllm":
        yield _load_for_vllm(checkpoint, recipe, suite, tokenizer)
    elif recipe.eval.engine == "openai":
        with _server(checkpoint, recipe, suite, test, tokenizer, run, listener) as answers:
            yield answers
    else:
        yield _load(checkpoint, source, tokenizer, listener)


def _load(
    checkpoint: Path, source: ModelSource, tokenizer: PreTrainedTokenizerBase, listener: Listener
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its mask applied, if it has one, and the tokenizer for benchmarks."""
    dtype = evaluation_dtype(checkpoint)
    spread = gpu_map(checkpoint, dtype)
    if spread is not None:
        listener.note(f"The model is too large for one GPU; its layers are on {len(set(spread.values()))} GPUs.")
    with nullcontext() if source.mask is None else open_mask(Path(source.mask)) as mask:
        model = load_model(checkpoint, dtype=dtype, device_map=spread)
        if mask is not None:
            apply_mask(model, mask, base_folder(mask))
    return model, tokenizer


def _require_complete(checkpoint: Path, source: ModelSource, engine: str) -> None:
    """Checks that the model can be served as it is.

    Raises:
        ConfigError: The model is a mask or adapter that has not been merged.
    """
    apart = source.mask or (str(checkpoint) if is_adapter(checkpoint) else None)
    if apart is not None:
        raise ConfigError(
            f"{'vLLM' if engine == 'vllm' else 'A server'} needs a complete checkpoint.",
            key="eval.engine",
            expected="a checkpoint with its mask applied or its adapter merged",
            actual=apart,
            hint=f"mftctl apply MODEL MASK, or fft --merge for an adapter; then mftctl eval OUT --engine {engine}",
        )


@contextmanager
def _server(
    checkpoint: Path,
    recipe: Recipe,
    suite: Suite,
    test: SuiteRecords,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    listener: Listener,
) -> Iterator[ServedAnswers]:
    """Connects to the server and checks that it can do what is measured.

    Raises:
        EvaluationError: It does not serve the model, or does not return the likelihoods of a text if they are needed.
        ServerError: It cannot be reached, or refuses a request.
    """
    from mftctl.evaluation.benchmarks.local_task import quiet_libraries
    from mftctl.evaluation.benchmarks.olmes import begins_texts
    from mftctl.evaluation.lm.served import ServedAnswers
    from mftctl.evaluation.server.completion_server import connected, require_likelihoods

    options = recipe.eval
    with connected(
        str(options.base_url),
        served_model=options.served_model,
        concurrent_requests=options.concurrent_requests,
        tokenizer=tokenizer,
        listener=listener,
    ) as server:
        needed_by = [benchmark.name for benchmark in suite.benchmarks if benchmark.compares_likelihoods]
        if test.lengths_tokens:
            needed_by.insert(0, "the loss on a data file")
        if needed_by:
            require_likelihoods(server, tokenizer, ", ".join(needed_by))
        model = server.model
        used = UsedServer(url=server.url, model=model.name, owner=model.owner, context_tokens=model.context_tokens)
        run.update(inputs={**run.record.inputs, "server": used.document()})
        with quiet_libraries():
            answers = ServedAnswers(
                server,
                checkpoint,
                tokenizer,
                seed=recipe.seed,
                has_turns=options.chat_template,
                add_bos_token=begins_texts(options.prompts),
            )
        yield answers


def _load_for_vllm(checkpoint: Path, recipe: Recipe, suite: Suite, tokenizer: PreTrainedTokenizerBase) -> VllmAnswers:
    """Starts vLLM on the checkpoint, in vLLM's own processes.

    Raises:
        EvaluationError: vLLM does not start.
    """
    from mftctl.evaluation.benchmarks.prompt_lengths import longest_request
    from mftctl.evaluation.lm.vllm import VllmAnswers

    options = recipe.eval
    needed = longest_request(
        [benchmark.task for benchmark in suite.benchmarks],
        tokenizer,
        limit=options.limit,
        chat_template=options.chat_template,
        seed=recipe.seed,
        max_new_tokens=options.max_new_tokens,
    )
    dtype = str(evaluation_dtype(checkpoint)).removeprefix("torch.")
    with visible_alone(best_device()):
        answers = VllmAnswers(checkpoint, dtype=dtype, seed=recipe.seed, options=options, needed_tokens=needed)
    answers.tokenizer.chat_template = tokenizer.chat_template
    return answers
