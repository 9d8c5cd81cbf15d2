"""The `eval` workflow: loss and exact match on a data file, and benchmarks, for one model."""

from __future__ import annotations

from contextlib import ExitStack

from mftctl.evaluation.suite import encode_test_data, measure, prepare_suite, require_local_images
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
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.delta.either import checkpoint_files, open_applicable
from mftctl.progress import Listener
from mftctl.runtime.peak_memory import peak_memory_bytes, restart_peak_memory
from mftctl.workflows.evaluation_engines import MeasuredModel, ready_engine, require_complete
from mftctl.workflows.planning.less_memory import evaluation_with_less_memory


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
    with ExitStack() as files:
        return _evaluate(recipe, source, run, listener, files)


def _evaluate(recipe: Recipe, source: ModelSource, run: Run, listener: Listener, files: ExitStack) -> EvalResult:
    suite = prepare_suite(recipe, listener)
    run.update(inputs=source.as_inputs())
    test = model = None
    if recipe.eval.predictions is None:
        weights = resolve_checkpoint(source.model, recipe.revision, adapters=True)
        require_complete(source, weights, recipe.eval.engine)
        applied = files.enter_context(open_applicable(source.mask))
        checkpoint = files.enter_context(checkpoint_files(weights, applied))
        encoder = load_encoder(checkpoint, recipe, run.started)
        check = check_checkpoint(checkpoint, encoder.tokenizer)
        tell_remarks(check, listener)
        test = encode_test_data(suite, recipe, encoder, listener)
        require_local_images(recipe, test)
        check_lengths(check, test.lengths_tokens, checkpoint)
        data = EvaluationData(
            chat_template=template_record(encoder, recipe),
            record_issues=suite.issue_counts(),
            model_remarks=list(check.remarks),
        )
        run.update(inputs={**source.as_inputs(), **data.document()})
        model = MeasuredModel(source, weights, checkpoint, applied)
    with device_for(
        run,
        listener,
        less_memory=evaluation_with_less_memory(recipe.eval),
        device=recipe.device,
        attention=recipe.attention,
    ):
        restart_peak_memory()
        with ready_engine(model, recipe, suite, test, run, listener) as loaded:
            datasets = measure(suite, recipe, loaded, run.folder, listener, test=test, model_name=source.model, run=run)
        if recipe.eval.engine == "openai" and test is not None:
            return EvalResult(state=source.state, datasets=datasets)  # the server's memory is not known
        return EvalResult(state=source.state, datasets=datasets, peak_memory_bytes=peak_memory_bytes())
