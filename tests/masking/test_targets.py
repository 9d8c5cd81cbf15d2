"""Which projections are found in each decoder family, and which layers an option value selects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mftctl.errors import MaskingError
from mftctl.masking.targets import (
    decoder_layers,
    find_targets,
    format_layers,
    layer_groups,
    linear_projections,
    parse_layers,
)
from tests.conftest import build_llama
from tests.masking.architectures import build

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], tuple[set[str], set[str]]]] = {
    "llama": (lambda: build_llama(layers=3), SEPARATE),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), SEPARATE),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)), SEPARATE),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SIZES)), SEPARATE),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)), SEPARATE),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**SIZES)), ({"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"})),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
        ({"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_projections_and_nothing_else(family: str) -> None:
    build, (attention, mlp) = FAMILIES[family]
    model = build()
    for part, names in (("attn", attention), ("mlp", mlp)):
        found = find_targets(model, None, part)
        assert {target.name.rpartition(".")[2] for target in found} == names
        assert {target.layer for target in found} == {0, 1, 2}
        assert {target.part for target in found} == {part}
    head = model.get_output_embeddings()
    assert all(target.module is not head for target in find_targets(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_layers_only(family: str) -> None:
    model = FAMILIES[family][0]()
    prefix, layers = decoder_layers(model)
    found = find_targets(model, [1])
    assert len(layers) == 3
    assert found
    assert all(target.name.startswith(f"{prefix}.1.") for target in found)
    assert all(model.get_submodule(target.name) is target.module for target in found)


def test_a_model_without_a_decoder() -> None:
    with pytest.raises(MaskingError, match="no list of decoder layers") as caught:
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))
    assert caught.value.actual == "Sequential"


def test_a_decoder_without_known_projections() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(MaskingError, match="No projection matches") as caught:
        find_targets(model)
    assert caught.value.key == "target"


def test_experts_are_found_by_what_the_checkpoint_stores_and_routers_never() -> None:
    model = build("mixtral")
    found = find_targets(model, [1], "mlp")
    start = "model.layers.1.block_sparse_moe.experts"
    assert {target.name for target in found} == {f"{start}.{e}.{name}" for e in range(4) for name in ("w1", "w2", "w3")}
    assert {target.part for target in found} == {"mlp"}
    assert {target.module_name for target in found} == {"model.layers.1.mlp.experts"}
    up = find_targets(model, [1], "mlp", ["w3"])
    assert [target.projection for target in up] == ["w3"] * 4
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(up[2].weight, fused[2, 48:])
    assert up[2].weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_dense_layers_shared_experts_and_their_gates_beside_fused_experts() -> None:
    """Qwen2-MoE: a router, a shared expert with its own gate, and layers without any of them."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **sizes, mlp_only_layers=[0]))
    assert isinstance(model.model.layers[1].mlp.shared_expert_gate, nn.Linear)
    names = {target.name.removeprefix("model.layers.1.mlp.") for target in find_targets(model, [1], "mlp")}
    projections = SEPARATE[1]
    assert names == {f"shared_expert.{name}" for name in projections} | {
        f"experts.{expert}.{name}" for expert in range(4) for name in projections
    }
    assert {target.name for target in find_targets(model, [0], "mlp")} == {
        f"model.layers.0.mlp.{name}" for name in projections
    }


def test_routers_with_linear_layers_inside_are_not_targets() -> None:
    """JetMoE: its attention has experts as well."""
    model = JetMoeForCausalLM(JetMoeConfig(**SIZES, num_local_experts=4, kv_channels=8))
    routers = {name for name, module in model.named_modules() if "router" in name and isinstance(module, nn.Linear)}
    assert len(routers) == 2 * model.config.num_hidden_layers
    assert {target.projection for target in find_targets(model)} == {"input_linear", "output_linear", "kv_proj"}


def test_experts_that_are_stored_fused_are_one_target_each() -> None:
    """GPT-OSS: transposed, with biases, which are not masked."""
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=8))
    found = find_targets(model, [1], "mlp")
    assert [(target.projection, tuple(target.weight.shape)) for target in found] == [
        ("gate_up_proj", (4, 32, 96)),
        ("down_proj", (4, 48, 32)),
    ]
    assert [target.fan_in for target in found] == [32, 48]


def test_experts_in_an_unknown_form_are_refused_by_name() -> None:
    sizes = {"attn_config": {"rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 48}}
    model = DbrxForCausalLM(DbrxConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, **sizes))
    with pytest.raises(MaskingError, match="fused in a form") as caught:
        find_targets(model, [1])
    assert caught.value.key == "transformer.blocks.1.ffn.experts.mlp.w1"
    assert "--target attn" in str(caught.value.hint)


def test_projections_that_are_modules_for_adapters() -> None:
    model = build("mixtral")
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name for name, _ in linear_projections(model)} == {
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in names
    }


def test_no_modules_for_adapters() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(MaskingError, match="No projection matches"):
        linear_projections(model)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4-7", [4, 5, 6, 7]),
        ("0,3,8-11", [0, 3, 8, 9, 10, 11]),
        ("all", list(range(12))),
        (" 2 , 1 ", [1, 2]),
        ("3-3", [3]),
    ],
)
def test_layer_choices(text: str, expected: list[int]) -> None:
    assert parse_layers(text, 12) == expected


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "7-4", "1,,2", "1.5", "all,1"])
def test_invalid_layer_choices(text: str) -> None:
    with pytest.raises(MaskingError, match="numbers and ranges") as caught:
        parse_layers(text, 12)
    assert (caught.value.key, caught.value.actual) == ("layers", text)


def test_layers_beyond_the_model() -> None:
    with pytest.raises(MaskingError, match="does not have that many") as caught:
        parse_layers("28-31", 30)
    assert caught.value.expected == "layers 0 to 29"


@pytest.mark.slow
@given(st.sets(st.integers(0, 40), min_size=1))
def test_layers_read_back(layers: set[int]) -> None:
    assert parse_layers(format_layers(list(layers)), 41) == sorted(layers)


@given(st.integers(1, 60), st.data())
def test_groups_cover_every_layer_once(layer_count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, layer_count))
    groups = layer_groups(layer_count, [size])
    assert [layer for group in groups for layer in group] == list(range(layer_count))
    assert all(len(group) == size for group in groups[:-1])


@pytest.mark.parametrize("size", [0, 5])
def test_a_group_size_that_does_not_fit(size: int) -> None:
    with pytest.raises(MaskingError, match="cannot have that many") as caught:
        layer_groups(4, [size])
    assert caught.value.key == "groups"


def test_all_layers_are_a_group_and_no_group_repeats() -> None:
    assert layer_groups(6, [4, "all"]) == [[0, 1, 2, 3], [4, 5], [0, 1, 2, 3, 4, 5]]
    assert layer_groups(6, [2, 6, "all", 2]) == [[0, 1], [2, 3], [4, 5], [0, 1, 2, 3, 4, 5]]
    assert layer_groups(6, ["all"], [3, 1]) == [[1, 3]]


def test_embeddings_and_norms_are_not_targets() -> None:
    model = build_llama()
    targets = {id(target.module.weight) for target in find_targets(model)}
    others = [parameter for name, parameter in model.named_parameters() if "embed" in name or "norm" in name]
    assert others
    assert not any(id(parameter) in targets for parameter in others)
