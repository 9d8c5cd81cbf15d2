"""The masked optimizer as an `Optimizer`: resuming, schedulers, groups, hooks, and unsupported uses."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from mftctl.errors import MaskingError, TrainingError
from mftctl.training.updates.masked_optimizer import MaskedOptimizer, UpdateRule
from tests.training.updates.test_masked_optimizer import (
    GMT,
    INNER,
    RULES,
    all_equal,
    make_parameters,
    set_gradients,
    weights,
)


def run(optimizer: Optimizer, parameters: Sequence[torch.Tensor], steps: range) -> list[torch.Tensor]:
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()
    return weights(parameters)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.method}-{rule.scope}")
@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd-momentum", "adafactor"])
def test_resuming_equals_an_uninterrupted_training(name: str, rule: UpdateRule) -> None:
    parameters = make_parameters()
    optimizer = MaskedOptimizer(INNER[name](parameters), rule)
    run(optimizer, parameters, range(3))
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    resumed_parameters = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    expected = run(optimizer, parameters, range(3, 6))

    resumed = MaskedOptimizer(INNER[name](resumed_parameters), rule)
    stored.seek(0)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    assert resumed.param_groups is resumed.inner.param_groups
    assert resumed.state is resumed.inner.state
    assert all_equal(run(resumed, resumed_parameters, range(3, 6)), expected)


def test_the_state_of_another_optimizer() -> None:
    inner = AdamW(make_parameters())
    with pytest.raises(TrainingError, match="updates all entries") as caught:
        MaskedOptimizer(inner, GMT).load_state_dict(inner.state_dict())
    assert caught.value.actual == "state, param_groups"


def test_a_scheduler_sets_the_learning_rate_of_the_inner_optimizer() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = MaskedOptimizer(SGD([parameter], lr=1.0), UpdateRule("gmt", 0.5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    steps = []
    for _ in range(3):
        before = parameter[1].item()
        parameter.grad = torch.tensor([0.0, 1.0])
        optimizer.step()
        scheduler.step()
        steps.append(before - parameter[1].item())
    assert steps == [1.0, 0.5, 0.25]
    assert optimizer.inner.param_groups[0]["lr"] == 0.125


def test_groups_keep_their_own_options() -> None:
    fast, slow, late = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = MaskedOptimizer(
        SGD([{"params": [fast], "lr": 1.0}, {"params": [slow], "lr": 0.5}]), UpdateRule("gmt", 0.5)
    )
    optimizer.add_param_group({"params": [late], "lr": 0.25})
    for parameter in (fast, slow, late):
        parameter.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    assert [parameter.tolist() for parameter in (fast, slow, late)] == [[0.0, -2.0], [0.0, -1.0], [0.0, -0.5]]
    assert [group["params"] for group in optimizer.param_groups] == [[fast], [slow], [late]]


def test_hooks_of_a_step_run_once() -> None:
    parameters = make_parameters()
    optimizer = MaskedOptimizer(SGD(parameters), GMT)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    set_gradients(parameters, 0)
    optimizer.step()
    assert calls == ["post"]


def test_it_shows_its_rule_and_the_inner_optimizer() -> None:
    text = repr(MaskedOptimizer(SGD(make_parameters()), GMT))
    assert text.startswith("MaskedOptimizer(UpdateRule(method='gmt', ratio=0.4,")
    assert "SGD (" in text


def test_a_closure_is_refused() -> None:
    optimizer = MaskedOptimizer(SGD(make_parameters()), GMT)
    with pytest.raises(TrainingError, match="takes no closure"):
        optimizer.step(lambda: 0.0)  # type: ignore[arg-type]


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = MaskedOptimizer(SGD(embedding.parameters()), GMT)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TrainingError, match="dense and whole") as caught:
        optimizer.step()
    assert "sparse" in caught.value.actual


def test_a_nan_gradient_stops_before_any_update() -> None:
    parameters = make_parameters()
    optimizer = MaskedOptimizer(AdamW(parameters), GMT)
    set_gradients(parameters, 0)
    parameters[1].grad[2] = float("nan")
    with pytest.raises(MaskingError, match="NaN"):
        optimizer.step()
    assert all_equal(parameters, make_parameters())


def test_a_failing_inner_step_leaves_the_groups_intact() -> None:
    parameters = make_parameters()
    optimizer = MaskedOptimizer(SGD(parameters), GMT)
    optimizer.param_groups[0]["lr"] = "fast"
    set_gradients(parameters, 0)
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.inner.param_groups is optimizer.param_groups
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_rule_with_a_ratio_out_of_range() -> None:
    with pytest.raises(MaskingError, match="share") as caught:
        UpdateRule("gmt", 1.0)
    assert caught.value.key == "ratio"
