"""How commands compute on a GPU, and errors when they cannot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.errors import ConfigError, DeviceMemoryError, StorageError, TrainingError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.recipe import EvalOptions
from mftctl.experiments.recording import recorded
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run, load_run
from mftctl.masking.checkpoints.load import evaluation_dtype
from mftctl.masking.selection import keep_highest
from mftctl.progress import Silence
from mftctl.runtime.devices import has_bf16, require_deterministic_attention, uses_bf16
from mftctl.runtime.torch_failures import gpu_failures
from mftctl.training.loop import SftTrainer
from mftctl.workflows.eval import evaluate
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.planning.less_memory import evaluation_with_less_memory, training_with_less_memory
from mftctl.workflows.probe import probe
from tests.conftest import build_llama
from tests.gpu_emulation.emulated_gpu import emulated_gpu
from tests.workflow_fixtures import Interrupter, make_recipe, open_run

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 77.89 GiB memory in use."
)
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error"
SHORT = {f"{section}__{key}": 2 for section in ("fft", "mask_train") for key in ("max_steps", "val_steps")}


@pytest.fixture
def workspace_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the cuBLAS setting from the environment, and undoes changes made by the test."""
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)


def fail(error: BaseException) -> Any:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    return failing


def opened(root: Path, workspace: Path, command: str = "fft", **changes: Any) -> tuple[Any, Run, Any]:
    recipe = make_recipe(workspace, **{**SHORT, **changes})
    run, source = open_run(root, command, recipe)
    return recipe, run, source


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fft", "mask-train"])
def test_of_two_gpus_one_is_used_with_a_single_note(workspace: Path, tmp_path: Path, command: str) -> None:
    work = {"fft": fine_tune, "mask-train": mask_train}[command]
    listener = Interrupter(-1)
    recipe, run, source = opened(tmp_path, workspace, command)
    with emulated_gpu(count=2):
        result = work(recipe, source, run, listener)
    said = [note for note in listener.notes if "GPUs are visible" in note]
    assert said == [
        f"2 GPUs are visible, but a single process uses only the first. To use all: mftctl {command} --processes 2 ..."
    ]
    alone = work(recipe, source, opened(tmp_path, workspace, command)[1], Silence())
    assert result.best_loss == pytest.approx(alone.best_loss, abs=1e-5)


@pytest.mark.slow
def test_of_two_gpus_eval_uses_one(workspace: Path, tmp_path: Path) -> None:
    listener = Interrupter(-1)
    recipe, run, source = opened(tmp_path, workspace, "eval", eval__limit=2)
    with emulated_gpu(count=2):
        evaluate(recipe, source, run, listener)
    alone = "2 GPUs are visible, but a single process uses only the first."
    assert f"{alone} To use all: mftctl eval --processes 2 ..." in listener.notes


def test_bf16_only_where_the_hardware_has_it(workspace: Path, tmp_path: Path) -> None:
    build_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    for bf16 in (False, True):
        with emulated_gpu(bf16=bf16):
            assert (has_bf16(), uses_bf16("auto"), uses_bf16("bf16"), uses_bf16("fp32")) == (bf16, bf16, True, False)
            assert evaluation_dtype(tmp_path) == ("auto" if bf16 else torch.float32)
            assert evaluation_dtype(workspace / "tiny") == "auto"
    assert not has_bf16()
    assert evaluation_dtype(tmp_path) == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fft", "mask-train", "probe", "eval"])
def test_every_command_computes_without_tf32_and_records_it(workspace: Path, tmp_path: Path, command: str) -> None:
    work: Any = {"fft": fine_tune, "mask-train": mask_train, "probe": probe, "eval": evaluate}[command]
    recipe, run, source = opened(tmp_path, workspace, command, eval__limit=2, probe__fast=True)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with emulated_gpu():
        work(recipe, source, run, Silence())
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    expected = {"name": "cuda: Emulated GPU", "tf32": False, "deterministic": False, "attention": "sdpa"}
    assert load_run(run.folder).record.device == expected


