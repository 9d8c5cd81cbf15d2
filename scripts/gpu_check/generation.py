"""Generates answers with the large model at two batch sizes, and at the size that the free memory allows."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import torch

from mftctl.data.encoding import Encoder
from mftctl.data.examples import Example, Message
from mftctl.evaluation.answer_room import AnswerRoom, answer_room, row_bytes
from mftctl.evaluation.generation import generate_answers
from mftctl.masking.checkpoints.load import load_tokenizer
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from scripts.gpu_check.findings import Measurement
from scripts.gpu_check.measuring import GB
from scripts.gpu_check.random_models import random_model
from scripts.gpu_check.scale import Scale


def generation(scale: Scale) -> Iterator[Measurement]:
    """Tokens per second, and the peak memory with the estimate for the batch size."""
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    model = random_model(scale.large, dtype, emulated=scale.rehearses)
    model.generation_config.eos_token_id = None
    tokenizer = load_tokenizer(resolve_checkpoint("quickstart"))
    questions = _questions(scale.prompts)
    longest = max(len(tokenizer(_text(question))["input_ids"]) for question in questions) + 16
    needs = row_bytes(model)
    rooms = {f"{tokens:,} tokens per batch": AnswerRoom(needs, most_tokens=tokens) for tokens in scale.budgets}
    rooms["batch size by free memory"] = answer_room(model)
    found: list[list[str]] = []
    for name, room in rooms.items():
        rows = min(scale.prompts, room.rows(longest, scale.new_tokens))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start_seconds = time.perf_counter()
        found.append(generate_answers(model, Encoder(tokenizer), questions, max_new_tokens=scale.new_tokens, room=room))
        seconds = time.perf_counter() - start_seconds
        yield Measurement(f"{name}: speed", scale.prompts * scale.new_tokens / seconds, "tokens/s")
        peak = (torch.cuda.max_memory_allocated() - before) / GB
        yield Measurement(f"{name}: peak above the weights", peak, "GB", rows * needs(longest, scale.new_tokens) / GB)
    equal = sum(len(set(answers)) == 1 for answers in zip(*found, strict=True))
    yield Measurement("answers equal at all batch sizes", f"{equal} of {scale.prompts}")


def _questions(count: int) -> list[Example]:
    generator = random.Random(0)
    return [
        Example(
            "chat",
            (
                Message("user", f"{generator.randrange(10**6)} and " * generator.randint(2, 12)),
                Message("assistant", "?"),
            ),
            f"random:{number}",
        )
        for number in range(count)
    ]


def _text(example: Example) -> str:
    return example.messages[0].content
