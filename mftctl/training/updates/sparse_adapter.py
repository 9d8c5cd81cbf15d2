"""Adapters that change individual weights of the projections, through peft: SHiRA and Super-Tuning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from mftctl.errors import ConfigError, MaskMismatchError
from mftctl.experiments.fft_options import FftOptions
from mftctl.masking.checkpoints.sparse_adapters import ADAPTER, rely_on_positions, shared_sparsity, super_tuning_layers
from mftctl.masking.selection import keep_highest, removed_count
from mftctl.masking.targets import linear_projections

Positions = Mapping[str, torch.Tensor]
"""Flat indices of the trained weights by path of the projection: int64, ascending, each at least one."""

MASK_TYPE = "mftctl"
"""SHiRA's `mask_type`: unknown to peft, so that it takes the positions in the adapter's file and draws none itself."""


def trained_counts(model: PreTrainedModel, options: FftOptions) -> dict[str, int]:
    """The number of weights that SHiRA or Super-Tuning trains in each projection, without a mask as its support.

    Args:
        model: The model, possibly without data.
        options: Method, rank and ratio.

    Raises:
        ConfigError: A projection is not an `nn.Linear`, has fewer weights than the rank asks for, or has none left.
    """
    counts = {}
    for name, projection in linear_modules(model, options.method).items():
        weights, sides = projection.weight.numel(), sum(projection.weight.shape)
        if options.method == "shira":
            counts[name] = options.lora_rank * sides
            if counts[name] > weights:
                raise _rank_too_high(model, options)
        else:
            counts[name] = weights - removed_count(weights, options.ratio or 0.0)
            if not counts[name]:
                raise ConfigError(
                    "The ratio leaves no weight of a projection to train.",
                    key="fft.ratio",
                    expected=f"at least one of the {weights:,} weights of {name}",
                    actual=options.ratio,
                    hint="a lower --ratio",
                )
    return counts


def choose_positions(model: PreTrainedModel, options: FftOptions, seed: int) -> dict[str, torch.Tensor]:
    """The weights that SHiRA or Super-Tuning trains without a mask as its support: random ones, or the largest.

    Args:
        model: The whole model.
        options: Method, rank and ratio.
        seed: Together with the path of a projection, decides the random weights.

    Raises:
        ConfigError: As for `trained_counts`.
        MaskingError: A weight is not a number.

    Source: SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) with a random mask, and as many weights as in peft. peft
        draws the same positions in every projection of one shape; here each projection has its own. Super-Tuning
        (arXiv 2607.09287) by magnitude. peft rounds the number of trained weights down; here the ratio is rounded as
        everywhere else, and of equal weights the one with the higher index is trained.
    """
    counts = trained_counts(model, options)
    modules = linear_modules(model, options.method)
    if options.method == "shira":
        return {name: _random(name, modules[name].weight.numel(), count, seed) for name, count in counts.items()}
    ratio = options.ratio or 0.0
    return {name: _largest(modules[name].weight.detach(), ratio) for name in counts}


def add_sparse_adapter(model: PreTrainedModel, options: FftOptions, positions: Positions) -> PeftModel:
    """Adds an adapter that changes the weights at these positions; only the changes, initially 0, are trainable.

    Args:
        model: A whole model; modified in place.
        options: The method.
        positions: The weights.

    Raises:
        ConfigError: A projection is not an `nn.Linear`.
        MaskMismatchError: SHiRA cannot store this many weights of each projection.
    """
    modules = linear_modules(model, options.method)
    if options.method == "shira":
        rely_on_positions()
        return get_peft_model(model, _shira(modules, positions))
    counts = {name: len(found) for name, found in positions.items()}
    adapted = get_peft_model(model, _super_tuning(modules, counts))
    for name, layer in super_tuning_layers(adapted):
        _put(layer, positions[name].to(layer.get_base_layer().weight.device, torch.int32))
    return adapted


def add_without_data(model: PreTrainedModel, options: FftOptions, counts: Mapping[str, int]) -> PeftModel:
    """Adds an adapter to a model without data, whose memory is to be estimated.

    SHiRA's sparse tensors cannot be run without data, so Super-Tuning with as many weights stands in for it: both add
    the changes to a copy of each weight.

    Args:
        model: A model on the meta device; modified in place.
        options: The method.
        counts: Number of trained weights of each projection.

    Raises:
        ConfigError: A projection is not an `nn.Linear`.
    """
    adapted = get_peft_model(model, _super_tuning(linear_modules(model, options.method), counts))
    for name, layer in super_tuning_layers(adapted):
        _put(layer, torch.empty(counts[name], dtype=torch.int32, device="meta"))
    return adapted


def linear_modules(model: PreTrainedModel, method: str) -> dict[str, nn.Linear]:
    """The attention and MLP projections that are modules, by path.

    Args:
        model: A whole model.
        method: The method, for the error.

    Raises:
        ConfigError: One of them is a `Conv1D`, for which peft has no such adapter.
    """
    found = {}
    for name, module in linear_projections(model):
        if not isinstance(module, nn.Linear):
            raise ConfigError(
                f"peft's {method} adapts only linear layers.",
                key="fft.method",
                expected="a model whose projections are nn.Linear modules",
                actual=f"{type(module).__name__} {name}",
                hint="--method lora",
            )
        found[name] = module
    return found


def _shira(modules: Mapping[str, nn.Linear], positions: Positions) -> PeftConfig:
    names = {id(modules[name]): name for name in positions}

    def mask(base_layer: nn.Module, r: int, **_: object) -> torch.Tensor:
        weight = modules[names[id(base_layer)]].weight
        chosen = torch.zeros(weight.numel(), device=weight.device)
        chosen[positions[names[id(base_layer)]].to(weight.device)] = 1.0
        return chosen.view(weight.shape)

    config = ShiraConfig(task_type="CAUSAL_LM", r=_shared_rank(modules, positions), target_modules=list(positions))
    config.mask_type, config.mask_fn = MASK_TYPE, mask  # type: ignore[assignment]
    return config


def _super_tuning(modules: Mapping[str, nn.Linear], counts: Mapping[str, int]) -> PeftConfig:
    sparsity = shared_sparsity((modules[name].weight.numel(), count) for name, count in counts.items())
    return SupertuningConfig(task_type="CAUSAL_LM", sparsity=sparsity, target_modules=list(counts))


def _put(layer: Any, indices: torch.Tensor) -> None:
    """Replaces the positions of a new Super-Tuning layer."""
    layer.supertuning_indices[ADAPTER] = indices
    layer.supertuning_values[ADAPTER] = nn.Parameter(torch.zeros(len(indices), device=indices.device))


def _shared_rank(modules: Mapping[str, nn.Linear], positions: Positions) -> int:
    """The rank for which SHiRA trains this many weights in every projection.

    Raises:
        MaskMismatchError: There is none.
    """
    ranks = {name: len(found) / sum(modules[name].weight.shape) for name, found in positions.items()}
    first = next(iter(ranks.values()))
    other = next((name for name, rank in ranks.items() if rank != first or not rank.is_integer()), None)
    if other is None:
        return int(first)
    rows, columns = modules[other].weight.shape
    raise MaskMismatchError(
        "peft's SHiRA cannot store the weights that the mask keeps: it changes rank * (inputs + outputs) weights of "
        "every projection, with one rank for all.",
        key=other,
        expected=f"a multiple of {rows + columns:,} weights, and the same multiple everywhere",
        actual=f"{len(positions[other]):,}, a rank of {ranks[other]:.4g}; the first projection has {first:.4g}",
        hint="--method supertuning, which trains the same weights with any counts",
    )


def _rank_too_high(model: PreTrainedModel, options: FftOptions) -> ConfigError:
    highest = {
        name: module.weight.numel() // sum(module.weight.shape)
        for name, module in linear_modules(model, options.method).items()
    }
    smallest = min(highest, key=lambda name: highest[name])
    return ConfigError(
        "SHiRA of this rank would train more weights than a projection has.",
        key="fft.lora_rank",
        expected=f"at most {highest[smallest]}, the limit of {smallest}",
        actual=options.lora_rank,
        hint=f"--lora-rank {highest[smallest]}",
    )


def _random(name: str, weights: int, count: int, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"shira:{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    chosen = generator.choice(weights, count, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(chosen))


def _largest(weight: torch.Tensor, ratio: float) -> torch.Tensor:
    return keep_highest(weight, ratio, ranking="absolute").flatten().nonzero().squeeze(1).cpu()
