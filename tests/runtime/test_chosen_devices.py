"""`--device` and `--attention`: the requested device and kernel are used, or there is an error."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mftctl.errors import ConfigError, DeviceMemoryError, MftError
from mftctl.evaluation.suite import check_suite
from mftctl.experiments import run_device
from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.jobs import Job
from mftctl.experiments.model_source import source_of_run
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe, with_changes
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.load import load_model
from mftctl.progress import Silence
from mftctl.runtime.devices import best_device, counts_memory, device_names, find_device, has_bf16, visible_alone
from mftctl.runtime.torch_failures import gpu_failures, is_out_of_memory
from mftctl.training.loop import SftTrainer
from mftctl.workflows.eval import evaluate
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from mftctl.workflows.run_checks import check_jobs
from tests.conftest import build_llama
from tests.gpu_emulation.emulated_gpu import emulated_gpu, used_gpus
from tests.partial_results import partial_result
from tests.workflow_fixtures import Interrupter, make_recipe, open_run

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

WORK: dict[str, Any] = {"fft": fine_tune, "mask-train": mask_train, "probe": probe, "eval": evaluate}
SHORT = {f"{section}__{key}": 2 for section in ("fft", "mask_train") for key in ("max_steps", "val_steps")}
FLASH = "flash_attention_2"


def work(command: str, root: Path, workspace: Path, **changes: Any) -> tuple[Run, dict[str, Any], list[str]]:
    """The run of a command, its result, and its notes."""
    recipe = make_recipe(workspace, **{**SHORT, "eval__limit": 3, "probe__fast": True, **changes})
    run, source = open_run(root, command, recipe)
    listener = Interrupter(-1)
    return run, WORK[command](recipe, source, run, listener).document(), listener.notes


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose accelerator is MPS."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(run_device, "_told_untested", set())


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Installs a fake flash-attn and records the attention that models are loaded with, without computing it."""
    asked: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(*arguments: Any, attn_implementation: Any = None, **settings: Any) -> Any:
        asked.append(attn_implementation)
        return load(*arguments, **settings)

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("command", ["mask-train", "probe", "eval"])
def test_on_the_cpu_of_a_machine_with_a_gpu_nothing_is_put_on_it(workspace: Path, tmp_path: Path, command: str) -> None:
    figures = {}
    for place in ("gpu", "cpu"):
        if place == "gpu":
            with emulated_gpu(bf16=True):
                run, result, _ = work(command, tmp_path, workspace, device="cpu")
                assert used_gpus() == set()
            assert run.record.device["name"] == "cpu"
            assert result["peak_memory_bytes"] > 0  # the emulated GPU reports 0
        else:
            _, result, _ = work(command, tmp_path, workspace)
        figures[place] = {key: value for key, value in result.items() if key in ("best_loss", "groups", "start_loss")}
        if command == "eval":
            figures[place] = {metric["name"]: metric["value"] for metric in result["datasets"][0]["metrics"]}
    assert figures["gpu"] == figures["cpu"]


@pytest.mark.slow
def test_an_adapter_is_continued_on_the_cpu(workspace: Path, tmp_path: Path) -> None:
    first, result, _ = work("fft", tmp_path, workspace, fft__method="lora")
    first.finish(partial_result(result))
    source = source_of_run(first)
    recipe = make_recipe(workspace, **SHORT, fft__method="lora", device="cpu")
    recipe = with_changes(recipe, {"model": source.model})
    with emulated_gpu():
        fine_tune(recipe, source, open_run(tmp_path, "fft", recipe)[0], Silence())
        assert used_gpus() == set()
        fine_tune(with_changes(recipe, {"device": "cuda"}), source, open_run(tmp_path, "fft", recipe)[0], Silence())
        assert used_gpus() == {0}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fft", "probe", "eval"])
