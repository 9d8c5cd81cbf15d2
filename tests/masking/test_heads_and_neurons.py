"""Which weights belong to a head or neuron, compared with slices by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mftctl.errors import MaskingError
from mftctl.masking.heads_and_neurons import heads_of, neurons_of
from mftctl.masking.targets import MaskTarget, find_targets
from tests.conftest import build_llama
from tests.masking.architectures import build

HEAD = 8


def random_values(targets: list[MaskTarget]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {target.name: torch.randn(target.weight.shape, generator=generator) for target in targets}


def test_heads_with_shared_keys_and_values() -> None:
    model = build_llama(layers=1)  # 4 heads, 2 of keys and values
    targets = find_targets(model, [0], "attn")
    heads, values = heads_of(model, targets), random_values(targets)
    found = sum(heads.sums(target, values[target.name]) for target in targets)
    q, k, v, o = (values[target.name].double() for target in targets)
    for head in range(4):
        own, shared = slice(head * HEAD, (head + 1) * HEAD), slice(head // 2 * HEAD, (head // 2 + 1) * HEAD)
        expected = q[own].sum() + (k[shared].sum() + v[shared].sum()) / 2 + o[:, own].sum()
        assert float(found[head]) == pytest.approx(float(expected), abs=1e-12)
    total = sum(float(part.double().sum()) for part in values.values())
    assert float(found.sum()) == pytest.approx(total, abs=1e-12)


def test_every_weight_belongs_to_one_of_the_neurons() -> None:
    model = build_llama(layers=2)
    targets = find_targets(model, [1], "mlp")
    neurons, values = neurons_of(targets), random_values(targets)
    assert neurons.count(1) == 64
    found = sum(neurons.sums(target, values[target.name]) for target in targets)
    gate, up, down = (values[target.name].double() for target in targets)
    assert torch.allclose(found, gate.sum(1) + up.sum(1) + down.sum(0), atol=1e-12)


def test_neurons_of_weights_stored_with_their_inputs_first() -> None:
    model = build("gpt2")
    targets = find_targets(model, [0], "mlp")
    neurons, values = neurons_of(targets), random_values(targets)
    into, out_of = (values[target.name].double() for target in targets)
    assert into.shape == (32, 128)
    found = sum(neurons.sums(target, values[target.name]) for target in targets)
    assert torch.allclose(found, into.sum(0) + out_of.sum(1), atol=1e-12)


def test_a_part_of_the_projections() -> None:
    model = build_llama(layers=1)
    (target,) = find_targets(model, [0], "both", ["v_proj"])
    heads, values = heads_of(model, [target]), random_values([target])[target.name]
    assert heads.sums(target, values).tolist() == pytest.approx(
        [float(values[head // 2 * HEAD :][:HEAD].double().sum()) / 2 for head in range(4)]
    )


@pytest.mark.parametrize(
    ("family", "part", "tensor"),
    [
        ("phi3", "attn", "model.layers.0.self_attn.qkv_proj"),
        ("phi3", "mlp", "model.layers.0.mlp.gate_up_proj"),
        ("gpt2", "attn", "transformer.h.0.attn.c_attn"),
        ("gpt_neox", "attn", "gpt_neox.layers.0.attention.query_key_value"),
        ("mixtral", "mlp", "model.layers.0.block_sparse_moe.experts.0.w1"),
    ],
)
def test_fused_projections_are_refused_by_name(family: str, part: str, tensor: str) -> None:
    model = build(family)
    targets = find_targets(model, [0], part)  # type: ignore[arg-type]
    with pytest.raises(MaskingError, match="cannot be assigned") as error:
        heads_of(model, targets) if part == "attn" else neurons_of(targets)
    assert error.value.key == tensor


def test_a_configuration_without_a_number_of_heads() -> None:
    model = build_llama(layers=1)
    targets = find_targets(model, [0], "attn")
    model.config.num_key_value_heads = 3
    with pytest.raises(MaskingError, match="heads of this model are not known"):
        heads_of(model, targets)


def test_a_projection_that_does_not_divide_into_heads() -> None:
    model = build_llama(layers=1)
    targets = find_targets(model, [0], "attn")
    model.config.num_attention_heads, model.config.num_key_value_heads = 7, 7
    with pytest.raises(MaskingError, match="does not divide into attention heads") as error:
        heads_of(model, targets)
    assert error.value.key == "model.layers.0.self_attn.q_proj"


def test_two_modules_in_a_layer_are_not_counted_together() -> None:
    model = build_llama(layers=1)
    targets = find_targets(model, [0], "mlp")
    other = MaskTarget("model.layers.0.shared_mlp.up_proj", 0, "mlp", nn.Linear(32, 64))
    with pytest.raises(MaskingError, match="several modules") as error:
        neurons_of([*targets, other])
    assert error.value.key == other.name


def test_projections_of_different_widths_have_no_neurons_in_common() -> None:
    targets = find_targets(build_llama(layers=1), [0], "mlp")
    wider = MaskTarget("model.layers.0.mlp.fc1", 0, "mlp", nn.Linear(32, 65))
    with pytest.raises(MaskingError, match="different numbers of neurons"):
        neurons_of([*targets, wider])
