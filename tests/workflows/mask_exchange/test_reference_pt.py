from __future__ import annotations

import pickle
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mftctl.errors import MaskFormatError, MaskMismatchError
from mftctl.masking.mask_file.codecs import unpack
from mftctl.workflows.mask_exchange.reference_pt import TorchMasks, write_torch
from tests.masking.mask_files import build_mask

KEEP = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.5


def save(folder: Path, content: object, **options: Any) -> Path:
    torch.save(content, folder / "masks.pt", **options)
    return folder / "masks.pt"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_masks_are_read_in_every_dtype_and_both_formats_of_torch(
    dtype: torch.dtype, zipped: bool, tmp_path: Path
) -> None:
    masks = TorchMasks(
        save(tmp_path, {"b": KEEP.to(dtype), "a": KEEP.T.to(dtype)}, _use_new_zipfile_serialization=zipped)
    )
    assert masks.names() == ["b", "a"]
    assert np.array_equal(unpack(masks.packed("b", (5, 7)), 35).reshape(5, 7), KEEP.numpy())
    assert np.array_equal(unpack(masks.packed("a", (7, 5)), 35).reshape(7, 5), KEEP.numpy().T)


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    masks = TorchMasks(save(tmp_path, {"a": torch.nn.Parameter(KEEP.float())}))
    assert np.array_equal(unpack(masks.packed("a", (5, 7)), 35).reshape(5, 7), KEEP.numpy())


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan"), float("inf"), 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_other_than_zero_or_one_is_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    scores = KEEP.to(dtype)
    scores[3, 2] = value
    with pytest.raises(MaskFormatError, match="values other than 0 and 1") as caught:
        TorchMasks(save(tmp_path, {"a": scores})).packed("a", (5, 7))
    assert (caught.value.key, caught.value.actual) == ("a", f"1 other, such as {value:g}")


@pytest.mark.parametrize("shape", [(7, 5), (35,), (5, 7, 1), (5, 8)])
def test_another_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="shape of a mask") as caught:
        TorchMasks(save(tmp_path, {"a": KEEP})).packed("a", shape)
    assert (caught.value.expected, caught.value.actual) == (shape, (5, 7))


def _nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # nested tensors are a prototype feature
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


@pytest.mark.parametrize(
    "value",
    [
        KEEP.int(),
        KEEP.to(torch.complex64),
        KEEP.float().to_sparse(),
        KEEP.float().to("meta"),
        _nested(torch.strided),
        _nested(torch.jagged),
        {"mask": KEEP},
        1.0,
        None,
    ],
    ids=["int", "complex", "sparse", "meta", "nested", "jagged", "dict", "number", "none"],
)
def test_entry_that_is_not_a_mask_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match="entry of the pickle is not a mask") as caught:
        TorchMasks(save(tmp_path, {"a": value})).packed("a", (5, 7))
    assert caught.value.key == "a"


@pytest.mark.parametrize("content", [{}, [KEEP], KEEP, {1: KEEP}, 3, None])
def test_pickle_without_masks_is_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match="contains no masks"):
        TorchMasks(save(tmp_path, content))


class Hostile:
    """A pickle that creates a file if it is opened carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code_is_refused_and_does_not(zipped: bool, tmp_path: Path) -> None:
    target = tmp_path / "owned"
    file = save(tmp_path, {"a": KEEP, "b": Hostile(target)}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(MaskFormatError, match="could run code") as caught:
        TorchMasks(file)
    assert caught.value.path == str(file)
    assert not target.exists()


def test_plain_pickle_that_would_run_code_is_refused_and_does_not(tmp_path: Path) -> None:
    (tmp_path / "masks.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "owned")))
    with pytest.raises(MaskFormatError, match="could run code"):
        TorchMasks(tmp_path / "masks.pt")
    assert not (tmp_path / "owned").exists()


def test_tensor_that_claims_more_than_the_file_holds_is_refused_by_its_shape(tmp_path: Path) -> None:
    masks = TorchMasks(save(tmp_path, {"a": torch.ones(1).expand(2**30, 2**30)}))
    with pytest.raises(MaskMismatchError, match="shape of a mask"):
        masks.packed("a", (5, 7))


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_gives_a_mask_or_a_known_error(zipped: bool, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(save(tmp_path, {"a": KEEP.float()}, _use_new_zipfile_serialization=zipped).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(2, len(content) - 1))] = data.draw(st.integers(0, 255))
    # The file of the last example may still be mapped, so a new file replaces it.
    (tmp_path / "damaged.pt").unlink(missing_ok=True)
    (tmp_path / "damaged.pt").write_bytes(content)
    with suppress(MaskFormatError, MaskMismatchError):
        masks = TorchMasks(tmp_path / "damaged.pt")
        for name in masks.names():
            assert masks.packed(name, (5, 7)).shape == (5,)


def test_written_masks_are_what_the_reference_implementation_applies(tmp_path: Path) -> None:
    mask = build_mask(**{"layers.0.weight": KEEP, "experts": KEEP})
    with (tmp_path / "masks.pt").open("wb") as stream:
        write_torch(mask, stream)
    masks = torch.load(tmp_path / "masks.pt", map_location="cpu", weights_only=True)
    assert list(masks) == ["experts", "layers.0"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(5, 7).to(dtype)
        assert torch.equal(weight.clone().mul_(masks["layers.0"]), torch.where(KEEP, weight, 0.0))
    assert torch.mean(masks["layers.0"]) == KEEP.float().mean()