def test_the_second_gpu_alone(workspace: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    step = SftTrainer.training_step

    def look(self: SftTrainer, *arguments: Any, **settings: Any) -> Any:
        seen.add((str(self.args.device), str(self.accelerator.device), self.args.n_gpu))
        return step(self, *arguments, **settings)

    monkeypatch.setattr(SftTrainer, "training_step", look)
    with emulated_gpu(count=2):
        run, _, said = work(command, tmp_path, workspace, device="cuda:1")
        assert used_gpus() == {1}
        assert torch.cuda.current_device() == 0
    assert run.record.device["name"] == "cuda:1: Emulated GPU"
    assert not any("GPUs are visible" in note for note in said)
    assert seen == ({("cuda:1", "cuda:1", 1)} if command == "fft" else set())


@pytest.mark.slow
def test_a_drop_is_computed_and_recorded_on_the_cpu(workspace: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    build_llama(seed=1).save_pretrained(tuned)
    changes = {"mask_train__method": "drop", "mask_train__base": str(workspace / "tiny"), "model": str(tuned)}
    with emulated_gpu():
        run, result, _ = work("mask-train", tmp_path, workspace, **changes)
    assert run.record.device["name"] == "cpu"
    assert result["peak_memory_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "name", "expected"),
    [
        (2, "cuda:2", "auto, cpu, cuda, cuda:0, cuda:1"),
        (1, "mps", "auto, cpu, cuda, cuda:0"),
        (1, "xpu", "auto, cpu, cuda, cuda:0"),
    ],
)
def test_a_missing_device(workspace: Path, tmp_path: Path, count: int, name: str, expected: str) -> None:
    for command in WORK:
        with emulated_gpu(count=count), pytest.raises(ConfigError, match="not available") as caught:
            work(command, tmp_path, workspace, device=name)
        assert (caught.value.key, caught.value.expected, caught.value.actual) == ("device", expected, name)


def test_on_a_machine_without_a_gpu(workspace: Path) -> None:
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match="not available") as caught:
            find_device(name)
        assert caught.value.expected == "auto, cpu"
        if torch.version.cuda is None:
            assert f"built for CUDA; this one is {torch.__version__}" in str(caught.value.hint)
    assert find_device("auto") == find_device("cpu") == best_device() == torch.device("cpu")
    assert device_names() == []


def test_an_experiment_reports_it_before_its_first_stage(workspace: Path) -> None:
    recipe = make_recipe(workspace, device="cuda:3")
    with pytest.raises(ConfigError, match="not available"):
        check_jobs([Job("fft", "fft", "fft", 0, recipe)], Silence())


def test_each_process_of_a_launcher_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with emulated_gpu(count=2):
        with pytest.raises(ConfigError, match="uses its own GPU") as caught:
            find_device("cuda:1")
        assert "CUDA_VISIBLE_DEVICES=1" in str(caught.value.hint)
        assert find_device("cuda") == find_device("auto") == torch.device("cuda")


def test_accelerate_launch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with emulated_gpu():
        assert find_device("auto").type == "cpu"
        assert find_device("cuda").type == "cuda"


@pytest.mark.usefixtures("mac")
def test_untested_devices_are_noted_once(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = open_run(tmp_path, "fft", make_recipe(workspace))
    listener = Interrupter(-1)
    for _ in range(2):
        with device_for(run, listener, less_memory=[]):
            assert best_device() == torch.device("mps")
            assert not has_bf16()
            assert not counts_memory(best_device())
    assert listener.notes == ["mftctl is not tested on mps, only on CUDA GPUs and with --device cpu."]
    assert run.record.device["name"] == "mps"
    monkeypatch.setenv("LOCAL_RANK", "0")  # processes find each other on the machine's CPU alone
    assert find_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="not available"):
        find_device("mps")


def test_a_mac_without_enough_memory() -> None:
    text = (
        "MPS backend out of memory (MPS allocated: 17.90 GB, other allocations: 1.00 GB, max allowed: 18.13 GB). "
        "Tried to allocate 512.00 MB on private pool."
    )
    assert is_out_of_memory(RuntimeError(text))
    with pytest.raises(DeviceMemoryError, match="while training") as caught, gpu_failures("training"):
        raise RuntimeError(text)
    assert caught.value.actual == "512.00 MB requested, 17.90 GB of 18.13 GB in use"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "cuda:-1", "cuda:1234"])
