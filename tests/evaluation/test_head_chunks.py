"""Chunked losses compared with losses on all logits: values, gradients, memory, and models that transform logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from mftctl.data.encoding import Encoded
from mftctl.evaluation import head_chunks
from mftctl.evaluation.head_chunks import answer_positions, logits_only_at
from mftctl.evaluation.losses import sample_losses
from mftctl.training.answer_loss import answer_loss
from mftctl.workflows.planning.allocation_meter import AllocationMeter, add_up
from tests.conftest import build_llama

SIZES = {"vocab_size": 102, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def adapted() -> nn.Module:
    """LoRA on a decoder layer and on the head."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": build_llama,
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=102, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
    "soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, head_dim=8, final_logit_softcapping=0.5)),
    "logits scaled down": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, logits_scaling=3.0)),
    "logits scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, **HEADS, logit_scale=0.3, pad_token_id=0)),
    "experts": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, **HEADS, num_local_experts=4, output_router_logits=True)
    ),
    "adapter": adapted,
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of four records with 70 answer tokens."""
    input_ids = torch.randint(6, 102, (4, 24), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :5] = labels[1, :8] = labels[2, 19:] = labels[2, 3:6] = -100
    return input_ids, labels


def never(text: str) -> None:
    pytest.fail(text)


def loss_of(model: Any, on_refusal: Callable[[str], None] = never, *, autocast: bool = False) -> torch.Tensor:
    input_ids, labels = batch()
    positions, tokens = answer_positions(labels)
    torch.manual_seed(1)  # GPT-2 has dropout
    with logits_only_at(model, positions, tokens, on_refusal), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(input_ids=input_ids, use_cache=False)
    return answer_loss(outputs, positions, tokens, torch.tensor(len(tokens)))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK_LOGITS", 102 * 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chunked = build(name), build(name)
    expected = loss_of(whole)
    expected.backward()
    monkeypatch.setattr(head_chunks, "CHUNK_LOGITS", 102 * 20)
    sizes = head_sizes(chunked)
    loss = loss_of(chunked)
    assert max(sizes) <= 20
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    theirs = {key: parameter.grad for key, parameter in whole.named_parameters()}
    for key, parameter in chunked.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key], rtol=1e-6, atol=1e-6)
    assert "forward" not in vars(chunked)


def head_sizes(model: Any) -> list[int]:
    """The number of positions in each subsequent pass through the head."""
    sizes: list[int] = []
    hook = lambda _, inputs, output: sizes.append(output.shape[1])  # noqa: E731
    model.get_output_embeddings().register_forward_hook(hook)
    return sizes


def test_one_chunk_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    sizes = head_sizes(model)
    answers = len(answer_positions(batch()[1])[0])
    monkeypatch.setattr(head_chunks, "CHUNK_LOGITS", 102 * answers)
    loss_of(model).backward()
    assert sizes == [answers]


@pytest.mark.usefixtures("small_chunks")
def test_under_autocast_the_loss_is_that_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chunked = build("soft cap"), build("soft cap")
    loss = loss_of(chunked, autocast=True)
    loss.backward()
    monkeypatch.setattr(head_chunks, "CHUNK_LOGITS", 2**27)
    expected = loss_of(whole, autocast=True)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    theirs = {key: parameter.grad for key, parameter in whole.named_parameters()}
    for key, parameter in chunked.named_parameters():
        assert (parameter.grad - theirs[key]).norm() <= 0.02 * theirs[key].norm()  # gradients are rounded to bf16


class Shifting(LlamaForCausalLM):
    """A model that shifts its logits with every call, so that those of a chunk differ."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + float(self.calls)
        self.calls += 1
        return output

    calls = 0


class Whole(LlamaForCausalLM):
    """A model that does not expose its decoder."""

    base_model_prefix = ""


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", [Shifting, Whole])
def test_a_model_with_different_logits_in_chunks_computes_all_with_one_note(kind: type[PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model: Any = kind(LlamaConfig(**SIZES, **HEADS))
    said: list[str] = []
    losses = [loss_of(model, said.append) for _ in range(2)]
    assert len(said) == 1
    assert said[0].startswith(f"{kind.__name__} computes the logits of all answer tokens at once")
    torch.manual_seed(0)
    expected = loss_of(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)))
    for loss in losses:  # a constant added to all logits does not change the loss
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_without_a_listener_it_is_a_warning() -> None:
    input_ids, labels = batch()
    positions, tokens = answer_positions(labels)
    model = Whole(LlamaConfig(**SIZES, **HEADS))
    with pytest.warns(RuntimeWarning, match="Whole computes"), logits_only_at(model, positions, tokens):
        assert model(input_ids=input_ids).logits.shape == (1, len(positions), 102)


@pytest.mark.usefixtures("small_chunks")
def test_a_batch_without_labels_still_reaches_every_parameter() -> None:
    """Processes without remaining records rely on this."""
    model = build("llama")
    input_ids, _ = batch()
    positions, tokens = answer_positions(torch.full_like(input_ids, -100))
    with logits_only_at(model, positions, tokens):
        outputs = model(input_ids=input_ids, use_cache=False)
    answer_loss(outputs, positions, tokens, 1).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "soft cap", "gpt2"])
def test_sample_losses_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    input_ids, labels = batch()
    records = [
        Encoded(ids[:length].tolist(), row[:length].tolist(), "f")
        for ids, row, length in zip(input_ids, labels, (24, 20, 24, 2), strict=True)
    ]
    records.append(Encoded([7, 8, 9], [-100, -100, -100], "f"))
    expected = sample_losses(model, records, pad_token_id=0)
    monkeypatch.setattr(head_chunks, "CHUNK_LOGITS", 102 * 20)
    sizes = head_sizes(model)
    found = sample_losses(model, records, pad_token_id=0)
    assert max(sizes) <= 20
    assert [loss.answer_tokens for loss in found] == [loss.answer_tokens for loss in expected]
    assert [loss.nll for loss in found] == pytest.approx([loss.nll for loss in expected], abs=1e-4)


@pytest.mark.slow
def test_memory_depends_on_the_chunk_and_not_on_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, at_once = 4096, 64
    config = LlamaConfig(**{**SIZES, "vocab_size": vocabulary}, **HEADS)

    def peak(answers: int) -> int:
        model = LlamaForCausalLM(config)
        model.requires_grad_(False)
        model.model.layers[0].requires_grad_(True)
        labels = torch.randint(6, vocabulary, (1, answers + 1))
        positions, tokens = answer_positions(labels)
        with AllocationMeter([*model.parameters(), *model.buffers(), labels, positions, tokens]) as meter:
            with logits_only_at(model, positions, tokens, never):
                outputs = model(input_ids=labels, use_cache=False)
            answer_loss(outputs, positions, tokens, 1).backward()
        return add_up(meter.events).peak_bytes

    all_at_once = peak(1024)
    monkeypatch.setattr(head_chunks, "CHUNK_LOGITS", vocabulary * at_once)
    of_a_chunk = 4 * vocabulary * at_once
    assert all_at_once > 2 * 4 * vocabulary * 1024
    assert peak(1024) < all_at_once / 4
    assert peak(1024) - peak(512) < of_a_chunk + (all_at_once >> 4)
