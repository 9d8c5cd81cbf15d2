"""Labels cover only the answers, and a prompt's ids are those before the labels of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mftctl.data.encoding import Encoded, Encoder, PromptTooLongError, encode_all
from mftctl.data.examples import Example, Kind, Message, TokenIds
from mftctl.data.prepared.load import load_examples
from mftctl.data.record_issues import RecordIssues, Remark
from mftctl.data.sources import DataSource
from mftctl.errors import DataError
from tests.conftest import build_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSES_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ message.content }}<|end|>{% endfor %}"
)
CORPUS = [
    "the cat sat on the cats mat. ",
    "a  b\n\nc \n d",
    "assistant user system the the cat is an",
    "\n\n\n   \n\n",
] * 20
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def wrap(tokenizer: Tokenizer, chat_template: str | None, eos: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


def train_bytes(chat_template: str | None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, whose tokens merge across white space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return wrap(tokenizer, chat_template, eos)


def train_metaspace(chat_template: str | None, scheme: str) -> PreTrainedTokenizerFast:
    """A BPE like Llama 2's: a space is prepended to the text, and BOS to that."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    # Line by line: Llama 2's tokens never span a line break either.
    lines = ["\n", *(line for text in CORPUS for line in text.split("\n"))]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(tokenizer, chat_template, "</s>")


CHARACTERS = build_tokenizer()
BYTES_CHATML = train_bytes(CHATML, eos="<|im_end|>")
BYTES_PLAIN = train_bytes(None)
LLAMA_PLAIN = train_metaspace(None, "first")
LLAMA_PLAIN_ALWAYS = train_metaspace(None, "always")


def example(*texts: str, kind: Kind = "chat", system: str | None = None) -> Example:
    """Alternating user and assistant turns, ending with the assistant."""
    roles = ["assistant", "user"] * len(texts)
    messages = [Message(role, text) for role, text in zip(reversed(roles[: len(texts)]), texts, strict=True)]
    return Example(kind, tuple([*([Message("system", system)] if system else []), *messages]), "data:1")


def encode(record: Example, tokenizer: PreTrainedTokenizerFast, max_length_tokens: int) -> Encoded:
    return Encoder(tokenizer).encode(record, max_length_tokens)


