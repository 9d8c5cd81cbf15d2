"""Two processes on one machine over gloo give the same results as one, written once."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mftctl.data.batching import LengthGroupedSampler, ProcessBatches, ProcessRecords
from mftctl.data.encoding import Encoded
from mftctl.errors import ConfigError
from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import FftResult
from mftctl.experiments.run_folder import Run, list_runs
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.mask import load_mask
from mftctl.runtime.process_group import import_deepspeed, share_of
from tests.forked_commands.commands import ForkedCommands
from tests.preference_records import write_preferences
from tests.vision_models import write_image_records

ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
TRAINING = ("--max-steps", "12", "--val-steps", "4", "--batch-size", "4")
MASK = ("--layers", "1-2", "--preset", "paper")
SOFT = (
    "--layers",
    "1-2",
    "--mask",
    "soft",
    "--max-multiplier",
    "2",
    "--set",
    "mask_train.travel=0.5",
    "-o",
    "soft.bits",
)
BUDGET = ("mask-train", "--layers", "all", "--ratio", "auto", "--budget", "0.1", "-o", "budget.bits")
GMT = ("fft", "--method", "gmt", "--lr", "3e-3")
FEW = ("fft", "--method", "gmt", "--ratio", "0.9", "--exclude", "embeddings", "--max-steps", "4", "--val-steps", "2")
FEW += ("--batch-size", "4")
# At this rate, an average of the weights has a lower loss than they have themselves.
FULL = ("fft", "--max-steps", "4", "--val-steps", "2", "--batch-size", "4", "--average", "ema", "--lr", "0.06")
FULL += ("--schedule", "constant", "--set", "fft.average_horizons=[0.5,1.0]")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is an extra, which the dev extra has")


PYTHON = (sys.executable, "-m")


def start(folder: Path, *command: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def run(folder: Path, *command: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    process = start(folder, *command)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def several(*commands: tuple[object, ...]) -> tuple[str, ...]:
    """The arguments of `tests.several_commands`."""
    return ("tests.several_commands", *(shlex.join(map(str, command)) for command in commands))


def accelerate(recipe: str) -> tuple[str, ...]:
    """The accelerate launcher for a configuration; takes a module and its arguments."""
    file = ROOT / "recipes" / "accelerate" / f"{recipe}.yaml"
    return ("accelerate.commands.launch", "--config_file", str(file), "-m")


def data(workspace: Path, model: Path | None = None) -> tuple[object, ...]:
    return ("-m", model or workspace / "tiny", "-d", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl")


def weights(folder: Path, number: int) -> dict[str, torch.Tensor]:
    """The weights written by a fine-tuning."""
    return load_file(folder / "runs" / f"{number:03d}-fft" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def half(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bf16."""
    folder = tmp_path_factory.mktemp("half") / "tiny"
    shutil.copytree(workspace / "tiny", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(workspace: Path, half: Path, tmp_path_factory: pytest.TempPathFactory, forked_commands: ForkedCommands) -> Path:
    """Results of one process with the same records per step: a mask, GMT models and a fully fine-tuned one."""
    folder = tmp_path_factory.mktemp("one")
    accumulated = ("--grad-accum", 2)
    commands = several(
        ("mask-train", *MASK, "-o", "mask.bits", *data(workspace), *TRAINING, *accumulated),
        (*GMT, *data(workspace), *TRAINING, *accumulated),
        (*FEW, *data(workspace), *accumulated),
        (*FULL, *data(workspace, half), *accumulated),
        ("mask-train", *SOFT, *data(workspace), *TRAINING, *accumulated),
        (*BUDGET, *data(workspace), *TRAINING, *accumulated),
    )
    code, _, errors = run(folder, *forked_commands.python, *commands)
    assert code == 0, errors
    return folder


def figures(trained: Run) -> list[dict[str, float]]:
    """The metrics of each training step, without times."""
    names = ("step", "loss", "grad_norm", "learning_rate", "num_input_tokens_seen", "eval_loss", "removed", "restored")
    return [
        {name: line[name] for name in names if name in line}
        for line in map(MetricsLine.document, trained.training.metrics())
    ]


@pytest.mark.slow
def test_accelerate_launch_learns_the_mask_of_one_process_and_writes_once(
    one: Path, workspace: Path, tmp_path: Path
) -> None:
    arguments = ("mask-train", *MASK, "-o", "mask.bits", *data(workspace), *TRAINING, "--json")
    code, output, errors = run(tmp_path, *PYTHON, *accelerate("ddp"), "mftctl", *arguments)
    assert code == 0, errors
    assert json.loads(output)["steps"] == 12
    assert (tmp_path / "mask.bits").read_bytes() == (one / "mask.bits").read_bytes()
    (mine,) = list_runs(tmp_path / "runs")[0]
    assert (mine.record.status, mine.record.processes) == ("finished", 2)
    for found, expected in zip(figures(mine), figures(list_runs(one / "runs")[0][0]), strict=True):
        assert found == pytest.approx(expected)
        assert found.get("eval_loss") == expected.get("eval_loss")
    assert errors.count("Run: runs/001-mask-train") == 1


@pytest.mark.slow
def test_gmt_selects_the_same_entries_and_a_budget_is_distributed_alike(
    one: Path, workspace: Path, tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    launcher = (*forked_commands.python, *TORCHRUN, *forked_commands.module)
    commands = several((*GMT, *data(workspace), *TRAINING), (*BUDGET, *data(workspace), *TRAINING))
    code, _, errors = run(tmp_path, *launcher, *commands)
    assert code == 0, errors
    found = weights(tmp_path, 1)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(one, 2).items())
    together, alone = (next(folder.glob("runs/*/ratios.json")).read_text() for folder in (tmp_path, one))
    assert together == alone
    assert len(set(json.loads(together)["ratios"].values())) > 1
    assert _kept(tmp_path / "budget.bits") == _kept(one / "budget.bits")


@pytest.mark.slow
def test_processes_share_the_retained_records(workspace: Path, tmp_path: Path, forked_commands: ForkedCommands) -> None:
    words = [f"{first}{second}" for first in "abcdef" for second in "ghijkl"]
    records = [{"question": f"spell {word}", "answer": " ".join(word)} for word in words]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ("fft", *data(workspace), "--retain", "other.jsonl", "--retain-weight", 2, "--global-batch-size", 8)
    settings = (*command, "--batch-size", 4, "--max-steps", 4, "--val-steps", 2, "--lr", "3e-3")
    launcher = (*forked_commands.python, *TORCHRUN, *forked_commands.module)
    for start_of_command in ((*forked_commands.python, *several(settings)), (*launcher, "mftctl", *settings)):
        code, _, errors = run(tmp_path, *start_of_command)
        assert code == 0, errors
    rows = [[line.document() for line in found.training.metrics()] for found in list_runs(tmp_path / "runs")[0]]
    for key in ("loss", "eval_loss", "retained_loss", "divergence"):
        alone, together = ([row[key] for row in found if key in row] for found in rows)
        assert alone
        assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_processes_share_preferences(workspace: Path, tmp_path: Path, forked_commands: ForkedCommands) -> None:
    """Also in a last step with too few records for both; each launch measures the reference by itself."""
    write_preferences(tmp_path / "train.jsonl", 26, "turns", seed=1)
    write_preferences(tmp_path / "val.jsonl", 9, "turns", seed=2)
    data = ("-m", workspace / "tiny", "-d", "train.jsonl", "--val-data", "val.jsonl", "--objective", "dpo")
    steps = ("--global-batch-size", 8, "--batch-size", 4, "--max-steps", 4, "--val-steps", 2, "--lr", "3e-3")
    commands = [(command, *data, *steps, "--no-cache", "--yes") for command in ("fft", "mask-train")]
    launcher = (*forked_commands.python, *TORCHRUN, *forked_commands.module)
    for start_of_command in (forked_commands.python, launcher):
        code, _, errors = run(tmp_path, *start_of_command, *several(*commands))
        assert code == 0, errors
    found, _ = list_runs(tmp_path / "runs")
    assert [one.record.command for one in found] == ["fft", "mask-train"] * 2
    for alone, together in ((found[0], found[2]), (found[1], found[3])):
        rows = [[line.document() for line in one.training.metrics()] for one in (alone, together)]
        for key in ("loss", "eval_loss"):
            values = [[row[key] for row in part if key in row] for part in rows]
            assert values[0]
            assert values[1] == pytest.approx(values[0], rel=1e-4)
        rewards = [[row["rewards"] for row in part if "rewards" in row] for part in rows]
        for one, other in zip(*rewards, strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_processes_share_records_with_images(
    vision_checkpoints: dict[str, Path], tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    """Also in a step in which one process has no image, and in one in which neither has."""
    write_image_records(tmp_path, [1, 0, 0, 2, 0, 1, 0, 0, 1])
    data = ("-m", vision_checkpoints["qwen2_vl"], "-d", "train.jsonl", "--val-data", "train.jsonl")
    steps = ("--global-batch-size", 4, "--batch-size", 2, "--max-steps", 4, "--val-steps", 2)
    launcher = (*forked_commands.python, *TORCHRUN, *forked_commands.module)
    for number, start_of_command in enumerate((forked_commands.python, launcher), start=1):
        mask = ("mask-train", *data, *steps, "--lr", "0.02", "--threshold", 0.02)
        commands = several(
            (*mask, "-o", f"{number}.bits"),
            (*mask, "--target", "all", "-o", f"{number}-all.bits"),
            ("fft", *data, *steps, "--lr", "1e-3", "-o", str(number)),
        )
        code, _, errors = run(tmp_path, *start_of_command, *commands)
        assert code == 0, errors
    for name in ("", "-all"):
        assert load_mask(tmp_path / f"1{name}.bits").removed > 0
        assert _kept(tmp_path / f"1{name}.bits") == _kept(tmp_path / f"2{name}.bits")
    assert set(load_mask(tmp_path / "1-all.bits").names()) > set(load_mask(tmp_path / "1.bits").names())
    alone, together = (load_file(tmp_path / str(number) / "model.safetensors") for number in (1, 2))
    before = load_file(vision_checkpoints["qwen2_vl"] / "model.safetensors")
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(weight, before[name]) for name, weight in alone.items() if "visual" in name)


def _kept(path: Path) -> dict[str, list[list[bool]]]:
    mask = load_mask(path)
    return {name: mask[name].tolist() for name in mask.names()}


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_one_process_resumes_to_the_same_mask(
    one: Path, workspace: Path, tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    kill_second(tmp_path, (*TORCHRUN, *forked_commands.module, "mftctl"), workspace)
    code, _, errors = run(tmp_path, *forked_commands.mftctl, "mask-train", "--resume", "--yes")
    assert code == 0, errors
    assert (tmp_path / "mask.bits").read_bytes() == (one / "mask.bits").read_bytes()


@pytest.mark.slow
def test_a_slow_save_by_one_process_does_not_end_the_run(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_commands: ForkedCommands
) -> None:
    """The process group gets the configured timeout; saving takes longer than a shorter timeout set later."""
    monkeypatch.setenv("MFTCTL_DDP_TIMEOUT", "345")
    launcher = (*forked_commands.python, *TORCHRUN, *forked_commands.module, "tests.slow_saving")
    few = ("--max-steps", "2", "--val-steps", "1", "--batch-size", "4")
    code, _, errors = run(tmp_path, *launcher, "mask-train", *MASK, "-o", "mask.bits", *data(workspace), *few)
    assert code == 0, errors
    assert (tmp_path / "mask.bits").is_file()


def kill_second(folder: Path, launcher: tuple[str, ...], workspace: Path) -> None:
    """Starts a mask training, kills the second process at the first checkpoint and waits for the others to end."""
    process = start(folder, *PYTHON, *launcher, "mask-train", *MASK, "-o", "mask.bits", *data(workspace), *TRAINING)
    checkpoint = folder / "runs" / "001-mask-train" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(next(second_process(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank      : 1" in errors
    assert "Signal 9 (SIGKILL)" in errors


@pytest.fixture(scope="module")
def killed(workspace: Path, tmp_path_factory: pytest.TempPathFactory, forked_commands: ForkedCommands) -> Path:
    """Remains of a training whose second process was killed, under ZeRO-3 if DeepSpeed is installed."""
    folder = tmp_path_factory.mktemp("killed")
    launcher = accelerate("zero3" if HAS_DEEPSPEED else "ddp")
    kill_second(folder, (*launcher, *forked_commands.module, "mftctl"), workspace)
    return folder


def test_processes_started_for_deepspeed_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    uncached = import_deepspeed.__wrapped__
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    uncached()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed, which is not installed") as caught:
        uncached()
    assert caught.value.hint == "pip install 'mftctl[deepspeed]'"


@pytest.mark.slow
@needs_deepspeed
def test_one_process_resumes_a_zero_training(
    one: Path, killed: Path, tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    shutil.copytree(killed / "runs", tmp_path / "runs")
    code, _, errors = run(tmp_path, *forked_commands.mftctl, "mask-train", "--resume", "--yes")
    assert code == 0, errors
    assert (tmp_path / "runs" / "001-mask-train" / "mask.bits").read_bytes() == (one / "mask.bits").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed), "fsdp2"],
)
def test_sharded_parameters_give_the_result_of_one_process(
    one: Path, killed: Path, half: Path, workspace: Path, tmp_path: Path, forked_commands: ForkedCommands, recipe: str
) -> None:
    shutil.copytree(killed / "runs", tmp_path / "killed")
    commands = several(
        ("mask-train", "--resume", "--yes", "--runs", "killed"),
        ("mask-train", *MASK, "-o", "whole.bits", *data(workspace), *TRAINING, "--json"),
        (*FEW, *data(workspace)),
        # The same records per step in different forward passes, with the loss in chunks of about 20 answer tokens.
        ("CHUNK_LOGITS=2000", *FULL, *data(workspace, half), "--batch-tokens", 60),
        *([("mask-train", *SOFT, *data(workspace), *TRAINING)] if recipe == "fsdp2" else []),
    )
    code, output, errors = run(
        tmp_path, *forked_commands.python, *accelerate(recipe), *forked_commands.module, *commands
    )
    assert code == 0, errors
    for mask in ("whole.bits", "killed/001-mask-train/mask.bits"):
        assert (tmp_path / mask).read_bytes() == (one / "mask.bits").read_bytes()
    if recipe == "fsdp2":
        with open_delta(tmp_path / "soft.bits") as together, open_delta(one / "soft.bits") as alone_bits:
            assert together.contents.tensors == alone_bits.contents.tensors
    assert json.loads(output[output.index("{") : output.rindex("}") + 1])["steps"] == 12
    mine, expected = list_runs(tmp_path / "runs")[0][0], list_runs(one / "runs")[0][0]
    assert mine.record.processes == 2
    for found, line in zip(figures(mine), figures(expected), strict=True):
        assert found == pytest.approx(line)

    before, entries, alone = load_file(workspace / "tiny" / "model.safetensors"), weights(tmp_path, 2), weights(one, 3)
    for name, value in alone.items():
        assert torch.equal(entries[name] != before[name], value != before[name])
        assert torch.allclose(entries[name], value, rtol=0, atol=0 if recipe == "zero2" else 1e-6)

    averaged, expected = (list_runs(folder / "runs")[0][number] for folder, number in ((tmp_path, 2), (one, 3)))
    assert averaged.result(FftResult).kept_average == expected.result(FftResult).kept_average == 0.5
    for line, other in zip(averaged.training.metrics(), expected.training.metrics(), strict=True):
        assert line.average_losses == pytest.approx(other.average_losses, rel=0.01)
    full, alone = weights(tmp_path, 3), weights(one, 4)
    assert full.keys() == alone.keys()
    for name, value in alone.items():
        assert full[name].dtype == torch.bfloat16
        assert torch.allclose(full[name].float(), value.float(), rtol=0.01, atol=1e-4)
    assert json.loads((tmp_path / "runs" / "003-fft" / "model" / "config.json").read_text()) == json.loads(
        (one / "runs" / "004-fft" / "model" / "config.json").read_text()
    )


def second_process(launcher: int) -> Iterator[int]:
    """The rank 1 process among the launcher's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            yield int(child)


@pytest.mark.slow
def test_bad_input_is_reported_once(workspace: Path, tmp_path: Path, forked_commands: ForkedCommands) -> None:
    launcher = (*forked_commands.python, *TORCHRUN, *forked_commands.module, "mftctl")
    arguments = ("mask-train", "-m", workspace / "tiny", "-d", "missing.jsonl")
    code, output, errors = run(tmp_path, *launcher, *arguments)
    assert code != 0
    assert errors.count("The data file does not exist") == 1
    assert output == ""


@pytest.mark.slow
def test_other_commands_are_for_one_process(tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "mftctl", "report"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "report runs as a single process" in found.stderr


@pytest.mark.parametrize(("records", "world_size"), [(16, 2), (13, 2), (9, 4), (3, 4), (1, 3)])
def test_processes_take_the_micro_batches_of_one(records: int, world_size: int) -> None:
    order = LengthGroupedSampler([1 + index % 5 for index in range(records)], 2, seed=0)
    alone = list(order)
    shares = [list(ProcessBatches(order, 2, rank, world_size)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(ProcessBatches(order, 2, 0, world_size))}
    taken = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert [index for batch in taken for index in batch if index >= 0] == alone


@given(items=st.integers(1, 20), world_size=st.integers(1, 5))
def test_shares_are_equally_long_and_leave_nothing_out(items: int, world_size: int) -> None:
    shares = []
    for rank in range(world_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(world_size))
            patch.setenv("RANK", str(rank))
            shares.append(share_of(range(items)))
    assert len({len(share) for share in shares}) == 1
    assert {item for share in shares for item in share} == set(range(items))
    assert sum(map(len, shares)) < items + world_size


def test_padding_micro_batches_have_nothing_to_learn() -> None:
    first, second = Encoded([1, 2, 3], [-100, 2, 3], "a:1"), Encoded([4, 5], [-100, 5], "a:2")
    records = ProcessRecords([first, second])
    assert records[1] == second
    assert records[-1] == Encoded([1, 2, 3], [-100, -100, -100], "a:1")
    assert len(records) == 2


@pytest.mark.parametrize(("processes", "accumulation", "now", "expected"), [(2, 1, 1, 2), (1, 4, 2, 2), (2, 3, 2, 3)])
def test_a_resumed_run_keeps_the_records_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, accumulation: int, now: int, expected: int
) -> None:
    recipe = resumed(tmp_path, monkeypatch, processes, accumulation, now)
    assert recipe.mask_train.grad_accum_steps == expected


def test_a_resumed_run_with_a_step_that_cannot_be_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="keeps its number of records per step") as caught:
        resumed(tmp_path, monkeypatch, 2, 1, 3)
    assert caught.value.actual == 3


def resumed(folder: Path, monkeypatch: pytest.MonkeyPatch, processes: int, accumulation: int, now: int) -> Recipe:
    """The recipe of a run that was started with one number of processes and resumed with another."""
    from mftctl.cli import resumption
    from mftctl.experiments.run_config import to_document
    from mftctl.experiments.run_folder import create_run

    recipe = Recipe.model_validate({"mask_train": {"grad_accum_steps": accumulation}})
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    started = create_run(folder, "mask-train", to_document(recipe))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(resumption, "world_size", lambda: now)
    return resumption.with_same_step_records(recipe, started, now)
