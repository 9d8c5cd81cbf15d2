"""The settings that vLLM is started with, recorded by a stand-in."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.registry import model_registry

from mftctl.errors import EvaluationError
from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.recipe import Recipe
from mftctl.masking.checkpoints.load import load_tokenizer
from mftctl.progress import Silence
from mftctl.workflows.eval import evaluate
from tests.conftest import build_llama, build_tokenizer
from tests.workflow_fixtures import make_recipe, open_run

QUESTIONS = ["1+1?", "What are two and two, if you count them up one after another?"]
NEW_TOKENS = 12


class Vllm:
    """A stand-in that records its settings and requests, and answers every request with nothing but an end token."""

    started: dict[str, Any]
    failure: Exception | None = None
    own_length = 512

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self.seeds: list[int | None] = []

    def start(self, **settings: Any) -> SimpleNamespace:
        if self.failure is not None:
            raise self.failure
        self.started = settings
        config = SimpleNamespace(max_model_len=settings["max_model_len"] or self.own_length)
        return SimpleNamespace(llm_engine=SimpleNamespace(model_config=config), generate=self.generate)

    def generate(self, prompts: Any, sampling_params: Any, **_: Any) -> list[SimpleNamespace]:
        self.prompts += [len(prompt.prompt_token_ids) for prompt in prompts]
        self.seeds += [asked.seed for asked in sampling_params]
        return [SimpleNamespace(outputs=[SimpleNamespace(text="#### 4", token_ids=[1])]) for _ in prompts]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    engine, versions = Vllm(), importlib.metadata.version
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": engine.start, "SamplingParams": SimpleNamespace, "TokensPrompt": SimpleNamespace},
        "vllm.lora.request": {"LoRARequest": None},
        "vllm.renderers.hf": {"resolve_chat_template": lambda **_: None},
        "vllm.tokenizers": {"get_tokenizer": lambda folder, **_: load_tokenizer(Path(folder))},
    }
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.32" if name == "vllm" else versions(name))
    monkeypatch.setattr("mftctl.evaluation.engine_checks.find_spec", lambda name: name)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, package=None: name if name == "vllm" else find(name, package)
    )
    for name in ("vllm.lora", "vllm.renderers", *contents):
        module = ModuleType(name)
        module.__dict__.update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(model_registry._objs, "vllm", raising=False)
    uses = ("lm_eval.models.vllm_causallms", "mftctl.evaluation.lm.vllm")
    for name in uses:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield engine
    for name in uses:
        sys.modules.pop(name, None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build_llama(layers=1).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def recipe(workspace: Path, checkpoint: Path, **changes: Any) -> Recipe:
    problems = checkpoint.parent / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": text, "answer": "#### 4"}) + "\n" for text in QUESTIONS))
    options = {"engine": "vllm", "tasks": ["gsm8k_0shot"], "task_data": {"gsm8k_0shot": str(problems)}}
    return make_recipe(
        workspace,
        model=str(checkpoint),
        test_data=[],
        eval={**options, "max_new_tokens": NEW_TOKENS, **changes},
    )


def run(workspace: Path, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    asked = recipe(workspace, checkpoint, **changes)
    opened, source = open_run(checkpoint.parent, "eval", asked)
    return evaluate(asked, source, opened, Silence()).document()


@pytest.mark.slow
def test_the_longest_sequence_is_that_of_the_benchmarks(workspace: Path, checkpoint: Path, vllm: Vllm) -> None:
    run(workspace, checkpoint)
    assert len(vllm.prompts) == len(QUESTIONS)
    assert vllm.started["max_model_len"] == max(vllm.prompts) + NEW_TOKENS + 16
    assert vllm.started["tensor_parallel_size"] == 1
    assert "gpu_memory_utilization" not in vllm.started


def test_chat_templates_and_limits_count(workspace: Path, checkpoint: Path, vllm: Vllm) -> None:
    run(workspace, checkpoint, chat_template=True, limit=1)
    assert vllm.started["max_model_len"] == max(vllm.prompts) + NEW_TOKENS + 16


def test_the_models_own_length_is_never_passed(workspace: Path, checkpoint: Path, vllm: Vllm) -> None:
    vllm.own_length = 40
    build_llama(layers=1, max_position_embeddings=vllm.own_length).save_pretrained(checkpoint)
    with pytest.raises(EvaluationError, match="exceed the model's context") as caught:
        run(workspace, checkpoint)
    assert vllm.started["max_model_len"] is None
    assert "--max-model-length" in str(caught.value.hint)


def test_settings_reach_vllm_under_its_names(workspace: Path, checkpoint: Path, vllm: Vllm) -> None:
    run(workspace, checkpoint, tensor_parallel=2, gpu_memory_share=0.5, max_model_length_tokens=300)
    names = ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len")
    assert [vllm.started[name] for name in names] == [2, 0.5, 300]


def test_a_failed_start_names_the_options_that_help(workspace: Path, checkpoint: Path, vllm: Vllm) -> None:
    vllm.failure = ValueError("The model's max seq len is larger than the KV cache.")
    with pytest.raises(EvaluationError, match="does not start") as caught:
        run(workspace, checkpoint)
    assert "larger than the KV cache" in str(caught.value.actual)
    assert "--max-model-length" in str(caught.value.hint)


def test_vllm_settings_are_not_deciding_keys(workspace: Path, checkpoint: Path) -> None:
    changes = {"tensor_parallel": 2, "gpu_memory_share": 0.5, "max_model_length_tokens": 300}
    plain, other = recipe(workspace, checkpoint), recipe(workspace, checkpoint, **changes)
    assert deciding_keys(plain, "eval") == deciding_keys(other, "eval")
    assert deciding_keys(plain, "eval") != deciding_keys(recipe(workspace, checkpoint, temperature=0.5), "eval")
