"""How many prompts are answered together: as many as the free memory takes, and fewer where it does not."""

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


T = TypeVar("T")
OnShortage = Callable[[int], None]
"""Told the tokens of a batch from now on, where there was no room for more."""

CPU_TOKENS = 16_384
"""Larger batches make a CPU no faster."""

GPU_TOKENS = 524_288
"""Answers are kept, and progress is shown, after each batch."""

_TOGETHER_TOKENS = 131_072
"""On GPUs that hold a part of the weights each: all must form the same batches, whatever is free on one of them."""

_SHARE = 0.7
"""Of the free memory: a cache that grows token by token leaves gaps."""


class AnswerRoom:
    """The size of batches.

    Args:
        bytes_of: The memory that one sequence takes, by the tokens of its prompt and of its answer.
        most_tokens: Of a batch: prompts with their padding, and answers.
        most_bytes: Of a batch; None for no limit.
        can_shrink: Whether a batch that finds no memory is tried again in halves.
        on_shortage: Told of that.
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
        """How many prompts, padded to this length, are answered together; at least one."""
        found = self._most_tokens // (prompt_tokens + new_tokens)
        if self._most_bytes is not None:
            found = min(found, self._most_bytes // self._bytes_of(prompt_tokens, new_tokens))
        return max(1, found)

    def answered(
        self, prompt_tokens: Sequence[int], new_tokens: int, answer: Callable[[list[int]], list[T]]
    ) -> Iterator[tuple[list[int], list[T]]]:
        """Batches with their answers, the longest prompts first, so that running out of memory shows at once.

        Args:
            prompt_tokens: The length of each prompt.
            new_tokens: The most tokens of an answer.
            answer: The answers to the prompts with these numbers, in their order. They do not depend on the batch.

        Yields:
            Numbers of prompts, and their answers; every prompt once.

        Raises:
            torch.OutOfMemoryError: A single prompt finds no room.
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
        """The answers; None where there was no room for so many."""
        try:
            return answer(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1 or not self._can_shrink:
                raise
        # Only here, after the error with its traceback has gone, is what the failed attempt held free.
        free_unreachable()
        return None

    def _halve(self, rows: int, prompt_tokens: int, new_tokens: int) -> None:
        self._most_tokens = rows * (prompt_tokens + new_tokens) // 2
        if self._most_bytes is not None:
            self._most_bytes = rows * self._bytes_of(prompt_tokens, new_tokens) // 2
        if self._on_shortage is not None:
            self._on_shortage(self._most_tokens)


def smaller_batches(name: str, tokens: int) -> str:
    """What a user is told of a shortage.

    Args:
        name: Of what is measured.
        tokens: Of a batch from now on.
    """
    return f"{name}: the GPU ran out of memory; batches of at most {tokens:,} tokens from here on."


def answer_room(model: PreTrainedModel, on_shortage: OnShortage | None = None) -> AnswerRoom:
    """The room beside a model that is on its device.

    Args:
        model: A causal language model.
        on_shortage: Told where there turns out to be less.
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
    """What one prompt and its answer take beside the weights, as a function of the tokens of both.

    The cache of all tokens, what a layer computes of the prompt, and the logits of one token.

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
    # Eager attention holds scores and their softmax in fp32; other kernels hold the mask alone.
    eager = getattr(config, "_attn_implementation", None) == "eager"
    pair_bytes = heads * (value_bytes + 4) if eager else 4
    logits_bytes = int(text.vocab_size) * (value_bytes + 8)

    def needed(prompt_tokens: int, new_tokens: int) -> int:
        cached = cache_bytes(config, prompt_tokens + new_tokens, value_bytes)
        return cached + layer_bytes * prompt_tokens + pair_bytes * prompt_tokens**2 + logits_bytes

    return needed
