"""Conversations with images in the chat templates of published models."""

from __future__ import annotations

from datetime import datetime

import pytest

from mftctl.data.chat_rendering import ChatRenderer
from mftctl.data.examples import Example, Message
from mftctl.data.image_reference import ImageReference
from tests.vision_models import vision_tokenizer

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = Example(
    "chat",
    (
        Message("user", "What is this?", image_places=(0,)),
        Message("assistant", "A cat."),
        Message("user", "And or ?", image_places=(4, 7)),
        Message("assistant", "Dogs."),
    ),
    "train.jsonl:1",
    has_turns=True,
    images=tuple(ImageReference(str(number)) for number in range(3)),
)


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (
            LLAVA,
            "USER: <image>\nWhat is this? ASSISTANT: A cat. USER: <image>\n<image>\nAnd  or  ? ASSISTANT: Dogs. ",
            ["A cat. ", "Dogs. "],
        ),
        (
            SMOLVLM,
            "<|im_start|>User:<image>What is this?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
            "User: And <image>or <image>?<end_of_utterance>\nAssistant: Dogs.<end_of_utterance>\n",
            ["A cat.<end_of_utterance>", "Dogs.<end_of_utterance>"],
        ),
        (
            QWEN2_VL,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
            "<|im_start|>assistant\nA cat.<|im_end|>\n"
            "<|im_start|>user\nAnd <|vision_start|><|image_pad|><|vision_end|>or "
            "<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n<|im_start|>assistant\nDogs.<|im_end|>\n",
            ["A cat.<|im_end|>", "Dogs.<|im_end|>"],
        ),
    ],
    ids=["llava", "smolvlm", "qwen2_vl"],
)
def test_answers_are_found_beside_images(template: str, text: str, answers: list[str]) -> None:
    tokenizer = vision_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<end_of_utterance>"]})
    tokenizer.chat_template = template
    found = ChatRenderer(tokenizer, datetime(2026, 1, 1)).render(CONVERSATION)
    assert found.text == text
    assert [text[answer.start : answer.end] for answer in found.answers] == answers
