"""Weighted sums against an implementation in numpy, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.errors import ModelError
from mftctl.masking.checkpoints import tensors as stored_files
from mftctl.masking.checkpoints.mixture import sum_of_parts, weighted_sum, write_mixture
from mftctl.masking.checkpoints.tensors import CHUNK_BYTES, tensor_index
from tests.masking.built_checkpoints import SAFETENSORS_NAMES, raw_tensors, stored_tensors, write_checkpoint
from tests.masking.combined_numpy import combined

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {"a.w": (3, 5), "b.w": (17,), "c.w": (2, 3, 4), "d": (1,)}


def some_tensors(dtype: torch.dtype, seed: int, *, shared: float = 0.0) -> dict[str, torch.Tensor]:
    """Random tensors; a share of the entries is the same for every seed."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        same = torch.rand(shape, generator=common) < shared
        values = torch.where(same, torch.randn(shape, generator=common), torch.randn(shape, generator=own))
        found[name] = values.to(dtype)
    return found


def raw_of(folder: Path) -> dict[str, bytes]:
    return {name: raw for path in sorted(folder.glob("*.safetensors")) for name, raw in raw_tensors(path).items()}


def mixed(folders: list[Path], weights: list[float], output: Path) -> dict[str, bytes]:
    indexes = [tensor_index(folder) for folder in folders]
    output.mkdir()
    write_mixture(folders[0], {name: [index[name] for index in indexes] for name in indexes[0]}, weights, output)
    return raw_of(output)


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(DTYPES),
    weights=st.lists(st.floats(-2, 2, width=32) | st.just(0.0), min_size=2, max_size=4).filter(any),
    shards=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    shared=st.sampled_from([0.0, 0.5]),
    chunk_bytes=st.sampled_from([8, 24, CHUNK_BYTES]),
    seed=st.integers(0, 2**20),
)
def test_the_sum_is_that_of_numpy_for_any_sharding_and_chunks(
    dtype: torch.dtype, weights: list[float], shards: list[int], shared: float, chunk_bytes: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_files, "CHUNK_BYTES", chunk_bytes)
        root = Path(folder)
        folders = [
            write_checkpoint(
                root / str(number), some_tensors(dtype, seed + number, shared=shared), shards=shards[number]
            )
            for number in range(len(weights))
        ]
        found = mixed(folders, weights, root / "out")
        raws = [raw_of(one) for one in folders]
        name_of_dtype = SAFETENSORS_NAMES[dtype]
        assert found == {name: combined([raw[name] for raw in raws], weights, name_of_dtype) for name in SHAPES}
        for name in SHAPES:  # the same in memory
            parts = [tensor_index(one)[name] for one in folders]
            assert sum_of_parts(parts, weights).view(torch.uint8).numpy().tobytes() == found[name]


def test_a_tensor_of_many_chunks_is_summed_throughout(tmp_path: Path) -> None:
    first, second = torch.randn(2, 700, 500, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    folders = [write_checkpoint(tmp_path / str(n), {"w": w.clone()}) for n, w in enumerate((first, second))]
    assert first.nbytes > 2 * CHUNK_BYTES
    mixed(folders, [0.25, 0.75], tmp_path / "out")
    expected = (0.25 * first.float() + 0.75 * second.float()).bfloat16()
    assert torch.equal(stored_tensors(tmp_path / "out")["w"], expected)


def test_the_order_of_the_sum_is_the_given_one() -> None:
    huge, tiny = torch.tensor([1e8]), torch.tensor([1.0])
    assert weighted_sum([huge, -huge, tiny], [1.0, 1.0, 1.0]) == 1
    assert weighted_sum([tiny, huge, -huge], [1.0, 1.0, 1.0]) == 0


def test_bf16_is_rounded_once_at_the_end() -> None:
    one, step = torch.tensor([1.0]).bfloat16(), torch.tensor([2.0**-8]).bfloat16()
    assert weighted_sum([one, step, step], [1.0, 1.0, 1.0]) == 1 + 2.0**-7  # rounding each sum would give 1


@pytest.mark.parametrize("value", [0.1, -0.0, float("inf"), 1e-45])
def test_an_entry_that_is_equal_in_all_keeps_its_bits(value: float) -> None:
    same = torch.tensor([value])
    assert weighted_sum([same] * 3, [0.3, 0.3, 0.4]).view(torch.int32) == same.view(torch.int32)


def test_a_checkpoint_of_weight_0_leaves_no_trace(tmp_path: Path) -> None:
    values = {"w": torch.tensor([-0.0, 1.0, 1e-45])}
    folders = [
        write_checkpoint(tmp_path / "nan", {"w": torch.tensor([1.0, float("nan"), float("inf")])}),
        write_checkpoint(tmp_path / "own", values),
    ]
    assert mixed(folders, [0.0, 1.0], tmp_path / "out") == raw_of(folders[1])


@pytest.mark.parametrize(
    ("first", "second", "weights"),
    [(6e4, -6e4, [3.0, -2.0]), (float("nan"), 1.0, [0.5, 0.5]), (float("inf"), 1.0, [0.5, 0.5])],
)
def test_a_sum_that_is_not_finite_is_refused(first: float, second: float, weights: list[float], tmp_path: Path) -> None:
    folders = [
        write_checkpoint(tmp_path / str(number), {"w": torch.tensor([0.5, value, 1.0]).half()})
        for number, value in enumerate((first, second))
    ]
    with pytest.raises(ModelError, match="not finite") as caught:
        mixed(folders, weights, tmp_path / "out")
    assert (caught.value.key, caught.value.actual) == ("w", "1 infinite or NaN entries")
    with pytest.raises(ModelError, match="not finite"):
        sum_of_parts([tensor_index(folder)["w"] for folder in folders], weights)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / str(number), {"w": torch.ones(9)}) for number in range(2)]
    indexes = [tensor_index(folder) for folder in folders]
    file = folders[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="truncated"):
        write_mixture(folders[0], {"w": [index["w"] for index in indexes]}, [0.5, 0.5], tmp_path / "out")