@pytest.mark.slow
@pytest.mark.usefixtures("workspace_config")
@pytest.mark.parametrize("command", ["fft", "mask-train"])
def test_deterministic_holds_for_the_whole_training_and_no_longer(
    workspace: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = {"fft": fine_tune, "mask-train": mask_train}[command]
    seen = set()
    step = SftTrainer.training_step

    def look(self: SftTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.add(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.backends.cudnn.deterministic,
                torch.backends.cuda.cudnn_sdp_enabled(),
                os.environ.get(WORKSPACE),
            )
        )
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SftTrainer, "training_step", look)
    changes = {"fft__deterministic": True, "mask_train__deterministic": True}
    recipe, run, source = opened(tmp_path, workspace, command, **changes)
    with emulated_gpu():
        work(recipe, source, run, Silence())
    assert seen == {(True, False, True, False, ":4096:8")}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert run.record.device["deterministic"]


def test_on_a_cpu_deterministic_changes_nothing(workspace: Path, tmp_path: Path) -> None:
    _, run, _ = opened(tmp_path, workspace, fft__deterministic=True)
    with device_for(run, Silence(), less_memory=[], deterministic=True):
        assert not torch.are_deterministic_algorithms_enabled()


def test_selection_on_a_gpu_goes_with_deterministic_algorithms() -> None:
    values = torch.tensor([3.0, 1.0, 1.0, 2.0])
    with emulated_gpu():
        torch.use_deterministic_algorithms(True)
        try:
            keep = keep_highest(values.cuda(), 0.25).cpu()
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
    assert keep.tolist() == [True, False, True, True]


def test_a_setting_of_cublas_that_is_not_deterministic(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    recipe, run, source = opened(tmp_path, workspace, fft__deterministic=True)
    with emulated_gpu(), pytest.raises(ConfigError, match="not configured for deterministic results") as caught:
        fine_tune(recipe, source, run, Silence())
    assert (caught.value.key, caught.value.actual) == (WORKSPACE, ":0:0")


@pytest.mark.usefixtures("workspace_config")
def test_several_processes_are_not_deterministic(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run, _ = opened(tmp_path, workspace)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with emulated_gpu(), pytest.raises(ConfigError, match="Multi-GPU training") as caught:
        with device_for(run, Silence(), less_memory=[], deterministic=True):
            pass
    assert caught.value.actual == "2 processes"


@pytest.mark.usefixtures("workspace_config")
def test_an_attention_that_is_not_deterministic(workspace: Path, tmp_path: Path) -> None:
    model = build_llama()
    model.config._attn_implementation = "flash_attention_2"
    require_deterministic_attention(model)
    _, run, _ = opened(tmp_path, workspace)
    with emulated_gpu(), device_for(run, Silence(), less_memory=[], deterministic=True):
        with pytest.raises(TrainingError, match="attention") as caught:
            require_deterministic_attention(model)
    assert caught.value.actual == "flash_attention_2"


def test_an_operation_that_is_not_deterministic_is_named() -> None:
    text = "_histc_cuda does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms"
    with pytest.raises(TrainingError, match="no deterministic") as caught, gpu_failures("training"):
        raise RuntimeError(text)
    assert caught.value.actual == "_histc_cuda"
    with pytest.raises(RuntimeError, match="something else"), gpu_failures("training"):
        raise RuntimeError("something else")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "place", "doing"),
    [
        ("fft", "mftctl.training.loop.SftTrainer.training_step", "training"),
        ("mask-train", "mftctl.training.loop.SftTrainer.training_step", "training"),
        ("mask-train", "mftctl.evaluation.losses._batch_losses", "measuring losses"),
        ("mask-train", "transformers.PreTrainedModel.to", "loading the model"),
        ("mask-train", "mftctl.training.score_start.initial_scores", "working on mask-train"),
        ("probe", "mftctl.training.loop.SftTrainer.training_step", "training"),
        ("eval", "transformers.PreTrainedModel.to", "loading the model"),
        ("eval", "mftctl.evaluation.losses._batch_losses", "measuring losses"),
        ("eval", "mftctl.evaluation.generation.continue_prompts", "generating answers"),
    ],
)
def test_out_of_gpu_memory(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str, doing: str
) -> None:
    work: Any = {"fft": fine_tune, "mask-train": mask_train, "probe": probe, "eval": evaluate}[command]
    recipe, run, source = opened(tmp_path, workspace, command)
    monkeypatch.setattr(place, fail(torch.OutOfMemoryError(OUT_OF_MEMORY)))
    with pytest.raises(DeviceMemoryError) as caught, recorded(run):
        work(recipe, source, run, Silence())
    assert caught.value.message == f"The GPU ran out of memory while {doing}."
    assert caught.value.actual == "2.50 GiB requested, 1.25 GiB of 79.15 GiB free"
    hint = str(caught.value.hint)
    assert hint.startswith("options that need less memory: ")
    longest = "mask_train.max_length_tokens" if command == "probe" else "--max-length"
    assert f"{longest} below 1024" in hint
    assert ("--batch-size 2 --grad-accum 2" in hint) == (command in ("fft", "mask-train"))
    assert ("mask_train.batch_size=2 --set mask_train.grad_accum_steps=2" in hint) == (command == "probe")
    assert "space" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fft", "mask-train"])
