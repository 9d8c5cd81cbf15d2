"""Every command on an emulated GPU: no operation mixes devices, and the results equal those of a CPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mftctl.errors import DeviceMemoryError, Interrupted
from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.model_source import ModelSource, source_of_run
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.results import Result
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.mask import load_mask
from mftctl.progress import Silence
from mftctl.training import averaging_trainer
from mftctl.workflows.eval import evaluate
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.interpolate import interpolate
from mftctl.workflows.loss_surface.measure import measure_surface
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.planning.memory_check import RoomOnGpu
from mftctl.workflows.probe import probe
from tests.conftest import build_llama, build_tokenizer
from tests.gpu_emulation.emulated_gpu import emulated_gpu
from tests.masking.architectures import build
from tests.masking.built_checkpoints import write_tuned
from tests.vision_models import write_image_records
from tests.workflow_fixtures import Interrupter, make_recipe, open_run, write_additions

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

WORK: dict[str, Callable[..., Result]] = {
    "fft": fine_tune,
    "interpolate": interpolate,
    "mask-train": mask_train,
    "probe": probe,
}
SHORT = {
    f"{section}__{key}": value
    for section in ("fft", "mask_train")
    for key, value in (("max_steps", 2), ("val_steps", 1))
}
HELPFUL = {"mask_train__preset": "default", "mask_train__layers": "all", "mask_train__learning_rate": 3e-3}
"""A mask that is better than none, so that it is confirmed."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers and few records, as the emulation takes time for every operation."""
    folder = tmp_path_factory.mktemp("workspace")
    build_llama(layers=2).save_pretrained(folder / "tiny")
    build_tokenizer().save_pretrained(folder / "tiny")
    for seed, (name, count) in enumerate({"train": 16, "val": 8, "test": 8}.items()):
        write_additions(folder / f"{name}.jsonl", count, seed)
    return folder


@pytest.fixture
def gpu() -> Iterator[None]:
    with emulated_gpu():
        yield


def run_command(command: str, root: Path, recipe: Recipe, source: ModelSource | None = None) -> Run:
    if source is None:
        run, source = open_run(root, command, recipe)
    else:
        run = create_run(root, command, to_document(recipe), inputs=source.as_inputs())
    run.finish(WORK[command](recipe, source, run, Silence()))
    return run


def both(command: str, workspace: Path, root: Path, **changes: Any) -> tuple[Run, Run]:
    """The same run on the emulated GPU and on the CPU; only for a probe with the estimate of its memory."""
    recipe = make_recipe(workspace, **{**SHORT, **changes})
    estimated = contextlib.nullcontext() if command == "probe" else mock.patch.object(RoomOnGpu, "require")
    with emulated_gpu(), estimated:
        on_gpu = run_command(command, root / "gpu", recipe)
    return on_gpu, run_command(command, root / "cpu", recipe)


def losses(run: Run) -> list[float]:
    return [
        line[key]
        for line in map(MetricsLine.document, run.training.metrics())
        for key in ("loss", "eval_loss")
        if key in line
    ]


@pytest.mark.slow
def test_soft_masks(workspace: Path, tmp_path: Path) -> None:
    changes = {"mask_train__mask": "soft", "mask_train__max_multiplier": 2, "mask_train__travel": 0.5}
    runs = both("mask-train", workspace, tmp_path, **{**HELPFUL, **changes, "mask_train__learning_rate": "auto"})
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)
    with open_delta(runs[0].record.result["mask"]) as first, open_delta(runs[1].record.result["mask"]) as second:
        assert first.contents.tensors == second.contents.tensors


@pytest.mark.slow
def test_interpolate(workspace: Path, tmp_path: Path) -> None:
    tuned = write_tuned(workspace / "tiny", tmp_path / "tuned")
    changes = {"model": str(tuned), "interpolate__base": str(workspace / "tiny"), "interpolate__shares": [0.5, 1.0]}
    on_gpu, on_cpu = both("interpolate", workspace, tmp_path, **changes)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), abs=1e-5)
    written = [Path(run.record.result["model"]) / "model.safetensors" for run in (on_gpu, on_cpu)]
    assert written[0].read_bytes() == written[1].read_bytes()


