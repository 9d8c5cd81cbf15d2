"""`fft` with weights, gradients and moments in bf16, with 8-bit moments, and with a fused optimizer step on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.optim import Optimizer

from mftctl.errors import ConfigError, Interrupted
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.jobs import spell_out
from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints import quantization
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.training.loop import SftTrainer
from mftctl.training.updates import optimizers
from mftctl.training.updates.masked_optimizer import MaskedOptimizer
from mftctl.training.updates.stochastic_adamw import StochasticAdamW
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.planning.less_memory import training_with_less_memory
from mftctl.workflows.run_checks import check_jobs
from tests.gpu_emulation.emulated_gpu import emulated_gpu
from tests.workflow_fixtures import Interrupter, make_recipe, open_run, tuned

LOW: dict[str, Any] = {"fft__low_memory": True}
EIGHT_BITS: dict[str, Any] = {"fft__optimizer": "adamw_8bit"}
SHORT: dict[str, Any] = {"fft__max_steps": 4, "fft__val_steps": 2}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


def losses(run: Run) -> list[float]:
    return [
        line[key]
        for line in map(MetricsLine.document, run.training.metrics())
        for key in ("loss", "eval_loss")
        if key in line
    ]


@pytest.fixture
def optimizers_made(monkeypatch: pytest.MonkeyPatch) -> list[Optimizer]:
    """The optimizer of each training, in its state at the last step."""
    made: list[Optimizer] = []
    create = SftTrainer.create_optimizer

    def keep(self: SftTrainer, model: Any = None) -> Optimizer:
        made.append(create(self, model))
        return made[-1]

    monkeypatch.setattr(SftTrainer, "create_optimizer", keep)
    return made


@pytest.mark.slow
def test_low_memory_takes_8_bytes_per_weight(
    workspace: Path, tmp_path: Path, optimizers_made: list[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype | None, bool]] = []
    step = StochasticAdamW.step

    def look(self: StochasticAdamW, closure: None = None) -> None:
        for group in self.param_groups:
            seen.extend((item.dtype, getattr(item.grad, "dtype", None), item.requires_grad) for item in group["params"])
        step(self, closure)

    monkeypatch.setattr(StochasticAdamW, "step", look)
    low = tuned(workspace, tmp_path, **SHORT, **LOW)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, True)}
    state = optimizers_made[0].state.values()
    assert {values[key].dtype for values in state for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    assert type(optimizers_made[0]) is StochasticAdamW
    assert low.record.result["trained_parameters"] == sum(tensor.numel() for tensor in weights(low).values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "hft"])
def test_low_memory_learns_about_the_same(workspace: Path, tmp_path: Path, method: str) -> None:
    usual = tuned(workspace, tmp_path / "usual", fft__method=method).record.result
    low = tuned(workspace, tmp_path / "low", fft__method=method, **LOW).record.result
    gain = usual["start_loss"] - usual["best_loss"]
    assert gain > 0.3
    assert low["start_loss"] == pytest.approx(usual["start_loss"], abs=0.01)
    assert low["best_loss"] == pytest.approx(usual["best_loss"], abs=0.1 * gain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        LOW,
        {**LOW, "fft__method": "gmt", "fft__ratio": 0.5},
        {**LOW, "fft__method": "random", "fft__unselected": "momentum"},
        {**EIGHT_BITS, "fft__method": "gmt", "fft__unselected": "momentum"},
    ],
    ids=["low memory", "low memory, gmt", "low memory, random, momentum", "8 bits, gmt"],
)
def test_resuming_gives_the_identical_model(workspace: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    undisturbed = tuned(workspace, tmp_path / "a", **SHORT, **changes)
    recipe = make_recipe(workspace, **SHORT, **changes)
    run, source = open_run(tmp_path / "b", "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(3))
    fine_tune(recipe, source, run, Silence(), resume=True)
    after = weights(run)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(undisturbed).items())
    assert losses(run) == losses(undisturbed)


@pytest.mark.slow
def test_low_memory_writes_the_trained_weights_in_the_dtype_of_the_start(workspace: Path, tmp_path: Path) -> None:
    run = tuned(workspace, tmp_path / "auto", **SHORT, **LOW)
    narrow = tuned(workspace, tmp_path / "bf16", **SHORT, **LOW, fft__save_dtype="bf16")
    written = weights(narrow)
    for name, tensor in weights(run).items():
        assert (tensor.dtype, written[name].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(tensor, written[name].float())


@pytest.mark.slow
def test_checkpoints_of_low_memory_are_in_bf16_and_the_best_is_kept(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__max_steps=8, fft__val_steps=2, fft__learning_rate=0.2, **LOW)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(7))
    with safe_open(run.training.checkpoints / "checkpoint-7" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    result = fine_tune(recipe, source, run, Silence(), resume=True).document()
    again = tuned(workspace, tmp_path / "again", model=result["model"], **SHORT, **LOW)
    assert again.record.result["start_loss"] == result["best_loss"]


@pytest.mark.slow
def test_low_memory_updates_no_more_than_gmt_selects(workspace: Path, tmp_path: Path) -> None:
    changes = {"fft__method": "gmt", "fft__ratio": 0.7, "fft__max_steps": 1, "fft__keep": "last"}
    before = load_file(workspace / "tiny" / "model.safetensors")
    after = weights(tuned(workspace, tmp_path / "tuned", **changes, **LOW))
    changed = {name: int((tensor.bfloat16().float() != after[name]).sum()) for name, tensor in before.items()}
    for name, count in changed.items():
        assert count <= after[name].numel() - removed_count(after[name].numel(), 0.7), name
    assert sum(changed.values()) > 0


def test_parameters_have_independent_noise_even_when_stepped_one_at_a_time() -> None:
    """As in a masked optimizer; with the same noise, equal parameters would stay equal."""
    parameters = [torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(3)]
    together = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    settings = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.0, "seed": 3}
    alone, all_at_once = StochasticAdamW(parameters, **settings), StochasticAdamW(together, **settings)
    for parameter in (*parameters, *together):
        parameter.grad = torch.ones_like(parameter)
    (group,) = alone.param_groups
    for parameter in parameters:
        alone.param_groups = [{**group, "params": [parameter]}]
        alone.step()
    all_at_once.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, together, strict=True))
    assert not torch.equal(parameters[0], parameters[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low_memory": True, "method": "lora"}, "fft.low_memory applies only to trained weights; lora freezes them"),
        ({"low_memory": True, "method": "shira"}, "fft.low_memory applies only to trained weights; shira freezes them"),
        ({"low_memory": True, "optimizer": "sgd"}, "fft.low_memory needs the optimizer adamw"),
        ({"low_memory": True, "optimizer": "adamw_8bit"}, "the optimizer is adamw_8bit"),
        ({"low_memory": True, "precision": "fp32"}, "fft.low_memory needs bf16; the precision is fp32"),
        ({"optimizer": "adamw_8bit", "method": "gmt"}, "keeps one scale per 256 moments"),
        ({"optimizer": "paged_adamw_8bit", "method": "random"}, "keeps one scale per 256 moments"),
        ({"quantize": "nf4"}, "fft.quantize applies only to the method lora; the method is full"),
        (
            {"quantize": "nf4", "method": "supertuning"},
            "fft.quantize applies only to the method lora; the method is supertuning",
        ),
    ],
)
def test_incompatible_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FftOptions(**options)


@pytest.mark.slow
def test_8_bit_moments_learn_the_same(workspace: Path, tmp_path: Path, optimizers_made: list[Optimizer]) -> None:
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    usual = tuned(workspace, tmp_path / "usual", fft__batch_size=8).record.result
    found = tuned(workspace, tmp_path / "8", fft__batch_size=8, **EIGHT_BITS).record.result
    assert found["best_loss"] == pytest.approx(usual["best_loss"], abs=0.05)
    assert found["best_loss"] < found["start_loss"] - 0.3
    assert not GlobalOptimManager.get_instance().module_weight_config_triple, "the embedding would stay in memory"
    assert type(optimizers_made[1]).__module__.startswith("bitsandbytes")


def test_paged_optimizers_need_a_gpu(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, data=[str(tmp_path / "missing.jsonl")], fft__optimizer="paged_adamw_8bit")
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(ConfigError, match="moves moments between GPU and main memory") as caught:
        fine_tune(recipe, source, run, Silence())  # raised before the missing data is read
    assert (caught.value.key, caught.value.expected) == ("fft.optimizer", "adamw_8bit, or a GPU")
    optimizers.check_memory_options(recipe.fft, torch.device("cuda"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [(EIGHT_BITS, "fft.optimizer"), ({"fft__method": "lora", "fft__quantize": "nf4"}, "fft.quantize")],
)
def test_without_bitsandbytes(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], key: str
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    recipe = make_recipe(workspace, data=[str(tmp_path / "missing.jsonl")], **changes)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(ConfigError, match="needs bitsandbytes") as caught:
        fine_tune(recipe, source, run, Silence())
    assert (caught.value.key, caught.value.hint) == (key, 'pip install "mftctl[bitsandbytes]"')
    experiment = make_recipe(workspace, stages={"fft": {"command": "fft"}}, **changes)
    with pytest.raises(ConfigError, match="cannot be completed") as caught:
        check_jobs(spell_out(experiment), Silence())
    assert "needs bitsandbytes" in caught.value.problems[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_adamw_is_fused_on_a_gpu(workspace: Path, tmp_path: Path, optimizers_made: list[Optimizer]) -> None:
    tuned(workspace, tmp_path / "cpu", **SHORT)
    with emulated_gpu():
        tuned(workspace, tmp_path / "gpu", **SHORT)
        tuned(workspace, tmp_path / "gmt", **SHORT, fft__method="gmt")
    fused = [
        (item.inner if isinstance(item, MaskedOptimizer) else item).param_groups[0]["fused"] for item in optimizers_made
    ]
    assert fused == [None, True, True]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            ["--low-memory", "--optimizer adamw_8bit", "--method lora", "--method lora --quantize nf4"],
        ),
        ({"method": "gmt"}, ["--low-memory", "--method lora", "--method lora --quantize nf4"]),
        ({"precision": "fp32"}, ["--optimizer adamw_8bit", "--method lora", "--method lora --quantize nf4"]),
        (
            {"low_memory": True},
            ["--no-low-memory --method lora", "--no-low-memory --method lora --quantize nf4"],
        ),
        ({"method": "lora"}, ["--quantize nf4"]),
        ({"method": "lora", "quantize": "nf4"}, []),
        ({"method": "lora", "lora_experts": True}, []),
        ({"method": "shira"}, ["--method lora", "--method lora --quantize nf4"]),
        ({"method": "supertuning", "support": "mask.bits"}, []),
    ],
)
def test_memory_saving_options_are_compatible_with_those_in_use(options: dict[str, Any], expected: list[str]) -> None:
    least = FftOptions(batch_size=1, gradient_checkpointing=True, max_length_tokens=64, **options)
    assert training_with_less_memory(least) == [*expected, "--max-length below 64"]
