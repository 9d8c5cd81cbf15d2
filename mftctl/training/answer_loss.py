"""The training loss over answer tokens, with logits computed only where an answer token is predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from mftctl.data.examples import IGNORED_LABEL


def answer_loss(
    outputs: Any,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    answer_tokens: Any,
    shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss summed over a micro-batch's answer tokens, divided by the answer tokens of the whole optimizer step.

    Args:
        outputs: The model's output: logits `(1, positions, vocabulary)`, the logits of all positions, or the logits
            of the first positions and the losses of the others, as in `logits_only_at`.
        positions: From `answer_positions`.
        tokens: From `answer_positions`.
        answer_tokens: Answer tokens in all micro-batches (and processes) of the step; the number of records where
            every record has equal weight.
        shares: From `record_shares`, for a mean over records; with None, every token has equal weight.
    """
    if shares is None:
        logits, shown, others = _shown(outputs, positions, tokens)
        total: torch.Tensor = F.cross_entropy(logits, shown, reduction="sum")
        loss: torch.Tensor = (total if others is None else total + others.sum()) / answer_tokens
        return loss
    mean: torch.Tensor = (token_losses(outputs, positions, tokens) * shares).sum() / answer_tokens
    return mean


def token_losses(outputs: Any, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each answer token, fp32 `(answer tokens,)`.

    Args:
        outputs: The model's output, as for `answer_loss`.
        positions: From `answer_positions`.
        tokens: From `answer_positions`.
    """
    logits, shown, others = _shown(outputs, positions, tokens)
    losses = F.cross_entropy(logits, shown, reduction="none")
    return losses if others is None else torch.cat([losses, others])


def _shown(
    outputs: Any, positions: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The logits in an output in fp32, the tokens predicted there, and the losses of the other tokens, if any."""
    logits, others = outputs.logits, getattr(outputs, "loss", None)
    if others is not None:
        return logits[0].float(), tokens[: logits.shape[1]], others
    # The last position of a record predicts nothing, so there are always more logits when all positions are given.
    chosen = logits[0] if logits.shape[:2] == (1, len(positions)) else logits.flatten(0, 1)[positions]
    return chosen.float(), tokens, None


def record_shares(labels: torch.Tensor) -> torch.Tensor:
    """The weight of each answer token in the mean of its record, fp32 `(answer tokens,)`, as in `answer_positions`.

    Args:
        labels: `(records, length)`, -100 where there is no answer token.
    """
    answers = labels[:, 1:] != IGNORED_LABEL
    return answers.sum(dim=1).float().reciprocal().unsqueeze(1).expand_as(answers)[answers]
