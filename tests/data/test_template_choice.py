"""Choice of the chat template, which is saved with the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from mftctl.data.encoding import Encoder
from mftctl.data.examples import Example, Message
from mftctl.data.template_choice import BUILT_IN, TemplateChoice, choose_template
from mftctl.errors import ConfigError
from tests.conftest import build_tokenizer
from tests.data.chat_families import CHATML, GEMMA_2, QWEN_3
from tests.data.test_chat_rendering import byte_tokenizer

CONVERSATION = Example(
    "chat",
    (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "uno"),
        Message("user", "Two?"),
        Message("assistant", "dos"),
    ),
    "data:1",
    has_turns=True,
)


def tokenizer_with(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text(tokenizer: PreTrainedTokenizerFast) -> str:
    chat = Encoder(tokenizer).renderer.chat
    assert chat is not None
    return chat.render(CONVERSATION).text


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_template_learns_every_answer(name: str) -> None:
    tokenizer = tokenizer_with(None)
    choose_template(tokenizer, TemplateChoice(name))
    chat = Encoder(tokenizer).renderer.chat
    assert chat is not None
    conversation = chat.render(CONVERSATION)
    stop = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    answers = [conversation.text[answer.start : answer.end] for answer in conversation.answers]
    assert answers == [f"uno{stop}", f"dos{stop}"]
    assert all(turn.content in conversation.text for turn in CONVERSATION.messages)


def test_own_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML)
    tokenizer = tokenizer_with(None)
    choose_template(tokenizer, TemplateChoice(str(tmp_path / "own.jinja")))
    assert tokenizer.chat_template == CHATML


def test_named_template() -> None:
    tokenizer = tokenizer_with({"rag": CHATML, "tool_use": QWEN_3})
    choose_template(tokenizer, TemplateChoice("rag"))
    assert tokenizer.chat_template == CHATML
    tokenizer = tokenizer_with({"default": CHATML, "tool_use": QWEN_3})
    choose_template(tokenizer, TemplateChoice())
    assert tokenizer.chat_template == CHATML


def test_named_templates_without_a_default() -> None:
    with pytest.raises(ConfigError, match="several chat templates") as caught:
        choose_template(tokenizer_with({"tool_use": CHATML, "rag": CHATML}), TemplateChoice())
    assert caught.value.expected == "rag, tool_use"


def test_no_such_template() -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        choose_template(tokenizer_with({"rag": CHATML}), TemplateChoice("toolu"))
    assert "rag, chatml, tulu" in str(caught.value.expected)


def test_file_that_is_not_a_template(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages")
    with pytest.raises(ConfigError, match="not valid Jinja") as caught:
        choose_template(tokenizer_with(None), TemplateChoice(str(tmp_path / "own.jinja")))
    assert str(caught.value.actual).startswith("line 1: ")


def test_variables_are_part_of_the_template_written(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("{{ shout }}{{ 'x' if thinking is false else 'y' }}" + CHATML)
    choose_template(tokenizer, TemplateChoice(variables={"shout": "it's", "thinking": False}))
    assert text(tokenizer).startswith("it'sx<|im_start|>")
    tokenizer.save_pretrained(tmp_path)
    assert text(PreTrainedTokenizerFast.from_pretrained(tmp_path)).startswith("it'sx<|im_start|>")


def test_system_prompt_goes_into_the_first_question() -> None:
    tokenizer = tokenizer_with(GEMMA_2)
    choose_template(tokenizer, TemplateChoice(merge_system=True))
    assert text(tokenizer).startswith("<s><start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>\n")


@pytest.mark.parametrize("choice", [TemplateChoice(merge_system=True), TemplateChoice(variables={"a": 1})])
def test_nothing_to_change(choice: TemplateChoice) -> None:
    with pytest.raises(ConfigError, match="no chat template to modify"):
        choose_template(tokenizer_with(None), choice)


def test_variable_without_a_name() -> None:
    with pytest.raises(ConfigError, match="invalid name"):
        choose_template(tokenizer_with(CHATML), TemplateChoice(variables={"a b": 1}))


def test_model_without_template_stays_without_one() -> None:
    tokenizer = tokenizer_with(None)
    choose_template(tokenizer, TemplateChoice())
    assert tokenizer.chat_template is None


def test_a_choice_replaces_an_earlier_one() -> None:
    tokenizer = build_tokenizer(chat_template="{{ mode }}|{{ n }}|{% for m in messages %}{{ m.content }};{% endfor %}")
    choose_template(tokenizer, TemplateChoice(variables={"mode": 'a "b" \\ -%}', "n": 1}, merge_system=True))
    written = str(tokenizer.chat_template)
    choose_template(tokenizer, TemplateChoice(variables={"mode": 'a "b" \\ -%}', "n": 1}, merge_system=True))
    assert tokenizer.chat_template == written
    choose_template(tokenizer, TemplateChoice(variables={"mode": False}))
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "False|1|s\n\nu;"
