"""One-off drop, compared with a stable argsort in numpy, and end to end."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from mftctl.errors import MaskingError, MaskMismatchError, ModelError
from mftctl.masking.checkpoints import delta_mask
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.apply_in_memory import apply_mask
from mftctl.masking.checkpoints.delta_mask import Strategy, drop_mask
from mftctl.masking.checkpoints.tensors import StoredTensor, read_tensor
from mftctl.masking.mask import Mask, load_mask, save_mask
from tests.conftest import build_llama
from tests.masking.built_checkpoints import digest_of, stored_tensors, write_checkpoint, write_tuned

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def make_mask(base: Path, tuned: Path, ratio: float = 0.3, strategy: Strategy = "trivial", seed: int = 0) -> Mask:
    return drop_mask(base, tuned, ratio, strategy, base_model="org/base", tuned_model="org/tuned", seed=seed)


def kept_by_sorting(base: np.ndarray, tuned: np.ndarray, ratio: float, strategy: str) -> np.ndarray:
    """The definition: a stable sort of all absolute differences, of which the first ones are reset."""
    sizes = np.abs(tuned.astype(np.float64) - base.astype(np.float64)).reshape(-1)
    order = np.argsort(sizes if strategy == "trivial" else -sizes, kind="stable")
    keep = np.ones(sizes.size, dtype=bool)
    keep[order[: int(np.floor(ratio * sizes.size + 0.5))]] = False
    return keep.reshape(base.shape)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a tuned checkpoint, with a fifth of the weights unchanged and different shards."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (9, 7), "b.weight": (16, 4), "norm.weight": (13,), "conv": (2, 3, 5)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base = write_checkpoint(tmp_path / "base", tensors, shards=2)
    return base, write_tuned(base, tmp_path / "tuned", shards=3)


@pytest.mark.parametrize("strategy", ["trivial", "salient"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.35, 0.9])
def test_smallest_or_largest_differences_are_reset_in_every_tensor(
    strategy: Strategy, ratio: float, pair: tuple[Path, Path]
) -> None:
    before, after = stored_tensors(pair[0]), stored_tensors(pair[1])
    mask = make_mask(*pair, ratio, strategy)
    assert mask.names() == sorted(before)
    for name in mask.names():
        # Differences are taken in fp32, as in the code under test, so that their order is the same.
        size = (after[name] - before[name]).numpy()
        assert np.array_equal(mask[name].numpy(), kept_by_sorting(np.zeros_like(size), size, ratio, strategy))


levels = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=40)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["trivial", "salient"])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=levels, ratio=st.floats(0, 0.99))
def test_ties_are_reset_lowest_index_first(
    strategy: Strategy,
    values: list[tuple[int, int]],
    ratio: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("ties")
    before, after = np.array([*values, (0, 1)], dtype=np.float32).T.copy()
    base = write_checkpoint(folder / "base", {"w": torch.from_numpy(before)})
    tuned = write_checkpoint(folder / "tuned", {"w": torch.from_numpy(after)})
    keep = make_mask(base, tuned, ratio, strategy)["w"].numpy()
    assert np.array_equal(keep, kept_by_sorting(before, after, ratio, strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_counts_are_exact_in_every_dtype(strategy: Strategy, dtype: torch.dtype, tmp_path: Path) -> None:
    before = torch.randn(31, 9).to(dtype)
    base = write_checkpoint(tmp_path / "base", {"w": before})
    tuned = write_tuned(base, tmp_path / "tuned")
    assert make_mask(base, tuned, 0.2, strategy).removed == round(0.2 * 31 * 9)


def test_differences_of_fp64_are_not_rounded_to_fp32(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": torch.ones(3, dtype=torch.float64)})
    after = torch.ones(3, dtype=torch.float64) + torch.tensor([3e-12, 1e-12, 2e-12], dtype=torch.float64)
    tuned = write_checkpoint(tmp_path / "tuned", {"w": after})
    assert make_mask(base, tuned, 0.4)["w"].tolist() == [True, False, True]


def test_random_depends_on_seed_and_name_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    mask = make_mask(*pair, strategy="random", seed=1)
    again = make_mask(pair[0], write_tuned(pair[0], tmp_path / "other", seed=8), strategy="random", seed=1)
    assert all(torch.equal(mask[name], again[name]) for name in mask.names())
    other = make_mask(*pair, strategy="random", seed=2)
    assert not any(torch.equal(mask[name], other[name]) for name in mask.names())


def test_random_draws_differ_between_tensors_and_are_even(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"a": torch.zeros(200, 100), "b": torch.zeros(200, 100)})
    mask = make_mask(base, write_tuned(base, tmp_path / "tuned"), 0.5, "random")
    assert mask.records["a"].removed == mask.records["b"].removed == 10_000
    assert 4_600 < int((mask["a"] & mask["b"]).sum()) < 5_400
    assert abs(mask["a"].float().mean(0) - 0.5).max() < 0.2


def test_records_hold_both_digests_and_metadata_both_models(pair: tuple[Path, Path], tmp_path: Path) -> None:
    mask = drop_mask(
        *pair,
        0.25,
        "salient",
        base_model="org/base",
        base_revision="abc",
        tuned_model="org/tuned",
        tuned_revision="def",
        seed=3,
        run_id="004-mask-train",
    )
    before, after = stored_tensors(pair[0]), stored_tensors(pair[1])
    for name, record in mask.records.items():
        assert (record.sha256, record.tuned_sha256) == (digest_of(before[name]), digest_of(after[name]))
    metadata = mask.metadata
    assert (metadata.kind, metadata.method, metadata.ratio, metadata.seed) == ("delta", "drop-salient", 0.25, 3)
    assert (metadata.base_label, metadata.tuned_label) == ("org/base at revision abc", "org/tuned at revision def")
    assert (metadata.run_id, metadata.layers, metadata.threshold) == ("004-mask-train", None, None)
    save_mask(mask, tmp_path / "mask.bits")
    assert load_mask(tmp_path / "mask.bits").records == mask.records


def test_progress_ends_at_the_size_of_all_tensors(pair: tuple[Path, Path]) -> None:
    steps: list[tuple[int, int]] = []
    drop_mask(*pair, 0.1, "trivial", base_model="b", tuned_model="t", on_progress=lambda *step: steps.append(step))
    total_bytes = sum(tensor.nbytes for tensor in stored_tensors(pair[1]).values())
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert len(steps) == 4
    assert steps[-1] == (total_bytes, total_bytes)


def test_one_tensor_of_each_checkpoint_is_in_memory_at_a_time(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counting(stored: StoredTensor) -> torch.Tensor:
        nonlocal most
        tensor = read_tensor(stored)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(delta_mask, "read_tensor", counting)
    make_mask(*pair)
    assert len(alive) == 8
    assert most == 2


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_streamed_checkpoint_equals_the_model_in_memory_and_the_definition(
    tied: bool, strategy: Strategy, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    build_llama(layers=2, tie_word_embeddings=tied).save_pretrained(base, max_shard_size="40KB")
    tuned = write_tuned(base, tmp_path / "tuned")
    mask = make_mask(base, tuned, 0.4, strategy)
    apply_to_checkpoint(base, mask, tmp_path / "out", mask_path=None, base_model="org/base", tuned=tuned)
    before, after, found = (stored_tensors(folder) for folder in (base, tuned, tmp_path / "out"))
    assert found.keys() == set(mask.names()) == after.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.where(mask[name], after[name], before[name]))
    model = AutoModelForCausalLM.from_pretrained(tuned)
    apply_mask(model, mask, base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in loaded.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("base_stores", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_copies_of_a_tied_head_get_the_same_mask(base_stores: bool, strategy: Strategy, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    build_llama(layers=1).save_pretrained(tmp_path / "plain")
    before = stored_tensors(tmp_path / "plain")
    after = {name: tensor + torch.randn(tensor.shape) for name, tensor in before.items()}
    after["lm_head.weight"] = after["model.embed_tokens.weight"].clone()
    if base_stores:
        before["lm_head.weight"] = before["model.embed_tokens.weight"].clone()
    write_checkpoint(base, before)
    write_checkpoint(tuned, after)
    (tuned / "config.json").write_bytes((tmp_path / "plain" / "config.json").read_bytes())
    mask = make_mask(base, tuned, 0.4, strategy)
    assert torch.equal(mask["lm_head.weight"], mask["model.embed_tokens.weight"])
    apply_to_checkpoint(base, mask, tmp_path / "out", mask_path=None, base_model="org/base", tuned=tuned)
    model = AutoModelForCausalLM.from_pretrained(tuned)
    apply_mask(model, mask, base)
    found = stored_tensors(tmp_path / "out")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found[name], model.state_dict()[name])


def test_tied_base_and_tuned_checkpoint_without_a_head_are_dropped_in_the_embeddings_once(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_llama(layers=1).save_pretrained(base)
    mask = make_mask(base, write_tuned(base, tmp_path / "tuned"))
    assert "model.embed_tokens.weight" in mask
    assert "lm_head.weight" not in mask


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan")])
def test_ratio_out_of_range_is_refused_before_anything_is_read(ratio: float, tmp_path: Path) -> None:
    with pytest.raises(MaskingError, match="ratio"):
        make_mask(tmp_path / "missing", tmp_path / "missing", ratio)


def test_unknown_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskingError, match="no such strategy") as caught:
        make_mask(tmp_path, tmp_path, 0.1, "largest")  # type: ignore[arg-type]
    assert caught.value.expected == ("trivial", "salient", "random")


@pytest.mark.parametrize("missing", [0, 1])
def test_folder_without_weights_is_refused(missing: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    folders = list(pair)
    folders[missing] = tmp_path / "nowhere"
    with pytest.raises(ModelError, match="no safetensors weights"):
        make_mask(*folders)


def test_checkpoints_with_different_tensors_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = stored_tensors(pair[1])
    tensors.pop("conv")
    with pytest.raises(MaskMismatchError, match="same tensors") as caught:
        make_mask(pair[0], write_checkpoint(tmp_path / "other", tensors))
    assert (caught.value.key, caught.value.actual) == ("conv", "no such tensor")


def test_a_checkpoint_and_itself_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(MaskMismatchError, match="nothing to reset"):
        make_mask(pair[0], pair[0])


@pytest.mark.parametrize("strategy", ["trivial", "salient"])
def test_difference_that_is_not_a_number_is_refused(strategy: Strategy, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": torch.ones(4)})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": torch.tensor([1.0, float("nan"), 2.0, 3.0])})
    with pytest.raises(ModelError, match="is NaN") as caught:
        make_mask(base, tuned, 0.5, strategy)
    assert (caught.value.key, caught.value.actual) == ("w", "1 NaN of 4")


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rescaled_pair(folder: Path, dtype: torch.dtype) -> tuple[Path, Path, Path]:
    """A base, a tuned checkpoint and the mask file of a rescaled random drop of 30 %."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    base = write_checkpoint(folder / "base", tensors)
    tuned = write_tuned(base, folder / "tuned")
    mask = drop_mask(base, tuned, 0.3, "random", rescale=True, base_model=str(base), tuned_model=str(tuned), seed=1)
    save_mask(mask, folder / "drop.bits")
    return base, tuned, folder / "drop.bits"


