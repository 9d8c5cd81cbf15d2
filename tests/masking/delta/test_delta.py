"""Reading delta files: golden bytes, damage, and files that violate the format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mftctl.errors import MaskFormatError
from mftctl.experiments import delta_options
from mftctl.masking.delta import selection, values
from mftctl.masking.delta.apply import apply_delta_to_checkpoint
from mftctl.masking.delta.delta import is_delta_file, open_delta
from mftctl.masking.delta.document import CARRIED_FILES
from mftctl.masking.mask import load_mask, save_mask
from tests.masking.delta.made_deltas import make, plan, raw_checkpoint, write_pair
from tests.masking.delta.plain_delta import plain_applied, plain_read_delta
from tests.masking.mask_files import GOLDEN, plain_file, small_mask

Change = Callable[[dict[str, Any], dict[str, bytes]], object]


def golden_pair(folder: Path) -> tuple[Path, Path]:
    """Checkpoints of plain numbers, the same on every machine."""
    numbers = torch.arange(60, dtype=torch.float32)
    before = {
        "layer.weight": (numbers / 64).reshape(6, 10).bfloat16(),
        "other.weight": (numbers / 32 - 1).reshape(5, 12),
        "norm.weight": torch.ones(5),
        "same.weight": torch.ones(2, 2),
        "tiny.weight": torch.zeros(1, 2),
    }
    changes = (numbers % 7 - 3) / 128
    after = {
        "layer.weight": (numbers / 64 + changes).reshape(6, 10).bfloat16(),
        "other.weight": (numbers / 32 - 1 + changes).reshape(5, 12),
        "norm.weight": torch.ones(5) + torch.tensor([0, 0.5, 0, -0.25, 0]),
        "same.weight": torch.ones(2, 2),
        "tiny.weight": torch.ones(1, 2),
    }
    base, tuned = write_pair(folder, before, after)
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    return base, tuned


GOLDENS = {
    "delta-exact": plan(0.75),
    "delta-int8": plan(0.75, "random", values="int8", rescale=True),
    "delta-sign": plan(values="sign"),
}


@pytest.fixture
def golden(tmp_path: Path) -> tuple[Path, Path]:
    """The base, and the golden file with exact values."""
    return golden_pair(tmp_path)[0], GOLDEN / "delta-exact.delta"


@pytest.mark.parametrize("name", GOLDENS)
def test_bytes_are_the_golden_ones(name: str, tmp_path: Path) -> None:
    make(*golden_pair(tmp_path), tmp_path / "change.delta", GOLDENS[name], run_id="0004-delta")
    assert (tmp_path / "change.delta").read_bytes() == (GOLDEN / f"{name}.delta").read_bytes()


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_files_apply(name: str, tmp_path: Path) -> None:
    base, _ = golden_pair(tmp_path)
    with open_delta(GOLDEN / f"{name}.delta") as delta:
        apply_delta_to_checkpoint(base, delta, tmp_path / "out", base_model="b")
        assert delta.file("chat_template.jinja") == b"{{ messages }}"
        left_out = {name: one.reason for name, one in delta.contents.left_out.items()}
    assert raw_checkpoint(tmp_path / "out") == plain_applied(GOLDEN / f"{name}.delta", raw_checkpoint(base))
    assert left_out == ({} if name == "delta-sign" else {"tiny.weight": "dropped"})
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_golden_file_is_the_one_that_the_definition_gives() -> None:
    document, payloads = plain_read_delta(GOLDEN / "delta-exact.delta")
    assert plain_file(document, payloads) == (GOLDEN / "delta-exact.delta").read_bytes()


def test_every_byte_counts(golden: tuple[Path, Path], tmp_path: Path) -> None:
    """A sample of all single damaged bytes; each is found on opening."""
    content, path = golden[1].read_bytes(), tmp_path / "damaged.delta"
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(MaskFormatError), open_delta(path):
            pass


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(length: int, golden: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "short.delta").write_bytes(golden[1].read_bytes()[:length])
    with pytest.raises(MaskFormatError), open_delta(tmp_path / "short.delta"):
        pass
    assert not is_delta_file(tmp_path / "short.delta")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match="cannot be read"), open_delta(tmp_path / "none.delta"):
        pass


def test_a_mask_is_no_delta_file_and_a_delta_file_is_no_mask(golden: tuple[Path, Path], tmp_path: Path) -> None:
    save_mask(small_mask(), tmp_path / "mask.bits")
    with pytest.raises(MaskFormatError, match="This is a mask file"), open_delta(tmp_path / "mask.bits"):
        pass
    with pytest.raises(MaskFormatError, match="This is a delta file"):
        load_mask(golden[1])
    assert is_delta_file(golden[1])
    assert not is_delta_file(tmp_path / "mask.bits")


def read_all(path: Path) -> None:
    """Reads every tensor and file of a delta file."""
    with open_delta(path) as delta:
        for name, record in delta.contents.tensors.items():
            delta.change(name).bits.part(0, record.weights)
        for name in delta.contents.files:
            delta.file(name)


def refused(path: Path, tmp_path: Path, change: Change) -> MaskFormatError:
    """The error raised for a golden file with changes and a correct digest, on opening it or reading its tensors."""
    document, payloads = copy.deepcopy(plain_read_delta(path))
    change(document, payloads)
    (tmp_path / "hostile.delta").write_bytes(plain_file(document, payloads))
    with pytest.raises(MaskFormatError) as caught:
        read_all(tmp_path / "hostile.delta")
    assert caught.value.path == str(tmp_path / "hostile.delta")
    return caught.value


def of_layer(**fields: object) -> Change:
    return lambda document, payloads: document["tensors"]["layer.weight"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, p: d.update(format_version=4), "format version"),
        (lambda d, p: d.update(more=1), "Extra inputs"),
        (lambda d, p: d.pop("files"), "Field required"),
        (lambda d, p: d.update(kind="weight"), "'delta'"),
        (lambda d, p: d.update(values="fp4"), "'exact'"),
        (lambda d, p: d.update(tensors={}), "at least 1 item"),
        (lambda d, p: d.update(tuned=[]), "a delta file names its fine-tuned models"),
        (lambda d, p: d.update(scale=1), "greater than 1"),
        (lambda d, p: d["unchanged"].update({"layer.weight": d["unchanged"]["same.weight"]}), "both changed and not"),
        (lambda d, p: d["left_out"]["tiny.weight"].update(reason="lost"), "'dropped'"),
        (lambda d, p: d["files"].update({"../evil": d["files"]["chat_template.jinja"]}), "carried file must be one of"),
        (lambda d, p: d["files"].update({"modeling.py": d["files"]["chat_template.jinja"]}), "carried file must be"),
        (lambda d, p: d["files"]["chat_template.jinja"].update(size_bytes=2**40), "less than or equal"),
        (of_layer(dtype="I32"), "must be one of"),
        (of_layer(removed=60), "must have a changed entry"),
        (of_layer(removed=61), "cannot have 61 removed"),
        (of_layer(codec="all"), "codec all keeps every entry"),
        (of_layer(codec="zip"), "'packed'"),
        (of_layer(values="fp4"), "'exact'"),
        (of_layer(dtype="F8_E4M3", values="int8"), "must be exact"),
        (of_layer(values_codec="zip"), "'raw'"),
    ],
)  # fmt: skip
def test_a_document_that_violates_the_format_is_refused(
    change: Change, message: str, golden: tuple[Path, Path], tmp_path: Path
) -> None:
    error = refused(golden[1], tmp_path, change)
    assert message in f"{error.message} {error.expected}"


def renamed(document: dict[str, Any], payloads: dict[str, bytes]) -> None:
    document["tensors"]["values:x"] = document["tensors"].pop("layer.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "must not start with values:"),
        (lambda d, p: p.pop("values:layer.weight"), "not those that its document describes"),
        (lambda d, p: p.update(more=b"1"), "not those that its document describes"),
        (lambda d, p: p.update({"values:norm.weight": p["values:norm.weight"] + b"\0"}), "do not match the number"),
        (lambda d, p: p.update({"layer.weight": b"\1"}), "payload can hold"),
        (lambda d, p: p.update({"file:chat_template.jinja": b"\1"}), "cannot be unpacked"),
        (lambda d, p: d["files"]["chat_template.jinja"].update(size_bytes=3), "cannot be unpacked"),
        (lambda d, p: d["files"]["chat_template.jinja"].update(sha256="0" * 64), "does not match its digest"),
        (of_layer(removed=46), "does not match its shape"),
    ],
)
def test_payloads_that_violate_the_format_are_refused(
    change: Change, message: str, golden: tuple[Path, Path], tmp_path: Path
) -> None:
    error = refused(golden[1], tmp_path, change)
    assert message in f"{error.message} {error.expected}"


def test_a_key_of_another_size_is_refused(tmp_path: Path) -> None:
    change: Change = lambda d, p: p.update({"layer.weight": b"\1" * 15})  # noqa: E731
    error = refused(GOLDEN / "delta-int8.delta", tmp_path, change)
    assert (error.expected, error.actual) == ("16 bytes", "15 bytes")


@pytest.mark.parametrize("limit", [0, 2**64 - 1])
def test_a_key_that_keeps_another_number_is_refused_while_applying(limit: int, tmp_path: Path) -> None:
    base, _ = golden_pair(tmp_path)
    document, payloads = plain_read_delta(GOLDEN / "delta-int8.delta")
    payloads["layer.weight"] = payloads["layer.weight"][:8] + limit.to_bytes(8, "little")
    (tmp_path / "hostile.delta").write_bytes(plain_file(document, payloads))
    with (
        open_delta(tmp_path / "hostile.delta") as delta,
        pytest.raises(MaskFormatError, match="number of changed entries"),
    ):
        apply_delta_to_checkpoint(base, delta, tmp_path / "out", base_model="b")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_found_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damage") / "hostile.delta"
    content = bytearray((GOLDEN / "delta-int8.delta").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    if bytes(content) != (GOLDEN / "delta-int8.delta").read_bytes():
        with pytest.raises(MaskFormatError), open_delta(path):
            pass


def test_control_characters_of_a_hostile_file_do_not_reach_the_terminal(
    golden: tuple[Path, Path], tmp_path: Path
) -> None:
    def change(document: dict[str, Any], payloads: dict[str, bytes]) -> None:
        document["\x1b[2J"] = 1

    assert "\x1b" not in str(refused(golden[1], tmp_path, change))


def test_the_recipe_offers_what_the_format_has() -> None:
    assert delta_options.DeltaValues == values.ChangeKind
    assert {*get_args(values.ChangeKind), "scale"} == set(get_args(values.ValuesKind))
    assert set(get_args(selection.Select)) < set(get_args(delta_options.DeltaSelect))
    assert delta_options.DeltaPart == selection.Part


def test_no_carried_file_is_code_or_weights() -> None:
    assert {Path(name).suffix for name in CARRIED_FILES} == {".json", ".jinja", ".model", ".txt"}
