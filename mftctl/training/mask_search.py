"""Inputs and result of a mask search, and the data and frozen model that it starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from mftctl.data.encoding import Encoded
from mftctl.data.seen_records import seen_records
from mftctl.evaluation.losses import RecordLoss
from mftctl.experiments.mask_results import Flips
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.model_source import ModelSource, fft_learning_rate
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import RetainedLosses, Rewards, Score
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.training_folder import TrainingFolder
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.outlines import StoredWeights
from mftctl.masking.rule import MaskRule, Rule
from mftctl.masking.soft_mask import SoftRule
from mftctl.masking.targets import MaskTarget
from mftctl.progress import Listener
from mftctl.runtime.devices import frozen_dtype
from mftctl.runtime.processes import world_size
from mftctl.training.inputs import TrainingInputs, prepare_training, require_same_data
from mftctl.training.interim_evaluation import InterimEvaluation
from mftctl.training.objectives import Objective, objective_of
from mftctl.training.retention import Retention
from mftctl.training.schedule import announce_step, total_steps
from mftctl.training.score_start import ScoreStart, score_start
from mftctl.training.step_scores import StepScores


@dataclass(frozen=True, slots=True)
class MaskSearch:
    """The inputs of a search for a mask.

    Attributes:
        model: The unmasked model; left unmasked, with its weights unchanged.
        targets: The projections that carry the mask.
        options: Method, ratio and training options.
        inputs: Encoded data.
        folder: Receives metrics and checkpoints.
        listener: Receives progress updates.
        unmasked_loss: Validation loss of the unmasked model; None for a model without values.
        fft_learning_rate: Learning rate that the model was fine-tuned with.
        seed: Decides the random start and the order of the data.
        resume: Resume from the latest checkpoint in the folder.
        interim: Evaluation during training.
        weights: The values of a model that was built without them.
        confirming: Records that confirm the mask of such a model, which has its values only during training.
        scores: Scores that decide between steps; None if the loss does.
        unmasked_score: The score of the unmasked model.
        base: For a delta mask, the weight before fine-tuning of each target, on the weight's device.
        retention: Measures data of another domain; None without such data.
        unmasked_retained_loss: Loss of the unmasked model on that data; None for a model without values.
        ratios: With ratio auto, the ratio of each target, by name; otherwise empty.
        unmasked_rewards: Rewards of preferences under the unmasked model; None for single answers.
        stored_dtypes: For a soft mask, the dtype of each target's weight in the checkpoint, by name; otherwise empty.
    """

    model: PreTrainedModel
    targets: list[MaskTarget]
    options: MaskTrainOptions
    inputs: TrainingInputs
    folder: TrainingFolder
    listener: Listener
    unmasked_loss: float | None
    fft_learning_rate: float
    seed: int
    resume: bool
    interim: InterimEvaluation | None = None
    weights: StoredWeights | None = None
    confirming: Sequence[Encoded] = ()
    scores: StepScores | None = None
    unmasked_score: Score | None = None
    base: Mapping[str, torch.Tensor] | None = None
    retention: Retention | None = None
    unmasked_retained_loss: float | None = None
    unmasked_rewards: Rewards | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    stored_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def ratio_of(self, target: MaskTarget) -> float | None:
        """The target's own ratio; None if a threshold applies."""
        return self.ratios.get(target.name, self.options.ratio_of(target.projection))

    def base_of(self, target: MaskTarget) -> torch.Tensor | None:
        """The target's weight before fine-tuning; None for a weight mask."""
        return None if self.base is None else self.base[target.name]

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return objective_of(self.options)

    @property
    def start(self) -> ScoreStart:
        """The initial scores and their learning rates."""
        return score_start(
            self.options,
            self.model,
            seed=self.seed,
            fft_learning_rate=self.fft_learning_rate,
            steps=total_steps(len(self.inputs.train), self.options, world_size()),
        )

    @property
    def rules(self) -> dict[str, Rule]:
        """The rule from scores to mask for each target.

        Raises:
            MaskingError: The pattern does not divide a target.
        """
        options = self.options
        if options.mask == "soft":
            limit = options.max_multiplier
            return {one.name: SoftRule(limit, dtype=self.stored_dtypes[one.name]) for one in self.targets}
        if options.blocks is not None:
            for target in self.targets:
                options.blocks.require_blocks(target.fan_in, target.name)
            return {
                target.name: MaskRule(None, None, options.ranking, options.blocks, target.inputs_dim)
                for target in self.targets
            }
        return {
            target.name: MaskRule(self.ratio_of(target), options.threshold, options.ranking) for target in self.targets
        }


