"""What answers in an evaluation: a model in memory, vLLM, or a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.errors import ConfigError
from mftctl.evaluation.suite import Suite, SuiteRecords, with_fixed_clock
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import UsedServer
from mftctl.masking.checkpoints.gpu_maps import gpu_map
from mftctl.masking.checkpoints.load import evaluation_dtype, load_model
from mftctl.masking.checkpoints.locate import is_adapter
from mftctl.masking.delta.either import Applicable, apply_in_memory
from mftctl.progress import Listener
from mftctl.runtime.devices import best_device, visible_alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.evaluation.benchmarks.measure import Loaded
    from mftctl.evaluation.lm.served import ServedAnswers
    from mftctl.evaluation.lm.vllm import VllmAnswers


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """The model to measure.

    Attributes:
        source: Its source.
        weights: The folder of its weights.
        checkpoint: The folder of its configuration and tokenizer, which also has the weights.
        applied: The mask or delta file to apply to the weights, if any.
    """

    source: ModelSource
    weights: Path
    checkpoint: Path
    applied: Applicable | None


@contextmanager
def ready_engine(
    model: MeasuredModel | None,
    recipe: Recipe,
    suite: Suite,
    test: SuiteRecords | None,
    run: Run,
    listener: Listener,
) -> Iterator[Loaded | None]:
    """The model and its tokenizer in memory, or another engine that is ready to answer; None for predictions.

    Args:
        model: The model; None for predictions, like `test`.
        recipe: With the `eval` section.
        suite: The benchmarks to measure.
        test: The encoded data to measure.
        run: Open run; receives a record of the server.
        listener: Receives notes.

    Raises:
        EvaluationError: vLLM does not start, or the server cannot do what is measured.
        ModelError: The checkpoint cannot be loaded.
        ServerError: A server cannot be reached, or refuses a request.
    """
    if model is None or test is None:
        yield None
        return
    tokenizer, engine = with_fixed_clock(test.encoder), recipe.eval.engine
    if engine == "vllm":
        yield _load_for_vllm(model.checkpoint, recipe, suite, tokenizer)
    elif engine == "openai":
        with _server(model.checkpoint, recipe, suite, test, tokenizer, run, listener) as answers:
            yield answers
    else:
        yield _load(model, tokenizer, listener)


def _load(
    measured: MeasuredModel, tokenizer: PreTrainedTokenizerBase, listener: Listener
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its mask or delta file applied, if it has one, and the tokenizer for benchmarks."""
    dtype = evaluation_dtype(measured.checkpoint)
    spread = gpu_map(measured.checkpoint, dtype)
    if spread is not None:
        listener.note(f"The model is too large for one GPU; its layers are on {len(set(spread.values()))} GPUs.")
    model = load_model(measured.checkpoint, dtype=dtype, device_map=spread)
    if measured.applied is not None:
        apply_in_memory(model, measured.applied, measured.weights)
    return model, tokenizer


def require_complete(source: ModelSource, checkpoint: Path, engine: str) -> None:
    """Checks that an engine other than the local one can serve the model as it is.

    Args:
        source: The model.
        checkpoint: Its folder.
        engine: The engine.

    Raises:
        ConfigError: The model is a mask or adapter that has not been merged.
    """
    apart = source.mask or (str(checkpoint) if is_adapter(checkpoint) else None)
    if engine != "hf" and apart is not None:
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
