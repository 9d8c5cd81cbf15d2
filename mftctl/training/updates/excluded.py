"""Parameters excluded from entry selection; each step updates all of their entries."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Excluded = Literal["embeddings", "head"]


def excluded_parameters(model: PreTrainedModel, parts: Collection[Excluded]) -> dict[nn.Parameter, str]:
    """The parameters excluded from entry selection, with their names, in model order.

    If embeddings and head are tied, either part selects their shared tensor.

    Args:
        model: The model, with whole or sharded parameters.
        parts: `embeddings`: all `nn.Embedding` modules, for tokens and positions; `head`: the output head.

    Source: ours. GMT masks every gradient without exception.
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
    """Message on the excluded parameters: their share of the weights, and whether embeddings and head are tied.

    Args:
        model: The model, with or without parameter values.
        parts: As in `excluded_parameters`; at least one.
    """
    chosen = excluded_parameters(model, parts)
    share = sum(item.numel() for item in chosen) / sum(item.numel() for item in model.parameters())
    text = f"Fully updated at each step: {', '.join(chosen.values()) or 'nothing'} ({share:.1%} of the weights)"
    head = set(_head(model))
    tied = [name for item, name in excluded_parameters(model, ["embeddings"]).items() if item in head]
    return f"{text}; {tied[0]} is both embeddings and head (tied weights)" if tied else text


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [] if head is None else list(head.parameters())
