from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.core_model_loading import Concatenate, WeightConverter

from mftctl.errors import MaskingError, MaskMismatchError
from mftctl.masking.checkpoints.apply_in_memory import apply_mask, checkpoint_names, target_names
from mftctl.masking.mask import Mask
from mftctl.masking.targets import find_targets
from tests.conftest import build_llama
from tests.masking.architectures import ARCHITECTURES, EXPERTS, SIZES, build
from tests.masking.built_checkpoints import learn_mask, projections, stored_tensors, write_checkpoint


class Tensors(torch.nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, torch.nn.Parameter(tensor.clone(), requires_grad=False))


def llama_mask(seed: int = 0) -> Mask:
    weights = dict(build_llama().named_parameters())
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    return learn_mask({name: weights[name].detach() for name in names}, seed=seed)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names_that_are_the_same_on_both_sides() -> None:
    assert checkpoint_names(["a.w", "b.w"], {"a.w", "b.w", "c.w"}, "model") == {"a.w": "a.w", "b.w": "b.w"}


def test_prefix_that_only_the_model_has() -> None:
    assert checkpoint_names(["transformer.h.0.w"], {"h.0.w"}, "transformer") == {"transformer.h.0.w": "h.0.w"}


def test_prefix_that_only_the_checkpoint_has() -> None:
    assert checkpoint_names(["h.0.w"], {"transformer.h.0.w"}, "transformer") == {"h.0.w": "transformer.h.0.w"}


@pytest.mark.parametrize("prefix", ["model", ""])
def test_first_name_that_is_not_found_is_refused(prefix: str) -> None:
    with pytest.raises(MaskMismatchError, match="not in the model") as caught:
        checkpoint_names(["a", "b", "c"], {"a"}, prefix)
    assert caught.value.key == "b"


def test_removed_weights_become_zero_and_no_other_changes() -> None:
    model, mask = build_llama(), llama_mask()
    before = state_of(model)
    apply_mask(model, mask)
    for name, tensor in model.state_dict().items():
        expected = torch.where(mask[name], before[name], 0.0) if name in mask else before[name]
        assert torch.equal(tensor, expected)
    removed = model.get_parameter(mask.names()[0])[~mask[mask.names()[0]]]
    assert removed.numel()
    assert not removed.signbit().any()


def test_second_application_changes_nothing() -> None:
    model, mask = build_llama(), llama_mask()
    apply_mask(model, mask)
    before = state_of(model)
    apply_mask(model, mask)
    assert unchanged(model, before)


def test_second_mask_on_the_same_tensor_is_refused() -> None:
    model = build_llama()
    apply_mask(model, llama_mask())
    before = state_of(model)
    with pytest.raises(MaskMismatchError, match="values of a tensor differ") as caught:
        apply_mask(model, llama_mask(seed=1))
    assert "another mask" in str(caught.value.hint)
    assert unchanged(model, before)


def test_mask_that_removes_nothing_still_needs_its_base() -> None:
    base = torch.ones(4, 4)
    mask = learn_mask({"w": base}, ratio=0.0)
    apply_mask(Tensors(w=base), mask)
    with pytest.raises(MaskMismatchError, match="values of a tensor differ"):
        apply_mask(Tensors(w=base + 1), mask)


def test_other_values_in_the_last_tensor_leave_the_first_untouched() -> None:
    model, mask = build_llama(), llama_mask()
    with torch.no_grad():
        model.get_parameter(mask.names()[-1])[0, 0] += 1
    before = state_of(model)
    with pytest.raises(MaskMismatchError, match="values of a tensor differ") as caught:
        apply_mask(model, mask)
    assert caught.value.key == mask.names()[-1]
    assert caught.value.hint is not None
    assert "org/base at revision abc123" in caught.value.hint
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("base", "loaded"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.float16),
    ],
)
def test_base_is_recognised_in_a_dtype_that_holds_it(base: torch.dtype, loaded: torch.dtype) -> None:
    stored = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(base)
    mask = learn_mask({"w": stored})
    model = Tensors(w=stored.to(loaded))
    apply_mask(model, mask)
    values = model.state_dict()["w"].to(torch.float64)
    assert torch.equal(values, torch.where(mask["w"], stored.to(torch.float64), 0.0))
    wrong = stored.flip(0)
    with pytest.raises(MaskMismatchError, match="values of a tensor differ"):
        apply_mask(Tensors(w=wrong.to(loaded)), mask)