SHAPES = {"a.weight": (33, 17), "norm.weight": (13,)}


def exactly_rescaled(before: torch.Tensor, after: torch.Tensor, scale: float) -> np.ndarray:
    """Base + scale * (tuned - base) in numpy, each operation rounded, as the format states."""
    wide = np.float64 if before.dtype == torch.float64 else np.float32
    base, tuned = (part.to(torch.float64).numpy().astype(wide) for part in (before, after))
    result = base + (wide(scale) * (tuned - base)).astype(wide)
    return torch.from_numpy(result).to(before.dtype).to(torch.float64).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_changes_are_rescaled_alike_in_files_and_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned, path = rescaled_pair(tmp_path, dtype)
    mask = load_mask(path)
    assert mask.metadata.scale == 1 / (1 - 0.3)
    apply_to_checkpoint(base, mask, tmp_path / "out", mask_path=path, base_model="base", tuned=tuned)
    before, after, written = (stored_tensors(folder) for folder in (base, tuned, tmp_path / "out"))
    for name in SHAPES:
        keep = mask[name].numpy()
        expected = exactly_rescaled(before[name], after[name], 1 / (1 - 0.3))
        found = written[name].to(torch.float64).numpy()
        assert written[name].dtype == dtype
        assert np.array_equal(found[keep], expected[keep])
        assert np.array_equal(found[~keep], before[name].to(torch.float64).numpy()[~keep])
        assert (found[keep] != after[name].to(torch.float64).numpy()[keep]).mean() > 0.3
    for wide in (dtype, torch.float64):
        model = torch.nn.Module()
        model.a, model.norm = torch.nn.Module(), torch.nn.Module()
        for name, tensor in after.items():
            part = getattr(model, name.partition(".")[0])
            part.weight = torch.nn.Parameter(tensor.to(wide, copy=True))
        apply_mask(model, mask, base)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, written[name].to(wide))