def test_an_invalid_device_name(name: str) -> None:
    with pytest.raises(ConfigError, match="device") as caught:
        parse_recipe({"device": name})
    assert any("auto, cpu, cuda, cuda:N, mps or xpu" in problem for problem in caught.value.problems)


def test_device_and_kernels_are_not_deciding_keys() -> None:
    elsewhere = Recipe(device="cuda:1", attention="eager")
    for command in WORK:
        assert deciding_keys(elsewhere, command) == deciding_keys(Recipe(), command)


@pytest.mark.parametrize("before", [None, "4,5,GPU-1"])
def test_a_started_process_sees_one_gpu(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with visible_alone(torch.device("cuda", 2)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ("2" if before is None else "GPU-1")
    with visible_alone(torch.device("cuda")):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"attention": "eager"}])
def test_vllm_uses_the_device_it_was_built_for(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mftctl.evaluation.engine_checks.find_spec", lambda name: object())
    recipe = parse_recipe({"eval": {"engine": "vllm", "tasks": ["gsm8k"]}, **changes})
    with pytest.raises(ConfigError, match="vLLM chooses its device"):
        check_suite(recipe)


@pytest.mark.parametrize("key", ["test_data", "retain_data"])
def test_vllm_measures_no_loss_on_data(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mftctl.evaluation.engine_checks.find_spec", lambda name: object())
    recipe = parse_recipe({"eval": {"engine": "vllm", "tasks": ["gsm8k"]}, key: ["quickstart/test"]})
    with pytest.raises(ConfigError, match="vLLM runs benchmarks only") as caught:
        check_suite(recipe)
    assert caught.value.actual == "vllm with the data quickstart/test"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fft", "eval"])
def test_eager_attention_is_used_and_recorded(workspace: Path, tmp_path: Path, command: str) -> None:
    eager, result, _ = work(command, tmp_path, workspace, attention="eager")
    sdpa, expected, _ = work(command, tmp_path, workspace)
    assert (eager.record.device["attention"], sdpa.record.device["attention"]) == ("eager", "sdpa")
    if command == "fft":
        assert result["best_loss"] == pytest.approx(expected["best_loss"], abs=1e-4)
        configs = [(Path(made["model"]) / "config.json").read_text() for made in (result, expected)]
        assert configs[0] == configs[1]  # a checkpoint does not record the kernels it was trained with


@pytest.mark.parametrize("command", WORK)
def test_flash_attention_is_not_for_a_cpu(workspace: Path, tmp_path: Path, command: str) -> None:
    with pytest.raises(ConfigError, match="CUDA GPU") as caught:
        work(command, tmp_path, workspace, attention=FLASH)
    assert caught.value.key == "attention"


def test_flash_attention_that_is_not_installed(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn")
    with emulated_gpu(bf16=True), pytest.raises(ConfigError, match="not installed") as caught:
        work("fft", tmp_path, workspace, attention=FLASH)
    assert "mftctl[flash-attn]" in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("fft", {"fft__precision": "fp32"}),
        ("fft", {}),
        ("mask-train", {"mask_train__precision": "fp32"}),
        ("probe", {}),
        ("eval", {}),
    ],
)
def test_flash_attention_is_not_for_fp32(
    workspace: Path, tmp_path: Path, command: str, changes: dict[str, str]
) -> None:
    with emulated_gpu(), pytest.raises(ConfigError, match="only bf16 and fp16"):
        work(command, tmp_path, workspace, attention=FLASH, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("in_bf16", [True, False])
def test_flash_attention_is_asked_for_where_it_can_compute(
    workspace: Path, tmp_path: Path, flash_attn: list[Any], in_bf16: bool
) -> None:
    build_llama().to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    run, _ = open_run(tmp_path, "fft", make_recipe(workspace))
    cases: list[tuple[Any, Any]] = [("fp32", torch.bfloat16), ("auto", torch.float32)]
    with emulated_gpu(bf16=in_bf16):
        for precision, dtype in cases:
            with device_for(run, Silence(), less_memory=[], attention=FLASH, precision=precision):
                try:
                    load_model(tmp_path / "bf16", dtype=dtype)
                except MftError:
                    flash_attn.append("refused")
    assert flash_attn == [FLASH, FLASH if in_bf16 else "refused"]
