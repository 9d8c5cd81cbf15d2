"""An answer ends at the end-of-turn marker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mftctl.data.encoding import Encoder
from mftctl.data.examples import Example, Message
from mftctl.evaluation.answer_stops import AnswerStops, answer_stops, name_stops, turn_stops
from mftctl.evaluation.generation import generate_answers
from tests.conftest import build_llama, build_tokenizer
from tests.data import chat_families as families
from tests.data.test_chat_rendering import byte_tokenizer

PLAIN_TEXT = (
    "{%- for m in messages -%}{{ '\n\nUser: ' ~ m.content if m.role == 'user' else '\n\nBot: ' ~ m.content ~ ' ###' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '\n\nBot: ' }}{%- endif -%}"
)
STOPS = {
    "chatml": (families.CHATML, "<|im_end|>"),
    "llama 3": (families.LLAMA_3, "<|eot_id|>"),
    "phi 3": (families.PHI_3, "<|end|>"),
    "mistral": (families.MISTRAL, "</s>"),
    "gemma 2": (families.GEMMA_2, "<end_of_turn>"),
    "command a": (families.COMMAND_A, "<|END_OF_TURN_TOKEN|>"),
    "no marker": (families.GLM_4, "<|user|>"),
    "an end of thinking that is none of the answer": (families.GPT_OSS, "<|return|>"),
}


@pytest.mark.parametrize("family", STOPS)
def test_stop_of_a_family(family: str) -> None:
    template, stop = STOPS[family]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    found = turn_stops(tokenizer)
    assert tokenizer.convert_ids_to_tokens(sorted(found.token_ids)) == [stop]
    assert found.texts == ()


def test_stop_in_plain_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN_TEXT
    assert turn_stops(tokenizer) == AnswerStops(frozenset(), ("###",))


def test_without_a_template_there_is_no_end_of_turn() -> None:
    assert turn_stops(build_tokenizer(chat_template=None)) == AnswerStops(frozenset())


def test_every_named_stop_ends_an_answer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = families.CHATML
    model = build_llama(layers=1)
    for named, ids in ((7, {7}), ([7, 9], {7, 9}), (None, set())):
        model.generation_config.eos_token_id = named
        found = answer_stops(model, tokenizer)
        assert found.token_ids == ids | set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]))
    assert AnswerStops(frozenset({3})).before([1, 2, 3, 4]) == [1, 2]
    assert AnswerStops(frozenset()).before([1, 2]) == [1, 2]


@pytest.mark.parametrize(("template", "stop"), [(families.CHATML, "<|im_end|>"), (PLAIN_TEXT, " ###")])
def test_answers_end_at_the_stop_of_the_template(template: str, stop: str) -> None:
    """A model that continues after its answer, as if its end of turn did not end the sequence."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    written = tokenizer(f" yes{stop} and on", add_special_tokens=False)["input_ids"]
    model = build_llama(layers=1, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    encoder = Encoder(tokenizer)
    question = Example("chat", (Message("user", "Sure?"), Message("assistant", "yes")), "q:1")
    prompt = encoder.prompt(question)
    order = dict(enumerate(written, start=len(prompt)))

    def scripted(input_ids: torch.Tensor, *_: object, **options: object) -> object:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        place = options["attention_mask"].shape[1]  # type: ignore[attr-defined]
        logits = torch.zeros(len(input_ids), 1, len(tokenizer))
        logits[:, :, order.get(place, 0)] = 1
        return CausalLMOutputWithPast(logits=logits)

    model.forward = scripted
    assert generate_answers(model, encoder, [question], max_new_tokens=12)[0].rstrip() == " yes"


def test_generation_settings_add_the_stop_to_existing_ones(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    for before, after in ((2, [2, 5]), ([2, 5], [2, 5]), (5, 5), (None, 5)):
        path.write_text(json.dumps({"eos_token_id": before, "do_sample": True}))
        name_stops(tmp_path, [5])
        assert json.loads(path.read_text()) == {"eos_token_id": after, "do_sample": True}


def test_checkpoint_without_generation_settings_gets_some_if_there_is_a_stop(tmp_path: Path) -> None:
    name_stops(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    name_stops(tmp_path, [5])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 5}