def test_change_too_small_for_the_base_dtype_is_found() -> None:
    stored = torch.ones(4, 4, dtype=torch.bfloat16)
    with pytest.raises(MaskMismatchError, match="values of a tensor differ"):
        apply_mask(Tensors(w=stored.float() + 1e-6), learn_mask({"w": stored}))


def test_dtype_too_narrow_for_the_base_is_masked_by_name_and_shape() -> None:
    stored = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    mask = learn_mask({"w": stored})
    model = Tensors(w=stored.bfloat16())
    apply_mask(model, mask)
    assert torch.equal(model.state_dict()["w"], torch.where(mask["w"], stored.bfloat16(), 0.0))


@pytest.mark.parametrize(
    "weight", [torch.ones(4, 2), torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 4, device="meta")]
)
def test_tensor_of_another_form_is_refused(weight: torch.Tensor) -> None:
    mask = learn_mask({"w": torch.ones(2, 4)})
    with pytest.raises(MaskMismatchError, match="different shape or dtype") as caught:
        apply_mask(Tensors(w=weight), mask)
    assert caught.value.key == "w"


def test_tensor_the_model_lacks_is_refused() -> None:
    with pytest.raises(MaskMismatchError, match="not in the model"):
        apply_mask(Tensors(v=torch.ones(2)), learn_mask({"w": torch.ones(2)}))