@dataclass(frozen=True, slots=True)
class FoundMask:
    """A mask in memory and its validation results.

    Attributes:
        mask: Mask of each target, by module name, on the CPU: bool, True = keep, or the uint8 codes of a soft mask.
        unmasked_loss: Validation loss per answer token, or per preference, without a mask.
        start_loss: Validation loss with the mask of the initial scores.
        best_loss: Validation loss with this mask, which is the best one unless the last was to be kept.
        best_step: The optimizer step at which it was found; 0 is the start.
        steps: Optimizer steps taken.
        tokens: Tokens trained on.
        learning_rate: The peak learning rate, the largest if it differs between tensors; None without training.
        flips: From `summarise_flips`; None without training.
        confirming: The losses of the confirming records without and with the mask; None if not measured.
        kept_average: Horizon of the running average of the scores that gave this mask; None for the scores themselves.
        unmasked_score: The score without a mask; None if the loss decides.
        best_score: The score with this mask.
        retained: Losses on data of another domain; None without such data.
        rewards: Rewards of preferences with this mask; None for single answers.
    """

    mask: dict[str, torch.Tensor]
    unmasked_loss: float
    start_loss: float
    best_loss: float
    best_step: int = 0
    steps: int = 0
    tokens: int = 0
    learning_rate: float | None = None
    flips: Flips | None = None
    confirming: tuple[Sequence[RecordLoss], Sequence[RecordLoss]] | None = None
    kept_average: float | None = None
    unmasked_score: Score | None = None
    best_score: Score | None = None
    retained: RetainedLosses | None = None
    rewards: Rewards | None = None

    @property
    def helps(self) -> bool:
        """True if the deciding score, or without one the validation loss, is better with the mask than without it."""
        if self.unmasked_score is not None and self.best_score is not None:
            return self.best_score.rank < self.unmasked_score.rank
        return self.best_loss < self.unmasked_loss


@dataclass(frozen=True, slots=True)
class MaskTrainingInputs:
    """Inputs of mask training.

    Attributes:
        inputs: Encoded data.
        fft_learning_rate: Learning rate that the model was fine-tuned with.
    """

    inputs: TrainingInputs
    fft_learning_rate: float


def prepare_mask_training(
    recipe: Recipe,
    source: ModelSource,
    run: Run,
    listener: Listener,
    data_fraction: float,
    retain_weight: float | None = None,
) -> MaskTrainingInputs:
    """Data for mask training: by default, records that the model was not fine-tuned on.

    The data and the learning rate that the model was fine-tuned with are recorded in the run.

    Args:
        recipe: Provides the `mask_train` section, the data and the seed.
        source: The fine-tuned model.
        run: Open run, in the same runs folder as the runs that produced the model.
        listener: Receives a note on the records left out.
        data_fraction: Share of the records to use.
        retain_weight: Weight of the divergence on the recipe's retained data; None if the command does not use it.

    Raises:
        ConfigError: The recipe names no data.
        DataError: The data cannot be used, or has changed since the run began.
        ModelError: The model does not match its configuration.
    """
    options = recipe.mask_train
    if options.method == "learned":
        announce_step(options, world_size(), listener)
    inputs = prepare_training(
        recipe,
        source.model,
        max_length_tokens=options.max_length_tokens,
        data_fraction=data_fraction,
        seen=seen_records(run.folder.parent, source.parents),
        learn_from=options.learn_from,
        retain_weight=retain_weight,
        kind=options.record_kind,
        now=run.started,
        listener=listener,
    )
    before = RunInputs.read(run.record.inputs)
    require_same_data(before, inputs)
    if inputs.left_out:
        listener.note(
            f"Training records: {len(inputs.train)}; left out because fine-tuning used them: {inputs.left_out} "
            "(--learn-from all includes them)"
        )
    # A resumed run continues with its original rate, even if its source no longer records it.
    rate = before.fft_learning_rate or fft_learning_rate(source, recipe)
    run.update(inputs={**source.as_inputs(), **inputs.summary(rate)})
    return MaskTrainingInputs(inputs, rate)


def load_frozen_model(inputs: TrainingInputs, options: MaskTrainOptions) -> PreTrainedModel:
    """The frozen model: in fp32, or in bf16 if requested, since its weights are only read."""
    return load_model(inputs.checkpoint, dtype=frozen_dtype(options.precision))
