"""The `eval` workflow: loss and exact match on a data file, and benchmarks, for one model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.data.encoding import Encoder
from mftctl.errors import ConfigError
from mftctl.evaluation.suite import Suite, encode_test_data, measure, prepare_suite, with_fixed_clock
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import (
    load_encoder,
    template_record,
)
from mftctl.experiments.results import EvalResult
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import EvaluationData
from mftctl.masking.checkpoints.check import check_checkpoint, check_lengths, tell_remarks
from mftctl.masking.checkpoints.gpu_maps import gpu_map
from mftctl.masking.checkpoints.load import evaluation_dtype, load_model
from mftctl.masking.checkpoints.locate import is_adapter, resolve_checkpoint
from mftctl.masking.delta.either import Applicable, apply_in_memory, checkpoint_files, open_applicable
from mftctl.progress import Listener
from mftctl.runtime.devices import best_device, visible_alone
from mftctl.runtime.peak_memory import peak_memory_bytes, restart_peak_memory
from mftctl.workflows.planning.less_memory import evaluation_with_less_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mftctl.evaluation.benchmarks.measure import Loaded
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
    """
    with ExitStack() as files:
        return _evaluate(recipe, source, run, listener, files)


def _evaluate(recipe: Recipe, source: ModelSource, run: Run, listener: Listener, files: ExitStack) -> EvalResult:
    suite = prepare_suite(recipe, listener)
    run.update(inputs=source.as_inputs())
    test = None
    if recipe.eval.predictions is None:
        weights = resolve_checkpoint(source.model, recipe.revision, adapters=True)
        applied = files.enter_context(open_applicable(source.mask))
        checkpoint = files.enter_context(checkpoint_files(weights, applied))
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
        loaded = None
        if test is not None:
            model = _Model(source, weights, checkpoint, applied)
            loaded = _load(model, recipe, suite, test.encoder, listener)
        datasets = measure(suite, recipe, loaded, run.folder, listener, test=test, model_name=source.model, run=run)
        return EvalResult(state=source.state, datasets=datasets, peak_memory_bytes=peak_memory_bytes())


@dataclass(frozen=True, slots=True)
class _Model:
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


def _load(measured: _Model, recipe: Recipe, suite: Suite, encoder: Encoder, listener: Listener) -> Loaded:
    """The model with its mask or delta file applied, if it has one, and the tokenizer for benchmarks."""
    tokenizer, checkpoint = with_fixed_clock(encoder), measured.checkpoint
    if recipe.eval.engine == "vllm":
        return _load_for_vllm(checkpoint, measured.source, recipe, suite, tokenizer)
    dtype = evaluation_dtype(checkpoint)
    spread = gpu_map(checkpoint, dtype)
    if spread is not None:
        listener.note(f"The model is too large for one GPU; its layers are on {len(set(spread.values()))} GPUs.")
    model = load_model(checkpoint, dtype=dtype, device_map=spread)
    if measured.applied is not None:
        apply_in_memory(model, measured.applied, measured.weights)
    return model, tokenizer


def _load_for_vllm(
    checkpoint: Path, source: ModelSource, recipe: Recipe, suite: Suite, tokenizer: PreTrainedTokenizerBase
) -> VllmAnswers:
    """Starts vLLM on the checkpoint, in vLLM's own processes.

    Raises:
        ConfigError: The model is a mask or adapter that has not been merged.
        EvaluationError: vLLM does not start.
    """
    apart = source.mask or (str(checkpoint) if is_adapter(checkpoint) else None)
    if apart is not None:
        raise ConfigError(
            "vLLM needs a complete checkpoint.",
            key="eval.engine",
            expected="a checkpoint with its mask applied or its adapter merged",
            actual=apart,
            hint="mftctl apply MODEL MASK, or fft --method lora --merge; then mftctl eval OUT --engine vllm",
        )
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
