"""What a training minimises: the loss on answers, or on preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.nn import functional as F

from mftctl.data.encoding import Encoded
from mftctl.data.examples import IGNORED_LABEL
from mftctl.evaluation.inference import OnProgress
from mftctl.evaluation.losses import RecordLoss, sample_losses
from mftctl.evaluation.preferences import DpoLoss, PreferenceLoss, answer_scores, mean_rewards, preference_losses
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.results import Rewards
from mftctl.experiments.training_options import TrainingOptions
from mftctl.training.answer_loss import answer_loss, record_shares, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """The answers of a micro-batch.

    Attributes:
        labels: int64 `(sequences, tokens)`, -100 where there is no answer token.
        positions: From `answer_positions`.
        tokens: From `answer_positions`.
        reference: Log-probabilities of the answers of preferences under the reference model, fp32 `(2, preferences)`;
            None for single answers.
    """

    labels: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    reference: torch.Tensor | None = None


class Objective(Protocol):
    """What a training minimises."""

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels with one label, behind the first position, for each term of the mean of a step."""

    def loss(self, outputs: Any, batch: AnswerBatch, terms: Any) -> torch.Tensor:
        """The loss of a micro-batch as its part of the mean of the whole optimizer step, with a gradient.

        Args:
            outputs: The model's output, as in `logits_only_at`.
            batch: The answers.
            terms: Terms of the mean, in all micro-batches and processes of the step.
        """

    def measure(
        self, model: PreTrainedModel, records: Sequence[Encoded], *, pad_token_id: int, on_progress: OnProgress
    ) -> Sequence[RecordLoss]:
        """The loss of each record; must be called in all processes at once."""

    def rewards(self, losses: Sequence[RecordLoss]) -> Rewards | None:
        """The rewards of measured preferences; None for single answers."""


@dataclass(frozen=True, slots=True)
class AnswerObjective:
    """The loss on answers: the mean over all answer tokens of a step.

    Attributes:
        averages_records: Whether it is the mean over records of each record's mean over answer tokens instead.
    """

    averages_records: bool = False

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels themselves, or one for each record."""
        return one_for_each(labels) if self.averages_records else labels

    def loss(self, outputs: Any, batch: AnswerBatch, terms: Any) -> torch.Tensor:
        """The part of a micro-batch in the mean of a step."""
        shares = record_shares(batch.labels) if self.averages_records else None
        return answer_loss(outputs, batch.positions, batch.tokens, terms, shares)

    def measure(
        self, model: PreTrainedModel, records: Sequence[Encoded], *, pad_token_id: int, on_progress: OnProgress
    ) -> Sequence[RecordLoss]:
        """The loss of each record."""
        return sample_losses(model, records, pad_token_id=pad_token_id, on_progress=on_progress, together=True)

    def rewards(self, losses: Sequence[RecordLoss]) -> Rewards | None:
        """None."""
        return None


@dataclass(frozen=True, slots=True)
class PreferenceObjective:
    """Direct preference optimisation: the mean over the preferences of a step.

    Attributes:
        dpo: The loss of preferences.
    """

    dpo: DpoLoss

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """One label for each preference."""
        return one_for_each(labels[: len(labels) // 2])

    def loss(self, outputs: Any, batch: AnswerBatch, terms: Any) -> torch.Tensor:
        """The part of a micro-batch in the mean of a step."""
        losses = token_losses(outputs, batch.positions, batch.tokens)
        # Each position occurs once, so that the sums do not depend on the order of additions on a GPU.
        spread = losses.new_zeros(batch.labels.numel()).index_copy(0, batch.positions, losses)
        log_probs = -spread.view(2, -1, batch.labels.shape[1]).sum(dim=2)
        tokens = (batch.labels[:, 1:] != IGNORED_LABEL).sum(dim=1).view(2, -1)
        reference = cast("torch.Tensor", batch.reference)
        rewards = self.dpo.rewards(log_probs, reference, tokens.clamp(min=1))
        losses_of_pairs = self.dpo.losses(rewards[0], rewards[1])
        # A pair without answers only fills a gap between processes.
        loss: torch.Tensor = torch.where(tokens[0] > 0, losses_of_pairs, 0).sum() / terms
        return loss

    def measure(
        self, model: PreTrainedModel, records: Sequence[Encoded], *, pad_token_id: int, on_progress: OnProgress
    ) -> Sequence[RecordLoss]:
        """The loss of each preference."""
        scores = answer_scores(model, records, pad_token_id=pad_token_id, on_progress=on_progress)
        return preference_losses(scores, records, self.dpo)

    def rewards(self, losses: Sequence[RecordLoss]) -> Rewards | None:
        """The means of the rewards, and how often the chosen answer has the higher one."""
        return mean_rewards([loss for loss in losses if isinstance(loss, PreferenceLoss)])


SFT = AnswerObjective()


def objective_of(options: TrainingOptions) -> Objective:
    """The objective that the options of a training name."""
    if options.objective == "dpo":
        beta = cast("float", options.beta)  # always set: filled in when the recipe was read
        return PreferenceObjective(DpoLoss(beta, options.length_normalized))
    return AnswerObjective(isinstance(options, MaskTrainOptions) and options.averages_records)


def one_for_each(labels: torch.Tensor) -> torch.Tensor:
    """Labels `(sequences, 2)` with one answer token per sequence that has any, so that sequences are counted."""
    answers = labels[:, 1:].ne(IGNORED_LABEL).any(dim=1, keepdim=True)
    return F.pad(torch.where(answers, 0, IGNORED_LABEL), (1, 0), value=IGNORED_LABEL)
