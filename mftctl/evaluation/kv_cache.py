"""What a model keeps of the tokens it has read while it writes an answer: keys and values of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache, PreTrainedConfig


def cache_bytes(config: PreTrainedConfig, tokens: int, value_bytes: int) -> int:
    """The bytes of keys and values of one sequence.

    Layers that look back over a window keep no more than it holds; layers that keep a state of fixed size, as linear
    attention does, count as if they kept every token.

    Args:
        config: The model's.
        tokens: Length of the sequence.
        value_bytes: Of a number, such as 2 in bf16.
    """
    text = config.get_text_config(decoder=True)
    width = _values_a_token(text)
    return sum(width * min(tokens, window or tokens) for window in _windows(text)) * value_bytes


def _windows(text: PreTrainedConfig) -> Sequence[int | None]:
    """How far each layer that keeps something looks back; None without a limit."""
    layers: Sequence[Any] = DynamicCache(config=text).layers or [None] * int(text.num_hidden_layers)
    return [getattr(layer, "sliding_window", None) for layer in layers if type(layer).__name__ != "DummyLayer"]


def _values_a_token(text: Any) -> int:
    """Keys and values of one token in one layer."""
    heads = int(text.num_attention_heads)
    own = getattr(text, "head_dim", None) or int(text.hidden_size) // heads
    latent = getattr(text, "kv_lora_rank", None)
    if latent is not None:  # DeepSeek's attention keeps what its keys and values are made of
        return int(latent) + int(text.qk_rope_head_dim)
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * int(own)
