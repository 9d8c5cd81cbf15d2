"""Operation counts of a training step, compared with torch's counter of actual matrix products."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from mftctl.experiments.fft_options import FftOptions
from mftctl.masking.layers import attach_masks, initial_scores
from mftctl.masking.rule import MaskRule
from mftctl.masking.targets import find_targets
from mftctl.training.flops import flops_per_token
from mftctl.training.updates.adapters import add_adapter
from tests.conftest import build_llama
from tests.masking.architectures import build

TOKENS = 12


def counted(model: PreTrainedModel) -> int:
    """Operations per token in products with weights, forward and backward, as counted by torch."""
    input_ids = torch.arange(TOKENS).unsqueeze(0) + 6
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    products = counter.get_flop_counts()["Global"]
    return sum(int(flops) for name, flops in products.items() if str(name) in ("aten.mm", "aten.addmm")) // TOKENS


def test_full_fine_tuning_costs_six_operations_per_weight() -> None:
    model = build_llama(attn_implementation="eager")
    weights = sum(item.numel() for item in model.parameters() if item.dim() == 2)
    assert flops_per_token(model) == 6 * weights == counted(model)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[0], [2], [1, 3]])
def test_below_the_first_mask_only_the_forward_pass_is_computed(layers: list[int]) -> None:
    model = build_llama(attn_implementation="eager").requires_grad_(False)
    targets = find_targets(model, layers)
    told = flops_per_token(model, targets)
    scores = {target.name: initial_scores(target, "kaiming") for target in targets}
    attach_masks(model, targets, scores, MaskRule(0.1))
    # In the lowest masked layer, torch computes no gradient for the input of q, k and v, since nothing needs it.
    attention = model.model.layers[layers[0]].self_attn
    spared = 2 * sum(getattr(attention, name).weight.numel() for name in ("q_proj", "k_proj", "v_proj"))
    assert told - spared == counted(model)


def test_a_frozen_half_needs_no_gradients_of_its_own() -> None:
    model = build_llama(attn_implementation="eager")
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
    assert flops_per_token(model) == counted(model)


def test_an_adapter_is_counted_in_addition_to_the_frozen_weights() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_llama(attn_implementation="eager"), LoraConfig(r=4, target_modules=["v_proj"]))
    frozen = sum(item.numel() for item in model.get_base_model().lm_head.parameters())
    own = sum(item.numel() for name, item in model.named_parameters() if "lora_" in name)
    layers = sum(item.numel() for name, item in model.named_parameters() if item.dim() == 2 and ".layers." in name)
    assert flops_per_token(model) == 4 * (frozen + layers) + 2 * own


@pytest.mark.parametrize("method", ["shira", "supertuning"])
def test_changes_of_individual_weights_need_the_gradient_of_all(method: str) -> None:
    options = FftOptions.model_validate({"method": method, "lora_rank": 2, "ratio": 0.9 if method != "shira" else None})
    model = add_adapter(build_llama(attn_implementation="eager"), options, base="llama", seed=0)
    # In the lowest layer, nothing needs the gradient of the input of q, k and v.
    attention = model.get_base_model().model.layers[0].self_attn
    spared = 2 * sum(getattr(attention, name).weight.numel() for name in ("q_proj", "k_proj", "v_proj"))
    assert flops_per_token(model) - spared == counted(model)


def test_an_adapter_of_experts_needs_the_gradient_of_those_of_a_token() -> None:
    model = build("mixtral")
    frozen = flops_per_token(model)
    experts = sum(item.numel() for item in model.parameters() if item.dim() == 3)
    options = {"method": "lora", "lora_rank": 2}
    found = []
    for chosen in (False, True):
        options_now = FftOptions.model_validate({**options, "lora_experts": chosen})
        found.append(flops_per_token(add_adapter(build("mixtral"), options_now, base="mixtral", seed=0)))
    assert found[1] - found[0] == 2 * experts // 2  # of four experts, a token is routed to two
    assert found[1] < frozen * 1.1


def test_only_the_experts_of_a_token_count() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))
    experts = sum(item.numel() for item in model.parameters() if item.dim() == 3)
    attention = sum(item.numel() for name, item in model.named_parameters() if "self_attn" in name)
    assert flops_per_token(model) == 6 * (experts // 2 + attention + model.lm_head.weight.numel())
