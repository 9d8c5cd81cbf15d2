"""Every answer is located in the rendered text, whatever the template family."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mftctl.data.chat_rendering import ChatRenderer, Conversation
from mftctl.data.examples import Example, Message, ToolCall
from mftctl.errors import DataError
from tests.data import chat_families as families

NOW = datetime(2026, 7, 9, 3, 4, 5)
SYSTEM, ONE, UNO, TWO, DOS = (
    Message(role, content)
    for role, content in [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "uno"),
        ("user", "Two?"),
        ("assistant", "dos"),
    ]
)
SHAPES = {
    "one": (ONE, UNO),
    "system": (SYSTEM, ONE, UNO),
    "two": (ONE, UNO, TWO, DOS),
    "both": (SYSTEM, ONE, UNO, TWO, DOS),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus the special tokens of all families."""
    vocabulary = {token: index for index, token in enumerate(families.SPECIAL)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(byte, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(families.SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TOKENIZER = byte_tokenizer()


def renderer(template: str) -> ChatRenderer:
    TOKENIZER.chat_template = template
    return ChatRenderer(TOKENIZER, NOW)


def rendered(template: str, *messages: Message, tools: str = "") -> Conversation:
    return renderer(template).render(Example("chat", messages, "data:1", has_turns=True, tools=tools))


def learned(conversation: Conversation) -> list[str]:
    return [conversation.text[answer.start : answer.end] for answer in conversation.answers]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_answers_with_their_stop(family: str, shape: str) -> None:
    template, marker = families.FAMILIES[family]
    messages = SHAPES[shape]
    if family == "gemma 2" and messages[0].role == "system":
        with pytest.raises(DataError, match="tokenizer's chat template fails") as caught:
            rendered(template, *messages)
        assert "--merge-system" in str(caught.value.hint)
        return
    conversation = rendered(template, *messages)
    assert learned(conversation) == [f"{turn.content}{marker}" for turn in messages if turn.role == "assistant"]
    assert all(answer.has_stop for answer in conversation.answers)
    assert not conversation.is_last_only


@pytest.mark.parametrize("family", families.FAMILIES)
def test_marker_of_a_family(family: str) -> None:
    template, marker = families.FAMILIES[family]
    assert renderer(template).turn_end.marker == marker


def test_next_role_is_the_stop_without_a_marker() -> None:
    conversation = rendered(families.GLM_4, *SHAPES["two"])
    assert learned(conversation) == ["uno<|user|>", "dos"]
    assert [answer.has_stop for answer in conversation.answers] == [True, False]


def test_each_turn_has_its_own_stop() -> None:
    assert learned(rendered(families.GPT_OSS, *SHAPES["both"])) == ["uno<|end|>", "dos<|return|>"]


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (families.QWEN_3, "<think>\nHmm.\n</think>\n\ndos<|im_end|>"),
        (
            families.GPT_OSS,
            "<|channel|>analysis<|message|>Hmm.<|end|><|start|>assistant<|channel|>final<|message|>dos<|return|>",
        ),
    ],
)
def test_thinking_is_learned_from_the_start_of_generation(template: str, answer: str) -> None:
    conversation = rendered(template, ONE, UNO, TWO, Message("assistant", "dos", thinking="Hmm."))
    assert learned(conversation)[-1] == answer
    assert not conversation.cuts_thinking


def test_thinking_cut_from_an_earlier_turn_is_reported() -> None:
    assert rendered(families.QWEN_3, ONE, Message("assistant", "uno", thinking="Hmm."), TWO, DOS).cuts_thinking
    inline = Message("assistant", "<think>Hmm.</think>dos")
    assert rendered(families.R1, ONE, inline).cuts_thinking
    assert learned(rendered(families.R1, ONE, inline)) == ["dos</s>"]


def test_thinking_that_the_template_leaves_out_of_the_last_answer() -> None:
    with pytest.raises(DataError, match="drops the thinking") as caught:
        rendered(families.CHATML, ONE, Message("assistant", "uno", thinking="Hmm."))
    assert caught.value.key == "messages[1]"


def test_question_that_the_template_leaves_out() -> None:
    with pytest.raises(DataError, match="drops text") as caught:
        rendered("{{ messages[-1].content }}", ONE, UNO)
    assert (caught.value.path, caught.value.key, caught.value.actual) == ("data:1", "messages[0]", "'One?'")


def test_answer_that_the_template_writes_twice() -> None:
    with pytest.raises(DataError, match="cannot be located") as caught:
        rendered("{%- for m in messages -%}{{ m.content ~ m.content }}{%- endfor -%}{{ messages | length }}", ONE, UNO)
    assert caught.value.key == "messages[1]"


def test_earlier_answers_that_depend_on_later_ones() -> None:
    template = (
        "{%- for m in messages -%}{{ m.role ~ m.content }}{%- if m.role == 'assistant' and not loop.last -%}"
        "{{ m.content }}{%- endif -%}{{ eos_token }}{%- endfor -%}"
    )
    conversation = rendered(template, *SHAPES["two"])
    assert learned(conversation) == ["dos</s>"]
    assert conversation.is_last_only


def test_system_prompt_that_the_template_adds() -> None:
    assert renderer(families.QWEN_2).added_system == "You are a kind helper."
    assert renderer(families.CHATML).added_system == ""
    assert renderer(families.GEMMA_2).added_system == ""


def test_clock_is_the_one_given() -> None:
    assert rendered(families.DATED, ONE, UNO).text.startswith("Today: 09 Jul 2026\n")


TOOL = '[{"type": "function", "function": {"name": "get_time"}}]'
CALL = Message("assistant", "", tool_calls=(ToolCall("get_time", '{"city": "Oslo"}'),))
SAID = Message("tool", "14:05")
TOOLS = (
    "{%- if tools -%}{{ 'Tools: ' ~ (tools | tojson) ~ '\n' }}{%- endif -%}{%- for m in messages -%}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}{%- for c in m.tool_calls or [] -%}"
    "{{ '<call>' ~ ARGUMENTS ~ '</call>' }}{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
CALL_AND_ANSWER = (ONE, CALL, SAID, UNO)


def test_tools_and_calls_reach_the_template() -> None:
    template = TOOLS.replace("ARGUMENTS", "(c.function | tojson)")
    conversation = rendered(template, *CALL_AND_ANSWER, tools=TOOL)
    call = '<call>{"name": "get_time", "arguments": {"city": "Oslo"}}</call><|im_end|>'
    assert learned(conversation) == [call, "uno<|im_end|>"]
    assert conversation.text.startswith(f"Tools: {TOOL}")
    assert not conversation.has_tools_as_text


def test_arguments_are_text_where_the_template_joins_them() -> None:
    template = TOOLS.replace("ARGUMENTS", "(c.function.name + c.function.arguments)")
    assert learned(rendered(template, *CALL_AND_ANSWER, tools=TOOL))[0] == (
        '<call>get_time{"city": "Oslo"}</call><|im_end|>'
    )


def test_tools_without_a_place_in_the_template_are_json_text() -> None:
    conversation = rendered(families.CHATML, *CALL_AND_ANSWER, tools=TOOL)
    assert conversation.text.startswith(f"<|im_start|>system\n{TOOL}<|im_end|>")
    assert learned(conversation)[0] == '{"name": "get_time", "arguments": {"city": "Oslo"}}<|im_end|>'
    assert conversation.has_tools_as_text


words = st.text(st.sampled_from("abc \n<>|'{}"), max_size=12)


@pytest.mark.slow
@given(st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=3))
def test_answers_are_found_in_any_text(pairs: list[tuple[str, str]]) -> None:
    messages = [turn for asked, said in pairs for turn in (Message("user", asked), Message("assistant", said))]
    assert learned(rendered(families.CHATML, *messages)) == [f"{said}<|im_end|>" for _, said in pairs]
