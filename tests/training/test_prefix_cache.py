"""Reuse of the frozen layers below the first masked one: computed once, bit-identical, disabled if outputs vary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mftctl.evaluation.inference import evaluation_mode
from mftctl.masking.layers import attach_masks, detach_masks, initial_scores, masked_layers
from mftctl.masking.rule import MaskRule
from mftctl.masking.targets import decoder_layers, find_targets
from mftctl.training.prefix_cache import HiddenStates, reusing_prefix
from tests.conftest import build_llama
from tests.masking.architectures import ARCHITECTURES, GPT2_SIZES, build

BATCHES = [
    {"input_ids": torch.randint(6, 102, (2, length), generator=torch.Generator().manual_seed(length))}
    for length in (9, 5, 7)
]
for batch in BATCHES:
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, -2:] = 0
MEMORY_BYTES = 1 << 20


def no_refusal(why: str) -> None:
    pytest.fail(why)


def mask_layer(model: PreTrainedModel, layer: int) -> None:
    targets = find_targets(model, [layer])
    scores = {target.name: initial_scores(target, "kaiming") for target in targets}
    attach_masks(model, targets, scores, MaskRule(0.1))


def train(model: PreTrainedModel, epochs: int = 2) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The logits of every training step and validation, and the scores after the last one."""
    logits = []
    modules = [module for _, module in masked_layers(model)]
    optimizer = torch.optim.AdamW([module.scores for module in modules], lr=0.02)
    for epoch in range(epochs):
        model.train()
        for batch in BATCHES if epoch % 2 == 0 else reversed(BATCHES):
            output = model(**batch, use_cache=False)
            logits.append(output.logits.detach())
            output.logits.float().logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with evaluation_mode(model):
            logits += [model(**batch, use_cache=False).logits for batch in BATCHES]
    return logits, [module.scores.detach().clone() for module in modules]


def count_forwards(model: PreTrainedModel, layer: int) -> Callable[[], int]:
    """A counter of a layer's actual forward passes, measured on one of its norms."""
    calls = []
    parts = decoder_layers(model)[1][layer].named_children()
    norm = next(module for name, module in parts if "norm" in name or name.startswith("ln_"))
    norm.register_forward_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_bits_with_and_without(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = without_dropout(build(name))
    mask_layer(plain, 1)
    expected = train(plain)

    torch.manual_seed(0)
    model = without_dropout(build(name))
    mask_layer(model, 1)
    computed = count_forwards(model, 0)
    with (
        HiddenStates(tmp_path, MEMORY_BYTES, 0) as states,
        reusing_prefix(model, 1, states, no_refusal, in_training=True),
    ):
        logits, scores = train(model)
        assert all(torch.equal(mine, its) for mine, its in zip(logits, expected[0], strict=True))
        assert all(torch.equal(mine, its) for mine, its in zip(scores, expected[1], strict=True))
        assert computed() == 6  # each batch once in training and once in validation
        assert len(states) == 6
        assert states.reused == 6


@pytest.mark.slow
@pytest.mark.parametrize(("memory_bytes", "file_bytes"), [(0, MEMORY_BYTES), (2500, 0), (2500, 2000)])
def test_the_same_bits_whatever_the_memory_limit(tmp_path: Path, memory_bytes: int, file_bytes: int) -> None:
    plain, model = build_llama(), build_llama()
    for one in (plain, model):
        mask_layer(one, 2)
    expected = train(plain, 3)
    with (
        HiddenStates(tmp_path, memory_bytes, file_bytes) as states,
        reusing_prefix(model, 2, states, no_refusal, in_training=True),
    ):
        logits, scores = train(model, 3)
        assert states.reused > 0
    assert all(torch.equal(mine, its) for mine, its in zip(logits, expected[0], strict=True))
    assert all(torch.equal(mine, its) for mine, its in zip(scores, expected[1], strict=True))


@pytest.mark.slow
def test_a_higher_group_starts_from_the_states_of_the_one_below(tmp_path: Path) -> None:
    model = build_llama()
    computed = [count_forwards(model, layer) for layer in range(4)]
    with HiddenStates(tmp_path, MEMORY_BYTES, 0) as states:
        for layer in (1, 2, 3):
            plain = build_llama()
            mask_layer(plain, layer)
            expected = train(plain, 1)
            mask_layer(model, layer)
            with reusing_prefix(model, layer, states, no_refusal, in_training=True):
                logits, _ = train(model, 1)
            detach_masks(model)
            assert all(torch.equal(mine, its) for mine, its in zip(logits, expected[0], strict=True))
    # 6 batches once, plus the first training and validation batch again at each of the other two boundaries
    assert [count() for count in computed[:3]] == [6 + 4, (6 + 2) + 6 + 2, (6 + 2) * 2 + 6]


@pytest.mark.slow
def test_a_later_lower_group_does_not_reuse_higher_states(tmp_path: Path) -> None:
    model, plain = build_llama(), build_llama()
    with HiddenStates(tmp_path, MEMORY_BYTES, 0) as states:
        for layer in (3, 1):
            mask_layer(model, layer)
            with reusing_prefix(model, layer, states, no_refusal, in_training=True):
                logits, _ = train(model)
            detach_masks(model)
    mask_layer(plain, 1)
    assert all(torch.equal(mine, its) for mine, its in zip(logits, train(plain)[0], strict=True))


def test_dropout_is_detected_in_training_and_reuse_continues_in_validation(tmp_path: Path) -> None:
    refusals: list[str] = []
    results = []
    for reuse in (False, True):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, resid_pdrop=0.5))
        mask_layer(model, 1)
        torch.manual_seed(1)
        with (
            HiddenStates(tmp_path, MEMORY_BYTES, 0) as states,
            reusing_prefix(model, 1 if reuse else 0, states, refusals.append, in_training=True),
        ):
            results.append(train(model))
            assert len(states) == (3 if reuse else 0)  # states of validation batches
    assert len(refusals) == 1
    assert refusals[0].startswith("Hidden states are not reused in training: the model's logits differ")
    assert all(torch.equal(mine, its) for mine, its in zip(*(logits for logits, _ in results), strict=True))


