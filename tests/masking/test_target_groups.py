"""Groups of projections that share a mask."""

from __future__ import annotations

from mftctl.masking.target_groups import TargetGroup, groups_by_projection, largest_kind
from mftctl.masking.targets import find_targets
from tests.conftest import build_llama
from tests.masking.architectures import build


def test_one_group_for_each_kind_in_model_order() -> None:
    groups = groups_by_projection(build_llama(), [1, 3])
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [group.name for group in groups] == names
    assert {group.layers for group in groups} == {(1, 3)}
    assert [group.name for group in groups_by_projection(build_llama(), [0], "attn")] == names[:4]
    assert groups_by_projection(build_llama(), [0], "both", ["v_proj"]) == [TargetGroup((0,), "v_proj")]


def test_experts_of_one_kind_are_one_group() -> None:
    assert [group.name for group in groups_by_projection(build("mixtral"), [0], "mlp")] == ["w1", "w3", "w2"]


def test_a_group_has_its_targets() -> None:
    targets = find_targets(build_llama())
    values = [target for target in targets if TargetGroup((0, 2), "v_proj").has(target)]
    assert [target.name for target in values] == [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 2)]
    layers = TargetGroup((1, 2))
    assert (layers.name, layers.projections(("up_proj",))) == ("1-2", ("up_proj",))
    assert sum(layers.has(target) for target in targets) == 14
    assert TargetGroup((1,), "up_proj").projections(None) == ("up_proj",)


def test_the_kind_with_the_most_weights() -> None:
    found = largest_kind(find_targets(build_llama(intermediate_size=48)))
    assert {target.projection for target in found} == {"gate_proj"}
    assert len(found) == 4
