from __future__ import annotations

from typing import Any

import pytest
import torch

from mftctl.evaluation.answer_room import cache_bytes
from tests.conftest import build_llama
from tests.masking.architectures import build


def kept(model: Any, tokens: int) -> int:
    """Actual size of a model's cache in bytes."""
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "llama", "phi3"])
def test_cache_size_of_a_model(name: str) -> None:
    model = build(name).eval()
    assert cache_bytes(model.config, 9, 4) == kept(model, 9)


def test_grouped_query_attention() -> None:
    model = build_llama(num_key_value_heads=1).to(torch.bfloat16)
    assert cache_bytes(model.config, 7, 2) == kept(model, 7)
    assert cache_bytes(model.config, 7, 2) < cache_bytes(build_llama(num_key_value_heads=4).config, 7, 2)


@pytest.mark.parametrize("tokens", [3, 8, 30])
def test_sliding_window_layers(tokens: int) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    whole = 4 * 2 * 2 * 16 * 4 * tokens
    assert cache_bytes(config, tokens, 4) == whole // 2 + whole // 2 * min(tokens, 8) // tokens
    # transformers omits the token that the next one would push out of the window
    assert 0 <= cache_bytes(config, tokens, 4) - kept(model, tokens) <= whole // tokens // 2


def test_latent_attention() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2,
    )  # fmt: skip
    assert cache_bytes(config, 5, 4) == kept(DeepseekV3ForCausalLM(config).eval(), 5)


def test_the_8b_model_of_llama_takes_128_kib_a_token() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256
    )
    assert cache_bytes(config, 1, 2) == 131_072
