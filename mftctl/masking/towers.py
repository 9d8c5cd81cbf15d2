"""The parts of a model with several towers: its language model, and the projector behind its vision tower."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_PROJECTOR = re.compile(r"(^|[._])(projector|connector|merger|aligner)", re.IGNORECASE)


def language_model(model: nn.Module) -> nn.Module | None:
    """The language model among the towers of a model; None if the model has no separate one.

    Args:
        model: Any module; only a model of transformers whose configuration has one for text has towers.
    """
    config = _config(model)
    if config is None or not hasattr(model, "get_decoder") or _text_config(config) is config:
        return None
    decoder = model.get_decoder()  # type: ignore[operator]
    return decoder if isinstance(decoder, nn.Module) else None


def outside_decoder(model: nn.Module) -> set[nn.Module]:
    """The modules in which no decoder layer is looked for: vision and audio towers, or all outside the language model.

    Args:
        model: Any module.
    """
    language = language_model(model)
    if language is None:
        return _in_towers(model)
    return set(model.modules()) - set(language.modules())


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

    These are the projections beside all towers, and those of a part of a tower that is named a projector, connector,
    merger or aligner.

    Args:
        model: Any model; without towers, it has none.
    """
    language = language_model(model)
    if language is None:
        return []
    head = model.get_output_embeddings()  # type: ignore[operator]
    excluded = {module for part in (language, head) if part is not None for module in part.modules()}
    inside = _in_towers(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module not in excluded
        and (module not in inside or _PROJECTOR.search(name))
    ]


def _in_towers(model: nn.Module) -> set[nn.Module]:
    """All modules of vision and audio towers.

    Towers are the models within a model that have another kind of configuration than it and its language model, and
    what the model itself calls its image encoder.
    """
    config = _config(model)
    if config is None:
        return set()
    own = {type(config), type(_text_config(config))}
    towers: list[nn.Module] = [
        part for part in model.modules() if isinstance(part, PreTrainedModel) and type(part.config) not in own
    ]
    if hasattr(config, "vision_config") and hasattr(model, "get_encoder"):
        encoder = model.get_encoder(modality="image")  # type: ignore[operator]
        if isinstance(encoder, nn.Module) and encoder not in (model, getattr(model, "base_model", None)):
            towers.append(encoder)
    return {module for tower in towers for module in tower.modules()}


def _config(model: nn.Module) -> Any:
    """The configuration of a model of transformers; None for any other module."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "get_text_config") else None


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)
