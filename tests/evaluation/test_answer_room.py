"""Number of prompts answered per batch, and behaviour when memory for a batch runs out."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.data.encoding import Encoder
from mftctl.errors import DeviceMemoryError
from mftctl.evaluation import answer_room as answer_rooms
from mftctl.evaluation.answer_room import CPU_TOKENS, GPU_TOKENS, AnswerRoom, answer_room, row_bytes
from mftctl.evaluation.data_file import evaluate_examples
from mftctl.evaluation.generation import generate_answers
from mftctl.evaluation.inference import length_batches
from tests.conftest import build_llama, build_tokenizer
from tests.evaluation.test_generation import lively_llama, questions
from tests.gpu_emulation.emulated_gpu import emulated_gpu
from tests.workflow_fixtures import encode_records


def decode_steps(room: AnswerRoom, lengths: list[int], new_tokens: int) -> int:
    return new_tokens * sum(1 for _ in room.answered(lengths, new_tokens, lambda batch: batch))


def room(most_tokens: int, **options: Any) -> AnswerRoom:
    return AnswerRoom(lambda prompt, new: prompt + new, most_tokens=most_tokens, **options)


@pytest.mark.slow
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 400))
def test_batches_are_those_of_the_lengths(lengths: list[int], most_tokens: int) -> None:
    batches = [batch for batch, _ in room(most_tokens).answered(lengths, 7, lambda batch: batch)]
    assert batches == length_batches([length + 7 for length in lengths], most_tokens)


@pytest.mark.parametrize(("most_bytes", "rows"), [(None, 10), (1000, 10), (50, 5), (19, 1), (0, 1)])
def test_memory_limits_a_batch_like_tokens(most_bytes: int | None, rows: int) -> None:
    assert room(100, most_bytes=most_bytes).rows(6, 4) == rows


def test_exact_match_takes_fewer_steps_than_with_the_batches_of_the_loss() -> None:
    """1,319 problems with GSM8K's lengths: 4,096 tokens per batch took more than 30 times as many steps."""
    lengths = [60 + (number * 37) % 150 for number in range(1319)]
    before = decode_steps(room(4096), lengths, 640)
    assert before == 640 * 278
    assert decode_steps(room(131_072), lengths, 640) == 640 * 8
    assert decode_steps(room(GPU_TOKENS), lengths, 640) == 640 * 3


class Small:
    """A GPU with memory for only a few prompts."""

    def __init__(self, rows: int) -> None:
        self.rows, self.tried, self.held = rows, [], []  # type: ignore[var-annotated]

    def answer(self, batch: list[int]) -> list[int]:
        assert not any(reference() for reference in self.held), "what a failed attempt held is still there"
        self.tried.append(len(batch))
        held = torch.zeros(len(batch))
        self.held.append(weakref.ref(held))
        if len(batch) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        del held
        return [10 * index for index in batch]


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 9), st.integers(60, 3000))
def test_answers_are_the_same_however_small_the_gpu(lengths: list[int], rows: int, most_tokens: int) -> None:
    found: dict[int, int] = {}
    for batch, answers in room(most_tokens, most_bytes=most_tokens).answered(lengths, 3, Small(rows).answer):
        found |= dict(zip(batch, answers, strict=True))
    assert found == {index: 10 * index for index in range(len(lengths))}


@pytest.mark.slow
def test_batches_are_halved_for_good_when_memory_runs_out() -> None:
    told: list[int] = []
    gpu = Small(3)
    list(room(200, on_shortage=told.append).answered([5] * 20, 5, gpu.answer))
    assert gpu.tried == [20, 10, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert told == [100, 50, 25]
    assert "at most 25 tokens" in answer_rooms.smaller_batches("gsm8k", 25)


@pytest.mark.slow
def test_a_single_prompt_that_does_not_fit_in_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = build_llama(layers=1), []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        tried.append(len(input_ids))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(DeviceMemoryError, match="while generating answers"):
        generate_answers(model, Encoder(build_tokenizer()), questions(4), max_new_tokens=5)
    assert tried == [4, 2, 1]


@pytest.mark.slow
def test_greedy_answers_are_the_same_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, examples = lively_llama(), build_tokenizer(), questions(9)
    undisturbed = evaluate_examples(model, Encoder(tokenizer), encode_records(examples, tokenizer, 100))
    generate, told = model.generate, []

    def narrow(input_ids: torch.Tensor, **others: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "generate", narrow)
    short = evaluate_examples(
        model, Encoder(tokenizer), encode_records(examples, tokenizer, 100), on_shortage=told.append
    )
    assert short == undisturbed
    assert len(told) == 3


def test_batch_memory_follows_from_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_llama()
    row = row_bytes(model)(20, 30)
    free = [10 * row]
    monkeypatch.setattr(answer_rooms, "free_memory_bytes", lambda device: free[0])
    assert answer_room(model).rows(20, 30) == 7
    free[0] = 1 << 50
    assert answer_room(model).rows(20, 30) == CPU_TOKENS // 50
    with emulated_gpu():
        assert answer_room(model.to("cuda")).rows(20, 30) == GPU_TOKENS // 50


def test_processes_that_share_weights_form_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_rooms, "world_size", lambda: 2)
    monkeypatch.setattr(answer_rooms, "shares_weights", lambda: True)
    monkeypatch.setattr(answer_rooms, "free_memory_bytes", lambda device: pytest.fail("free memory differs"))
    assert answer_room(build_llama()).rows(20, 30) == CPU_TOKENS // 50
    with pytest.raises(torch.OutOfMemoryError):
        list(answer_room(build_llama()).answered([5] * 8, 5, Small(2).answer))


def test_memory_per_row_covers_cache_prompt_and_logits() -> None:
    model = build_llama()
    need = row_bytes(model)
    assert need(10, 20) - need(10, 19) == need(10, 21) - need(10, 20) > 0
    assert need(11, 20) - need(10, 20) > need(10, 21) - need(10, 20)
    sdpa = need(50, 1)
    model.set_attn_implementation("eager")
    assert row_bytes(model)(50, 1) > sdpa
