"""The training loss over answer tokens, with logits computed only where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mftctl.data.examples import IGNORED_LABEL


def answer_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where an answer token is predicted, and which one it is.

    Args:
        labels: `(records, length)`, -100 where there is no answer token.

    Returns:
        Positions in the flattened batch, int64 `(answer tokens,)`, each the one before its token; and the tokens.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
    positions = (targets != IGNORED_LABEL).nonzero().squeeze(1)
    return positions, targets[positions]


@contextmanager
def logits_only_at(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Inside it, the output head gets the hidden states of some positions only: prompts and padding need no logits.

    With a large vocabulary and small layers the head is a good part of a training step, and its logits of the memory.
    What a model does to its logits, such as a soft cap, it still does.

    Args:
        model: A causal language model. One whose head is not a module of its own computes all logits.
        positions: From `answer_positions`.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        yield
        return

    def choose(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].flatten(0, 1)[positions].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def answer_loss(outputs: Any, positions: torch.Tensor, tokens: torch.Tensor, answer_tokens: Any) -> torch.Tensor:
    """The loss summed over a micro-batch's answer tokens, divided by the answer tokens of the whole optimizer step.

    Args:
        outputs: Of the model, with logits `(1, positions, vocabulary)`, or of all positions.
        positions: From `answer_positions`.
        tokens: From `answer_positions`.
        answer_tokens: Of all micro-batches (and processes) of the step.
    """
    logits = outputs.logits
    # A record's last position predicts nothing, so that logits of all positions are always more.
    chosen = logits[0] if logits.shape[:2] == (1, len(positions)) else logits.flatten(0, 1)[positions]
    loss: torch.Tensor = F.cross_entropy(chosen.float(), tokens, reduction="sum") / answer_tokens
    return loss
