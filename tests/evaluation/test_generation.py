from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from mftctl.data.encoding import Encoded, Encoder
from mftctl.data.examples import Example, Message
from mftctl.errors import EvaluationError
from mftctl.evaluation.answer_room import AnswerRoom
from mftctl.evaluation.generation import context_tokens, default_max_new_tokens, generate_answers
from tests.conftest import build_llama, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def questions(count: int, *, seed: int = 0) -> list[Example]:
    """Questions of 1 to 60 random letters."""
    rng = random.Random(seed)
    return [
        Example(
            kind="chat",
            messages=(
                Message("user", "".join(chr(rng.randrange(97, 123)) for _ in range(rng.randint(1, 60)))),
                Message("assistant", "?"),
            ),
            where=f"q.jsonl:{index + 1}",
        )
        for index in range(count)
    ]


def room(most_tokens: int) -> AnswerRoom:
    return AnswerRoom(lambda prompt, new: 0, most_tokens=most_tokens)


def one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: list[Example], max_new_tokens: int
) -> list[str]:
    """Greedy decoding that recomputes the whole sequence for every token."""
    answers = []
    for example in examples:
        prompt = Encoder(tokenizer).prompt(example)
        ids = list(prompt)
        while len(ids) < len(prompt) + max_new_tokens:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        answers.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    return answers


def lively_llama(**options: object) -> PreTrainedModel:
    """A random Llama with large weights, whose answers vary and sometimes end early."""
    model = build_llama(layers=2, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def lively_gpt2() -> PreTrainedModel:
    """A model with learned positions, which left padding must not shift."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=102, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=1, bos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("build", [lively_llama, lively_gpt2])
def test_batches_give_the_text_of_one_by_one(build: object) -> None:
    model, tokenizer, examples = build(), build_tokenizer(), questions(12)  # type: ignore[operator]
    answers = generate_answers(model, Encoder(tokenizer), examples, max_new_tokens=20, room=room(400))
    assert answers == one_by_one(model, tokenizer, examples, 20)
    assert len(set(answers)) > 6


@pytest.mark.slow
def test_an_answer_ends_at_any_stop_token_of_tokenizer_and_checkpoint() -> None:
    model, tokenizer, examples = lively_llama(), build_tokenizer(), questions(12)
    free = generate_answers(model, Encoder(tokenizer), examples, max_new_tokens=20)
    letter = free[0][3]
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(letter)]
    stopped = generate_answers(model, Encoder(tokenizer), examples, max_new_tokens=20)
    assert stopped == [answer.partition(letter)[0] for answer in free]


@pytest.mark.slow
def test_the_tokenizer_alone_names_the_end_of_a_turn() -> None:
    model, tokenizer, examples = lively_llama(), build_tokenizer(), questions(30)
    with_both = generate_answers(model, Encoder(tokenizer), examples, max_new_tokens=20)
    model.generation_config.eos_token_id = None
    assert generate_answers(model, Encoder(tokenizer), examples, max_new_tokens=20) == with_both
    assert any(len(answer) < 20 for answer in with_both)


def test_sampling_and_penalties_of_the_checkpoint_are_left_out() -> None:
    model, tokenizer, examples = lively_llama(), build_tokenizer(), questions(6)
    greedy = generate_answers(model, Encoder(tokenizer), examples, max_new_tokens=12)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.min_new_tokens = True, 3.0, 9.0, 12
    assert generate_answers(model, Encoder(tokenizer), examples, max_new_tokens=12) == greedy
    assert model.generation_config is own


def test_the_mode_is_restored_and_progress_reaches_the_end() -> None:
    model, calls = build_llama(layers=1, attention_dropout=0.9).train(), []
    generate_answers(
        model,
        Encoder(build_tokenizer()),
        questions(5),
        max_new_tokens=2,
        room=room(80),
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert model.training
    assert len(calls) > 1
    assert calls[-1] == (5, 5)


def test_no_questions_give_no_answers() -> None:
    assert generate_answers(build_llama(layers=1), Encoder(build_tokenizer()), [], max_new_tokens=5) == []


def test_a_prompt_that_does_not_fit_is_named_before_any_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = build_llama(layers=1, max_position_embeddings=40), questions(8)
    monkeypatch.setattr(model, "generate", lambda **_: pytest.fail("generated"))
    first_long = next(example for example in examples if len(Encoder(build_tokenizer()).prompt(example)) > 20)
    with pytest.raises(EvaluationError, match="exceed the model's context") as caught:
        generate_answers(model, Encoder(build_tokenizer()), examples, max_new_tokens=20)
    assert caught.value.path == first_long.where
    assert "40" in str(caught.value.expected)


def test_a_prompt_that_just_fits_is_answered() -> None:
    example = questions(1)[0]
    width = len(Encoder(build_tokenizer()).prompt(example))
    model = build_llama(layers=1, max_position_embeddings=width + 4)
    assert len(generate_answers(model, Encoder(build_tokenizer()), [example], max_new_tokens=4, room=room(1))) == 1


def test_the_context_of_models_that_name_it_differently_or_not_at_all() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    assert context_tokens(build_llama(layers=1)) == 512
    assert context_tokens(lively_gpt2()) == 512
    bloom = BloomForCausalLM(BloomConfig(vocab_size=102, hidden_size=32, n_layer=1, n_head=4))
    assert context_tokens(bloom) is None


def sample(answer_tokens: int) -> Encoded:
    return Encoded(input_ids=[6] * (5 + answer_tokens), labels=[-100] * 5 + [6] * answer_tokens, where="x:1")


def test_room_for_an_answer_follows_the_longest_reference() -> None:
    assert default_max_new_tokens([sample(3), sample(20)]) == 46
    assert default_max_new_tokens([sample(3), sample(20)], longest_prompt_tokens=30, limit_tokens=512) == 46
    assert default_max_new_tokens([sample(20)], longest_prompt_tokens=30, limit_tokens=60) == 30
    assert default_max_new_tokens([sample(20)], longest_prompt_tokens=70, limit_tokens=60) == 1