def encode_prompt(record: Example, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return Encoder(tokenizer).prompt(record)


def labelled(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each contiguous run of labels."""
    runs: list[list[int]] = []
    previous = -100
    for label in encoded.labels:
        if label != -100 and previous == -100:
            runs.append([])
        if label != -100:
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in runs]


def assert_consistent(encoded: Encoded, prompt: Sequence[int]) -> None:
    """Labels equal the ids or are ignored, and the prompt is everything before the last run of labels."""
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (-100, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    assert encoded.answer_tokens == sum(label != -100 for label in encoded.labels)
    end = max(index for index, label in enumerate(encoded.labels) if label != -100)
    while end > 0 and encoded.labels[end - 1] != -100:
        end -= 1
    assert list(prompt) == encoded.input_ids[:end]


def test_template_labels_the_answer_with_its_marker() -> None:
    record = example("2+2?", "4", system="Be brief.")
    encoded = encode(record, CHARACTERS, 100)
    assert CHARACTERS.decode(encoded.input_ids) == "<|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>4<|end|>"
    assert labelled(encoded, CHARACTERS) == ["4<|end|>"]
    assert encoded.where == "data:1"
    assert_consistent(encoded, encode_prompt(record, CHARACTERS))


def test_every_assistant_turn_is_labelled() -> None:
    record = example("a", "b", "c", "d", system="S")
    encoded = encode(record, CHARACTERS, 100)
    assert labelled(encoded, CHARACTERS) == ["b<|end|>", "d<|end|>"]
    assert_consistent(encoded, encode_prompt(record, CHARACTERS))


def test_opening_assistant_turn_is_context() -> None:
    assert labelled(encode(example("hello", "a", "b"), CHARACTERS, 100), CHARACTERS) == ["b<|end|>"]


def test_line_end_after_the_marker_is_not_labelled() -> None:
    encoded = encode(example("a", "the cat", "c", "the mat"), BYTES_CHATML, 100)
    assert labelled(encoded, BYTES_CHATML) == ["the cat<|im_end|>", "the mat<|im_end|>"]
    assert BYTES_CHATML.decode(encoded.input_ids).endswith("<|im_end|>\n")


def test_template_without_a_marker_gets_the_end_token() -> None:
    tokenizer = train_bytes(BARE)
    record = example("the cat", "sat")
    encoded = encode(record, tokenizer, 100)
    assert tokenizer.decode(encoded.input_ids) == "user: the cat\nassistant: sat</s>"
    assert labelled(encoded, tokenizer) == ["sat</s>"]
    assert_consistent(encoded, encode_prompt(record, tokenizer))


def test_template_with_bos_has_one_bos() -> None:
    tokenizer = train_metaspace("{{ bos_token }}" + CHATML, "first")
    encoded = encode(example("the", "cat"), tokenizer, 100)
    assert tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == tokenizer.bos_token_id


def test_template_without_bos_gets_none() -> None:
    tokenizer = train_metaspace(CHATML, "first")
    assert tokenizer.bos_token_id not in encode(example("the", "cat"), tokenizer, 100).input_ids


def test_completion_goes_through_the_template() -> None:
    chat, completion = example("a", "b"), example("a", "b", kind="completion")
    assert encode(chat, CHARACTERS, 100) == encode(completion, CHARACTERS, 100)


def test_chat_without_a_template() -> None:
    record = example("the cat", "sat", system="system")
    encoded = encode(record, BYTES_PLAIN, 100)
    assert BYTES_PLAIN.decode(encoded.input_ids) == "system\n\nthe cat\nsat</s>"
    assert labelled(encoded, BYTES_PLAIN) == ["sat</s>"]
    assert_consistent(encoded, encode_prompt(record, BYTES_PLAIN))


def test_completion_without_a_template() -> None:
    record = example("the c", "ats", kind="completion")
    encoded = encode(record, BYTES_PLAIN, 100)
    assert BYTES_PLAIN.decode(encoded.input_ids) == "the cats</s>"
    assert labelled(encoded, BYTES_PLAIN) == ["ats</s>"]
    assert_consistent(encoded, encode_prompt(record, BYTES_PLAIN))


def test_completion_of_an_empty_prompt() -> None:
    record = example("", "the cat", kind="completion")
    encoded = encode(record, BYTES_PLAIN, 100)
    assert encoded.labels == encoded.input_ids
    assert encode_prompt(record, BYTES_PLAIN) == []


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BYTES_PLAIN])
def test_text_is_labelled_whole_and_never_templated(tokenizer: PreTrainedTokenizerFast) -> None:
    record = example("the cat", kind="text")
    encoded = encode(record, tokenizer, 100)
    assert labelled(encoded, tokenizer) == [f"the cat{tokenizer.eos_token}"]
    assert encoded.labels == encoded.input_ids
    assert encode_prompt(record, tokenizer) == []


def test_text_after_bos() -> None:
    encoded = encode(example("the cat", kind="text"), LLAMA_PLAIN, 100)
    assert encoded.input_ids == [*LLAMA_PLAIN("the cat")["input_ids"], LLAMA_PLAIN.eos_token_id]
    assert encoded.labels == [-100, *encoded.input_ids[1:]]
    assert encode_prompt(example("the cat", kind="text"), LLAMA_PLAIN) == [LLAMA_PLAIN.bos_token_id]


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_end_token_in_the_record_is_not_doubled(kind: Kind) -> None:
    record = example("the cat</s>", kind=kind) if kind == "text" else example("the", "cat</s>", kind=kind)
    assert encode(record, BYTES_PLAIN, 100).input_ids.count(BYTES_PLAIN.eos_token_id) == 1


def test_tokenizer_without_an_end_token() -> None:
    tokenizer = train_bytes(None)
    tokenizer.eos_token = None
    assert labelled(encode(example("a", "b"), tokenizer, 100), tokenizer) == ["b"]


pieces = st.text(st.sampled_from("the cats.\n "), max_size=12)
answers = pieces.filter(str.strip)


@pytest.mark.slow
@given(st.lists(st.tuples(pieces, answers), min_size=1, max_size=3))
def test_template_boundaries_hold_for_any_white_space(turns: list[tuple[str, str]]) -> None:
    record = example(*(text for turn in turns for text in turn))
    encoded = encode(record, BYTES_CHATML, 1000)
    text = "".join(
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" for user, answer in turns
    )
    assert BYTES_CHATML.decode(encoded.input_ids) == text
    assert labelled(encoded, BYTES_CHATML) == [f"{answer}<|im_end|>" for _, answer in turns]
    assert_consistent(encoded, encode_prompt(record, BYTES_CHATML))
    prompt = text[: text.rindex("assistant\n") + len("assistant\n")]
    assert BYTES_CHATML.decode(encode_prompt(record, BYTES_CHATML)) == prompt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer", "bos"), [(BYTES_PLAIN, ""), (LLAMA_PLAIN, "<s>"), (LLAMA_PLAIN_ALWAYS, "<s>"), (CHARACTERS, "")]
)
@given(prompt=pieces.filter(bool), answer=answers)
def test_completion_boundaries_hold_for_any_white_space(
    tokenizer: PreTrainedTokenizerFast, bos: str, prompt: str, answer: str
) -> None:
    plain = build_tokenizer(chat_template=None) if tokenizer is CHARACTERS else tokenizer
    record = example(prompt, answer, kind="completion")
    encoded = encode(record, plain, 1000)
    skip = len(bos) > 0
    tokens = plain.convert_ids_to_tokens(encoded.input_ids[skip:])
    if tokenizer in (LLAMA_PLAIN, LLAMA_PLAIN_ALWAYS):
        assert encoded.input_ids[0] == plain.bos_token_id
        # The tokenizer omits a space at the start of the text if there is one, and there is none at the boundary.
        text = "".join(tokens).replace("▁", " ")
        assert text in (f" {prompt}{answer}</s>", f"{prompt}{answer}</s>")
    else:
        assert plain.decode(encoded.input_ids) == f"{prompt}{answer}{plain.eos_token}"
    assert_consistent(encoded, encode_prompt(record, plain))
    alone = plain(prompt)["input_ids"]
    assert encode_prompt(record, plain) == alone


@pytest.mark.slow
@given(answers, answers)
def test_prompt_does_not_depend_on_the_answer(one: str, other: str) -> None:
    for tokenizer in (BYTES_PLAIN, BYTES_CHATML, LLAMA_PLAIN):
        prompts = [encode_prompt(example("the ", answer, kind="completion"), tokenizer) for answer in (one, other)]
        assert prompts[0] == prompts[1]


@pytest.mark.slow
@given(st.integers(1, 60))
def test_truncation_keeps_the_front(max_length_tokens: int) -> None:
    record = example("2+2?", "the sum is 4")
    whole = encode(record, CHARACTERS, 1000)
    prompt_tokens = len(encode_prompt(record, CHARACTERS))
    if max_length_tokens <= prompt_tokens:
        with pytest.raises(PromptTooLongError, match="left to train on"):
            encode(record, CHARACTERS, max_length_tokens)
        return
    cut = encode(record, CHARACTERS, max_length_tokens)
    assert cut.input_ids == whole.input_ids[:max_length_tokens]
    assert cut.labels == whole.labels[:max_length_tokens]


def test_answer_cut_away_names_place_numbers_and_option() -> None:
    with pytest.raises(DataError) as caught:
        encode(example("x" * 50, "4"), CHARACTERS, 20)
    assert caught.value.path == "data:1"
    assert "20 tokens" in str(caught.value.expected)
    assert caught.value.actual == "a prompt of 53 tokens, 55 tokens in total"
    assert "--max-length" in str(caught.value.hint)


def test_single_first_token_is_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="left to train on"):
        encode(example("the cat", kind="text"), CHARACTERS, 1)


def test_template_that_leaves_out_a_question() -> None:
    tokenizer = build_tokenizer(
        chat_template="{% for message in messages %}{{ message.content if loop.last else '-' }}<|end|>{% endfor %}"
    )
    with pytest.raises(DataError, match="drops text") as caught:
        encode(example("a", "b"), tokenizer, 100)
    assert (caught.value.path, caught.value.key, caught.value.actual) == ("data:1", "messages[0]", "'a'")


def test_template_that_refuses_the_roles() -> None:
    tokenizer = build_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match="tokenizer's chat template fails") as caught:
        encode_prompt(example("a", "b", system="S"), tokenizer)
    assert caught.value.path == "data:1"
    assert caught.value.actual == "system, user, assistant: no system role"


def test_encode_all_keeps_the_order() -> None:
    records = [example("a", str(number)) for number in range(5)]
    encoded = encode_all(records, Encoder(CHARACTERS), 100, RecordIssues())
    assert encoded.records == [encode(record, CHARACTERS, 100) for record in records]
    assert encoded.examples == records


def test_encode_all_counts_what_it_leaves_out() -> None:
    records = [example("a", "b"), example("x" * 50, "b"), example("a", "y" * 50), example("a", "b", system="{}")]
    tokenizer = build_tokenizer(chat_template=REFUSES_SYSTEM)
    issues, told = RecordIssues(), []
    encoded = encode_all(
        records, Encoder(tokenizer), 20, issues, on_progress=lambda done, total: told.append((done, total))
    )
    assert [record.remarks for record in encoded.records] == [Remark.NONE, Remark.CUT]
    assert encoded.examples == [records[0], records[2]]
    assert (issues.overlong, issues.cut, len(issues.refused)) == (1, 1, 1)
    assert told == [(4, 4)]


def test_conversation_without_a_template_is_refused() -> None:
    record = Example("chat", example("a", "b", system="s").messages, "data:1", has_turns=True)
    with pytest.raises(DataError, match="no chat template") as caught:
        encode(record, BYTES_PLAIN, 100)
    assert caught.value.actual == "a conversation of system, user, assistant"
    assert "--chat-template tulu" in str(caught.value.hint)


@pytest.mark.parametrize("tokenizer", [LLAMA_PLAIN, LLAMA_PLAIN_ALWAYS])
@pytest.mark.parametrize("record", [example("<s>the cat", kind="text"), example("<s>the", " cat", kind="completion")])
def test_text_that_brings_its_bos_gets_no_second_one(tokenizer: PreTrainedTokenizerFast, record: Example) -> None:
    encoded = encode(record, tokenizer, 100)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == tokenizer.bos_token_id


def test_last_answer_alone_is_learned_where_asked_for() -> None:
    encoded = Encoder(CHARACTERS, learn="last").encode(example("a", "b", "c", "d"), 100)
    assert labelled(encoded, CHARACTERS) == ["d<|end|>"]


def test_turn_that_is_not_to_be_learned() -> None:
    turns = example("a", "b", "c", "d").messages
    muted = replace(turns[1], is_learned=False)
    encoded = encode(Example("chat", (turns[0], muted, *turns[2:]), "x"), CHARACTERS, 100)
    assert labelled(encoded, CHARACTERS) == ["d<|end|>"]


def test_token_ids_are_taken_as_they_are() -> None:
    record = Example("tokens", (), "data:1", token_ids=TokenIds((1, 5, 6, 2), (-100, -100, 6, 2)))
    assert encode(record, CHARACTERS, 100) == Encoded([1, 5, 6, 2], [-100, -100, 6, 2], "data:1")
    assert encode(record, CHARACTERS, 3).remarks == Remark.CUT


def test_token_id_that_the_tokenizer_lacks() -> None:
    record = Example("tokens", (), "data:1", token_ids=TokenIds((1, 10**6), (1, 10**6)))
    with pytest.raises(DataError, match="not in the tokenizer's vocabulary") as caught:
        encode(record, CHARACTERS, 100)
    assert caught.value.actual == 10**6


@pytest.mark.slow
def test_real_gsm8k_answers_are_labelled_in_full(real_data: Path) -> None:
    examples = load_examples([DataSource(str(real_data / "gsm8k" / "train.jsonl.gz"), count=100)])
    encoded = encode_all(examples, Encoder(BYTES_CHATML), 4096, RecordIssues())
    for record, tokens in zip(examples, encoded.records, strict=True):
        assert labelled(tokens, BYTES_CHATML) == [f"{record.answer}<|im_end|>"]
        assert_consistent(tokens, encode_prompt(record, BYTES_CHATML))
