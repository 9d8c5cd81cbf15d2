"""Direct preference optimisation: rewards and losses of preferences, and their measurement on records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mftctl.evaluation.inference import OnProgress
from mftctl.evaluation.losses import sample_losses
from mftctl.experiments.results import Rewards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from mftctl.data.encoding import Encoded


@dataclass(frozen=True, slots=True)
class DpoLoss:
    """The loss of preferences, from the log-probabilities of their answers.

    Attributes:
        beta: How strongly the model is held to the reference model.
        length_normalized: Whether each log-probability is divided by the number of tokens of its answer.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; length-normalised as in Tülu 3 (arXiv 2411.15124),
        section 5.1, which TRL calls `sigmoid_norm`.
    """

    beta: float
    length_normalized: bool = False

    def rewards(self, log_probs: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The implicit reward of each answer, of the shape of the arguments.

        Args:
            log_probs: Summed over the tokens of an answer, in nats.
            reference: The same of the reference model.
            tokens: Number of tokens of each answer, at least 1.
        """
        ratios = log_probs - reference
        return self.beta * (ratios / tokens if self.length_normalized else ratios)

    def losses(self, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
        """The negative log-likelihood of each preference, under the model of Bradley and Terry."""
        from torch.nn import functional as F

        return -F.logsigmoid(chosen_rewards - rejected_rewards)


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """The loss of one preference.

    Attributes:
        nll: Negative log-likelihood of the preference, in nats.
        chosen_reward: Implicit reward of the chosen answer.
        rejected_reward: Implicit reward of the rejected answer.
    """

    nll: float
    chosen_reward: float
    rejected_reward: float

    @property
    def weight(self) -> int:
        """1: all preferences have the same weight in a mean."""
        return 1


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """What a model gives the answers of preferences; each of shape `(records, 2)`: chosen, rejected.

    Attributes:
        log_probs: Log-probability of each answer, fp64, in nats.
        tokens: Number of its tokens.
    """

    log_probs: torch.Tensor
    tokens: torch.Tensor


def answer_scores(
    model: PreTrainedModel, records: Sequence[Encoded], *, pad_token_id: int, on_progress: OnProgress | None = None
) -> AnswerScores:
    """The scores of the answers of all records; must be called in all processes at once.

    Args:
        model: A causal language model on any device, in any float dtype.
        records: Preferences.
        pad_token_id: Pads shorter sequences on the right.
        on_progress: Called after each batch with the number of records done and the total.
    """
    import torch

    from mftctl.data.prepared.records import Sides

    def advance(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done // 2, total // 2)

    losses = sample_losses(model, Sides(records), pad_token_id=pad_token_id, on_progress=advance, together=True)
    return AnswerScores(
        -torch.tensor([loss.nll for loss in losses], dtype=torch.float64).view(-1, 2),
        torch.tensor([loss.answer_tokens for loss in losses]).view(-1, 2),
    )


def preference_losses(scores: AnswerScores, records: Sequence[Encoded], loss: DpoLoss) -> list[PreferenceLoss]:
    """The loss of each record.

    Args:
        scores: From `answer_scores`.
        records: The same records, with the log-probabilities of the reference model.
        loss: The loss.
    """
    import torch

    reference = torch.tensor([record.reference for record in records], dtype=torch.float64)
    chosen, rejected = loss.rewards(scores.log_probs, reference, scores.tokens).unbind(dim=1)
    columns = (values.tolist() for values in (loss.losses(chosen, rejected), chosen, rejected))
    return [PreferenceLoss(*values) for values in zip(*columns, strict=True)]


def mean_rewards(losses: Sequence[PreferenceLoss]) -> Rewards:
    """The means over all preferences.

    Args:
        losses: At least one.
    """
    chosen, rejected = ([getattr(loss, name) for loss in losses] for name in ("chosen_reward", "rejected_reward"))
    right = sum(loss.chosen_reward > loss.rejected_reward for loss in losses)
    mean = [sum(values) / len(losses) for values in (chosen, rejected)]
    return Rewards(chosen=mean[0], rejected=mean[1], accuracy=right / len(losses), margin=mean[0] - mean[1])
