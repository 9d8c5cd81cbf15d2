"""The loss of a model on each reference answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mftctl.errors import EvaluationError
from mftctl.evaluation.inference import OnProgress, evaluation_mode, length_batches
from mftctl.runtime.process_group import merged, share_of
from mftctl.runtime.processes import world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from mftctl.data.encoding import Encoded


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """The summed loss of one sample.

    Attributes:
        nll: Sum of the negative log-likelihoods of the answer's tokens, in nats.
        answer_tokens: Number of tokens in that sum. The first token of a text never counts: nothing precedes it to
            predict it from.
    """

    nll: float
    answer_tokens: int

    @property
    def weight(self) -> int:
        """The number of answer tokens, so that a mean is one over tokens."""
        return self.answer_tokens


class RecordLoss(Protocol):
    """The loss of one record, and its weight in a mean."""

    @property
    def nll(self) -> float:
        """Summed negative log-likelihood, in nats."""

    @property
    def weight(self) -> int:
        """Number of terms in that sum."""


def mean_loss(losses: Sequence[RecordLoss]) -> float:
    """The mean negative log-likelihood in nats: per answer token, or per preference.

    Args:
        losses: The samples; long answers weigh more than short ones, as in training.

    Raises:
        EvaluationError: There is no answer token.
    """
    weight = sum(loss.weight for loss in losses)
    if weight == 0:
        raise EvaluationError(
            "There is no answer token to compute a loss on.",
            expected="at least one sample with an answer",
            actual=f"samples: {len(losses)}, answer tokens: 0",
        )
    return math.fsum(loss.nll for loss in losses) / weight


def sample_losses(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_tokens: int = 4096,
    on_progress: OnProgress | None = None,
    together: bool = False,
) -> list[SampleLoss]:
    """The loss of each sample, in the given order.

    Logits are computed only at positions where some sample of the batch has an answer, through the model's own
    `logits_to_keep`: unlike separate calls of decoder and output head, this preserves the model's transformations of
    the logits (soft caps, scales). Large numbers of logits are computed in chunks.

    Args:
        model: A causal language model on any device, in any float dtype.
        encoded: Token ids and labels; -100 marks unscored tokens. All answers of a conversation are scored.
        pad_token_id: Pads shorter samples on the right.
        batch_tokens: Maximum tokens per batch, including padding.
        on_progress: Called after each batch.
        together: Whether all processes call this together and share the batches, which stay the same.
    """
    from mftctl.data.batching import PaddingCollator
    from mftctl.data.prepared.records import token_lengths
    from mftctl.runtime.torch_failures import gpu_failures

    batches = length_batches(token_lengths(encoded), batch_tokens)
    takers = world_size() if together else 1
    collate = PaddingCollator(pad_token_id)
    keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters
    losses: dict[int, SampleLoss] = {}
    with evaluation_mode(model), gpu_failures("measuring losses"):
        for indices in share_of(batches) if together else batches:
            batch = collate([encoded[index] for index in indices])
            losses.update(zip(indices, _batch_losses(model, batch, keeps_some=keeps_some), strict=True))
            if on_progress is not None:
                on_progress(min(len(losses) * takers, len(encoded)), len(encoded))
    losses = merged(losses) if together else losses
    return [losses[index] for index in range(len(encoded))]


def _batch_losses(model: PreTrainedModel, batch: dict[str, Tensor], *, keeps_some: bool) -> list[SampleLoss]:
    """The losses of one batch.

    Args:
        model: In evaluation mode.
        batch: `input_ids`, `attention_mask` and `labels`, each `(samples, tokens)`, and inputs for images, if any.
        keeps_some: Whether the model can compute logits at selected positions only.
    """
    import torch.nn.functional as F

    from mftctl.data.batching import model_inputs
    from mftctl.data.examples import IGNORED_LABEL
    from mftctl.evaluation.head_chunks import chunk_count

    targets = batch["labels"][:, 1:].to(model.device)
    positions = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
    if len(positions) == 0:
        return [SampleLoss(nll=0.0, answer_tokens=0) for _ in targets]
    if chunk_count(model, targets.shape[0] * len(positions)) > 1:
        return _losses_in_chunks(model, batch)
    targets = targets[:, positions]
    logits = model(
        **model_inputs(batch, model.device),
        use_cache=False,
        **({"logits_to_keep": positions} if keeps_some else {}),
    ).logits
    if not keeps_some:
        logits = logits[:, positions]
    losses = []
    for row, target in zip(logits, targets, strict=True):
        # One sample at a time, so that only one sample's logits are held in fp32.
        nll = F.cross_entropy(row.float(), target, ignore_index=IGNORED_LABEL, reduction="none")
        losses.append(SampleLoss(nll=exact_sum(nll), answer_tokens=int((target != IGNORED_LABEL).sum())))
    return losses


def _losses_in_chunks(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[SampleLoss]:
    """The losses of a batch with too many logits to hold at once."""
    import torch
    import torch.nn.functional as F

    from mftctl.data.batching import model_inputs
    from mftctl.evaluation.head_chunks import answer_positions, logits_only_at

    labels = batch["labels"].to(model.device)
    positions, tokens = answer_positions(labels)
    with logits_only_at(model, positions, tokens):
        output = model(**model_inputs(batch, model.device), use_cache=False)
    logits, others = output.logits, getattr(output, "loss", None)
    chosen = logits[0] if logits.shape[0] == 1 and logits.shape[1] <= len(tokens) else logits.flatten(0, 1)[positions]
    shown = F.cross_entropy(chosen.float(), tokens[: len(chosen)], reduction="none")
    nll = (shown if others is None else torch.cat([shown, others])).double()
    samples = positions // labels.shape[1]
    sums = torch.zeros(len(labels), dtype=torch.float64, device=nll.device).index_add(0, samples, nll).tolist()
    counts = torch.bincount(samples, minlength=len(labels)).tolist()
    return [SampleLoss(nll=total, answer_tokens=count) for total, count in zip(sums, counts, strict=True)]


def exact_sum(values: torch.Tensor) -> float:
    """Returns the sum in fp64, computed on the CPU on a Mac, whose GPU has no fp64."""
    import torch

    return float((values.cpu() if values.device.type == "mps" else values).sum(dtype=torch.float64))
