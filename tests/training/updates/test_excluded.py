"""Entries excluded from selection are always updated, and the ratio applies to all others."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch.optim import SGD, AdamW
from transformers import PreTrainedModel

from mftctl.masking.selection import removed_count
from mftctl.training.sharding.gradients import select_whole
from mftctl.training.updates.excluded import Excluded, excluded_parameters, excluded_text
from mftctl.training.updates.gradient_selection import keep_largest, keep_random
from mftctl.training.updates.masked_optimizer import MaskedOptimizer, UpdateRule
from tests.conftest import build_llama
from tests.masking.architectures import build


def names(model: PreTrainedModel, *parts: Excluded) -> list[str]:
    return list(excluded_parameters(model, parts).values())


def test_embeddings_and_head_by_their_names() -> None:
    model = build_llama(layers=1, tie_word_embeddings=False)
    assert names(model, "embeddings") == ["model.embed_tokens.weight"]
    assert names(model, "head") == ["lm_head.weight"]
    assert names(model, "head", "embeddings") == ["model.embed_tokens.weight", "lm_head.weight"]
    assert names(model) == []
    assert "tied" not in excluded_text(model, ("head",))


def test_tied_weights_are_one_tensor_that_either_name_excludes() -> None:
    model = build_llama(layers=1, tie_word_embeddings=True)
    assert names(model, "embeddings") == names(model, "head") == ["model.embed_tokens.weight"]
    share = model.model.embed_tokens.weight.numel() / sum(item.numel() for item in model.parameters())
    assert excluded_text(model, ("head",)) == (
        f"Fully updated at each step: model.embed_tokens.weight ({share:.1%} of the weights); "
        "model.embed_tokens.weight is both embeddings and head (tied weights)"
    )


def test_positions_are_embeddings_too() -> None:
    assert names(build("gpt2"), "embeddings") == ["transformer.wte.weight", "transformer.wpe.weight"]


def with_gradients(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(size, generator=generator).requires_grad_() for size in (30, 50, 20)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.slow
@pytest.mark.parametrize("unselected", ["unchanged", "momentum"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("method", ["gmt", "random"])
def test_excluded_entries_are_updated_as_without_a_rule_and_others_as_without_exclusion(
    method: Literal["gmt", "random"],
    scope: Literal["tensor", "global"],
    unselected: Literal["unchanged", "momentum"],
) -> None:
    rule = UpdateRule(method, 0.4, scope, unselected, seed=3)
    ours, plain, alone = with_gradients(), with_gradients(), with_gradients()
    optimizers = (
        MaskedOptimizer(AdamW(ours, lr=0.1), rule, excluded=[ours[1]]),
        AdamW(plain, lr=0.1),
        MaskedOptimizer(AdamW([alone[0], alone[2]], lr=0.1), rule),
    )
    for step in range(3):
        for parameters in (ours, plain, alone):
            for parameter, fresh in zip(parameters, with_gradients(step), strict=True):
                parameter.grad = copy.copy(fresh.grad)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(ours[1], plain[1])
        assert torch.equal(ours[0], alone[0])
        assert torch.equal(ours[2], alone[2])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_counts_cover_only_the_entries_selected_from(scope: Literal["tensor", "global"]) -> None:
    parameters = with_gradients()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = MaskedOptimizer(SGD(parameters, lr=1.0), UpdateRule("gmt", 0.37, scope), excluded=parameters[:1])
    optimizer.select()
    held = removed_count(70, 0.37) if scope == "global" else removed_count(50, 0.37) + removed_count(20, 0.37)
    assert (optimizer.total_entries, optimizer.updated_entries) == (100, 100 - held)
    optimizer.step()
    moved = [int((now != then).sum()) for now, then in zip(parameters, before, strict=True)]
    assert moved[0] == 30
    assert sum(moved[1:]) == 70 - held


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("method", ["gmt", "random"])
def test_processes_with_sharded_gradients_select_the_same_entries(
    method: Literal["gmt", "random"], scope: Literal["tensor", "global"]
) -> None:
    gradients = [parameter.grad for parameter in with_gradients() if parameter.grad is not None]
    rule = UpdateRule(method, 0.4, scope, seed=3)
    found: dict[int, torch.Tensor] = {}
    select_whole(
        [gradient.shape for gradient in gradients],
        lambda index: gradients[index],
        rule,
        5,
        found.__setitem__,
        device=torch.device("cpu"),
        excluded=[1],
    )
    others = [gradients[0], gradients[2]]
    expected = keep_largest(others, 0.4, scope) if method == "gmt" else keep_random(others, 0.4, scope, seed=3, step=5)
    assert found[1].all()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[1])
