"""The parts of a model with several towers: its language model, and the projector behind its vision tower."""

from __future__ import annotations

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

_PROJECTOR = re.compile(r"(^|[._])(projector|connector|merger|aligner)", re.IGNORECASE)


def has_towers(model: nn.Module) -> bool:
    """True if a model has a language model among other parts, such as a vision tower."""
    return language_model(model) is not None


def beside_language_model(model: nn.Module) -> list[nn.Parameter]:
    """The parameters outside the language model and its output head: of a vision tower and a projector."""
    language = language_model(model)
    if language is None:
        return []
    head = model.get_output_embeddings()  # type: ignore[operator]
    inside = {id(parameter) for part in (language, head) if part is not None for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def projector_modules(model: nn.Module) -> list[tuple[str, nn.Linear | Conv1D]]:
    """Path and module of the linear projections between a vision tower and the language model, in model order.

    These are the projections beside the towers, and those of a part of the vision tower that is named a projector,
    connector, merger or aligner.

    Args:
        model: Any model; without towers, it has none.
    """
    language = language_model(model)
    if language is None:
        return []
    head = model.get_output_embeddings()  # type: ignore[operator]
    excluded = {id(module) for part in (language, head) if part is not None for module in part.modules()}
    towers = [model.get_encoder(modality=modality) for modality in ("image", "audio")]  # type: ignore[operator]
    inside = {id(module) for tower in towers if language not in tower.modules() for module in tower.modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module) not in excluded
        and (_PROJECTOR.search(name) or (inside and id(module) not in inside))
    ]


def language_model(model: nn.Module) -> nn.Module | None:
    """The language model among the towers of a model; None if the model has no other parts.

    Args:
        model: Any module; only a model of transformers whose configuration has a separate one for text has towers.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or not hasattr(model, "get_decoder"):
        return None
    if config.get_text_config(decoder=True) is config:
        return None
    decoder = model.get_decoder()  # type: ignore[operator]
    return decoder if isinstance(decoder, nn.Module) else None
