"""Random models with the shape of a real one, and batches as a trainer builds them."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def build(shape: dict[str, int | bool], seed: int = 0) -> LlamaForCausalLM:
    """A Llama of that shape in fp32, in training mode."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape)).train()


def micro_batches(
    vocab_size: int, *, count: int, records: int, length_tokens: int, answer_share: float
) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one step; the last part of each record is the answer."""
    generator = torch.Generator().manual_seed(0)
    prompt_tokens = round((1 - answer_share) * length_tokens)
    found = []
    for _ in range(count):
        input_ids = torch.randint(0, vocab_size, (records, length_tokens), generator=generator)
        labels = input_ids.clone()
        labels[:, :prompt_tokens] = -100
        found.append({"input_ids": input_ids, "labels": labels})
    return found
