"""The masked optimizer compared with loops over single numbers, with its inner optimizers, and in training loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from mftctl.masking.selection import removed_count
from mftctl.training.updates.masked_optimizer import MaskedOptimizer, UpdateRule
from tests.training.updates.test_gradient_selection import keep_by_sorting

Make = Callable[[Any], Optimizer]

GMT = UpdateRule("gmt", 0.4)
RULES = [GMT, UpdateRule("gmt", 0.4, "global"), UpdateRule("random", 0.4, seed=5), UpdateRule("random", 0.4, "global")]

INNER: dict[str, Make] = {
    "adamw": lambda params: AdamW(params, lr=0.1, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda params: AdamW(params, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda params: AdamW(params, lr=0.1, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda params: AdamW(params, lr=0.1, amsgrad=True),
    "adam-l2": lambda params: Adam(params, lr=0.1, weight_decay=0.1),
    "sgd": lambda params: SGD(params, lr=0.1, weight_decay=0.1),
    "sgd-momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda params: RMSprop(params, lr=0.1, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda params: Adagrad(params, lr=0.1, initial_accumulator_value=0.5),
    "adadelta": lambda params: Adadelta(params, lr=1.0),
    "adamax": lambda params: Adamax(params, lr=0.1),
    "nadam": lambda params: NAdam(params, lr=0.1),
    "radam": lambda params: RAdam(params, lr=0.1),
    "rprop": lambda params: Rprop(params, lr=0.1),
    "adafactor": lambda params: Adafactor(params, lr=0.1),
}


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in ((4, 5), (7,), (3, 6))
    ]


def set_gradients(parameters: Sequence[torch.Tensor], step: int) -> None:
    """Sets gradients that depend only on the step."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.dtype)


def snapshot(parameters: Sequence[torch.Tensor], optimizer: Optimizer) -> list[dict[str, torch.Tensor]]:
    """Copies of each parameter and of its state tensors of the same shape."""
    return [
        {
            "weight": parameter.detach().clone(),
            **{
                key: value.clone()
                for key, value in optimizer.state.get(parameter, {}).items()
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape
            },
        }
        for parameter in parameters
    ]


