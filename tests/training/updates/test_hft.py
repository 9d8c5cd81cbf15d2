"""Half Fine-Tuning: frozen parameters are counted by hand, and stay bit-identical in training."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mftctl.errors import MaskingError
from mftctl.training.updates.hft import freeze_half, hft_frozen_names
from tests.conftest import build_llama

ATTENTION, MLP, NORM = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), ("norm",)


def counts(names: list[str], parts: tuple[str, ...], layers: int) -> list[int]:
    """The number of names that are weights of these parts, per layer of a Llama-like model."""
    found = Counter(
        int(name.split(".")[2])
        for name in names
        if name.endswith(".weight") and any(part in name.split(".")[-2] for part in parts)
    )
    return [found[layer] for layer in range(layers)]


def build_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=3, n_head=2)).eval()


@pytest.mark.parametrize("seed", range(5))
def test_half_of_each_category_in_each_layer(llama: LlamaForCausalLM, seed: int) -> None:
    names = hft_frozen_names(llama, seed)
    assert counts(names, ATTENTION, 4) == [2, 2, 2, 2]
    assert counts(names, MLP, 4) == [1, 2, 1, 2]
    assert counts(names, NORM, 4) == [1, 1, 1, 1]
    assert len(names) == 8 + 6 + 4


def test_names_are_parameters_of_layers_in_model_order(llama: LlamaForCausalLM) -> None:
    names = hft_frozen_names(llama, 0)
    assert names == [name for name, _ in llama.named_parameters() if name in set(names)]
    assert all(name.startswith("model.layers.") for name in names)


def test_the_seed_decides_the_choice(llama: LlamaForCausalLM) -> None:
    assert hft_frozen_names(llama, 1) == hft_frozen_names(llama, 1)
    assert hft_frozen_names(llama, 1) != hft_frozen_names(llama, 2)


def test_every_tensor_of_a_layer_can_be_chosen(llama: LlamaForCausalLM) -> None:
    chosen = {name for seed in range(60) for name in hft_frozen_names(llama, seed)}
    # This Llama ties its head to the embeddings; neither these nor the final norm belong to a layer.
    assert {name for name, _ in llama.named_parameters()} - chosen == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize("seed", range(5))
def test_gpt2_freezes_biases_with_their_weights(seed: int) -> None:
    """One of two modules is frozen: c_attn or c_proj, c_fc or c_proj, ln_1 or ln_2, each with its bias."""
    names = hft_frozen_names(build_gpt2(), seed)
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    assert names == [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    for layer in range(3):
        inside = [module.removeprefix(f"transformer.h.{layer}.") for module in modules if f".h.{layer}." in module]
        assert sorted(name.split(".")[0].split("_")[0] for name in inside) == ["attn", "ln", "mlp"]


def test_norms_inside_the_attention_are_norms() -> None:
    """Qwen3 normalises queries and keys, which leaves four attention projections and four norms."""
    config = Qwen3Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    names = hft_frozen_names(Qwen3ForCausalLM(config), 0)
    assert counts(names, ATTENTION, 2) == [2, 2]
    assert counts(names, NORM, 2) == [2, 2]


def test_frozen_parameters_stay_bit_identical_in_training(llama: LlamaForCausalLM) -> None:
    frozen = set(freeze_half(llama, 3))
    before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2, weight_decay=0.1)
    input_ids = torch.arange(6, 38).view(2, 16)
    for _ in range(3):
        llama(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unchanged = {name for name, parameter in llama.named_parameters() if torch.equal(parameter, before[name])}
    assert unchanged == frozen


def test_freezing_leaves_other_parameters_as_they_were(llama: LlamaForCausalLM) -> None:
    llama.model.norm.requires_grad_(False)
    frozen = freeze_half(llama, 3)
    assert frozen == hft_frozen_names(llama, 3)
    fixed = [name for name, parameter in llama.named_parameters() if not parameter.requires_grad]
    assert fixed == [*frozen, "model.norm.weight"]


def test_a_model_without_layers() -> None:
    with pytest.raises(MaskingError, match="no list of decoder layers"):
        freeze_half(nn.Linear(2, 2), 0)


def test_layers_without_attention() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(MaskingError, match="No projection matches"):
        hft_frozen_names(model, 0)


def test_gradients_are_not_computed_for_what_is_frozen() -> None:
    model = build_llama(layers=2)
    frozen = set(freeze_half(model, 0))
    input_ids = torch.arange(6, 22).view(1, 16)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen
