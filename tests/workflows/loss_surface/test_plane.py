"""The plane through three models: exact corners, right angles and true distances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mftctl.errors import ModelError
from mftctl.workflows.loss_surface.plane import PlanePoint, WeightPlane, Weights

COORDINATE = st.floats(-3, 3)


def make_weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 6, generator=generator).to(dtype),
        "bias": torch.randn(4, generator=generator).to(dtype),
    }


def flat(weights: Weights) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in weights.values()])


def weights_at(plane: WeightPlane, model: nn.Linear, point: PlanePoint) -> torch.Tensor:
    plane.set_point(point)
    return flat(dict(model.named_parameters()))


@pytest.mark.slow
@given(st.integers(0, 99), COORDINATE, COORDINATE, COORDINATE, COORDINATE)
def test_distances_on_the_plane_are_those_of_the_weights(seed: int, x: float, y: float, z: float, w: float) -> None:
    model = nn.Linear(6, 4)
    plane = WeightPlane(model, (make_weights(seed), make_weights(seed + 100), make_weights(seed + 200)))
    one, other = (weights_at(plane, model, point) for point in (PlanePoint(x, y), PlanePoint(z, w)))
    assert float(torch.dist(one, other)) == pytest.approx(math.hypot(x - z, y - w), abs=1e-5)


@pytest.mark.slow
@given(st.integers(0, 99))
def test_the_corners_have_the_stated_coordinates(seed: int) -> None:
    model = nn.Linear(6, 4)
    corners = make_weights(seed), make_weights(seed + 100), make_weights(seed + 200)
    plane = WeightPlane(model, corners)
    assert plane.corners[0] == PlanePoint(0.0, 0.0)
    assert plane.corners[1].y == 0
    assert plane.corners[2].y > 0
    for point, weights in zip(plane.corners, corners, strict=True):
        torch.testing.assert_close(weights_at(plane, model, point), flat(weights), atol=1e-5, rtol=0)


def test_a_corner_has_its_exact_weights_and_points_do_not_depend_on_earlier_ones() -> None:
    model = nn.Linear(6, 4)
    corners = make_weights(1), make_weights(2), make_weights(3)
    plane = WeightPlane(model, corners)
    fresh = weights_at(plane, model, PlanePoint(0.3, 0.7))
    for number, weights in enumerate(corners):
        plane.set_corner(number)
        assert torch.equal(flat(dict(model.named_parameters())), flat(weights))
    assert torch.equal(weights_at(plane, model, PlanePoint(0.3, 0.7)), fresh)


def test_corners_in_bf16_are_distinguished_in_fp32() -> None:
    model = nn.Linear(6, 4)
    first = make_weights(1, torch.bfloat16)
    second = {name: torch.nextafter(tensor, torch.full_like(tensor, 9.0)) for name, tensor in first.items()}
    third = {**first, "bias": torch.zeros_like(first["bias"])}
    plane = WeightPlane(model, (first, second, third))
    halfway = weights_at(plane, model, PlanePoint(plane.corners[1].x / 2, 0.0))
    torch.testing.assert_close(halfway, (flat(first) + flat(second)) / 2, atol=1e-6, rtol=0)
    assert not torch.equal(halfway.bfloat16().double(), halfway)


def test_a_tensor_shared_by_all_corners_is_unchanged() -> None:
    model = nn.Linear(6, 4)
    first, second = make_weights(1), make_weights(2)
    plane = WeightPlane(model, (first, {**second, "bias": first["bias"]}, {**make_weights(3), "bias": first["bias"]}))
    plane.set_point(PlanePoint(1.5, -2.5))
    assert torch.equal(model.bias, first["bias"])


def test_two_models_with_the_same_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="first two of the three models have the same weights"):
        WeightPlane(nn.Linear(6, 4), (make_weights(1), make_weights(1), make_weights(2)))


def test_three_models_on_a_line_are_refused() -> None:
    first, second = make_weights(1), make_weights(2)
    third = {name: first[name] + 3 * (second[name] - first[name]) for name in first}
    with pytest.raises(ModelError, match="lie on a line"):
        WeightPlane(nn.Linear(6, 4), (first, second, third))
    with pytest.raises(ModelError, match="lie on a line"):
        WeightPlane(nn.Linear(6, 4), (first, second, first))


def test_models_of_another_form_are_refused() -> None:
    other = {**make_weights(2), "weight": torch.zeros(5, 6)}
    with pytest.raises(ModelError, match="do not have the same parameters"):
        WeightPlane(nn.Linear(6, 4), (make_weights(1), other, make_weights(3)))