def weights(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def all_equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def adamw_on_one_number(
    state: dict[str, float], gradient: float, step: int, *, lr: float, decay: float
) -> dict[str, float]:
    """AdamW (Loshchilov and Hutter, algorithm 2) with torch's default betas and epsilon."""
    mean = 0.9 * state["exp_avg"] + 0.1 * gradient
    square = 0.999 * state["exp_avg_sq"] + 0.001 * gradient**2
    update = (mean / (1 - 0.9**step)) / (math.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return {"weight": state["weight"] * (1 - lr * decay) - lr * update, "exp_avg": mean, "exp_avg_sq": square}


def sgd_on_one_number(
    state: dict[str, float], gradient: float, step: int, *, lr: float, decay: float
) -> dict[str, float]:
    """Gradient descent with a momentum of 0.9 that starts at 0, and weight decay as an L2 penalty."""
    velocity = 0.9 * state["momentum_buffer"] + gradient + decay * state["weight"]
    return {"weight": state["weight"] - lr * velocity, "momentum_buffer": velocity}


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize(
    ("make", "one_number", "keys"),
    [
        (INNER["adamw"], adamw_on_one_number, ("exp_avg", "exp_avg_sq")),
        (INNER["sgd-momentum"], sgd_on_one_number, ("momentum_buffer",)),
    ],
    ids=["adamw", "sgd"],
)
def test_equals_a_loop_over_single_numbers(make: Make, one_number: Any, keys: tuple[str, ...], scope: Any) -> None:
    """Over several steps, selected entries follow the textbook rule; all others keep weight and state."""
    parameters = make_parameters(torch.float64)
    states = [
        [{"weight": value, **dict.fromkeys(keys, 0.0)} for value in parameter.flatten().tolist()]
        for parameter in parameters
    ]
    optimizer = MaskedOptimizer(make(parameters), UpdateRule("gmt", 0.4, scope))
    for step in range(1, 6):
        set_gradients(parameters, step)
        gradients = [parameter.grad.clone() for parameter in parameters]
        keep = keep_by_sorting([gradient.numpy() for gradient in gradients], 0.4, scope)
        for entries, gradient, selected in zip(states, gradients, keep, strict=True):
            for index, (entry, slope) in enumerate(zip(list(entries), gradient.flatten().tolist(), strict=True)):
                if selected.ravel()[index]:
                    entries[index] = one_number(entry, slope, step, lr=0.1, decay=0.1)
        optimizer.step()
        for entries, actual in zip(states, snapshot(parameters, optimizer), strict=True):
            for key, tensor in actual.items():
                expected = torch.tensor([entry[key] for entry in entries], dtype=torch.float64)
                torch.testing.assert_close(tensor.flatten(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.method}-{rule.scope}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INNER)
def test_exactly_the_selected_entries_change(name: str, dtype: torch.dtype, rule: UpdateRule) -> None:
    """Selected entries are updated as by the inner optimizer; others keep weight and state bit by bit."""
    parameters = make_parameters(dtype)
    optimizer = MaskedOptimizer(INNER[name](parameters), rule)
    for step in range(4):
        before = snapshot(parameters, optimizer)
        set_gradients(parameters, step)
        optimizer.select()
        masks = [optimizer.selected[parameter] for parameter in parameters]
        plain, plain_parameters = copy_of(optimizer.inner, parameters, INNER[name])
        plain.step()
        optimizer.step()
        ordinary = snapshot(plain_parameters, plain)
        for old, new, alone, mask in zip(before, snapshot(parameters, optimizer), ordinary, masks, strict=True):
            assert old.keys() <= new.keys()
            for key in new:
                assert torch.equal(new[key][mask], alone[key][mask])
            for key in old:
                assert torch.equal(new[key][~mask], old[key][~mask])
            if dtype == torch.float32 and name != "rprop":  # Rprop skips an update where the gradient's sign changes
                assert (new["weight"] != old["weight"])[mask].all()
    if "adam" in name:
        assert {int(optimizer.state[parameter]["step"]) for parameter in parameters} == {4}


def copy_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter], make: Make) -> tuple[Optimizer, list[Any]]:
    """An optimizer of the same type and state on copies of the parameters and their gradients."""
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = None if parameter.grad is None else parameter.grad.clone()
    other = make(copies)
    for copy, parameter in zip(copies, parameters, strict=True):
        if parameter in optimizer.state:
            other.state[copy] = deepcopy(optimizer.state[parameter])
    return other, copies


@pytest.mark.slow
@pytest.mark.parametrize("name", INNER)
def test_ratio_zero_is_the_inner_optimizer(name: str) -> None:
    ours, plain = make_parameters(), make_parameters()
    masked, inner = MaskedOptimizer(INNER[name](ours), UpdateRule("gmt", 0.0)), INNER[name](plain)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(plain, step)
        masked.step()
        inner.step()
        assert all_equal(ours, plain)


@pytest.mark.parametrize("name", ["adamw", "adam-l2", "sgd-momentum"])
def test_the_plain_variant_is_the_inner_optimizer_on_masked_gradients(name: str) -> None:
    ours, plain = make_parameters(), make_parameters()
    masked = MaskedOptimizer(INNER[name](ours), UpdateRule("gmt", 0.4, unselected="momentum"))
    inner = INNER[name](plain)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(plain, step)
        keep = keep_by_sorting([parameter.grad.numpy() for parameter in plain], 0.4, "tensor")
        before = weights(ours)
        for parameter, selected in zip(plain, keep, strict=True):
            parameter.grad *= torch.from_numpy(selected)
        masked.step()
        inner.step()
        assert all_equal(ours, plain)
    moved = torch.cat(
        [(new != old)[~torch.from_numpy(mask)] for new, old, mask in zip(ours, before, keep, strict=True)]
    )
    assert moved.all()


