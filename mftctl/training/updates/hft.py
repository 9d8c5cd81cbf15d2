"""Half Fine-Tuning: half of the parameters of every decoder layer stay frozen."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import Literal

from torch import nn

from mftctl.masking.targets import decoder_layers, find_targets

Category = Literal["attn", "mlp", "norm"]


def hft_frozen_names(model: nn.Module, seed: int) -> list[str]:
    """The names of the parameters that Half Fine-Tuning freezes, in model order.

    Within each decoder layer and each category (attention, MLP, norms), half of the parameter tensors are chosen at
    random. If their number is odd, half of it is rounded down and up alternately over the layers, starting with down,
    so that about half of each category is frozen. A bias is treated together with the weight of its module.

    Embeddings, the final norm and the output head stay trainable, since they belong to no layer. One choice applies to
    a whole training; use a different seed for a further training stage.

    Args:
        model: A decoder-only model. A norm is a module with `norm` in its class name, even inside attention; attention
            is everything in the same submodule as the attention projections; everything else in a layer counts as MLP.
        seed: Decides the choice.

    Raises:
        MaskingError: The model has no decoder layers, or a layer has no attention.

    Source: HFT (Hui et al. 2024, arXiv 2404.18466), selection by category, as used in the GMT paper (section 4.1,
        footnote 4).
    """
    prefix, decoder = decoder_layers(model)
    generator = random.Random(seed)
    rounds_up: defaultdict[Category, bool] = defaultdict(bool)
    frozen: list[str] = []
    for index, layer in enumerate(decoder):
        chosen: set[str] = set()
        for category, units in _units(layer, _attention_roots(model, prefix, index)).items():
            odd = len(units) % 2
            count = len(units) // 2 + (odd and rounds_up[category])
            rounds_up[category] ^= bool(odd)
            chosen.update(*(units[unit] for unit in generator.sample(sorted(units), count)))
        frozen += [f"{prefix}.{index}.{name}" for name, _ in layer.named_parameters() if name in chosen]
    return frozen


def freeze_half(model: nn.Module, seed: int) -> list[str]:
    """Freezes half of the parameters of every decoder layer and returns their names.

    Args:
        model: Modified in place; other parameters are left unchanged.
        seed: Decides the choice; see `hft_frozen_names`.

    Raises:
        MaskingError: The model has no decoder layers, or a layer has no attention.
    """
    names = hft_frozen_names(model, seed)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names


def _attention_roots(model: nn.Module, prefix: str, index: int) -> set[str]:
    """The children of a decoder layer that contain its attention projections, such as `self_attn`."""
    start = f"{prefix}.{index}."
    return {target.name.removeprefix(start).split(".")[0] for target in find_targets(model, [index], "attn")}


def _units(layer: nn.Module, attention_roots: set[str]) -> dict[Category, dict[str, list[str]]]:
    """The parameter names of a layer by category and by unit; a weight and its bias form one unit."""
    units: dict[Category, dict[str, list[str]]] = {"attn": {}, "mlp": {}, "norm": {}}
    for name, _ in layer.named_parameters():
        owner = layer.get_submodule(name.rpartition(".")[0])
        category: Category = "attn" if name.split(".")[0] in attention_roots else "mlp"
        if "norm" in type(owner).__name__.lower():
            category = "norm"
        unit = re.sub(r"[._](weight|bias)$", "", name)
        units[category].setdefault(unit, []).append(name)
    return units
