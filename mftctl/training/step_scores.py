"""Scores of a training's candidates at each validation, which decide between them in place of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mftctl.data.encoding import EncodedRecords
from mftctl.evaluation.score_choice import LOSS
from mftctl.evaluation.statistics import Interval
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import Score
from mftctl.experiments.run_folder import Run
from mftctl.experiments.training_options import TrainingOptions
from mftctl.progress import Listener
from mftctl.training.candidates import Candidate
from mftctl.training.inputs import TrainingInputs
from mftctl.training.validation_scores import ValidationScorer, score_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepScores:
    """Measures scores during a training and keeps their samples.

    Args:
        scorer: Measures a model.
        folder: Receives a folder of samples for each measurement.
        listener: Receives a note about each validation.
        unmasked: Folder of the samples without a mask, if several trainings share them; by default, one in `folder`.
    """

    def __init__(
        self, scorer: ValidationScorer, folder: Path, listener: Listener, *, unmasked: Path | None = None
    ) -> None:
        self._scorer = scorer
        self._root = folder
        self._listener = listener
        self._unmasked = unmasked or folder / "unmasked"

    def unmasked(self, model: PreTrainedModel) -> Score:
        """The score of a model without a mask."""
        return self._scorer.score_once(model, self._unmasked)

    def score(self, model: PreTrainedModel, step: int, horizon: float | None) -> Score:
        """The score of the trained values at a step, or of their average with a horizon."""
        return self._scorer.score(model, self._root / _name(step, horizon))

    def change(self, best: Candidate, step: int, before: Candidate | None, before_step: int) -> dict[str, Any]:
        """The log entry for the change from the best candidate so far, with its paired 95 % interval; empty for none.

        Args:
            best: The best candidate at this step.
            step: This step.
            before: The best candidate of earlier steps; None at the first validation.
            before_step: Its step.
        """
        if best.score is None:
            return {}
        text = f"Step {step}: {best.score.metric} {best.score.value:.4f}"
        if before is None:
            self._listener.note(text)
            return {}
        found = score_change(self._folder(before_step, before.horizon), self._folder(step, best.horizon), best.score)
        self._listener.note(f"{text}, {_text(found)} against the best so far (step {before_step})")
        return {"score_change": {"value": found.estimate, "low": found.low, "high": found.high}}

    def _folder(self, step: int, horizon: float | None) -> Path:
        folder = self._root / _name(step, horizon)
        # Initial scores that remove nothing have the score of the unmasked model, which is not measured again.
        return folder if step > 0 or folder.exists() else self._unmasked


def _name(step: int, horizon: float | None) -> str:
    return f"step-{step}" if horizon is None else f"step-{step}-average-{horizon}"


def _text(change: Interval) -> str:
    return f"{change.estimate:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def step_scores(
    recipe: Recipe,
    section: Literal["fft", "mask_train"],
    options: TrainingOptions,
    inputs: TrainingInputs,
    records: EncodedRecords,
    run: Run,
    listener: Listener,
) -> StepScores | None:
    """The scores that decide between the steps of a training; None if the loss does.

    Args:
        recipe: Provides the `eval` section.
        section: The recipe section of the training.
        options: The options in it.
        inputs: Inputs of the training.
        records: The validation records and their examples, for exact match.
        run: The training's run; receives the samples.
        listener: Receives progress updates and notes.

    Raises:
        MftError: As for `ValidationScorer`.
    """
    if options.best_by == LOSS:
        return None
    key, chosen = f"{section}.best_by", "The best step is"
    scorer = ValidationScorer(recipe, options.best_by, key, chosen, inputs, records, run.started, listener)
    return StepScores(scorer, run.folder / "scores", listener)