def test_weight_decay_does_not_change_the_state_of_never_selected_entries() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = MaskedOptimizer(SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.5), UpdateRule("gmt", 0.5))
    parameter.grad = torch.tensor([0.1, 3.0])
    optimizer.step()
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [0.0, 4.0]


def test_selects_from_the_accumulated_gradient() -> None:
    """The largest sum is selected, not the largest addend: algorithm 1, lines 3 to 7."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = MaskedOptimizer(SGD([parameter], lr=1.0), UpdateRule("gmt", 0.6))
    for factors in ([5.0, 2.0, 1.0], [-5.0, 2.0, 1.0]):
        (parameter * torch.tensor(factors)).sum().backward()
    optimizer.step()
    assert parameter.tolist() == [0.0, -4.0, 0.0]


def test_clipping_after_selection_sees_the_masked_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = MaskedOptimizer(SGD([parameter], lr=1.0), UpdateRule("gmt", 0.5))
    parameter.grad = torch.tensor([3.0, 1.0, 4.0, 2.0])
    optimizer.select()
    assert clip_grad_norm_([parameter], 1.0) == 5.0
    optimizer.step()
    torch.testing.assert_close(parameter.data, torch.tensor([-0.6, 0.0, -0.8, 0.0]))


def test_a_second_selection_changes_nothing() -> None:
    """In the plain variant, a random choice among the chosen would show up immediately."""
    parameters = make_parameters()
    optimizer = MaskedOptimizer(SGD(parameters, lr=1.0), UpdateRule("random", 0.4))
    set_gradients(parameters, 0)
    optimizer.select()
    selected = dict(optimizer.selected)
    clip_grad_norm_(parameters, 0.1)
    optimizer.select()
    assert all(optimizer.selected[parameter] is selected[parameter] for parameter in parameters)
    optimizer.step()
    assert optimizer.selected == {}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_step_leaves_no_selection_behind(set_to_none: bool) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = MaskedOptimizer(SGD([parameter], lr=1.0), UpdateRule("gmt", 0.5))
    parameter.grad = torch.tensor([2.0, 1.0])
    optimizer.select()
    optimizer.zero_grad(set_to_none)
    (parameter * torch.tensor([1.0, 2.0])).sum().backward()
    optimizer.step()
    assert parameter.tolist() == [0.0, -2.0]


def test_a_step_skipped_by_the_caller_leaves_no_selection_behind() -> None:
    """Gradients reset by the model and not the optimizer, as in `transformers.Trainer`."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = MaskedOptimizer(SGD([parameter], lr=1.0), UpdateRule("gmt", 0.5))
    parameter.grad = torch.tensor([2.0, 1.0])
    optimizer.select()
    parameter.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    assert parameter.tolist() == [0.0, -2.0]


@pytest.mark.parametrize("unselected", ["unchanged", "momentum"])
def test_parameters_without_a_gradient_are_untouched(unselected: Any) -> None:
    with_gradient, without = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    rule = UpdateRule("gmt", 0.5, "global", unselected)
    optimizer = MaskedOptimizer(AdamW([without, with_gradient], weight_decay=0.1), rule)
    with_gradient.grad = torch.arange(4.0)
    optimizer.step()
    assert without.tolist() == [1.0] * 4
    assert without not in optimizer.state
    assert (optimizer.updated_entries, optimizer.total_entries) == (2, 4)


def test_a_step_without_gradients_does_nothing() -> None:
    parameters = make_parameters()
    optimizer = MaskedOptimizer(AdamW(parameters), GMT)
    optimizer.step()
    assert all_equal(parameters, make_parameters())


