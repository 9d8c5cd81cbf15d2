"""Initial values and learning rates of the scores in mask training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mftctl.errors import ConfigError
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.layers import DEFAULT_START_STD, initial_scores, kaiming_bound
from mftctl.masking.targets import MaskTarget
from mftctl.training.schedule import schedule_factors

_RATE_FACTOR = 4.0
"""Only scores that reach the threshold change the mask, so scores tolerate a larger rate than weights
(docs/results/findings.md)."""


@dataclass(frozen=True, slots=True)
class ScoreStart:
    """The start and the learning rate of the scores.

    Attributes:
        options: Options of mask training.
        std: Standard deviation of the normal start.
        seed: Decides random starts.
        fft_learning_rate: Learning rate that the model was fine-tuned with.
        steps: Optimizer steps of the training.
    """

    options: MaskTrainOptions
    std: float
    seed: int
    fft_learning_rate: float
    steps: int

    def scores(
        self, target: MaskTarget, weight: torch.Tensor | None = None, base: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The initial scores of a target, fp32, of its weight's shape.

        Args:
            target: The projection.
            weight: Values of its weight, if the target itself has none.
            base: Its weight before fine-tuning, for a delta mask.
        """
        options = self.options
        return initial_scores(
            target,
            options.start,
            std=self.std,
            constant=options.start_value,
            seed=self.seed,
            weight=weight,
            base=base,
        )

    def learning_rate(self, target: MaskTarget) -> float:
        """The peak learning rate of a target's scores.

        Raises:
            ConfigError: `auto` has no distance to scale to.
        """
        options = self.options
        if options.learning_rate != "auto":
            return options.learning_rate
        if options.start == "weights":
            return _RATE_FACTOR * self.fft_learning_rate
        scale = self._scale(target)
        if scale == 0.0:
            raise ConfigError(
                "learning_rate: auto needs scores that start away from the threshold.",
                key="mask_train.learning_rate",
                expected="a number, or a start_value other than the threshold",
                actual=options.start_value,
            )
        return auto_learning_rate(options.travel, scale, schedule_factors(self.steps, options))

    def learning_rate_text(self, targets: Sequence[MaskTarget]) -> str:
        """The learning rate of the targets' scores and how it was chosen."""
        highest = max(self.learning_rate(target) for target in targets)
        if self.options.learning_rate != "auto":
            return f"{highest:.3g}"
        if self.options.start == "weights":
            return f"{highest:.3g}, {_RATE_FACTOR:g} times that of fine-tuning ({self.fft_learning_rate:.3g})"
        starts = {"normal": f"N(0, {self.std:g})", "identity": "the multiplier 1"}
        start = starts.get(self.options.start, "the initial scores")
        return f"up to {highest:.3g}, scaled to {start}"

    def _scale(self, target: MaskTarget) -> float:
        """The unit of distance for `auto`."""
        match self.options.start:
            case "normal":
                return self.std
            case "kaiming":
                return kaiming_bound(target)
            case "identity":
                return 1.0
            case _:
                return abs(self.options.start_value - (self.options.threshold or 0.0))


def score_start(
    options: MaskTrainOptions, model: PreTrainedModel, *, seed: int, fft_learning_rate: float, steps: int
) -> ScoreStart:
    """The start and the learning rate of the scores on a model.

    Args:
        options: Options of mask training.
        model: Its configuration provides the standard deviation of the normal start if the options do not.
        seed: Decides random starts.
        fft_learning_rate: Learning rate that the model was fine-tuned with.
        steps: Optimizer steps of the training.
    """
    text_config = model.config.get_text_config()
    std = options.start_std or getattr(text_config, "initializer_range", None) or DEFAULT_START_STD
    return ScoreStart(options, std, seed, fft_learning_rate, steps)


def auto_learning_rate(travel: float, scale: float, factors: Sequence[float]) -> float:
    """The peak learning rate at which Adam, moving a score by one learning rate per step, travels `travel` scales.

    Args:
        travel: Total distance in units of `scale`.
        scale: Typical magnitude of the initial scores.
        factors: The schedule: each step's share of the peak learning rate.

    Source: ours; what matters is how far a score can move in total relative to the spread of the initial scores.
    """
    return travel * scale / sum(factors)
