"""Estimates from a few layers compared with the same estimates from all layers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, GPT2Config, PreTrainedConfig

from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.checkpoints.meta_models import build_skeleton
from mftctl.workflows.planning import memory
from mftctl.workflows.planning.allocation_meter import Event, Stretch
from mftctl.workflows.planning.batches import Batches
from mftctl.workflows.planning.layer_sampling import keep_stand_ins, repeat_layers, stand_ins
from mftctl.workflows.planning.training_setup import TrainingPlan, plan_fine_tuning, plan_mask_training
from tests.conftest import build_llama

_BATCHES = Batches(3, 24, True, 4, 24, 12, 69)
_LLAMA = build_llama(layers=7).config
_GPT2 = GPT2Config(vocab_size=102, n_embd=32, n_layer=7, n_head=4, n_positions=64)
_GEMMA = Gemma3TextConfig(
    vocab_size=102,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 5,
)


def _fft(**options: Any) -> TrainingPlan:
    return plan_fine_tuning(FftOptions(**options), 0)


def _mask(*layers: int, **options: Any) -> TrainingPlan:
    return plan_mask_training(MaskTrainOptions(**options), layers)


_CHECKPOINTED = {"gradient_checkpointing": True, "precision": "bf16"}
_PLANS = {
    "full": _fft(),
    "accumulation": _fft(grad_accum_steps=2),
    "bf16": _fft(precision="bf16"),
    # Autocast keeps the cast weights of all layers until the end of the forward pass, and frees them then.
    "checkpointing, bf16": _fft(**_CHECKPOINTED),
    "lora": _fft(method="lora", lora_rank=2, lora_dropout=0.1, **_CHECKPOINTED),
    "hft": _fft(method="hft", **_CHECKPOINTED),
    "mask on all layers": _mask(*range(7)),
    "mask on the first layers": _mask(0, 1, grad_accum_steps=2),
    "mask on middle layers": _mask(2, 3, **_CHECKPOINTED),
    "mask on the last layers": _mask(3, 4, 5, 6, precision="bf16"),
    "mask without training": _mask(4, 5, method="magnitude"),
}


def _each_for_itself(layers: torch.nn.ModuleList) -> list[int]:
    return list(range(len(layers)))


def _check_against_all_layers(config: PreTrainedConfig, plan: TrainingPlan, batches: Batches = _BATCHES) -> None:
    found = memory.estimate_memory(config, plan, batches, process_bytes=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "stand_ins", _each_for_itself)
        expected = memory.estimate_memory(config, plan, batches, process_bytes=0)
    assert asdict(found) == asdict(expected)


@pytest.mark.slow
@pytest.mark.parametrize("plan", _PLANS.values(), ids=_PLANS)
def test_llama(plan: TrainingPlan) -> None:
    _check_against_all_layers(_LLAMA, plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "mask on the first layers"])
def test_alternating_kinds_of_attention(name: str) -> None:
    _check_against_all_layers(_GEMMA, _PLANS[name])


@pytest.mark.slow
def test_fused_projections_and_an_embedding_of_positions() -> None:
    _check_against_all_layers(_GPT2, _PLANS["hft"])


@pytest.mark.slow
@settings(deadline=None, max_examples=5)
@given(
    data=st.data(),
    layers=st.integers(1, 7),
    records=st.integers(1, 5),
    tokens=st.integers(2, 40),
    checkpointing=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_masks_anywhere(
    data: st.DataObject, layers: int, records: int, tokens: int, checkpointing: bool, precision: str
) -> None:
    masked = data.draw(st.sets(st.integers(0, layers - 1), min_size=1))
    plan = _mask(*sorted(masked), gradient_checkpointing=checkpointing, precision=precision)
    batches = Batches(records, tokens, records > 1, records, tokens, tokens, records * (tokens - 1))
    _check_against_all_layers(build_llama(layers=layers).config, plan, batches)


def test_the_first_and_last_layer_of_a_structure_are_always_sampled() -> None:
    layers = build_llama(layers=9).model.layers
    # The first layer differs: gradients need not go below it.
    assert stand_ins(layers) == [0, 1, 2, 2, 2, 2, 2, 2, 8]
    layers.requires_grad_(False)
    assert stand_ins(layers) == [0, 1, 1, 1, 1, 1, 1, 1, 8]
    layers[3].mlp.requires_grad_(True)
    assert stand_ins(layers) == [0, 1, 1, 3, 4, 5, 5, 5, 8]


def test_layers_that_train_other_parameters_are_not_alike() -> None:
    layers = build_llama(layers=8).model.layers
    for index in (3, 5):
        layers[index].mlp.requires_grad_(False)
    assert stand_ins(layers) == [0, 1, 2, 3, 2, 3, 2, 7]


def test_a_shortened_model_keeps_the_kinds_of_its_layers() -> None:
    model = build_skeleton(_GEMMA, torch.float32)
    layers = model.model.layers
    chosen = stand_ins(layers)
    assert chosen == [0, 1, 2, 3, 4, 3, 4, 3, 8, 9]
    kept = keep_stand_ins(model, layers, chosen)
    assert (list(kept), list(kept.values())) == ([0, 1, 2, 3, 4, 8, 9], list(layers))
    assert model.config.layer_types == [_GEMMA.layer_types[index] for index in kept]
    assert len(_GEMMA.layer_types) == 10


def test_allocations_left_by_each_layer_are_freed_outside_as_often_as_made() -> None:
    before, after = Stretch(), Stretch()
    first, second, back = Stretch("forward", 0), Stretch("forward", 1), Stretch("backward", 1)
    events = [
        Event(before, before, 1),
        Event(first, first, 10),
        Event(second, second, 100),
        Event(after, second, -100),
        Event(after, before, -1),
        Event(back, first, -10),
    ]
    found = [(event.stretch, event.size_bytes) for event in repeat_layers(events, [0, 1, 1])]
    assert found == [
        (before, 1),
        (first, 10),
        *[(second, 100)] * 2,
        *[(after, -100)] * 2,
        (after, -1),
        *[(back, -10)] * 2,
    ]