def delta_of(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, torch.Tensor, torch.Tensor, Mask]:
    """A base with one tensor, its values, the tuned values and a delta mask."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = (torch.randn(6, 5, generator=generator).to(dtype) for _ in range(2))
    mask = learn_mask({"w": base}, tuned={"w": tuned})
    return write_checkpoint(folder, {"w": base}), base, tuned, mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("loaded", [None, torch.bfloat16, torch.float32])
def test_removed_weights_of_a_delta_mask_get_the_values_of_the_base(
    dtype: torch.dtype, loaded: torch.dtype | None, tmp_path: Path
) -> None:
    folder, base, tuned, mask = delta_of(tmp_path / "base", dtype)
    model = Tensors(w=tuned.to(loaded or dtype))
    apply_mask(model, mask, folder)
    expected = torch.where(mask["w"], tuned.double(), base.double()).to(loaded or dtype)
    assert torch.equal(model.w.double(), expected.double())


def test_signs_of_zeros_and_weights_laid_out_by_columns_are_reset_bit_for_bit(tmp_path: Path) -> None:
    base, tuned = torch.full((2, 9), -0.0), torch.zeros(2, 9)
    mask = learn_mask({"w": base}, tuned={"w": tuned})
    model = Tensors(w=tuned)
    model.w = torch.nn.Parameter(tuned.T.contiguous().T, requires_grad=False)
    apply_mask(model, mask, write_checkpoint(tmp_path / "base", {"w": base}))
    assert torch.equal(model.w.signbit(), ~mask["w"])


def test_second_application_of_a_delta_mask_is_refused(tmp_path: Path) -> None:
    folder, _, tuned, mask = delta_of(tmp_path / "base")
    model = Tensors(w=tuned)
    apply_mask(model, mask, folder)
    before = state_of(model)
    with pytest.raises(MaskMismatchError, match="values of a tensor differ") as caught:
        apply_mask(model, mask, folder)
    assert str(caught.value.hint).startswith("load org/tuned at revision def456")
    assert unchanged(model, before)


def test_base_in_the_place_of_the_tuned_model_is_refused(tmp_path: Path) -> None:
    folder, base, _, mask = delta_of(tmp_path / "base")
    with pytest.raises(MaskMismatchError, match="values of a tensor differ"):
        apply_mask(Tensors(w=base), mask, folder)


def test_another_base_for_a_delta_mask_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    _, base, tuned, mask = delta_of(tmp_path / "base")
    model = Tensors(w=tuned)
    with pytest.raises(MaskMismatchError, match="base is not the one this delta mask was made for") as caught:
        apply_mask(model, mask, write_checkpoint(tmp_path / "other", {"w": base + 1}))
    assert caught.value.key == "w"
    assert torch.equal(model.w, tuned)


def test_delta_mask_without_a_base_is_refused(tmp_path: Path) -> None:
    _, _, tuned, mask = delta_of(tmp_path / "base")
    with pytest.raises(MaskMismatchError, match="needs the base") as caught:
        apply_mask(Tensors(w=tuned), mask)
    assert caught.value.expected == "org/base at revision abc123"


def test_weight_mask_with_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="to its model only"):
        apply_mask(build_llama(), llama_mask(), tmp_path)


def test_weights_laid_out_by_columns_are_masked_in_place() -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model = Tensors(w=base)
    model.w = torch.nn.Parameter(base.T.contiguous().T)
    mask = learn_mask({"w": base})
    apply_mask(model, mask)
    assert torch.equal(model.w, torch.where(mask["w"], base, 0.0))


def test_gpt2_is_masked_under_names_with_and_without_the_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    full = projections(tmp_path / "base")
    assert "transformer.h.1.attn.c_attn.weight" in full
    bare = {name.removeprefix("transformer."): tensor for name, tensor in full.items()}
    with_prefix, without = (GPT2LMHeadModel.from_pretrained(tmp_path / "base") for _ in range(2))
    apply_mask(with_prefix, learn_mask(full))
    apply_mask(without, learn_mask(bare))
    apply_mask(without.transformer, learn_mask(full))
    assert unchanged(with_prefix, state_of(without))
    assert (with_prefix.transformer.h[1].attn.c_attn.weight == 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_are_masked_in_place_by_the_names_on_disk(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "base")
    family = ARCHITECTURES[name]
    stored = stored_tensors(tmp_path / "base")
    mask = learn_mask({family.start + tensor: stored[family.start + tensor] for tensor in family.mlp})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    address = fused.data_ptr()
    apply_mask(model, mask)
    assert model.model.layers[1].mlp.experts.gate_up_proj is fused
    assert fused.data_ptr() == address
    model.save_pretrained(tmp_path / "out")
    after = stored_tensors(tmp_path / "out")
    for tensor, values in stored.items():
        kept = mask[tensor] if tensor in mask else torch.ones_like(values, dtype=torch.bool)
        assert torch.equal(after[tensor], torch.where(kept, values, 0.0)), tensor


def test_other_values_in_one_expert_are_refused(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    mask = learn_mask({name: stored_tensors(tmp_path)[name]})
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2, 50, 0] += 1
    with pytest.raises(MaskMismatchError, match="values of a tensor differ") as caught:
        apply_mask(model, mask)
    assert caught.value.key == name


def test_an_expert_the_model_lacks_is_refused() -> None:
    name = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    with pytest.raises(MaskMismatchError, match="not in the model") as caught:
        apply_mask(build("mixtral"), learn_mask({name: torch.ones(48, 32)}))
    assert caught.value.key == name


def gemma_with_vision() -> PreTrainedModel:
    """A Gemma 3 with a vision tower (4 B parameters and up), whose layers have other names in memory than on disk."""
    torch.manual_seed(0)
    text = {**SIZES, "head_dim": 16, "num_hidden_layers": 3}
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


@pytest.mark.slow
def test_projections_that_have_another_name_on_disk(tmp_path: Path) -> None:
    gemma_with_vision().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    stored = stored_tensors(tmp_path)
    names = target_names(find_targets(model, [1], "mlp"), model, stored)
    assert set(names.values()) == {
        f"language_model.model.layers.1.mlp.{projection}_proj.weight" for projection in ("gate", "up", "down")
    }
    mask = learn_mask({name: stored[name] for name in names.values()})
    apply_mask(model, mask)
    for target, name in names.items():
        assert torch.equal(model.get_parameter(f"{target}.weight"), torch.where(mask[name], stored[name], 0.0))


def test_names_of_targets_without_the_prefix_of_the_model() -> None:
    model = build("gpt2")
    targets = find_targets(model, [1], "mlp")
    names = target_names(targets, model, {"h.1.mlp.c_fc.weight", "h.1.mlp.c_proj.weight"})
    assert names["transformer.h.1.mlp.c_fc"] == "h.1.mlp.c_fc.weight"


def test_a_target_the_checkpoint_lacks_is_refused() -> None:
    model = build("mixtral")
    with pytest.raises(MaskMismatchError, match="not in the model") as caught:
        target_names(find_targets(model, [1], "mlp"), model, {"lm_head.weight"})
    assert caught.value.key == "model.layers.1.block_sparse_moe.experts.0.w1.weight"


def test_a_projection_that_is_stored_as_several_tensors_is_refused() -> None:
    model = build("phi3")
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter(parts, "mlp.gate_up_proj.weight", operations=[Concatenate(dim=0)])]
    with pytest.raises(MaskingError, match="stored as several tensors") as caught:
        target_names(find_targets(model, [1], "mlp", ["gate_up_proj"]), model, set())
    assert caught.value.key == "model.layers.1.mlp.gate_up_proj.weight"
    assert caught.value.actual == "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight"
