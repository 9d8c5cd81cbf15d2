"""Benchmarks and test data evaluated on a model during training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mftctl.data.encoding import Encoder
from mftctl.errors import Interrupted
from mftctl.evaluation.suite import encode_test_data, measure, prepare_suite, with_fixed_clock
from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.run_folder import Run
from mftctl.experiments.training_folder import TrainingFolder
from mftctl.experiments.training_options import TrainingOptions
from mftctl.masking.checkpoints.check import check_lengths
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import from_first
from mftctl.runtime.processes import world_size
from mftctl.runtime.stop_request import StopRequest
from mftctl.training.inputs import TrainingInputs


class InterimEvaluation(TrainerCallback):
    """Evaluates every N steps, at the start and at the end, always on the same first problems and records.

    Each evaluation adds a line to `metrics.jsonl` with `step`, `dataset`, `digest` and `metrics`; its samples go to
    `evaluations/step-<step>/`.

    Args:
        recipe: Provides the `eval` section and `test_data`.
        options: Training options: how often to evaluate, and on how many samples.
        encoder: Encoder of the model's tokenizer.
        model_name: Name of the model in outputs written for a judge.
        folder: The training's folder.
        listener: Receives progress updates.

    Raises:
        MftError: There is nothing to evaluate, or a task, a file or the sandbox cannot be used.

    Source: MFT, figure 2.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: TrainingOptions,
        encoder: Encoder,
        model_name: str,
        folder: TrainingFolder,
        listener: Listener,
    ) -> None:
        limit = min(options.benchmark_limit, recipe.eval.limit or options.benchmark_limit)
        local = {"eval.predictions": None, "eval.engine": "hf", "eval.base_url": None}
        self._recipe = with_changes(recipe, {"eval.limit": limit, **local})
        self._every = options.benchmark_every or 0
        self._tokenizer = with_fixed_clock(encoder)
        self._model_name = model_name
        self._folder = folder
        self._listener = listener
        self._patient = _Patient(listener)
        self._measures = prepare_suite(self._recipe, self._patient)
        self._test = encode_test_data(self._measures, self._recipe, encoder, listener)

    @property
    def test_lengths(self) -> list[int]:
        """The lengths of the test records and of those to retain in tokens."""
        return self._test.lengths_tokens

    def watch(self, stop: StopRequest) -> None:
        """Aborts an evaluation, which can take long, as soon as the user asks to stop.

        Several processes that share an evaluation finish it, since the signal reaches each at a different time.

        Args:
            stop: Set when the user asks to stop.
        """
        self._patient.stop = stop if world_size() == 1 else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Runs an evaluation that is due and was not completed before a stop."""
        if self._is_due(state) and not self._has_measured(state.global_step):
            try:
                self._measure(state.global_step, kwargs["model"])
            except _StopWanted as error:
                raise Interrupted(
                    f"Stopped at step {state.global_step} of {state.max_steps}, before the next step.",
                    path=self._folder.folder,
                    hint=self._folder.resume_command,
                ) from error

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluates if an evaluation is due."""
        if self._is_due(state) and not self._patient.is_stopped:
            try:
                self._measure(state.global_step, kwargs["model"])
            except _StopWanted:
                control.should_save = control.should_training_stop = True

    def _has_measured(self, step: int) -> bool:
        """True if a step was evaluated before a stop; the same in all processes, as one may be ahead and writing."""
        measured = from_first(lambda: str(any(line.step == step for line in measurements(self._folder))))
        return measured == str(True)

    def _is_due(self, state: TrainerState) -> bool:
        return state.global_step % self._every == 0 or state.global_step >= state.max_steps

    def _measure(self, step: int, model: Any) -> None:
        folder = self._folder.folder / "evaluations" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        loaded = (model, self._tokenizer)
        found = measure(
            self._measures,
            self._recipe,
            loaded,
            folder,
            self._patient,
            test=self._test,
            model_name=self._model_name,
        )
        for dataset in found:
            name, metrics = dataset.name, dataset.metrics
            line = MetricsLine(step=step, dataset=name, digest=dataset.digest, metrics=metrics)
            self._folder.log(line.document())
            values = ", ".join(f"{metric.name} {metric.value:.4f}" for metric in metrics)
            self._listener.note(f"Step {step}, {name}: {values} (n = {metrics[0].samples})")


def interim_evaluation(
    recipe: Recipe, options: TrainingOptions, inputs: TrainingInputs, source: ModelSource, run: Run, listener: Listener
) -> InterimEvaluation | None:
    """The evaluation during a training run; None if none is requested.

    Args:
        recipe: Provides the `eval` section and `test_data`.
        options: Options of the training.
        inputs: Inputs of the training.
        source: The model being trained.
        run: The training's run.
        listener: Receives progress updates.

    Raises:
        MftError: There is nothing to evaluate, or a task, a file or the sandbox cannot be used.
    """
    if options.benchmark_every is None:
        return None
    encoder = Encoder(inputs.tokenizer, learn=recipe.learn, now=run.started, images=inputs.images)
    interim = InterimEvaluation(recipe, options, encoder, source.model, run.training, listener)
    check_lengths(inputs.check, interim.test_lengths, inputs.checkpoint)
    return interim


def measurements(folder: TrainingFolder) -> list[MetricsLine]:
    """The evaluations during a training run: `step`, `dataset`, `digest` and `metrics` of each.

    Args:
        folder: The training's folder.
    """
    return [line for line in folder.metrics() if line.dataset is not None]


class _StopWanted(Exception):  # noqa: N818 - a request by the user, not an error of theirs
    """The user asked to stop; never leaves this module."""


class _Patient:
    """A listener that forwards everything and aborts the work when a stop is requested."""

    def __init__(self, listener: Listener) -> None:
        self.stop: StopRequest | None = None
        self._listener = listener

    @property
    def is_stopped(self) -> bool:
        """True if the user asked to stop."""
        return self.stop is not None and self.stop.requested

    def progress(self, state: Progress) -> None:
        """Forwards a progress update."""
        if self.is_stopped:
            raise _StopWanted
        self._listener.progress(state)

    def note(self, text: str) -> None:
        """Forwards the text."""
        self._listener.note(text)

    def warn(self, text: str) -> None:
        """Forwards the text."""
        self._listener.warn(text)
