"""Publicly reported bugs of similar tools that mftctl must not share, each with the correct value on generated inputs.

The test numbers refer to the list of cases named in the issue.
"""

from __future__ import annotations

import csv
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from mftctl.errors import ConfigError, DataError, Interrupted
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_folder import load_run
from mftctl.progress import Silence
from mftctl.training.inputs import TrainingInputs, prepare_training
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.planning.training_data import trained_segments
from mftctl.workflows.validate import Validation, validate
from tests.conftest import build_llama, build_tokenizer
from tests.data import chat_families
from tests.workflow_fixtures import Interrupter, make_recipe, open_run

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|eot|>", "<|tool|>", "<|start|>"),
    *("<|channel|>", "<|message|>", "<|return|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"),
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<|system|>You may call {{ tools | tojson }}<|eot|>{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}:"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
FUNCTION = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
EVAL_ONLY = {"measure": {"command": "eval"}}


class Listener(Silence):
    """Records all events."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Bench:
    """A model folder and data, in a separate folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = Listener()
        self.model(PLAIN)

    def model(self, template: Any) -> None:
        """Gives the model a chat template, or several named ones."""
        tokenizer = build_tokenizer(chat_template=None)
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", *SPECIAL]}
        )
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        tokenizer.chat_template = template
        shutil.rmtree(self.folder / "model", ignore_errors=True)
        tokenizer.save_pretrained(self.folder / "model")
        build_llama(layers=1, vocab_size=len(tokenizer)).save_pretrained(self.folder / "model")

    def data(self, *records: dict[str, Any]) -> Path:
        path = self.folder / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    def recipe(self, data: Path, **changes: Any) -> Recipe:
        return Recipe.model_validate(
            {"model": str(self.folder / "model"), "data": str(data), "val_data": str(data), **changes}
        )

    def inputs(self, data: Path, max_length_tokens: int = 4096, **changes: Any) -> TrainingInputs:
        """The inputs of a training on these records."""
        recipe = self.recipe(data, **changes)
        return prepare_training(
            recipe,
            str(recipe.model),
            max_length_tokens=max_length_tokens,
            now=datetime(2026, 3, 5, tzinfo=UTC),
            listener=self.listener,
        )

    def shown(self, *records: dict[str, Any], **changes: Any) -> list[str]:
        """The text of each record, with learned parts between » and «."""
        return shown(self.inputs(self.data(*records), **changes))

    def checked(self, data: Path, **changes: Any) -> Validation:
        """The findings of `validate`."""
        return validate(self.recipe(data, stages=EVAL_ONLY, test_data=str(data), **changes), None)


def shown(inputs: TrainingInputs) -> list[str]:
    texts = []
    for record in inputs.train:
        segments = trained_segments(record, inputs.tokenizer)
        texts.append("".join(f"»{item.text}«" if item.is_answer else item.text for item in segments))
    return texts


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(*texts: str, system: str | None = None) -> dict[str, Any]:
    """A conversation record; the user has the first turn."""
    turns = [turn(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    return {"messages": ([] if system is None else [turn("system", system)]) + turns}


@pytest.mark.slow
def test_01_prompt_and_completion_as_turns(bench: Bench) -> None:
    prompt = [turn("system", "One word."), turn("user", "Hi"), turn("assistant", "Yes?"), turn("user", "Peru?")]
    assert bench.shown({"prompt": prompt, "completion": [turn("assistant", "Lima")]}) == [
        "<s><|system|>One word.</s><|user|>Hi</s><|assistant|>Yes?</s><|user|>Peru?</s><|assistant|>»Lima</s>«"
    ]


@pytest.mark.slow
def test_02_content_as_parts(bench: Bench) -> None:
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]
    record = {"messages": [turn("user", parts), turn("assistant", [{"type": "text", "text": "Blue"}])]}
    assert bench.shown(record) == ["<s><|user|>Name a colour.</s><|assistant|>»Blue</s>«"]
    image = {"messages": [turn("user", [{"type": "image", "url": "https://a.org/a.png"}]), turn("assistant", "Blue")]}
    with pytest.raises(DataError, match="not on this machine"):
        bench.shown(image)
    audio = {"messages": [turn("user", [{"type": "audio", "path": "a.wav"}]), turn("assistant", "Blue")]}
    with pytest.raises(DataError, match="neither text nor an image") as caught:
        bench.shown(audio)
    assert caught.value.actual == "audio"


@pytest.mark.slow
def test_04_tools_reach_the_template(bench: Bench) -> None:
    bench.model(WITH_TOOLS)
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"city": "Oslo"}'}}
    turns = [turn("user", "Time?"), turn("assistant", "Let me look.", tool_calls=[call])]
    turns += [turn("tool", "14:05", tool_call_id="c1"), turn("assistant", "It is 14:05.")]
    (text,) = bench.shown({"messages": turns, "tools": [FUNCTION]})
    assert text.startswith(f"<|system|>You may call {json.dumps([FUNCTION])}<|eot|><|user|>Time?<|eot|><|assistant|>")
    assert text.endswith(
        '<|assistant|>»Let me look.<call>clock:{"city": "Oslo"}</call><|eot|>«<|tool|>14:05<|eot|>'
        "<|assistant|>»It is 14:05.<|eot|>«"
    )