MASKS = {
    "default": HELPFUL,
    "paper": {"mask_train__layers": "1", "mask_train__grad_accum_steps": 2},
    "threshold": {"mask_train__threshold": -0.035, "mask_train__layers": "all"},
    "ratio auto": {"mask_train__ratio": "auto", "mask_train__layers": "all"},
    "low memory": {**HELPFUL, "mask_train__low_memory": True},
    "bf16, checkpointing": {**HELPFUL, "mask_train__precision": "bf16", "mask_train__gradient_checkpointing": True},
    "delta": {**HELPFUL, "mask_train__kind": "delta"},
    "delta, low memory, bf16": {
        **HELPFUL,
        "mask_train__kind": "delta",
        "mask_train__low_memory": True,
        "mask_train__precision": "bf16",
    },
    "random": {"mask_train__method": "random", "mask_train__layers": "1"},
    "magnitude": {"mask_train__method": "magnitude", "mask_train__layers": "1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", MASKS.values(), ids=MASKS)
def test_mask_train(workspace: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if changes.get("mask_train__kind") == "delta":
        build_llama(layers=2, seed=1).save_pretrained(tmp_path / "base")
        changes = {**changes, "mask_train__base": str(tmp_path / "base")}
    on_gpu, on_cpu = both("mask-train", workspace, tmp_path, **changes)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), abs=1e-5)
    masks = [load_mask(Path(run.record.result["mask"])) for run in (on_gpu, on_cpu)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1].names())
    if "mask_train__learning_rate" in changes:
        assert on_gpu.record.result["confirmation"] == pytest.approx(on_cpu.record.result["confirmation"], abs=1e-5)
        assert on_gpu.record.result["confirmation"] is not None


TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"fft__gradient_checkpointing": True},
    "gmt": {"fft__method": "gmt", "fft__ratio": 0.5},
    "gmt, momentum": {"fft__method": "gmt", "fft__unselected": "momentum", "fft__grad_accum_steps": 2},
    "gmt, global": {"fft__method": "gmt", "fft__scope": "global"},
    "gmt, global, momentum": {"fft__method": "gmt", "fft__scope": "global", "fft__unselected": "momentum"},
    "random": {"fft__method": "random", "fft__ratio": 0.5},
    "random, global": {"fft__method": "random", "fft__scope": "global"},
    "hft": {"fft__method": "hft"},
    "shira": {"fft__method": "shira", "fft__lora_rank": 2},
    "supertuning": {"fft__method": "supertuning", "fft__ratio": 0.9, "fft__merge": True},
    "supertuning, bf16": {"fft__method": "supertuning", "fft__ratio": 0.9, "fft__precision": "bf16"},
    "adafactor": {"fft__optimizer": "adafactor", "fft__method": "gmt"},
    "low memory": {"fft__low_memory": True},
    "low memory, gmt": {"fft__low_memory": True, "fft__method": "gmt", "fft__ratio": 0.5},
    "8 bits": {"fft__optimizer": "adamw_8bit"},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", TUNINGS.values(), ids=TUNINGS)
def test_fft(workspace: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    on_gpu, on_cpu = both("fft", workspace, tmp_path, **changes)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fft", "lora", "mask-train"])
def test_holding_on_to_another_domain(workspace: Path, tmp_path: Path, command: str) -> None:
    words = [f"{first}{second}" for first in "abcdef" for second in "ghijkl"]
    records = [{"question": f"spell {word}", "answer": " ".join(word)} for word in words]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changes: dict[str, Any] = {"retain_data": [str(tmp_path / "other.jsonl")]}
    if command == "mask-train":
        base = write_tuned(workspace / "tiny", tmp_path / "base")
        changes |= {**HELPFUL, "mask_train__base": str(base), "mask_train__retain_weight": 1.0}
    else:
        changes |= {"fft__method": "full" if command == "fft" else "lora", "fft__retain_weight": 1.0}
    runs = both("fft" if command == "lora" else command, workspace, tmp_path, **changes)
    found = [
        [
            value
            for line in run.training.metrics()
            for value in (line.retained_loss, line.divergence)
            if value is not None
        ]
        for run in runs
    ]
    assert len(found[0]) >= 3
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["device", "cpu"])
def test_averages_on_either_device(workspace: Path, tmp_path: Path, device: str) -> None:
    changes = {"fft__average": "ema", "fft__average_horizons": [0.5], "fft__average_device": device}
    runs = both("fft", workspace, tmp_path, **changes)
    on_gpu, on_cpu = ([line.average_losses for line in run.training.metrics()] for run in runs)
    assert any(on_gpu)
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_averages_that_main_memory_cannot_hold(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging_trainer, "available_bytes", lambda: 1_000)
    recipe = make_recipe(workspace, **{**SHORT, "fft__average": "ema", "fft__average_device": "cpu"})
    with emulated_gpu(), pytest.raises(DeviceMemoryError, match="too small for the running averages") as caught:
        run_command("fft", tmp_path, recipe)
    assert caught.value.hint == "fewer average_horizons, --low-memory, or --average none"


