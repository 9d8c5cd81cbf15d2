"""Delta files of tiny checkpoints: applied, they are compared with a reader written from the definition."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mftctl.errors import MaskFileError, MaskingError, MaskMismatchError, ModelError, OutputError
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.delta_mask import drop_mask
from mftctl.masking.checkpoints.tensors import CHUNK_BYTES
from mftctl.masking.delta.apply import apply_delta_to_checkpoint
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.delta.make import DeltaPlan
from mftctl.masking.delta.selection import Selection
from mftctl.masking.delta.spool import delta_permit
from mftctl.masking.delta.values import ValuesKind
from mftctl.masking.mask import Mask
from tests.masking.built_checkpoints import learn_mask, stored_tensors
from tests.masking.checkpoints.test_delta_mask import kept_by_sorting
from tests.masking.delta.made_deltas import (
    SHAPES,
    Tensors,
    make,
    moved,
    plan,
    random_tensors,
    raw_checkpoint,
    write_pair,
)
from tests.masking.delta.plain_delta import plain_applied, plain_bits, plain_read_delta

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
ROUNDED: tuple[ValuesKind, ...] = ("bf16", "int8", "sign")


def applied(base: Path, delta: Path, output: Path) -> dict[str, bytes]:
    """The tensors of the base with the changes of a file, checked against the plain reader."""
    with open_delta(delta) as opened:
        apply_delta_to_checkpoint(base, opened, output, base_model="org/base")
    found = raw_checkpoint(output)
    assert found == plain_applied(delta, raw_checkpoint(base))
    return found


def kept_entries(path: Path) -> dict[str, np.ndarray]:
    document, payloads = plain_read_delta(path)
    return {
        name: np.array(plain_bits(entry, payloads.get(name))).reshape(entry["shape"])
        for name, entry in document["tensors"].items()
    }


# Everything, exactly


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_change_gives_the_tuned_checkpoint_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    before = random_tensors(dtype)
    base, tuned = write_pair(tmp_path, before, moved(before, size=0.02), shards=(2, 3))
    contents = make(base, tuned, tmp_path / "change.delta")
    assert applied(base, tmp_path / "change.delta", tmp_path / "out") == raw_checkpoint(tuned)
    assert list(contents.unchanged) == ["positions"]
    assert not contents.left_out


bit_patterns = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=30)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns=bit_patterns)
def test_any_bits_come_back_infinities_and_nans_included(
    dtype: torch.dtype, patterns: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bits")
    size = dtype.itemsize
    sides = [
        torch.from_numpy(np.array([[pair[side] % 2 ** (8 * size) for pair in (*patterns, (0, 1))]], f"<u{size}"))
        .view({2: torch.int16, 4: torch.int32}[size])
        .view(dtype)
        for side in (0, 1)
    ]
    base, tuned = write_pair(folder, {"w": sides[0]}, {"w": sides[1]})
    make(base, tuned, folder / "change.delta")
    assert applied(base, folder / "change.delta", folder / "out") == raw_checkpoint(tuned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sparse_fine_tuning_is_exact_and_stores_only_its_changes(dtype: torch.dtype, tmp_path: Path) -> None:
    """As after GMT, SHiRA or Super-Tuning: most entries have the bits of the base."""
    before = random_tensors(dtype)
    after = moved(before, size=0.5, share=0.05)
    base, tuned = write_pair(tmp_path, before, after)
    contents = make(base, tuned, tmp_path / "change.delta")
    assert applied(base, tmp_path / "change.delta", tmp_path / "out") == raw_checkpoint(tuned)
    for name, record in contents.tensors.items():
        assert record.kept == int((before[name] != after[name]).sum())


@pytest.mark.parametrize("codec", ["packed", "deflate", "ans"])
def test_every_codec_of_the_bits_gives_the_same(codec: str, tmp_path: Path) -> None:
    before = random_tensors(torch.bfloat16)
    base, tuned = write_pair(tmp_path, before, moved(before))
    make(base, tuned, tmp_path / "change.delta", DeltaPlan(Selection(0.8, codec=codec)))  # type: ignore[arg-type]
    make(base, tuned, tmp_path / "same.delta", plan(0.8))
    assert applied(base, tmp_path / "change.delta", tmp_path / "out") == plain_applied(
        tmp_path / "same.delta", raw_checkpoint(base)
    )
    document, _ = plain_read_delta(tmp_path / "change.delta")
    assert document["tensors"]["a.weight"]["codec"] == codec


# Selection


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.95])
def test_the_largest_changes_of_each_matrix_are_kept(ratio: float, tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    after = moved(before)
    base, tuned = write_pair(tmp_path, before, after)
    make(base, tuned, tmp_path / "change.delta", plan(ratio))
    kept = kept_entries(tmp_path / "change.delta")
    for name in SHAPES:
        changes = (after[name] - before[name]).numpy()
        expected = kept_by_sorting(np.zeros_like(changes), changes, ratio, "trivial") & (changes != 0)
        assert np.array_equal(kept[name], expected if changes.ndim > 1 else changes != 0)
    results = applied(base, tmp_path / "change.delta", tmp_path / "out")
    found = {name: np.frombuffer(results[name], "<f4").reshape(SHAPES[name]) for name in SHAPES}
    for name in SHAPES:
        assert np.array_equal(found[name], np.where(kept[name], after[name].numpy(), before[name].numpy()))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_changes_are_those_of_dare(dtype: torch.dtype, rescale: bool, tmp_path: Path) -> None:
    """A drop mask with the same entries, applied to the tuned checkpoint, gives the same bits."""
    before = random_tensors(dtype)
    base, tuned = write_pair(tmp_path, before, moved(before))
    contents = make(base, tuned, tmp_path / "change.delta", plan(0.75, "random", rescale=rescale))
    kept = kept_entries(tmp_path / "change.delta")
    for name, bits in kept.items():
        if bits.ndim > 1:
            assert bits.sum() == bits.size - int(np.floor(0.75 * bits.size + 0.5))
            assert contents.tensors[name].codec == "seeded"
    mask = drop_mask(base, tuned, 0.75, "random", rescale=rescale, base_model="b", tuned_model="t")
    matrices = [name for name in mask.names() if name in kept and kept[name].ndim > 1]
    records = {name: replace(mask.records[name], removed=int((~kept[name]).sum())) for name in matrices}
    same = Mask({name: torch.from_numpy(kept[name]) for name in matrices}, records, mask.metadata)
    apply_to_checkpoint(base, same, tmp_path / "masked", mask_path=None, base_model="b", tuned=tuned)
    assert applied(base, tmp_path / "change.delta", tmp_path / "out") == raw_checkpoint(tmp_path / "masked")


def test_seed_and_name_decide_random_entries(tmp_path: Path) -> None:
    before = {"a": torch.zeros(40, 40), "b": torch.zeros(40, 40)}
    base, tuned = write_pair(tmp_path, before, {name: tensor + 1 for name, tensor in before.items()})
    kept = []
    for number, seed in enumerate((3, 3, 4)):
        path = tmp_path / f"{number}.delta"
        make(base, tuned, path, DeltaPlan(Selection(0.5, "random", seed)))
        kept.append(kept_entries(path))
    assert np.array_equal(kept[0]["a"], kept[1]["a"])
    assert not np.array_equal(kept[0]["a"], kept[2]["a"])
    assert not np.array_equal(kept[0]["a"], kept[0]["b"])


@pytest.mark.parametrize("strategy", ["trivial", "random"])
def test_a_delta_mask_decides_and_the_rest_is_stored_whole(strategy: str, tmp_path: Path) -> None:
    before = random_tensors(torch.bfloat16)
    base, tuned = write_pair(tmp_path, before, moved(before))
    rescale = strategy == "random"
    mask = drop_mask(base, tuned, 0.4, strategy, rescale=rescale, base_model="b", tuned_model="t")  # type: ignore[arg-type]
    some = [name for name in mask.names() if name != "b.weight" and "norm" not in name]
    part = Mask({name: mask[name] for name in some}, {name: mask.records[name] for name in some}, mask.metadata)
    make(base, tuned, tmp_path / "change.delta", DeltaPlan(Selection(mask=part)))
    apply_to_checkpoint(base, part, tmp_path / "masked", mask_path=None, base_model="b", tuned=tuned)
    found, expected = applied(base, tmp_path / "change.delta", tmp_path / "out"), raw_checkpoint(tmp_path / "masked")
    if rescale:  # the mask scales what it covers, the delta every matrix
        assert {name: found[name] for name in some} == {name: expected[name] for name in some}
    else:
        assert found == expected


def test_a_mask_for_other_checkpoints_is_refused(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, moved(before))
    (tmp_path / "other").mkdir()
    _, other = write_pair(tmp_path / "other", before, moved(before, seed=9))
    mask = drop_mask(base, other, 0.4, "trivial", base_model="b", tuned_model="t")
    with pytest.raises(MaskMismatchError, match="tuned checkpoint is not the one this delta mask was made for"):
        make(base, tuned, tmp_path / "change.delta", DeltaPlan(Selection(mask=mask)))
    assert not (tmp_path / "change.delta").exists()


def test_a_weight_mask_is_refused(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, moved(before))
    mask = learn_mask({"a.weight": before["a.weight"]})
    with pytest.raises(MaskMismatchError, match="weight mask does not say which changes to keep"):
        make(base, tuned, tmp_path / "change.delta", DeltaPlan(Selection(mask=mask)))


def test_a_mask_with_a_tensor_of_another_model_is_refused(tmp_path: Path) -> None:
    before = {name: tensor for name, tensor in random_tensors(torch.float32).items() if name != "conv"}
    base, tuned = write_pair(tmp_path, before, moved(before))
    mask = learn_mask({"conv": torch.ones(2, 3)}, tuned={"conv": torch.zeros(2, 3)})
    with pytest.raises(MaskMismatchError, match="a tensor that the checkpoints do not have") as caught:
        make(base, tuned, tmp_path / "change.delta", DeltaPlan(Selection(mask=mask)))
    assert caught.value.key == "conv"


def test_excluded_parts_keep_the_base_and_are_named(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(7, 3, generator=generator)
    before = {
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": embeddings.clone(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(4, 3, generator=generator),
        "model.norm.weight": torch.ones(3),
    }
    after = {name: tensor + 0.5 for name, tensor in before.items()}
    base, tuned = write_pair(tmp_path, before, after)
    contents = make(base, tuned, tmp_path / "change.delta", plan(exclude=("embeddings", "vectors")))
    assert list(contents.tensors) == ["model.layers.0.mlp.up_proj.weight"]
    reasons = {name: one.reason for name, one in contents.left_out.items()}
    # The base ties its head to its embeddings, so that they go together.
    assert reasons == dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"), "excluded")
    found = applied(base, tmp_path / "change.delta", tmp_path / "out")
    assert found["lm_head.weight"] == raw_checkpoint(base)["lm_head.weight"]
    untied = {**before, "lm_head.weight": embeddings + 1}
    (tmp_path / "untied").mkdir()
    base, tuned = write_pair(tmp_path / "untied", untied, {name: tensor + 0.5 for name, tensor in untied.items()})
    contents = make(base, tuned, tmp_path / "change.delta", plan(exclude=("head",)))
    assert list(contents.left_out) == ["lm_head.weight"]


# Values


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize(("ratio", "select"), [(0.0, "trivial"), (0.7, "trivial"), (0.7, "random")])
def test_rounded_values_are_those_of_the_definition(
    kind: ValuesKind, dtype: torch.dtype, ratio: float, select: str, tmp_path: Path
) -> None:
    before = random_tensors(dtype)
    after = moved(before)
    base, tuned = write_pair(tmp_path, before, after)
    contents = make(
        base, tuned, tmp_path / "change.delta", plan(ratio, select, values=kind, rescale=select == "random")
    )
    results = applied(base, tmp_path / "change.delta", tmp_path / "out")
    assert results["norm.weight"] == raw_checkpoint(tuned)["norm.weight"]  # a vector is exact
    assert contents.tensors["norm.weight"].values == "exact"
    assert contents.tensors["a.weight"].values == kind
    scale = 1 / 0.3 if select == "random" else 1.0
    kept = kept_entries(tmp_path / "change.delta")["a.weight"]
    found = stored_tensors(tmp_path / "out")["a.weight"].double().numpy()
    old, new = before["a.weight"].double().numpy(), after["a.weight"].double().numpy()
    assert np.array_equal(found[~kept], old[~kept])
    error = np.abs(found - (old + scale * (new - old)))[kept]
    sizes = scale * np.abs(new - old)[kept]
    rounding = 2.0 ** -{torch.bfloat16: 8, torch.float16: 11}.get(dtype, 23) * np.abs(found[kept])
    bound = {"bf16": sizes * 2**-8, "int8": sizes.max() / 254 * 1.001, "sign": sizes + sizes.mean()}[kind]
    assert (error <= bound + rounding + 1e-7).all()


def test_sign_of_the_whole_change_is_bitdelta(tmp_path: Path) -> None:
    before = {"w": torch.randn(6, 9, generator=torch.Generator().manual_seed(0))}
    after = moved(before, share=0.5)
    base, tuned = write_pair(tmp_path, before, after)
    contents = make(base, tuned, tmp_path / "change.delta", plan(values="sign"))
    assert (contents.tensors["w"].codec, contents.tensors["w"].removed) == ("all", 0)
    change = after["w"] - before["w"]
    alpha = np.float32(change.abs().double().mean())
    expected = before["w"].numpy() + np.where(change.numpy() > 0, alpha, -alpha)
    results = applied(base, tmp_path / "change.delta", tmp_path / "out")
    assert np.array_equal(np.frombuffer(results["w"], "<f4").reshape(6, 9), expected)


@pytest.mark.parametrize("options", [{"values": "int8"}, {"ratio": 0.5, "select": "random", "rescale": True}])
def test_weights_in_8_bits_are_neither_rounded_nor_rescaled(options: dict[str, object], tmp_path: Path) -> None:
    before = random_tensors(torch.float8_e4m3fn)
    base, tuned = write_pair(tmp_path, before, moved(before, size=0.1))
    with pytest.raises(MaskingError, match="neither rounded nor rescaled") as caught:
        make(base, tuned, tmp_path / "change.delta", plan(**options))  # type: ignore[arg-type]
    assert (caught.value.key, caught.value.actual) == ("a.weight", "F8_E4M3")


def test_only_random_changes_are_rescaled() -> None:
    with pytest.raises(MaskingError, match="Only random changes can be rescaled"):
        plan(0.5, rescale=True)


@pytest.mark.parametrize(
    ("kind", "rescale", "message"),
    [("exact", True, "rescaled weight is not finite"), ("bf16", True, "changed weight is not finite")],
)
def test_a_weight_that_overflows_is_refused(kind: ValuesKind, rescale: bool, message: str, tmp_path: Path) -> None:
    before = {"w": torch.zeros(4, 4, dtype=torch.float16)}
    base, tuned = write_pair(tmp_path, before, {"w": torch.full((4, 4), 6e4, dtype=torch.float16)})
    with pytest.raises(MaskingError, match=message):
        make(base, tuned, tmp_path / "change.delta", plan(0.5, "random", values=kind, rescale=rescale))
    assert not (tmp_path / "change.delta").exists()


@pytest.mark.parametrize(("ratio", "kind"), [(0.5, "exact"), (0.0, "int8")])
def test_a_diverged_fine_tuning_is_refused_where_changes_are_computed(
    ratio: float, kind: ValuesKind, tmp_path: Path
) -> None:
    before = {"w": torch.zeros(4, 4)}
    base, tuned = write_pair(tmp_path, before, {"w": torch.full((4, 4), float("nan"))})
    with pytest.raises(ModelError, match=r"is NaN|is not finite"):
        make(base, tuned, tmp_path / "change.delta", plan(ratio, values=kind))


# The two checkpoints


def test_equal_models_have_no_change(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, before)
    with pytest.raises(MaskMismatchError, match="same weights, so there is nothing to store"):
        make(base, tuned, tmp_path / "change.delta")
    assert list(tmp_path.glob("*.delta")) == []


def test_a_ratio_that_leaves_nothing_is_refused_and_one_that_leaves_little_names_what_it_dropped(
    tmp_path: Path,
) -> None:
    before = {"w": torch.zeros(1, 3), "big": torch.zeros(10, 10)}
    base, tuned = write_pair(tmp_path, before, {"w": torch.ones(1, 3), "big": torch.zeros(10, 10)})
    with pytest.raises(MaskingError, match="No change of the fine-tuning is left"):
        make(base, tuned, tmp_path / "change.delta", plan(0.9))
    (tmp_path / "more").mkdir()
    base, tuned = write_pair(tmp_path / "more", before, {name: tensor + 1 for name, tensor in before.items()})
    contents = make(base, tuned, tmp_path / "change.delta", plan(0.9))
    assert {name: one.reason for name, one in contents.left_out.items()} == {"w": "dropped"}
    assert applied(base, tmp_path / "change.delta", tmp_path / "out")["w"] == raw_checkpoint(base)["w"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"a.weight": tensors["a.weight"].T.contiguous()},
        lambda tensors: tensors | {"a.weight": tensors["a.weight"].bfloat16()},
        lambda tensors: tensors | {"new": torch.ones(3)},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "b.weight"},
    ],
    ids=["shape", "dtype", "more", "fewer"],
)
def test_checkpoints_with_other_tensors_are_refused(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, change(moved(before)))
    with pytest.raises(MaskMismatchError, match="do not have the same tensors"):
        make(base, tuned, tmp_path / "change.delta")


def test_a_tensor_that_is_not_floating_point_must_be_the_same(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, {**moved(before), "positions": torch.arange(4) + 1})
    with pytest.raises(MaskMismatchError, match="no mask can describe"):
        make(base, tuned, tmp_path / "change.delta")


def head_and_embeddings(seed: int) -> tuple[torch.Tensor, Tensors]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 5, generator=generator), {"layer.weight": torch.randn(5, 5, generator=generator)}


@pytest.mark.parametrize("base_stores", [False, True])
@pytest.mark.parametrize("tuned_stores", [False, True])
@pytest.mark.parametrize("select", ["trivial", "random"])
def test_a_tied_head_stays_tied(base_stores: bool, tuned_stores: bool, select: str, tmp_path: Path) -> None:
    sides = []
    for seed, stores in ((0, base_stores), (1, tuned_stores)):
        embeddings, others = head_and_embeddings(seed)
        head = {"lm_head.weight": embeddings.clone()} if stores else {}
        sides.append({"model.embed_tokens.weight": embeddings, **others, **head})
    base, tuned = write_pair(tmp_path, *sides)
    make(base, tuned, tmp_path / "change.delta", plan(0.4, select))
    found = applied(base, tmp_path / "change.delta", tmp_path / "out")
    assert set(found) == set(sides[0])
    if base_stores:
        assert found["lm_head.weight"] == found["model.embed_tokens.weight"]


def test_a_head_untied_by_fine_tuning_is_refused(tmp_path: Path) -> None:
    embeddings, others = head_and_embeddings(0)
    before = {"model.embed_tokens.weight": embeddings, **others}
    after = {"model.embed_tokens.weight": embeddings + 1, "lm_head.weight": embeddings + 2, **others}
    base, tuned = write_pair(tmp_path, before, after)
    with pytest.raises(MaskMismatchError, match="separate output head, but the base ties") as caught:
        make(base, tuned, tmp_path / "change.delta")
    assert caught.value.key == "lm_head.weight"


# The file


def test_bytes_do_not_depend_on_shards_or_chance(tmp_path: Path) -> None:
    before = random_tensors(torch.bfloat16)
    after = moved(before)
    found = []
    for number, shards in enumerate([(1, 1), (3, 2), (1, 1)]):
        (tmp_path / str(number)).mkdir()
        base, tuned = write_pair(tmp_path / str(number), before, after, shards=shards)
        make(base, tuned, tmp_path / f"{number}.delta", plan(0.5, values="int8"))
        found.append((tmp_path / f"{number}.delta").read_bytes())
    assert found[0] == found[1] == found[2]


def test_the_permit_decides_about_an_existing_file(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, moved(before))
    path = tmp_path / "change.delta"
    make(base, tuned, path, permit=delta_permit(replace=False))
    first = path.read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        make(base, tuned, path, plan(0.5), permit=delta_permit(replace=False))
    assert path.read_bytes() == first
    make(base, tuned, path, plan(0.5), permit=delta_permit(replace=True))
    assert path.read_bytes() != first
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists and is not a delta file"):
        make(base, tuned, path, permit=delta_permit(replace=True))
    assert path.read_text() == "mine"


def test_a_path_that_cannot_be_written_is_a_mask_file_error(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, moved(before))
    (tmp_path / "file").touch()
    with pytest.raises(MaskFileError, match="delta file cannot be written"):
        make(base, tuned, tmp_path / "file" / "change.delta")


def test_progress_counts_the_bytes_of_the_base(tmp_path: Path) -> None:
    before = random_tensors(torch.float32)
    base, tuned = write_pair(tmp_path, before, moved(before))
    told: list[tuple[int, int]] = []
    make(base, tuned, tmp_path / "change.delta", on_progress=lambda done, total: told.append((done, total)))
    total = sum(len(raw) for name, raw in raw_checkpoint(base).items() if name != "positions")
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    """Allocations of numpy and Python; payloads wait in a file until the document is written."""
    peaks = {}
    for count in (4, 64):
        (tmp_path / str(count)).mkdir()
        before = {f"layers.{number}.w": torch.full((128, 1024), 0.5) for number in range(count)}
        base, tuned = write_pair(tmp_path / str(count), before, moved(before))
        tracemalloc.start()
        make(base, tuned, tmp_path / f"{count}.delta")
        with open_delta(tmp_path / f"{count}.delta") as delta:
            apply_delta_to_checkpoint(base, delta, tmp_path / f"out{count}", base_model="b")
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[64] < peaks[4] * 3  # 16 if it grew; one or two tensors are in memory at once, by chance
    assert peaks[64] > CHUNK_BYTES