def test_a_single_number_is_a_parameter_like_any_other() -> None:
    """Its step counter has the parameter's shape, but is not part of its entries."""
    scalar, vector = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(3))
    optimizer = MaskedOptimizer(AdamW([scalar, vector], lr=0.1), UpdateRule("gmt", 0.25, "global"))
    for step in range(1, 4):
        scalar.grad, vector.grad = torch.tensor(0.1), torch.ones(3)
        optimizer.step()
        assert scalar.item() == 1.0
        assert optimizer.state[scalar]["step"] == step
        assert optimizer.state[scalar]["exp_avg"] == 0.0
    assert (vector < 1.0).all()


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_random_updates_different_entries_in_exact_numbers_at_each_step(scope: Any) -> None:
    parameters = make_parameters()
    optimizer = MaskedOptimizer(SGD(parameters, lr=1.0), UpdateRule("random", 0.3, scope))
    sizes = [parameter.numel() for parameter in parameters]
    choices = set()
    for step in range(6):
        before = weights(parameters)
        set_gradients(parameters, step)
        optimizer.step()
        changed = [new != old for new, old in zip(parameters, before, strict=True)]
        counts = [int(mask.sum()) for mask in changed]
        if scope == "tensor":
            assert counts == [size - removed_count(size, 0.3) for size in sizes]
        else:
            assert sum(counts) == sum(sizes) - removed_count(sum(sizes), 0.3)
        assert sum(counts) == optimizer.updated_entries
        choices.add(tuple(torch.cat([mask.flatten() for mask in changed]).tolist()))
    assert optimizer.total_entries == sum(sizes)
    assert len(choices) == 6


def test_entries_that_overflow_do_not_affect_others() -> None:
    """An infinite gradient corrupts only the entry that it updates."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MaskedOptimizer(SGD([parameter], lr=1.0), UpdateRule("gmt", 0.6))
    parameter.grad = torch.tensor([1.0, -float("inf"), 2.0])
    optimizer.step()
    assert parameter.tolist() == [1.0, float("inf"), 1.0]


def test_a_transposed_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2).t())
    optimizer = MaskedOptimizer(AdamW([parameter], lr=1.0), UpdateRule("gmt", 0.5))
    parameter.grad = torch.tensor([[1.0, 6.0, 2.0], [5.0, 3.0, 4.0]])
    optimizer.step()
    assert (parameter != 0).tolist() == [[False, True, False], [True, False, True]]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.2, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", INNER)
def test_parts_of_a_parameter_are_updated_like_the_whole(
    name: str, dtype: torch.dtype, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mftctl.training.updates.masked_optimizer._PART_ENTRIES", 64)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in ((21, 13), (64,), (1,))]
    states = []
    for in_parts in (True, False):
        parameters = [nn.Parameter(value.clone()) for value in values]
        optimizer = MaskedOptimizer(INNER[name](parameters), UpdateRule("gmt", ratio))
        if not in_parts:
            monkeypatch.setattr(MaskedOptimizer, "_is_updated_in_parts", lambda *_: False)
        for step in range(4):
            set_gradients(parameters, step)
            optimizer.step()
        states.append((snapshot(parameters, optimizer), [dict(optimizer.state[item]) for item in parameters]))
        assert set(optimizer.state) == set(parameters)
    (in_parts_now, in_parts_state), (whole_now, whole_state) = states
    for one, other in zip(in_parts_now, whole_now, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)
    for state, right in zip(in_parts_state, whole_state, strict=True):
        assert list(state) == list(right)
        assert state.get("step") == right.get("step")


def test_a_parameter_without_entries() -> None:
    empty, other = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(2))
    optimizer = MaskedOptimizer(AdamW([empty, other]), UpdateRule("gmt", 0.5, "global"))
    for step in range(1, 4):
        empty.grad, other.grad = torch.zeros(0, 3), torch.ones(2)
        optimizer.step()
        assert optimizer.state[empty]["step"] == optimizer.state[other]["step"] == step
    assert other[0] == 0.0
    assert other[1] < 0.0
