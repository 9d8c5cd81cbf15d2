from __future__ import annotations

import io
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mftctl.errors import MaskFormatError, MaskMismatchError
from mftctl.masking.mask_file.codecs import unpack
from mftctl.workflows.mask_exchange.maskllm_npz import NpzMasks, write_npz
from tests.masking.mask_files import build_mask

KEEP = np.random.default_rng(0).random((5, 7)) < 0.5


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(5, 7), (4, 8), (1,), (2, 3, 4), (9,)])
def test_bits_packed_by_numpy_are_read(save: object, shape: tuple[int, ...], tmp_path: Path) -> None:
    keep = np.random.default_rng(1).random(shape) < 0.5
    save(tmp_path / "masks.npz", **{"b.weight.mask": np.packbits(keep), "a": np.packbits(~keep)})  # type: ignore[operator]
    masks = NpzMasks(tmp_path / "masks.npz")
    assert masks.names() == ["b.weight.mask", "a"]
    assert np.array_equal(unpack(masks.packed("b.weight.mask", shape), keep.size).reshape(shape), keep)
    assert np.array_equal(unpack(masks.packed("a", shape), keep.size).reshape(shape), ~keep)


def test_written_masks_are_what_maskllm_applies(tmp_path: Path) -> None:
    keep = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    with (tmp_path / "masks.npz").open("wb") as stream:
        write_npz(build_mask(**{"layers.0.weight": keep, "layers.1.weight": ~keep}), stream)
    with np.load(tmp_path / "masks.npz", allow_pickle=False) as archive:
        assert sorted(archive) == ["layers.0.weight.mask", "layers.1.weight.mask"]
        bits = np.unpackbits(archive["layers.0.weight.mask"])
    assert torch.equal(torch.from_numpy(bits).view(6, 12).bool(), keep)


def test_written_bytes_depend_on_the_mask_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as stream:
            write_npz(build_mask(w=torch.from_numpy(KEEP)), stream)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("shape", [(5, 9), (3, 7), (64, 64)])
def test_another_size_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    np.savez(tmp_path / "masks.npz", a=np.packbits(KEEP))
    with pytest.raises(MaskMismatchError, match="size of a mask") as caught:
        NpzMasks(tmp_path / "masks.npz").packed("a", shape)
    assert caught.value.actual == "5 bytes"
    assert caught.value.key == "a"


@pytest.mark.parametrize("array", [KEEP, np.packbits(KEEP).astype(np.int8), np.packbits(KEEP)[None], np.uint8(3)])
def test_array_that_is_not_packed_bits_is_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "masks.npz", a=array)
    with pytest.raises(MaskFormatError, match="does not hold packed bits") as caught:
        NpzMasks(tmp_path / "masks.npz").packed("a", (5, 7))
    assert caught.value.key == "a"


def test_pickled_array_is_refused_without_opening_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "masks.npz", a=np.array([{"not": "bits"}], dtype=object))
    with pytest.raises(MaskFormatError, match="does not hold packed bits") as caught:
        NpzMasks(tmp_path / "masks.npz").packed("a", (5, 7))
    assert caught.value.actual == "object, 1 dimension"


def test_padding_bits_that_are_not_zero_are_refused(tmp_path: Path) -> None:
    packed = np.packbits(KEEP)
    packed[-1] |= 1
    np.savez(tmp_path / "masks.npz", a=packed)
    with pytest.raises(MaskFormatError, match="padding bits"):
        NpzMasks(tmp_path / "masks.npz").packed("a", (5, 7))


def test_member_that_is_not_an_array_is_refused(tmp_path: Path) -> None:
    file = write_archive(tmp_path / "masks.npz", {"a.npy": npy(np.packbits(KEEP)), "readme.txt": b"hello"})
    with pytest.raises(MaskFormatError, match="not a numpy array") as caught:
        NpzMasks(file)
    assert caught.value.key == "readme.txt"


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", npy(np.packbits(KEEP))[:-1], npy(np.packbits(KEEP)) + b"\0"])
def test_member_that_is_cut_short_or_too_long_is_refused(content: bytes, tmp_path: Path) -> None:
    masks = NpzMasks(write_archive(tmp_path / "masks.npz", {"a.npy": content}))
    with pytest.raises(MaskFormatError, match="archive is damaged") as caught:
        masks.packed("a", (5, 7))
    assert caught.value.key == "a"


def test_array_that_claims_to_be_huge_is_refused_without_allocation(tmp_path: Path) -> None:
    header = npy(np.zeros(5, np.uint8))[:128].replace(b"(5,), }     ", b"(%d,), }" % 2**40, 1)
    masks = NpzMasks(write_archive(tmp_path / "masks.npz", {"a.npy": header.ljust(128)[:127] + b"\n"}))
    tracemalloc.start()
    with pytest.raises((MaskFormatError, MaskMismatchError)):
        masks.packed("a", (5, 7))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.slow
def test_archive_bomb_is_refused_without_allocation(tmp_path: Path) -> None:
    content = npy(np.zeros(5, np.uint8)) + bytes(50_000_000)
    masks = NpzMasks(write_archive(tmp_path / "masks.npz", {"a.npy": content}))
    del content
    tracemalloc.start()
    with pytest.raises(MaskFormatError, match="damaged"):
        masks.packed("a", (5, 8))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_gives_the_mask_or_a_known_error(save: object, data: st.DataObject, tmp_path: Path) -> None:
    save(tmp_path / "masks.npz", a=np.packbits(KEEP))  # type: ignore[operator]
    content = bytearray((tmp_path / "masks.npz").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.npz").write_bytes(content)
    with suppress(MaskFormatError, MaskMismatchError):
        masks = NpzMasks(tmp_path / "damaged.npz")
        for name in masks.names():
            assert np.array_equal(unpack(masks.packed(name, (5, 7)), 35).reshape(5, 7), KEEP)
