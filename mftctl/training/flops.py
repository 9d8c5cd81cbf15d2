"""Counts the floating-point operations of a training step's matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mftctl.masking.targets import PROJECTOR_LAYER, MaskTarget, decoder_layers
from mftctl.masking.towers import beside_language_model


def flops_per_token(model: nn.Module, masked: Sequence[MaskTarget] = ()) -> int:
    """Floating-point operations per token of a forward and a backward pass, counting only products with weights.

    A weight costs 2 for the output, 2 for the gradient of its input if its decoder layer or one below contains anything
    trained, and 2 for its own gradient if it is trained, or if an adapter is added to it as a whole, as SHiRA,
    Super-Tuning and LoRA of fused experts are. Only experts that a token is routed to count. Products within attention
    and within adapters of experts, norms, the optimizer, and the savings from reuse and from logits only at answers are
    left out.

    Of a model with a vision tower, only its language model and a masked projector count: how often a tower runs
    depends on the images.

    Args:
        model: The whole model in one process, before masks are attached.
        masked: Targets that a mask is learned for, while the weights themselves are frozen.
    """
    prefix, decoder = decoder_layers(model)
    whole, factors = _added_to(model)
    whole |= {id(target.module.get_parameter(target.parameter)) for target in masked}
    share = _active_share(model)
    towers = {id(parameter) for parameter in beside_language_model(model)}
    matrices = []
    for name, weight, is_expert in _matrices(model):
        inside = name.startswith(f"{prefix}.")
        layer = int(name.removeprefix(f"{prefix}.").split(".")[0]) if inside else len(decoder)
        if name.startswith(factors):
            continue
        if id(weight) in towers:
            if id(weight) not in whole:
                continue
            layer = PROJECTOR_LAYER
        trained = weight.requires_grad or id(weight) in whole
        matrices.append((layer, _weight_count(weight) * (share if is_expert else 1.0), trained))
    below = -1 if _trains_embeddings(model) else len(decoder) + 1
    lowest = min([below, *(layer for layer, _, trained in matrices if trained)])
    return round(sum(size * (2 + 2 * (layer >= lowest) + 2 * trained) for layer, size, trained in matrices))


def _added_to(model: nn.Module) -> tuple[set[int], tuple[str, ...]]:
    """Ids of frozen weights to which an adapter is added as a whole, and starts of the names of its own matrices."""
    if not hasattr(model, "peft_config"):
        return set(), ()
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.shira import ShiraLayer
    from peft.tuners.supertuning.layer import SupertuningLayer

    found, factors = set(), []
    for name, module in model.named_modules():
        if isinstance(module, ShiraLayer | SupertuningLayer):
            found.add(id(module.get_base_layer().weight))
        elif isinstance(module, ParamWrapper):
            found.add(id(module.get_param()))  # type: ignore[no-untyped-call]
            factors += [f"{name}.lora_A.", f"{name}.lora_B."]
    return found, tuple(factors)


def _matrices(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yields name and weight of every matrix that hidden states are multiplied by, and whether it holds experts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module.weight, False
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                yield f"{name}.{own}", parameter, True


def _weight_count(weight: torch.Tensor) -> int:
    """The number of weights in a parameter; two 4-bit weights share an entry."""
    quantization = getattr(weight, "quant_state", None)
    return weight.numel() if quantization is None else math.prod(quantization.shape)


def _trains_embeddings(model: nn.Module) -> bool:
    return any(
        parameter.requires_grad
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    )


def _active_share(model: nn.Module) -> float:
    """The share of experts that a token is routed to; 1 for a model without experts."""
    config = getattr(model, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return chosen / experts if chosen and experts else 1.0
