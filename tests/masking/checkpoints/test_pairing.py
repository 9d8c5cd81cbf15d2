from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.pairing import counterpart, is_embedding, is_head, pair_base_tensors, pair_tensors
from mftctl.masking.checkpoints.tensors import tensor_index
from tests.masking.built_checkpoints import write_checkpoint

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def pairs(folder: Path, base: Tensors, tuned: Tensors) -> list[tuple[str, str]]:
    """The pairs of two checkpoints as (tuned name, base name)."""
    found = pair_tensors(write_checkpoint(folder / "base", base), write_checkpoint(folder / "tuned", tuned))
    return [(pair.name, pair.base.name) for pair in found]


def matrix(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_floating_point_tensors_are_paired_by_name_in_ascending_order(tmp_path: Path) -> None:
    base = {"b": matrix(0), "a": matrix(1, torch.bfloat16), "c": torch.ones(5)}
    tuned = {"b": matrix(2), "a": matrix(3, torch.bfloat16), "c": torch.ones(5)}
    assert pairs(tmp_path, base, tuned) == [("a", "a"), ("b", "b"), ("c", "c")]


def test_sharded_and_whole_checkpoints_are_paired(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.w": matrix(number) for number in range(5)}
    base = write_checkpoint(tmp_path / "base", tensors, shards=2)
    tuned = write_checkpoint(tmp_path / "tuned", tensors, shards=3)
    assert [pair.name for pair in pair_tensors(base, tuned)] == sorted(tensors)


@pytest.mark.parametrize("missing", ["base", "tuned"])
def test_tensor_in_one_checkpoint_only_is_refused(missing: str, tmp_path: Path) -> None:
    both = {"a": matrix(), "z": matrix()}
    one = {**both, "m": matrix(), "n": matrix()}
    with pytest.raises(MaskMismatchError, match="same tensors") as caught:
        pairs(tmp_path, both if missing == "base" else one, both if missing == "tuned" else one)
    assert caught.value.key == "m"
    of_base, of_tuned = str(caught.value.expected).split(", as in")[0], caught.value.actual
    absent, present = (of_base, of_tuned) if missing == "base" else (of_tuned, of_base)
    assert (absent, present) == ("no such tensor", "F32 (4, 3)")


@pytest.mark.parametrize("other", [matrix().T.contiguous(), matrix().bfloat16(), torch.ones(4, 3, dtype=torch.int32)])
def test_tensor_of_another_form_is_refused(other: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="same tensors") as caught:
        pairs(tmp_path, {"a": matrix(), "b": matrix()}, {"a": matrix(), "b": other})
    assert caught.value.key == "b"
    assert str(caught.value.expected).startswith("F32 (4, 3), as in the base")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "layers.0.attention.bias",
    ],
)
@pytest.mark.parametrize("owners", [{"base"}, {"tuned"}, {"base", "tuned"}])
def test_buffers_that_are_computed_are_left_out(name: str, owners: set[str], tmp_path: Path) -> None:
    sides = [
        {"w": matrix(seed), **({name: matrix(seed)} if side in owners else {})}
        for seed, side in enumerate(["base", "tuned"])
    ]
    assert pairs(tmp_path, *sides) == [("w", "w")]


@pytest.mark.parametrize(
    "value", [torch.arange(6), torch.tensor(1.5), torch.ones(0, 3), torch.ones(2, dtype=torch.bool)]
)
def test_equal_tensors_that_no_mask_can_describe_are_left_out(value: torch.Tensor, tmp_path: Path) -> None:
    assert pairs(tmp_path, {"w": matrix(), "x": value}, {"w": matrix(1), "x": value.clone()}) == [("w", "w")]


