"""Parameters of which no entries are chosen: each step updates them whole."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Excluded = Literal["embeddings", "head"]


def excluded_parameters(model: PreTrainedModel, parts: Collection[Excluded]) -> dict[nn.Parameter, str]:
    """The parameters that a choice of entries leaves out, with their names, in model order.

    Where embeddings and head are one tensor, each of the two words names it.

    Args:
        model: With its parameters, whole or as processes share them.
        parts: `embeddings`: all of its `nn.Embedding`s, of tokens and positions; `head`: what makes logits.

    Source: ours. GMT masks every gradient and names no exception.
    """
    found: set[nn.Parameter] = set()
    if "embeddings" in parts:
        found |= {
            item for module in model.modules() if isinstance(module, nn.Embedding) for item in module.parameters()
        }
    if "head" in parts:
        found |= set(_head(model))
    return {parameter: name for name, parameter in model.named_parameters() if parameter in found}


def excluded_text(model: PreTrainedModel, parts: Collection[Excluded]) -> str:
    """What is left out, for a user: the share of the weights, and where one tensor is both embeddings and head.

    Args:
        model: With all of its parameters, or their outlines.
        parts: As `excluded_parameters` takes them; at least one.
    """
    chosen = excluded_parameters(model, parts)
    share = sum(item.numel() for item in chosen) / sum(item.numel() for item in model.parameters())
    text = f"Updated whole at each step: {', '.join(chosen.values()) or 'nothing'} ({share:.1%} of the weights)"
    head = set(_head(model))
    tied = [name for item, name in excluded_parameters(model, ["embeddings"]).items() if item in head]
    return f"{text}; {tied[0]} is both embeddings and head (tied weights)" if tied else text


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [] if head is None else list(head.parameters())