@pytest.mark.slow
def test_fft_in_bf16_trains(workspace: Path, tmp_path: Path) -> None:
    with emulated_gpu(bf16=True):
        run = run_command("fft", tmp_path, make_recipe(workspace, **SHORT))
    assert run.record.result["best_loss"] < run.record.result["start_loss"]


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("command", ["fft", "mask-train"])
def test_training_resumes_from_a_checkpoint(workspace: Path, tmp_path: Path, command: str) -> None:
    recipe = make_recipe(
        workspace, **{**SHORT, "fft__max_steps": 3, "mask_train__max_steps": 3, "mask_train__layers": "1"}
    )
    undisturbed = run_command(command, tmp_path / "undisturbed", recipe)
    run, source = open_run(tmp_path / "stopped", command, recipe)
    with pytest.raises(Interrupted):
        WORK[command](recipe, source, run, Interrupter(2))
    WORK[command](recipe, source, run, Silence(), resume=True)
    assert losses(run) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_lora_is_trained_loaded_again_and_measured(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **SHORT, fft__method="lora", eval__limit=4)
    first = run_command("fft", tmp_path, recipe)
    source = source_of_run(first)
    again = run_command("fft", tmp_path, with_changes(recipe, {"model": source.model, "fft.merge": True}), source)
    assert again.record.result["start_loss"] == pytest.approx(first.record.result["best_loss"], abs=1e-6)
    run, _ = open_run(tmp_path, "eval", recipe)
    assert evaluate(recipe, source, run, Silence()).document()["datasets"]


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True])
def test_probe(workspace: Path, tmp_path: Path, fast: bool) -> None:
    on_gpu, on_cpu = both("probe", workspace, tmp_path, probe__fast=fast, probe__groups=[1])
    changes = [{group["layers"]: group["change"] for group in run.record.result["groups"]} for run in (on_gpu, on_cpu)]
    assert changes[0] == pytest.approx(changes[1], abs=1e-5)


@pytest.mark.slow
def test_eval_of_a_masked_model(workspace: Path, tmp_path: Path) -> None:
    """Covers loss, exact match and a benchmark."""
    problems = tmp_path / "problems.jsonl"
    lines = [{"question": f"{number}+2?", "answer": f"#### {number + 2}"} for number in range(4)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"eval__limit": 4, "eval__max_new_tokens": 12}
    recipe = make_recipe(
        workspace, **changes, eval__tasks=["gsm8k_0shot"], eval__task_data={"gsm8k_0shot": str(problems)}
    )
    random = make_recipe(workspace, mask_train__method="random", mask_train__layers="1")
    run, source = open_run(tmp_path, "mask-train", random)
    masked = replace(source, mask=mask_train(random, source, run, Silence()).document()["mask"])
    with emulated_gpu():
        on_gpu = evaluate(recipe, masked, open_run(tmp_path, "eval", recipe)[0], Silence()).document()
    on_cpu = evaluate(recipe, masked, open_run(tmp_path, "eval", recipe)[0], Silence()).document()
    for mine, its in zip(on_gpu["datasets"], on_cpu["datasets"], strict=True):
        assert [metric["name"] for metric in mine["metrics"]] == [metric["name"] for metric in its["metrics"]]
        assert mine["metrics"][0]["value"] == pytest.approx(its["metrics"][0]["value"], abs=1e-5)
    assert [dataset["name"] for dataset in on_gpu["datasets"]] == ["test.jsonl", "gsm8k_0shot"]


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_the_loss_surface(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **SHORT, mask_train__layers="all")
    fft = run_command("fft", tmp_path, recipe)
    source = source_of_run(fft)
    recipe = with_changes(recipe, {"model": source.model, "fft.keep": "last"})
    for command in ("fft", "mask-train"):
        run_command(command, tmp_path, recipe, source)
    surface = measure_surface(tmp_path, Silence(), points=4, records=4, device="cuda:0")
    assert len(surface.training.metrics()) == 3 + 4**2
    assert surface.record.device["name"] == "cuda:0: Emulated GPU"
    again = measure_surface(tmp_path, Silence(), points=4, records=4, device="cpu")
    assert again.folder == surface.folder  # the device of the measurement does not make it a different run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_other_architectures(workspace: Path, tmp_path: Path, name: str) -> None:
    build(name).save_pretrained(tmp_path / name)
    build_tokenizer().save_pretrained(tmp_path / name)
    changes = {**HELPFUL, "model": str(tmp_path / name)}
    on_gpu, on_cpu = both("mask-train", workspace, tmp_path, **changes)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "family"), [("fft", "llava"), ("mask-train", "qwen2_vl")])
def test_images(vision_checkpoints: dict[str, Path], tmp_path: Path, command: str, family: str) -> None:
    data = [str(write_image_records(tmp_path, [1, 0]))]
    changes = {"model": str(vision_checkpoints[family]), "data": data, "val_data": data, "mask_train__target": "all"}
    one_step = {"fft__max_steps": 1, "mask_train__max_steps": 1}
    runs = both(command, tmp_path, tmp_path, **{**HELPFUL, **changes, **one_step})
    assert losses(runs[0])
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)