def test_layers_that_share_more_than_hidden_states_are_detected(tmp_path: Path) -> None:
    model = build_llama()
    layers = decoder_layers(model)[1]
    seen: list[torch.Tensor] = []
    layers[0].register_forward_hook(lambda module, args, output: seen.append(output.sum()))
    layers[3].register_forward_hook(lambda module, args, output: output * (seen.pop() if seen else 0))
    refusals: list[str] = []
    with (
        HiddenStates(tmp_path, MEMORY_BYTES, 0) as states,
        reusing_prefix(model, 2, states, refusals.append, in_training=True),
        torch.no_grad(),
    ):
        model(**BATCHES[0], use_cache=False)
        assert len(states) == 0
    assert len(refusals) == 1


def test_a_layer_that_returns_more_than_a_tensor_is_not_reused(tmp_path: Path) -> None:
    model = build_llama()
    layer = decoder_layers(model)[1][1]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: (plain(*args, **kwargs),)
    decoder_layers(model)[1][2].register_forward_pre_hook(lambda module, args: (args[0][0], *args[1:]))
    refusals: list[str] = []
    with (
        HiddenStates(tmp_path, MEMORY_BYTES, 0) as states,
        reusing_prefix(model, 2, states, refusals.append, in_training=True),
        torch.no_grad(),
    ):
        model(**BATCHES[0], use_cache=False)
    assert len(refusals) == 1
    assert layer.__dict__["forward"].__name__ == "<lambda>"  # the previous forward method is restored


def test_a_file_that_cannot_be_written_ends_the_reuse_and_nothing_else(tmp_path: Path) -> None:
    model = build_llama()
    refusals: list[str] = []
    with (
        HiddenStates(tmp_path / "missing", 0, MEMORY_BYTES) as states,
        reusing_prefix(model, 2, states, refusals.append, in_training=True),
        torch.no_grad(),
    ):
        outputs = [model(**BATCHES[0], use_cache=False).logits for _ in range(3)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert len(refusals) == 1
    assert "their file cannot be written" in refusals[0]


def test_generation_is_unaffected_and_the_model_is_restored(tmp_path: Path) -> None:
    model = build_llama()
    expected = model.generate(BATCHES[0]["input_ids"], max_new_tokens=5, do_sample=False)
    with (
        HiddenStates(tmp_path, MEMORY_BYTES, 0) as states,
        reusing_prefix(model, 2, states, no_refusal, in_training=False),
    ):
        assert torch.equal(model.generate(BATCHES[0]["input_ids"], max_new_tokens=5, do_sample=False), expected)
        model.train()
        model(**BATCHES[0], use_cache=False)
        model(**BATCHES[0])
        assert len(states) == 0
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(model)[1])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_batch_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    model = build_llama()
    with (
        HiddenStates(tmp_path, MEMORY_BYTES, 0) as states,
        reusing_prefix(model, 2, states, no_refusal, in_training=True),
        torch.no_grad(),
    ):
        expected = model(**BATCHES[0], use_cache=False).logits
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 4), 999), use_cache=False)
        assert torch.equal(model(**BATCHES[0], use_cache=False).logits, expected)
        assert len(states) == 1
