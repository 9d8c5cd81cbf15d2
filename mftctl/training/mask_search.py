"""What a mask search needs, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mftctl.data.encoding import Encoded
from mftctl.data.seen_records import seen_records
from mftctl.evaluation.losses import SampleLoss
from mftctl.experiments.model_source import Source, fft_learning_rate
from mftctl.experiments.recipe import MaskTrainOptions, Recipe
from mftctl.experiments.results import Flips
from mftctl.experiments.run_folder import Run, TrainingFolder
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.outlines import StoredWeights
from mftctl.masking.rule import Indicator
from mftctl.masking.targets import MaskTarget
from mftctl.progress import Listener
from mftctl.runtime.devices import uses_bf16
from mftctl.runtime.processes import world_size
from mftctl.training.inputs import TrainingInputs, prepare_training, require_same_data
from mftctl.training.interim_evaluation import InterimEvaluation
from mftctl.training.schedule import announce_step, total_steps
from mftctl.training.score_start import ScoreStart, score_start


@dataclass(frozen=True, slots=True)
class MaskSearch:
    """What a search for a mask works on.

    Attributes:
        model: Unmasked; left unmasked, its weights untouched.
        targets: The projections that carry the mask.
        options: Method, ratio and training options.
        inputs: Encoded data.
        folder: Gets metrics and checkpoints.
        listener: Hears progress.
        unmasked_loss: Validation loss of the unmasked model; None for a model that comes without values.
        fft_learning_rate: That the model was fine-tuned with.
        seed: Decides the random start and the order of the data.
        resume: Go on from the newest checkpoint of the folder.
        interim: What is measured on the way.
        weights: The values of a model that comes without.
        confirming: Records that confirm the mask of such a model, which has its values during the training only.
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

    @property
    def start(self) -> ScoreStart:
        """Where the scores start, and how fast they move."""
        return score_start(
            self.options,
            self.model,
            seed=self.seed,
            fft_learning_rate=self.fft_learning_rate,
            steps=total_steps(len(self.inputs.train), self.options, world_size()),
        )

    @property
    def indicators(self) -> dict[str, Indicator]:
        """The rule from scores to mask of each target."""
        options = self.options
        return {
            target.name: Indicator(
                options.ratio_of(target.projection), options.effective_threshold, options.effective_ranking
            )
            for target in self.targets
        }


@dataclass(frozen=True, slots=True)
class LearnedMask:
    """A mask in memory, and what validation says of it.

    Attributes:
        keep: Bool keep mask of each target, by module name, on the CPU.
        unmasked_loss: Validation loss per answer token without a mask.
        start_loss: The same with the mask of the initial scores.
        best_loss: The same with this mask, which is the best one unless the last was to be kept.
        best_step: The optimizer step it was found at; 0 is the start.
        steps: Optimizer steps taken.
        tokens: Tokens trained on.
        learning_rate: The peak learning rate; the largest where it differs between tensors. None without one.
        flips: From `summarise_flips`; None without training.
        confirming: The losses of confirming records without the mask and with it; None where they were not measured.
    """

    keep: dict[str, torch.Tensor]
    unmasked_loss: float
    start_loss: float
    best_loss: float
    best_step: int = 0
    steps: int = 0
    tokens: int = 0
    learning_rate: float | None = None
    flips: Flips | None = None
    confirming: tuple[list[SampleLoss], list[SampleLoss]] | None = None

    @property
    def helps(self) -> bool:
        """Whether the model is better under it than without a mask."""
        return self.best_loss < self.unmasked_loss


@dataclass(frozen=True, slots=True)
class MaskTrainingInputs:
    """What a mask is learned from.

    Attributes:
        inputs: Encoded data.
        fft_learning_rate: That the model was fine-tuned with.
    """

    inputs: TrainingInputs
    fft_learning_rate: float


def prepare_mask_training(
    recipe: Recipe, source: Source, run: Run, listener: Listener, data_fraction: float
) -> MaskTrainingInputs:
    """The data to learn a mask from: by default the records that the model was not fine-tuned on, as it says.

    The run notes it, and the learning rate that the model was fine-tuned with.

    Args:
        recipe: With the `mask_train` section, the data and the seed.
        source: The fine-tuned model.
        run: Open run, beside those that made the model.
        listener: Is told what is left out.
        data_fraction: Share of the records to learn from.

    Raises:
        MftError: The data cannot be used.
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
        learn_from=options.effective_learn_from,
        now=run.started,
        listener=listener,
    )
    require_same_data(run.record.inputs, inputs)
    if inputs.left_out:
        listener.note(
            f"Training records: {len(inputs.train)}; {inputs.left_out} that fine-tuning has seen are left out "
            "(--learn-from all takes them in)"
        )
    # A resumed run goes on with the rate it began with, whatever its source can still tell.
    rate = float(run.record.inputs.get("fft_learning_rate") or fft_learning_rate(source, recipe))
    run.update(inputs={**source.as_inputs(), **inputs.summary(), "fft_learning_rate": rate})
    return MaskTrainingInputs(inputs, rate)


def load_frozen_model(inputs: TrainingInputs, options: MaskTrainOptions) -> PreTrainedModel:
    """The model that stays as it is: fp32, or bf16 where asked for, since its weights are only read."""
    return load_model(inputs.checkpoint, dtype=frozen_dtype(options))


def frozen_dtype(options: MaskTrainOptions) -> torch.dtype:
    """The dtype in which the frozen weights are held."""
    return torch.bfloat16 if uses_bf16(options.precision) else torch.float32
