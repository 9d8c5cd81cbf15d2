"""Small random decoders of many families, each with its maskable weights under their names in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "vocab_size": 102,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GPT2_SIZES = {
    "vocab_size": 102,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
}
NEOX_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


@dataclass(frozen=True)
class Architecture:
    """A family of decoders.

    Attributes:
        build: Returns a random model of 2 layers.
        attention: Names on disk of the attention projections of layer 1, with their shapes.
        mlp: The same for its MLP projections.
        start: Common prefix of those names.
    """

    build: Callable[[], PreTrainedModel]
    attention: dict[str, tuple[int, ...]]
    mlp: dict[str, tuple[int, ...]]
    start: str = "model.layers.1."


def separate_attention(head_size: int = 8) -> dict[str, tuple[int, ...]]:
    wide, narrow = 4 * head_size, 2 * head_size
    shapes = {"q_proj": (wide, 32), "k_proj": (narrow, 32), "v_proj": (narrow, 32), "o_proj": (32, wide)}
    return {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}


SEPARATE_MLP = {"mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48)}

DENSE = {
    "llama": Architecture(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), separate_attention(), SEPARATE_MLP),
    "qwen2": Architecture(lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), separate_attention(), SEPARATE_MLP),
    "qwen3": Architecture(
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)), separate_attention(16), SEPARATE_MLP
    ),
    "gemma2": Architecture(
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)), separate_attention(16), SEPARATE_MLP
    ),
    "gemma3": Architecture(
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16)), separate_attention(16), SEPARATE_MLP
    ),
    "mistral": Architecture(lambda: MistralForCausalLM(MistralConfig(**SIZES)), separate_attention(), SEPARATE_MLP),
    "phi3": Architecture(
        lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
        {"self_attn.qkv_proj.weight": (64, 32), "self_attn.o_proj.weight": (32, 32)},
        {"mlp.gate_up_proj.weight": (96, 32), "mlp.down_proj.weight": (32, 48)},
    ),
    "gpt2": Architecture(
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
        {"attn.c_attn.weight": (32, 96), "attn.c_proj.weight": (32, 32)},
        {"mlp.c_fc.weight": (32, 128), "mlp.c_proj.weight": (128, 32)},
        "transformer.h.1.",
    ),
    "gpt_neox": Architecture(
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX_SIZES)),
        {"attention.query_key_value.weight": (96, 32), "attention.dense.weight": (32, 32)},
        {"mlp.dense_h_to_4h.weight": (48, 32), "mlp.dense_4h_to_h.weight": (32, 48)},
        "gpt_neox.layers.1.",
    ),
    "olmo2": Architecture(lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)), separate_attention(), SEPARATE_MLP),
}


def expert_shapes(path: str, gate: str, up: str, down: str, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of four experts."""
    shapes = {gate: (width, 32), up: (width, 32), down: (32, width)}
    return {f"{path}.{expert}.{name}.weight": shape for expert in range(4) for name, shape in shapes.items()}


EXPERTS = {
    "mixtral": Architecture(
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
        separate_attention(),
        expert_shapes("block_sparse_moe.experts", "w1", "w3", "w2", 48),
    ),
    "qwen3_moe": Architecture(
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        ),
        separate_attention(16),
        expert_shapes("mlp.experts", "gate_proj", "up_proj", "down_proj", 24),
    ),
}
STORED_FUSED = {
    "gpt_oss": Architecture(
        lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
        separate_attention(),
        {"mlp.experts.gate_up_proj": (4, 32, 96), "mlp.experts.down_proj": (4, 48, 32)},
    )
}
ARCHITECTURES = DENSE | EXPERTS | STORED_FUSED


def build(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A model of a family with all weights random, including biases and norms, so that these matter too."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model
