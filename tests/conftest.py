"""Shared fixtures: a tiny Llama and a locally built tokenizer; none of them needs the network."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "80"
os.environ["NO_COLOR"] = "1"
if "MFTCTL_CACHE" not in os.environ:  # removed at the end by the process that made it
    os.environ["MFTCTL_CACHE"] = tempfile.mkdtemp(prefix="mftctl-test-cache-")
    atexit.register(shutil.rmtree, os.environ["MFTCTL_CACHE"], ignore_errors=True)

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.forked_commands.commands import ForkedCommands

# First calls import their dependencies and machines are shared, so a time limit per example would be flaky.
settings.register_profile("mftctl", deadline=None, max_examples=50)
settings.load_profile("mftctl")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

LONGEST_FILES = (
    "test_real.py",
    "runtime/test_processes.py",
    "test_readme.py",
    "test_examples.py",
    "workflows/multi_process/test_launcher.py",
    "benchmarks/test_they_run.py",
    "killing/test_killing.py",
    "gpu_emulation/test_commands_on_a_gpu.py",
    "cli/test_run.py",
    "cli/test_interruption.py",
    "cli/test_outputs.py",
    "cli/test_terminal.py",
    "workflows/planning/test_memory.py",
    "workflows/planning/test_counted_memory.py",
    "workflows/planning/test_layer_sampling.py",
    "gpu_emulation/test_work_of_a_step.py",
    "training/updates/test_update_methods.py",
    "masking/test_experts_training.py",
    "runtime/test_devices.py",
    "workflows/test_mask_train.py",
    "training/test_low_memory_tuning.py",
    "evaluation/sandbox/test_sandbox_attacks.py",
    "evaluation/benchmarks/test_code_solutions.py",
    "evaluation/benchmarks/test_trials.py",
)
"""Those of more than 15 seconds, in the order in which workers start them."""


def build_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A character-level tokenizer: printable ASCII, newline and five special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<unk>"]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocab = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    fast.chat_template = chat_template
    return fast


def build_llama(*, layers: int = 4, seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A Llama of hidden size 32 in fp32, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, object] = {
        "vocab_size": 102,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).eval()


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_no_garbage() -> None:
    """Keeps the garbage collector from rescanning the half million objects of imported libraries in long runs."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import datasets  # noqa: F401
    import lm_eval.api.task  # noqa: F401
    import transformers.trainer  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _what_earlier_modules_left_is_no_garbage(_libraries_are_no_garbage: None) -> None:
    """The same for what is imported and kept on the way, before a module makes anything of its own."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return build_llama()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer. Read-only: copy it before modifying it."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    build_llama().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vision_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved vision-language model of each family, with its processor. Read-only."""
    from tests.vision_models import FAMILIES, save_vision_model

    root = tmp_path_factory.mktemp("vision")
    return {family: save_vision_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real benchmark data; skips the test if there is none."""
    folder = os.environ.get("MFTCTL_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MFTCTL_TEST_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and addition problems to learn. Read-only."""
    from tests.workflow_fixtures import make_workspace

    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def forked_commands() -> Iterator[ForkedCommands]:
    """Starts commands as processes that need no time for imports."""
    from tests.forked_commands.commands import running_server

    with running_server() as commands:
        yield commands


@pytest.fixture
def forked_workers(tmp_path: Path, forked_commands: ForkedCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are forked with their imports done, instead of started with the Python program given them."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\nexec {shlex.join(forked_commands.python)} tests.forked_commands.worker\n")
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the longest files first, so that no worker still runs one of them when the others have ended."""
    tests = Path(__file__).parent
    ranks = {tests / name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
