"""Estimated mask sizes compared with written files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.checkpoints.meta_models import build_skeleton
from mftctl.masking.mask import save_mask
from mftctl.masking.mask_file.codecs import encode, pack
from mftctl.masking.targets import find_targets
from mftctl.workflows.planning.mask_sizes import MaskEstimate, deflate_size_bytes, masked_tensors
from tests.conftest import build_llama
from tests.masking.mask_files import build_mask


def _random_mask(weights: int, removed: int, seed: int = 0) -> torch.Tensor:
    keep = torch.ones(weights, dtype=torch.bool)
    keep[torch.randperm(weights, generator=torch.Generator().manual_seed(seed))[:removed]] = False
    return keep


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(weights=st.integers(100_000, 600_000), share=st.floats(0.01, 0.99))
def test_deflate_sizes_are_within_3_percent(weights: int, share: float) -> None:
    removed = int(weights * share)
    written = len(encode(pack(_random_mask(weights, removed)), "deflate"))
    assert deflate_size_bytes(weights, removed) == pytest.approx(written, rel=0.03)


def test_bits_per_weight_at_ratio_01() -> None:
    assert 8 * deflate_size_bytes(10_000_000, 1_000_000) / 10_000_000 == pytest.approx(0.478, rel=0.005)


def test_small_and_empty_masks_stay_below_their_bits() -> None:
    assert deflate_size_bytes(64, 6) <= 8 + 5
    assert deflate_size_bytes(1_000_000, 0) < 1_000_000 / 8 / 7


def test_counts_of_a_model_without_weights() -> None:
    model = build_skeleton(build_llama().config, torch.float32)
    tensors = masked_tensors(find_targets(model, [1], "mlp"), MaskTrainOptions(ratio=0.1))
    assert [tensor.name for tensor in tensors] == [
        f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert {(tensor.weights, tensor.removed, tensor.packed_bytes) for tensor in tensors} == {(2048, 205, 256)}


def test_a_ratio_by_projection_and_a_threshold() -> None:
    targets = find_targets(build_llama(), [0], projections=["q_proj", "up_proj"])
    by_projection = masked_tensors(targets, MaskTrainOptions(ratio={"q_proj": 0.5, "up_proj": 0.25}))
    assert [tensor.removed for tensor in by_projection] == [512, 512]
    by_threshold = masked_tensors(targets, MaskTrainOptions(preset="paper", threshold=0.0))
    assert [(tensor.removed, tensor.deflate_bytes) for tensor in by_threshold] == [(None, None)] * 2
    mask = MaskEstimate("1", tuple(by_threshold))
    assert (mask.removed, mask.deflate_bytes, mask.weights) == (None, None, sum(item.weights for item in by_threshold))


def test_a_saved_mask_file_has_the_expected_size(tmp_path: Path) -> None:
    weights, removed = 512 * 1024, 52_429
    keep = _random_mask(weights, removed).reshape(512, 1024)
    save_mask(build_mask(a=keep, b=keep), tmp_path / "mask.bits")
    size_bytes = (tmp_path / "mask.bits").stat().st_size
    assert 2 * deflate_size_bytes(weights, removed) == pytest.approx(size_bytes, rel=0.03)
