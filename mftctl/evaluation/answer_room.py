"""Batch sizes for generation: as large as free memory allows, and smaller after running out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import DynamicCache, PreTrainedConfig

from mftctl.runtime.devices import free_memory_bytes
from mftctl.runtime.peak_memory import free_unreachable
from mftctl.runtime.process_group import shares_weights
from mftctl.runtime.processes import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cache_bytes(config: PreTrainedConfig, tokens: int, value_bytes: int) -> int:
    """The size in bytes of the keys and values of one sequence.

    Layers with sliding-window attention keep at most one window; layers with a state of fixed size, such as linear
    attention, count as if they kept every token.

    Args:
        config: The model's configuration.
        tokens: Length of the sequence.
        value_bytes: Bytes per value, such as 2 for bf16.
    """
    text = config.get_text_config(decoder=True)
    width = _values_a_token(text)
    return sum(width * min(tokens, window or tokens) for window in _windows(text)) * value_bytes


def _windows(text: PreTrainedConfig) -> Sequence[int | None]:
    """The attention window of each layer with a cache; None without a limit."""
    layers: Sequence[Any] = DynamicCache(config=text).layers or [None] * int(text.num_hidden_layers)
    return [getattr(layer, "sliding_window", None) for layer in layers if type(layer).__name__ != "DummyLayer"]


def _values_a_token(text: Any) -> int:
    """Number of key and value entries per token and layer."""
    heads = int(text.num_attention_heads)
    own = getattr(text, "head_dim", None) or int(text.hidden_size) // heads
    latent = getattr(text, "kv_lora_rank", None)
    if latent is not None:  # DeepSeek's attention caches the latents of its keys and values
        return int(latent) + int(text.qk_rope_head_dim)
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * int(own)


T = TypeVar("T")
OnShortage = Callable[[int], None]
"""Called with the new maximum of tokens per batch after running out of memory."""

CPU_TOKENS = 16_384
"""Larger batches are no faster on a CPU."""

GPU_TOKENS = 524_288
"""Answers are stored and progress is reported after each batch."""

_TOGETHER_TOKENS = 131_072
"""For sharded weights: all GPUs must form the same batches, whatever their free memory."""

_SHARE = 0.7
"""Usable share of the free memory: a cache that grows token by token fragments it."""


class AnswerRoom:
    """Determines batch sizes.

    Args:
        bytes_of: Memory of one sequence, as a function of prompt and answer tokens.
        most_tokens: Maximum tokens per batch: padded prompts and answers.
        most_bytes: Maximum bytes per batch; None for no limit.
        can_shrink: Whether to retry with half the batch after running out of memory.
        on_shortage: Called when a batch shrinks.
    """

    def __init__(
        self,
        bytes_of: Callable[[int, int], int],
        *,
        most_tokens: int,
        most_bytes: int | None = None,
        can_shrink: bool = True,
        on_shortage: OnShortage | None = None,
    ) -> None:
        self._bytes_of = bytes_of
        self._most_tokens = most_tokens
        self._most_bytes = most_bytes
        self._can_shrink = can_shrink
        self._on_shortage = on_shortage

    def rows(self, prompt_tokens: int, new_tokens: int) -> int:
        """Number of prompts per batch at this padded length; at least one."""
        found = self._most_tokens // (prompt_tokens + new_tokens)
        if self._most_bytes is not None:
            found = min(found, self._most_bytes // self._bytes_of(prompt_tokens, new_tokens))
        return max(1, found)

    def answered(
        self, prompt_tokens: Sequence[int], new_tokens: int, answer: Callable[[list[int]], list[T]]
    ) -> Iterator[tuple[list[int], list[T]]]:
        """Generates answers in batches, longest prompts first, so that running out of memory shows at once.

        Args:
            prompt_tokens: The length of each prompt.
            new_tokens: Maximum tokens per answer.
            answer: Returns the answers to the prompts with the given indices, in order, independent of the batch.

        Yields:
            Indices of prompts and their answers; every prompt once.

        Raises:
            torch.OutOfMemoryError: There is not enough memory for a single prompt.
        """
        waiting = sorted(range(len(prompt_tokens)), key=lambda index: -prompt_tokens[index])
        while waiting:
            longest = prompt_tokens[waiting[0]]
            batch = waiting[: self.rows(longest, new_tokens)]
            found = self._attempt(answer, batch)
            if found is None:
                self._halve(len(batch), longest, new_tokens)
                continue
            yield batch, found
            waiting = waiting[len(batch) :]

    def _attempt(self, answer: Callable[[list[int]], list[T]], batch: list[int]) -> list[T] | None:
        """The answers; None if the batch ran out of memory."""
        try:
            return answer(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1 or not self._can_shrink:
                raise
        # Only here, once the error and its traceback are gone, can the memory of the failed attempt be freed.
        free_unreachable()
        return None

    def _halve(self, rows: int, prompt_tokens: int, new_tokens: int) -> None:
        self._most_tokens = rows * (prompt_tokens + new_tokens) // 2
        if self._most_bytes is not None:
            self._most_bytes = rows * self._bytes_of(prompt_tokens, new_tokens) // 2
        if self._on_shortage is not None:
            self._on_shortage(self._most_tokens)


def smaller_batches(name: str, tokens: int) -> str:
    """The message for the user when batches shrink.

    Args:
        name: Name of the dataset or benchmark.
        tokens: New maximum of tokens per batch.
    """
    return f"{name}: the GPU ran out of memory; continuing with batches of at most {tokens:,} tokens."


def answer_room(model: PreTrainedModel, on_shortage: OnShortage | None = None) -> AnswerRoom:
    """Batch sizes for a model that is already on its device.

    Args:
        model: A causal language model.
        on_shortage: Called if batches must shrink for lack of memory.
    """
    needs = row_bytes(model)
    if world_size() > 1 and shares_weights():
        tokens = CPU_TOKENS if model.device.type == "cpu" else _TOGETHER_TOKENS
        return AnswerRoom(needs, most_tokens=tokens, can_shrink=False)
    return AnswerRoom(
        needs,
        most_tokens=CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS,
        most_bytes=int(_SHARE * free_memory_bytes(model.device)),
        on_shortage=on_shortage,
    )


def row_bytes(model: PreTrainedModel) -> Callable[[int, int], int]:
    """The memory for one prompt and its answer in addition to the weights, as a function of their tokens.

    It covers the KV cache of all tokens, one layer's activations for the prompt, and the logits of one token.

    Args:
        model: A causal language model.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    value_bytes = model.dtype.itemsize
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    between = (getattr(text, "moe_intermediate_size", None) or 0) * experts
    between = max(between, getattr(text, "intermediate_size", None) or 4 * hidden)
    layer_bytes = (4 * hidden + 3 * between) * value_bytes
    # Eager attention holds scores and their softmax in fp32; other kernels hold only the mask.
    eager = getattr(config, "_attn_implementation", None) == "eager"
    pair_bytes = heads * (value_bytes + 4) if eager else 4
    logits_bytes = int(text.vocab_size) * (value_bytes + 8)

    def needed(prompt_tokens: int, new_tokens: int) -> int:
        cached = cache_bytes(config, prompt_tokens + new_tokens, value_bytes)
        return cached + layer_bytes * prompt_tokens + pair_bytes * prompt_tokens**2 + logits_bytes

    return needed