@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (torch.OutOfMemoryError(OUT_OF_MEMORY), DeviceMemoryError, "out of memory while training"),
        (torch.distributed.DistBackendError(NCCL), TrainingError, "connection to another process was lost"),
    ],
    ids=["memory", "NCCL"],
)
def test_other_checkpoint_failures_are_not_reported_as_a_full_disk(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    error: Exception,
    expected: type[Exception],
    message: str,
) -> None:
    work = {"fft": fine_tune, "mask-train": mask_train}[command]
    recipe, run, source = opened(tmp_path, workspace, command)
    monkeypatch.setattr(torch, "save", fail(error))
    with pytest.raises(expected, match=message) as caught, recorded(run):
        work(recipe, source, run, Silence())
    assert not isinstance(caught.value, StorageError)
    assert "space" not in str(caught.value)


def test_other_torch_errors_are_passed_on() -> None:
    with pytest.raises(DeviceMemoryError) as caught, gpu_failures("training"):
        raise torch.OutOfMemoryError("HIP out of memory\nmore")
    assert caught.value.actual == "HIP out of memory"


def test_memory_saving_options_are_those_not_in_use() -> None:
    assert training_with_less_memory(FftOptions(batch_size=7, grad_accum_steps=2)) == [
        "--batch-size 2 --grad-accum 7",
        "--gradient-checkpointing",
        "--low-memory",
        "--optimizer adamw_8bit",
        "--method lora",
        "--method lora --quantize nf4",
        "--max-length below 1024",
    ]
    least = {"batch_size": 1, "gradient_checkpointing": True, "max_length_tokens": 64}
    quantized = FftOptions(**least, method="lora", quantize="nf4")
    assert training_with_less_memory(quantized) == ["--max-length below 64"]
    mask = MaskTrainOptions(**least, low_memory=True)
    assert training_with_less_memory(mask) == ["fewer --layers", "--max-length below 64"]
    assert "--low-memory" in training_with_less_memory(MaskTrainOptions(**least))
    assert training_with_less_memory(FftOptions(batch_size=9, global_batch_size=18))[0] == "--batch-size 3"
    assert training_with_less_memory(FftOptions(batch_tokens=3000))[0] == "--batch-tokens 1500"
    assert training_with_less_memory(FftOptions(batch_tokens=1500))[0] == "--batch-tokens 1024"
    assert training_with_less_memory(FftOptions(batch_tokens=900))[0] == "--gradient-checkpointing"
    assert evaluation_with_less_memory(EvalOptions(batch_size=1, generate=False)) == ["--max-length below 1024"]
    assert evaluation_with_less_memory(EvalOptions(tasks=["gsm8k"]))[0] == "--batch-size 1"