@pytest.mark.slow
def test_05_function_call_and_observation(bench: Bench) -> None:
    call = json.dumps({"name": "clock", "arguments": {"city": "Oslo"}})
    turns = [("human", "Time?"), ("function_call", call), ("observation", "14:05"), ("gpt", "It is 14:05.")]
    record = {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": json.dumps([FUNCTION])}
    (text,) = bench.shown(record)
    assert text == (
        f"<s><|system|>{json.dumps([FUNCTION])}</s><|user|>Time?</s><|assistant|>»{call}</s>«"
        "<|tool|>14:05</s><|assistant|>»It is 14:05.</s>«"
    )
    assert any("written as JSON text" in note for note in bench.listener.notes)


@pytest.mark.slow
def test_07_a_text_that_begins_with_bos(bench: Bench) -> None:
    bench.model(None)
    first, second = bench.shown({"text": "<s>[INST] Hi [/INST] Hello"}, {"text": "[INST] Bye [/INST] Goodbye"})
    assert first == "<s>»[INST] Hi [/INST] Hello</s>«"
    assert second == "<s>»[INST] Bye [/INST] Goodbye</s>«"


@pytest.mark.slow
def test_08_a_prompt_that_begins_with_bos(bench: Bench) -> None:
    bench.model(None)
    assert bench.shown({"prompt": "<s>[INST] Hi [/INST]", "completion": " Hello"}) == [
        "<s>[INST] Hi [/INST]» Hello</s>«"
    ]


@pytest.mark.slow
def test_10_the_history_of_alpaca(bench: Bench) -> None:
    record = {"instruction": "And Chile?", "output": "Santiago", "history": [["Peru?", "Lima"]], "system": "Short."}
    assert bench.shown(record) == [
        "<s><|system|>Short.</s><|user|>Peru?</s><|assistant|>»Lima</s>«"
        "<|user|>And Chile?</s><|assistant|>»Santiago</s>«"
    ]


@pytest.mark.slow
def test_11_thinking_reaches_the_template(bench: Bench) -> None:
    bench.model(chat_families.QWEN_3)
    for field in ("reasoning_content", "thinking"):
        (text,) = bench.shown({"messages": [turn("user", "1+1?"), turn("assistant", "2", **{field: "Add."})]})
        assert text.rstrip().endswith("»<think>\nAdd.\n</think>\n\n2<|im_end|>«")
    bench.model(PLAIN)
    with pytest.raises(DataError, match="drops the thinking"):
        bench.shown({"messages": [turn("user", "1+1?"), turn("assistant", "2", thinking="Add.")]})


@pytest.mark.slow
def test_13_a_long_cell(bench: Bench) -> None:
    path = bench.folder / "data.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("question", "answer"), ("word " * 40_000, "Words."), ("a", "b")])
    inputs = bench.inputs(path, 300_000)
    assert [len(record.input_ids) > 200_000 for record in inputs.train] == [True, False]


@pytest.mark.slow
def test_16_zstd(bench: Bench) -> None:
    path = bench.folder / "data.jsonl.zst"
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(b'{"question": "a?", "answer": "b"}\n')
    assert shown(bench.inputs(path)) == ["<s><|user|>a?</s><|assistant|>»b</s>«"]


BAD = ({"messages": [turn("user", "Hi")]}, {"messages": []}, {"question": "a", "answer": " "})


@pytest.mark.slow
def test_18_bad_records_are_counted_and_can_be_left_out(bench: Bench) -> None:
    data = bench.data(*BAD, {"question": "Yo", "answer": "Ho"})
    with pytest.raises(DataError, match="3 of 4 records cannot be used") as caught:
        bench.inputs(data)
    assert all(f"data.jsonl:{line}" in str(caught.value.actual) for line in (1, 2, 3))
    assert "--bad-records skip" in str(caught.value.hint)
    assert any("3 of 4 records cannot be used" in text for text in bench.checked(data).problems)
    inputs = bench.inputs(data, bad_records="skip", bad_records_max=0.8)
    assert shown(inputs) == ["<s><|user|>Yo</s><|assistant|>»Ho</s>«"]
    assert inputs.summary()["record_issues"]["Training data"] == {"refused": 3}
    assert any(note.startswith("Training data: 3 of 4 records") for note in bench.listener.notes)
    found = bench.checked(data, bad_records="skip", bad_records_max=0.8)
    assert found.problems == []
    assert any("3 of 4 records skipped as unusable" in text for text in found.warnings)


@pytest.mark.slow
def test_22_token_ids(bench: Bench) -> None:
    (record,) = bench.inputs(bench.data({"input_ids": [7, 8, 9, 2], "labels": [-100, -100, 9, 2]})).train
    assert (record.input_ids, record.labels) == ([7, 8, 9, 2], [-100, -100, 9, 2])


@pytest.mark.slow
def test_27_earlier_turns_without_thinking(bench: Bench) -> None:
    bench.model(chat_families.QWEN_3)
    (text,) = bench.shown(talk("One?", "uno", "Two?", "dos"))
    assert "<|im_start|>assistant\n»uno<|im_end|>«" in text
    assert "dos<|im_end|>«" in text


@pytest.mark.slow
def test_28_a_generation_prompt_that_thinks(bench: Bench) -> None:
    bench.model(chat_families.R1)
    assert bench.shown(talk("Three?", "tres")) == ["<s><|User|>Three?<|Assistant|>»tres</s>«"]


@pytest.mark.slow
def test_30_eos_once_at_the_close(bench: Bench) -> None:
    bench.model(chat_families.PHI_3.replace("<|end|>", "<|eot|>"))
    (text,) = bench.shown(talk("One?", "uno", "Two?", "dos"))
    assert "»uno<|eot|>«" in text
    assert "»dos<|eot|>«" in text


@pytest.mark.slow
def test_31_the_system_prompt_in_the_last_question(bench: Bench) -> None:
    bench.model(chat_families.MISTRAL)
    (text,) = bench.shown(talk("One?", "uno", "Two?", "dos", system="Be kind."))
    assert text == "<s>[INST] One? [/INST] »uno</s>«[INST] Be kind.\n\nTwo? [/INST] »dos</s>«"


@pytest.mark.slow
def test_33_the_next_role_is_the_stop(bench: Bench) -> None:
    bench.model(chat_families.GLM_4)
    assert bench.shown(talk("One?", "uno", "Two?", "dos")) == [
        "<|user|>One?<|assistant|>»uno<|user|>«Two?<|assistant|>»dos</s>«"
    ]


@pytest.mark.slow
def test_34_a_template_that_refuses_a_system_turn(bench: Bench) -> None:
    bench.model(NO_SYSTEM)
    record = talk("Hi", "Ho", system="Be kind.")
    with pytest.raises(DataError, match="chat template") as caught:
        bench.shown(record)
    assert "--merge-system" in str(caught.value.hint)
    (text,) = bench.shown(record, merge_system=True)
    assert text.startswith("<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>assistant\n»Ho")


@pytest.mark.slow
def test_36_named_templates_without_a_default(bench: Bench) -> None:
    bench.model({"rag": PLAIN, "tool_use": WITH_TOOLS})
    data = bench.data(talk("Hi", "Ho"))
    with pytest.raises(ConfigError, match="several chat templates") as caught:
        bench.inputs(data)
    assert (caught.value.key, caught.value.expected) == ("--chat-template", "rag, tool_use")
    assert any("several chat templates" in text for text in bench.checked(data).problems)
    assert shown(bench.inputs(data, chat_template="rag")) == ["<s><|user|>Hi</s><|assistant|>»Ho</s>«"]


@pytest.mark.slow
def test_39_a_template_that_wants_parts(bench: Bench) -> None:
    bench.model(PARTS)
    assert bench.shown(talk("One?", "uno", "Two?", "dos")) == [
        "<|user|>One?<|eot|><|assistant|>»uno<|eot|>«<|user|>Two?<|eot|><|assistant|>»dos<|eot|>«"
    ]


@pytest.mark.slow
def test_42_turns_without_a_template(bench: Bench) -> None:
    bench.model(None)
    record = talk("One?", "uno", "Two?", "dos", system="Short.")
    with pytest.raises(DataError, match="no chat template") as caught:
        bench.shown(record)
    assert all(way in str(caught.value.hint) for way in ("--chat-template tulu", "FILE.jinja", "prompt and completion"))
    (text,) = bench.shown(record, chat_template="chatml")
    assert text.count("»") == 2
    assert "»uno<|im_end|>" in text


@pytest.mark.slow
def test_71_cut_answers_are_counted(bench: Bench) -> None:
    data = bench.data(*({"question": f"{number}?", "answer": "word " * 40} for number in range(8)))
    inputs = bench.inputs(data, 64)
    assert inputs.issues["Training data"] == {"cut": 8}
    assert any("8 of 8 answers (100.0%) truncated at --max-length 64" in note for note in bench.listener.notes)
    assert any("does not learn to stop" in warning for warning in bench.listener.warnings)
    warnings = bench.checked(data, fft={"max_length_tokens": 64}).warnings
    assert any("8 of 8 answers" in text for text in warnings)
    bench.listener.warnings.clear()
    mixed = bench.data({"question": "a", "answer": "b"}, {"question": "c", "answer": "word " * 40})
    bench.inputs(mixed, 64)
    assert bench.listener.warnings == []


@pytest.mark.slow
def test_an_overlong_prompt_is_left_out_with_a_count(bench: Bench) -> None:
    data = bench.data({"question": "q" * 100, "answer": "a"}, {"question": "q", "answer": "a"})
    inputs = bench.inputs(data, 64, bad_records_max=0.5)
    assert len(inputs.train) == len(inputs.records) == 1
    assert any("1 of 2 records skipped: the prompt alone" in note for note in bench.listener.notes)
    with pytest.raises(DataError, match="no record can be used"):
        bench.inputs(bench.data({"question": "q" * 100, "answer": "a"}), 64, bad_records_max=1.0)


@pytest.mark.slow
def test_77_data_changed_before_a_resumption(workspace: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_bytes((workspace / "train.jsonl").read_bytes())
    recipe = make_recipe(workspace, data=[str(data)])
    run, source = open_run(tmp_path / "runs", "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(step=5))
    before = load_run(run.folder).record.inputs["digests"]
    lines = data.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(['{"question": "1+1?", "answer": "3"}', *lines[1:]]) + "\n", encoding="utf-8")
    again = load_run(run.folder)
    with pytest.raises(DataError, match="changed since this run began") as caught:
        fine_tune(recipe, source, again, Silence(), resume=True)
    assert (caught.value.key, str(caught.value.expected)) == ("train", f"SHA-256 {before['train']}")
    assert load_run(run.folder).record.inputs["digests"] == before


@pytest.mark.slow
def test_the_clock_of_a_template_is_that_of_the_run(bench: Bench) -> None:
    bench.model("{{ strftime_now('%d %b %Y') }}|" + PLAIN)
    assert bench.shown(talk("Hi", "Ho")) == ["05 Mar 2026|<s><|user|>Hi</s><|assistant|>»Ho</s>«"]
    assert bench.inputs(bench.data(talk("Hi", "Ho"))).template.now == "2026-03-05T00:00:00+00:00"


@pytest.mark.slow
def test_the_system_prompt_that_a_template_adds_is_reported_once(bench: Bench) -> None:
    bench.model(chat_families.QWEN_2)
    bench.shown(talk("Hi", "Ho"), talk("Ho", "Hi"))
    assert [note for note in bench.listener.notes if "system prompt of its own" in note] == [
        "Training data: the chat template adds a system prompt of its own: 'You are a kind helper.'"
    ]


@pytest.mark.slow
def test_switches_of_turns_and_learn_last(bench: Bench) -> None:
    turns = [turn("user", "a"), turn("assistant", "b", weight=0), turn("user", "c"), turn("assistant", "d")]
    assert bench.shown({"messages": turns}) == ["<s><|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>»d</s>«"]
    assert bench.shown(talk("a", "b", "c", "d"), learn="last") == [
        "<s><|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>»d</s>«"
    ]


@pytest.mark.slow
def test_a_fine_tuned_model_has_the_chosen_template(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__max_steps=1, chat_template="zephyr", template_args={"kind": True})
    run, source = open_run(tmp_path, "fft", recipe)
    fine_tune(recipe, source, run, Silence())
    written = AutoTokenizer.from_pretrained(run.folder / "model").chat_template
    assert written.startswith("{%- set kind = true -%}")
    record = load_run(run.folder).record.inputs["chat_template"]
    assert (record["source"], record["args"]) == ("zephyr", {"kind": True})
    card = (run.folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "| Chat template | zephyr, kind=True |" in card
    assert "| Method | FFT |" in card