def test_rescaling_keeps_the_mean_change(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.zeros(200, 200)})
    tuned = write_checkpoint(tmp_path / "tuned", {"a.weight": torch.ones(200, 200)})
    mask = drop_mask(base, tuned, 0.75, "random", rescale=True, base_model="b", tuned_model="t")
    apply_to_checkpoint(base, mask, tmp_path / "out", mask_path=None, base_model="b", tuned=tuned)
    written = stored_tensors(tmp_path / "out")["a.weight"]
    assert written.mean() == 1
    assert set(written.flatten().tolist()) == {0.0, 4.0}


def test_a_ratio_of_0_needs_no_scale(pair: tuple[Path, Path]) -> None:
    mask = drop_mask(*pair, 0.0, "random", rescale=True, base_model="b", tuned_model="t")
    assert mask.metadata.scale is None


def test_weights_in_8_bits_are_not_rescaled(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(9, 7, generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
    base = write_checkpoint(tmp_path / "base", {"a.weight": one})
    tuned = write_checkpoint(tmp_path / "tuned", {"a.weight": other})
    with pytest.raises(MaskingError, match="8 bits") as caught:
        drop_mask(base, tuned, 0.3, "random", rescale=True, base_model="b", tuned_model="t")
    assert (caught.value.key, caught.value.actual) == ("a.weight", "F8_E4M3")


def test_a_rescaled_weight_that_overflows_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.zeros(9, 7, dtype=torch.float16)})
    tuned = write_checkpoint(tmp_path / "tuned", {"a.weight": torch.full((9, 7), 6e4, dtype=torch.float16)})
    mask = drop_mask(base, tuned, 0.5, "random", rescale=True, base_model="b", tuned_model="t")
    with pytest.raises(MaskingError, match="not finite") as caught:
        apply_to_checkpoint(base, mask, tmp_path / "out", mask_path=None, base_model="b", tuned=tuned)
    assert caught.value.key == "a.weight"
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_rescaled_once(tmp_path: Path) -> None:
    """The tuned checkpoint stores embeddings and head, which are one parameter in memory."""
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(9, 7, generator=generator) for _ in range(2))
    base = write_checkpoint(tmp_path / "base", {"embed.weight": before, "head.weight": before.clone()})
    tuned = write_checkpoint(tmp_path / "tuned", {"embed.weight": after, "head.weight": after.clone()})
    mask = drop_mask(base, tuned, 0.3, "random", rescale=True, base_model="b", tuned_model="t")
    tensors = {name: mask["embed.weight"] for name in mask.names()}  # the same entries for both
    same = Mask(tensors, mask.records, mask.metadata)
    model = torch.nn.Module()
    model.embed, model.head = torch.nn.Module(), torch.nn.Module()
    model.embed.weight = model.head.weight = torch.nn.Parameter(after.clone())
    apply_mask(model, same, base)
    expected = exactly_rescaled(before, after, 1 / (1 - 0.3))
    keep = mask["embed.weight"].numpy()
    assert np.array_equal(model.head.weight.detach().numpy()[keep], expected[keep])