@pytest.mark.parametrize(
    ("before", "after"), [(torch.arange(6), -torch.arange(6)), (torch.tensor(1.5), torch.tensor(2.0))]
)
def test_other_values_that_no_mask_can_describe_are_refused(
    before: torch.Tensor, after: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(MaskMismatchError, match="no mask can describe") as caught:
        pairs(tmp_path, {"w": matrix(), "x": before}, {"w": matrix(1), "x": after})
    assert caught.value.key == "x"


@pytest.mark.parametrize("base_stores", [False, True])
@pytest.mark.parametrize("tuned_stores", [False, True])
def test_tied_head_is_paired_with_the_embeddings_of_the_base_where_the_tuned_checkpoint_stores_it(
    base_stores: bool, tuned_stores: bool, tmp_path: Path
) -> None:
    base, tuned = {EMBEDDINGS: matrix()}, {EMBEDDINGS: matrix(1)}
    if base_stores:
        base[HEAD] = base[EMBEDDINGS].clone()
    if tuned_stores:
        tuned[HEAD] = tuned[EMBEDDINGS].clone()
    expected = [(HEAD, EMBEDDINGS)] if tuned_stores else []
    assert pairs(tmp_path, base, tuned) == [*expected, (EMBEDDINGS, EMBEDDINGS)]


def test_head_of_its_own_in_both_is_paired_with_itself(tmp_path: Path) -> None:
    found = pairs(tmp_path, {EMBEDDINGS: matrix(), HEAD: matrix(1)}, {EMBEDDINGS: matrix(2), HEAD: matrix(3)})
    assert found == [(HEAD, HEAD), (EMBEDDINGS, EMBEDDINGS)]


def test_tuned_checkpoint_that_ties_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="separate output head") as caught:
        pairs(tmp_path, {EMBEDDINGS: matrix(), HEAD: matrix(1)}, {EMBEDDINGS: matrix(2)})
    assert caught.value.key == HEAD


def test_head_without_embeddings_to_stand_for_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="same tensors") as caught:
        pairs(tmp_path, {"w": matrix()}, {"w": matrix(), HEAD: matrix()})
    assert caught.value.key == HEAD


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "transformer.wte.weight", "wte.weight"])
def test_embeddings_stand_only_for_the_head(name: str, tmp_path: Path) -> None:
    index = tensor_index(write_checkpoint(tmp_path / "c", {name: matrix(), "model.wte.weights": matrix()}))
    assert counterpart(HEAD, index) == index[name]
    assert counterpart(name, index) == index[name]
    assert counterpart("model.norm.weight", index) is None


def test_two_embeddings_leave_the_head_without_one(tmp_path: Path) -> None:
    tensors = {"encoder.embed_tokens.weight": matrix(), "decoder.embed_tokens.weight": matrix()}
    assert counterpart(HEAD, tensor_index(write_checkpoint(tmp_path / "c", tensors))) is None


# By the names of the base


def base_pairs(folder: Path, base: Tensors, tuned: Tensors) -> list[tuple[str, str, str]]:
    """The pairs as (name, base name, tuned name)."""
    found = pair_base_tensors(write_checkpoint(folder / "base", base), write_checkpoint(folder / "tuned", tuned))
    return [(pair.name, pair.base.name, pair.tuned.name) for pair in found]


@pytest.mark.parametrize(
    ("base_stores", "tuned_stores", "expected"),
    [
        (False, False, [(EMBEDDINGS, EMBEDDINGS, EMBEDDINGS)]),
        (False, True, [(EMBEDDINGS, EMBEDDINGS, EMBEDDINGS)]),
        (True, False, [(HEAD, EMBEDDINGS, EMBEDDINGS), (EMBEDDINGS, EMBEDDINGS, EMBEDDINGS)]),
        (True, True, [(HEAD, EMBEDDINGS, HEAD), (EMBEDDINGS, EMBEDDINGS, EMBEDDINGS)]),
    ],
)
def test_a_tied_head_has_the_names_of_the_base(
    base_stores: bool, tuned_stores: bool, expected: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    sides = []
    for seed, stores in ((0, base_stores), (1, tuned_stores)):
        sides.append({EMBEDDINGS: matrix(seed), **({HEAD: matrix(seed)} if stores else {})})
    assert base_pairs(tmp_path, *sides) == expected


def test_a_head_that_only_the_tuned_checkpoint_has_must_be_tied(tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="separate output head, but the base ties") as caught:
        base_pairs(tmp_path, {EMBEDDINGS: matrix(0)}, {EMBEDDINGS: matrix(1), HEAD: matrix(2)})
    assert caught.value.key == HEAD


def test_an_untied_head_is_paired_with_the_tuned_one(tmp_path: Path) -> None:
    base = {EMBEDDINGS: matrix(0), HEAD: matrix(1)}
    assert base_pairs(tmp_path, base, {EMBEDDINGS: matrix(2), HEAD: matrix(3)})[0] == (HEAD, HEAD, HEAD)


def test_embeddings_and_heads_are_known_by_their_names() -> None:
    assert all(map(is_embedding, ("model.embed_tokens.weight", "transformer.wte.weight", "wpe.weight")))
    assert all(map(is_head, ("lm_head.weight", "embed_out.weight", "lm_head.bias")))
    assert not any(is_embedding(name) or is_head(name) for name in ("model.norm.weight", "h.0.mlp.c_fc.weight"))
