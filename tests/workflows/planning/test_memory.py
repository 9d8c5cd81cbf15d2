"""Memory estimates, compared with measured peaks and manual counts, and their response to options."""

from __future__ import annotations

import functools
import json
import mmap
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.data.encoding import Encoded
from mftctl.errors import MaskingError, ModelError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.checkpoints.meta_models import read_config
from mftctl.training.inputs import prepare_training
from mftctl.training.updates.stochastic_adamw import step_workspace_bytes
from mftctl.workflows.planning.batches import Batches, assumed_batches, largest_batches
from mftctl.workflows.planning.memory import MemoryEstimate, estimate_memory, resident_bytes
from mftctl.workflows.planning.training_setup import plan_fine_tuning, plan_mask_training
from tests.conftest import build_llama
from tests.workflows.planning.peak_memory import Case, make_case

_WEIGHTS = {
    "layers": 4,
    "vocab_size": 1000,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_LOGITS = {"layers": 2, "vocab_size": 20_000, "hidden_size": 64, "intermediate_size": 128}
_ACTIVATIONS = {"layers": 8, "hidden_size": 128, "intermediate_size": 512}
_CASES = {
    "fft, weights": Case("fft", _WEIGHTS, 2, 60),
    "mask-train, weights": Case("mask-train", _WEIGHTS, 2, 60, {"grad_accum_steps": 2}),
    "mask-train, delta": Case("mask-train", _WEIGHTS, 2, 60, {"kind": "delta", "grad_accum_steps": 2}),
    "fft, logits": Case("fft", _LOGITS, 4, 120),
    "fft, retained weights": Case("fft", _WEIGHTS, 2, 60, {"retain_weight": 1.0}),
    "fft, retained logits": Case("fft", _LOGITS, 4, 120, {"retain_weight": 1.0}),
    "fft, checkpointing": Case("fft", _ACTIVATIONS, 8, 256, {"gradient_checkpointing": True}),
}
_TINY = Batches(4, 24, True, 4, 24, 12, 92)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """The peak of each case, measured in a separate process."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process measure its peak anew")
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.workflows.planning.peak_memory",
            json.dumps([asdict(case) for case in _CASES.values()]),
        ],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return dict(zip(_CASES, json.loads(finished.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", _CASES)
def test_estimates_are_within_15_percent_of_measured_peaks(
    name: str, measured: dict[str, dict[str, int]], tmp_path: Path
) -> None:
    case = _CASES[name]
    recipe = make_case(tmp_path, case)
    options = recipe.fft if case.command == "fft" else recipe.mask_train
    inputs = prepare_training(recipe, str(recipe.model), max_length_tokens=options.max_length_tokens)
    plan = plan_fine_tuning(options, 0) if isinstance(options, FftOptions) else plan_mask_training(options, [0, 1])
    batches = largest_batches(inputs.train, inputs.validation, options.batch_size)
    estimate = estimate_memory(read_config(str(recipe.model)), plan, batches, process_bytes=0)
    # Without the process, which dominates small trainings and would hide any error.
    expected = measured[name]["peak_bytes"] - measured[name]["process_bytes"]
    assert expected > 50e6, "too small to tell anything"
    assert estimate.peak_bytes == pytest.approx(expected, rel=0.15)


@functools.cache
def _fft(**options: Any) -> MemoryEstimate:
    return estimate_memory(
        build_llama(layers=2).config, plan_fine_tuning(FftOptions(**options), 0), _TINY, process_bytes=7
    )


@pytest.mark.slow
def test_fine_tuning_by_hand() -> None:
    parameters = sum(parameter.numel() for parameter in build_llama(layers=2).parameters())
    found = _fft()
    assert found.gradients_bytes == 4 * parameters
    assert found.optimizer_bytes == 8 * parameters
    assert 0 <= found.weights_bytes - 4 * parameters < 1000  # plus the few numbers of the rotary embedding
    assert (found.scores_bytes, found.masked_weights_bytes, found.process_bytes) == (0, 0, 7)
    standing = found.process_bytes + found.weights_bytes + found.optimizer_bytes
    assert standing < found.peak_bytes <= standing + found.gradients_bytes + found.activations_bytes


@pytest.mark.slow
def test_a_mask_by_hand() -> None:
    options = MaskTrainOptions(target="mlp")
    found = estimate_memory(build_llama(layers=2).config, plan_mask_training(options, [0, 1]), _TINY, process_bytes=0)
    weights = 2 * 3 * 32 * 64  # layers, projections, hidden size, intermediate size
    assert (found.scores_bytes, found.masked_weights_bytes, found.gradients_bytes) == (4 * weights,) * 3
    assert found.optimizer_bytes == 8 * weights


@pytest.mark.slow
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_delta_mask_needs_a_second_copy_of_the_masked_weights(low_memory: bool) -> None:
    found = {}
    for kind in ("weight", "delta"):
        options = MaskTrainOptions.model_validate({"target": "mlp", "kind": kind, "low_memory": low_memory})
        plan = plan_mask_training(options, [0, 1])
        found[kind] = estimate_memory(build_llama(layers=2).config, plan, _TINY, process_bytes=0)
    weights = 2 * 3 * 32 * 64
    weight, delta = found["weight"], found["delta"]
    assert delta.weights_bytes == weight.weights_bytes + 4 * weights
    assert delta.scores_bytes == weight.scores_bytes
    more = delta.peak_bytes - weight.peak_bytes - 4 * weights
    assert 0 <= more <= 2 * 4 * 32 * 64  # the change of a tensor in its backward pass


@pytest.mark.slow
def test_low_memory_by_hand() -> None:
    options = MaskTrainOptions(target="mlp", low_memory=True)
    found = estimate_memory(build_llama(layers=2).config, plan_mask_training(options, [0, 1]), _TINY, process_bytes=0)
    weights = 2 * 3 * 32 * 64
    assert (found.scores_bytes, found.gradients_bytes, found.optimizer_bytes) == (2 * weights, 2 * weights, 4 * weights)
    assert (found.masked_weights_bytes, found.step_bytes) == (0, step_workspace_bytes(32 * 64, torch.device("cpu")))
    plain = plan_mask_training(MaskTrainOptions(target="mlp"), [0, 1])
    usual = estimate_memory(build_llama(layers=2).config, plain, _TINY, process_bytes=0)
    assert found.peak_bytes < usual.peak_bytes


@pytest.mark.slow
def test_a_mask_without_training_needs_no_gradients() -> None:
    options = MaskTrainOptions(method="magnitude")
    found = estimate_memory(build_llama(layers=2).config, plan_mask_training(options, [0, 1]), _TINY, process_bytes=0)
    assert (found.gradients_bytes, found.optimizer_bytes, found.activations_bytes) == (0, 0, 0)
    assert found.validation_bytes > 0


@pytest.mark.slow
def test_the_trained_weights_decide() -> None:
    full = _fft()
    lora = _fft(method="lora", lora_rank=2)
    # Rank-2 factors for 7 projections in 2 layers, with (inputs + outputs) numbers per rank.
    assert lora.gradients_bytes == 4 * 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert lora.weights_bytes == full.weights_bytes + lora.gradients_bytes
    shira = _fft(method="shira", lora_rank=2)
    assert shira.gradients_bytes == lora.gradients_bytes
    assert shira.weights_bytes == full.weights_bytes + 2 * lora.gradients_bytes  # with the positions
    assert shira.activations_bytes > lora.activations_bytes
    assert full.gradients_bytes * 0.3 < _fft(method="hft").gradients_bytes < full.gradients_bytes * 0.7
    assert _fft(method="gmt").step_bytes > full.step_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "moments"), [("sgd", 0), ("rmsprop", 1), ("adagrad", 1), ("adamw", 2)])
def test_optimizers(optimizer: str, moments: int) -> None:
    found = _fft(optimizer=optimizer)
    assert found.optimizer_bytes == moments * found.gradients_bytes


@pytest.mark.slow
def test_low_memory_fine_tuning_takes_8_bytes_per_weight() -> None:
    parameters = sum(parameter.numel() for parameter in build_llama(layers=2).parameters())
    found = _fft(low_memory=True)
    assert (found.gradients_bytes, found.optimizer_bytes) == (2 * parameters, 4 * parameters)
    assert found.step_bytes == step_workspace_bytes(102 * 32, torch.device("cpu"))
    assert 0 <= found.weights_bytes - 2 * parameters < 1000
    assert _fft(low_memory=True, method="gmt").step_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_moments(optimizer: str) -> None:
    config = build_llama(layers=2, hidden_size=64, intermediate_size=128, tie_word_embeddings=False).config
    plan = plan_fine_tuning(FftOptions(optimizer=optimizer), 0)  # type: ignore[arg-type]
    found = estimate_memory(config, plan, _TINY, process_bytes=0)
    embedding, head = 102 * 64, 102 * 64  # moments in 32 bits for the former, in 8 for the latter
    wide = 2 * 2 * 64 * 32 + 5 * 64  # keys, values and norms are too small for 8 bits
    narrow = 2 * (2 * 64 * 64 + 3 * 64 * 128)
    scales = 2 * (2 * 16 + 3 * 32) + -(-head // 256)
    assert found.optimizer_bytes == 8 * (embedding + wide) + 2 * (narrow + head) + 8 * scales
    assert found.step_bytes == 0


@pytest.mark.slow
def test_a_quantised_base_takes_about_half_a_byte_per_weight() -> None:
    plain, quantized = _fft(method="lora"), _fft(method="lora", quantize="nf4")
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert plain.weights_bytes - quantized.weights_bytes == pytest.approx((4 - 0.516) * weights, rel=1e-3)
    assert quantized.activations_bytes == plain.activations_bytes + 2 * 32 * 64
    assert quantized.peak_bytes < plain.peak_bytes


@pytest.mark.slow
def test_lora_computing_in_bf16_holds_its_base_in_bf16() -> None:
    plain, narrow = _fft(method="lora", precision="fp32"), _fft(method="lora", precision="bf16")
    adapter = plain.gradients_bytes
    assert narrow.gradients_bytes == adapter
    assert narrow.weights_bytes - adapter == pytest.approx((plain.weights_bytes - adapter) / 2, rel=0.01)


@pytest.mark.slow
def test_a_sparse_adapter_holds_its_base_in_bf16_only_if_it_is_stored_so() -> None:
    options = FftOptions(method="supertuning", precision="bf16")
    plans = [plan_fine_tuning(options, 0, stored=dtype) for dtype in (torch.bfloat16, torch.float32, None)]
    assert [plan.weights_dtype for plan in plans] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.slow
def test_adafactor_keeps_rows_and_columns() -> None:
    expected = sum(
        sum(parameter.shape) if parameter.dim() == 2 else parameter.numel()
        for parameter in build_llama(layers=2).parameters()
    )
    assert _fft(optimizer="adafactor").optimizer_bytes == 4 * expected


@pytest.mark.slow
def test_checkpointing_and_accumulation() -> None:
    assert _fft(gradient_checkpointing=True).activations_bytes < _fft().activations_bytes
    assert _fft(grad_accum_steps=2).peak_bytes > _fft().peak_bytes
    assert _fft(grad_accum_steps=2).activations_bytes == _fft().activations_bytes


@pytest.mark.slow
def test_bf16_keeps_weights_in_fp32_and_halves_most_activations() -> None:
    full, half = _fft(), _fft(precision="bf16")
    assert half.weights_bytes == full.weights_bytes
    mask = {
        precision: estimate_memory(
            build_llama(layers=2).config,
            plan_mask_training(MaskTrainOptions(precision=precision), [0]),
            _TINY,
            process_bytes=0,
        )
        for precision in ("fp32", "bf16")
    }
    assert mask["bf16"].weights_bytes == pytest.approx(mask["fp32"].weights_bytes / 2, rel=0.01)
    assert mask["bf16"].activations_bytes < 0.7 * mask["fp32"].activations_bytes


def test_largest_batches() -> None:
    def record(tokens: int, prompt: int) -> Encoded:
        return Encoded([1] * tokens, [-100] * prompt + [1] * (tokens - prompt), "here")

    found = largest_batches([record(length, 2) for length in (5, 9, 3, 9)], [record(6, 4), record(4, 1)], 2)
    assert (found.records, found.length_tokens, found.padded) == (2, 9, False)
    # Labels at positions 4 and 5, and 1 to 3, are each predicted one position earlier.
    assert (found.validation_records, found.validation_tokens, found.scored_tokens) == (2, 6, 5)
    assert largest_batches([record(5, 1)], [record(5, 1)], 8).records == 1


def test_assumed_batches_are_as_long_as_allowed() -> None:
    assert assumed_batches(3, 1024) == Batches(3, 1024, True, 4, 1024, 1024, 3069)


def test_a_model_whose_computation_depends_on_values() -> None:
    config = build_llama(layers=2).config
    plan = plan_fine_tuning(FftOptions(), 0)

    def prepare(model: torch.nn.Module) -> None:
        model.register_forward_pre_hook(lambda *_: torch.zeros(3).sum().item())

    with pytest.raises(ModelError, match="cannot be estimated"):
        estimate_memory(config, replace(plan, prepare=prepare), _TINY, process_bytes=0)


def test_a_missing_projection() -> None:
    plan = plan_mask_training(MaskTrainOptions(ratio={"c_attn": 0.1}), [0])
    with pytest.raises(MaskingError, match="no projection"):
        estimate_memory(build_llama(layers=2).config, plan, _TINY, process_bytes=0)


def test_resident_bytes_grow_with_allocated_memory() -> None:
    before = resident_bytes()
    # Directly from the kernel: an allocator may return a block that is already resident.
    with mmap.mmap(-1, 100_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"x" * len(held))
        assert resident_bytes() - before >= 0.9 * len(held)
