"""The loss over answer tokens, compared with cross entropy on the logits of all positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mftctl.evaluation.head_chunks import answer_positions, logits_only_at
from mftctl.training.answer_loss import answer_loss
from tests.conftest import build_llama


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=102, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def gemma2() -> PreTrainedModel:
    """A model that applies a soft cap to its logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=102, final_logit_softcapping=0.5, **sizes, **heads)).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of three records whose answers start and end at different positions; one answer has a gap."""
    input_ids = torch.randint(6, 102, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :5] = labels[1, :8] = labels[2, 9:] = labels[2, 3:6] = -100
    return input_ids, labels


@pytest.mark.parametrize("build", [build_llama, gpt2, gemma2])
def test_loss_and_gradients_are_those_of_all_logits(build: type[PreTrainedModel]) -> None:
    input_ids, labels = batch()
    losses, gradients = [], []
    for few in (False, True):
        model = build()
        positions, tokens = answer_positions(labels)
        if few:
            with logits_only_at(model, positions):
                outputs = model(input_ids=input_ids, use_cache=False)
            assert outputs.logits.shape == (1, len(positions), 102)
            loss = answer_loss(outputs, positions, tokens, torch.tensor(40))
        else:
            logits = model(input_ids=input_ids, use_cache=False).logits
            flat = logits[:, :-1].reshape(-1, 102)
            loss = F.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum") / 40
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: item.grad for name, item in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_positions_come_before_their_tokens() -> None:
    labels = torch.tensor([[-100, 7, 8, -100], [5, -100, -100, 6]])
    positions, tokens = answer_positions(labels)
    assert positions.tolist() == [0, 1, 6]  # the first token of a record is never predicted
    assert tokens.tolist() == [7, 8, 6]


def test_the_head_is_restored_afterwards() -> None:
    model, (input_ids, labels) = build_llama(), batch()
    positions, _ = answer_positions(labels)
    with pytest.raises(ZeroDivisionError), logits_only_at(model, positions):
        raise ZeroDivisionError
    assert model(input_ids=input_ids).logits.shape == (3, 12, 102)


def test_a_model_without_a_head_of_its_own_computes_all_logits() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_llama()

        def forward(self, input_ids: torch.Tensor) -> object:
            return self.inner(input_ids=input_ids)

    model, (input_ids, labels) = Plain(), batch()
    positions, tokens = answer_positions(labels)
    with logits_only_at(model, positions):
        outputs = model(input_ids)
    assert outputs.logits.shape == (3, 12, 102)
    with logits_only_at(model.inner, positions):
        chosen = model(input_ids)
    expected = answer_loss(chosen, positions, tokens, 1)
    torch.testing.assert_close(answer_loss(outputs, positions, tokens, 1), expected)
