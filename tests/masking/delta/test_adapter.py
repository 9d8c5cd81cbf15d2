"""Super-Tuning adapters: written and read, compared with peft itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mftctl.errors import MaskingError, ModelError
from mftctl.files.ownership import Kind, permit_folder
from mftctl.masking.checkpoints.locate import is_adapter
from mftctl.masking.delta.adapter import ADAPTER_WEIGHTS, ExportedAdapter, export_adapter, import_adapter
from mftctl.masking.delta.adapter_format import added_values, entries, settle_sparsity
from mftctl.masking.delta.apply import apply_delta_to_checkpoint
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.delta.records import NamedModel
from tests.conftest import build_llama
from tests.masking.built_checkpoints import stored_tensors, write_tuned
from tests.masking.delta.made_deltas import make, plan, raw_checkpoint

LINEAR = plan(0.9, exclude=("embeddings", "vectors"))


def export(base: Path, delta: Path, output: Path) -> ExportedAdapter:
    with open_delta(delta) as opened:
        permit = permit_folder(Kind.MODEL, replace=False)
        return export_adapter(opened, base, output, permit, base_model=NamedModel(str(base)))


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def exported(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.dtype, ExportedAdapter]:
    """A folder with `base`, `change.delta`, `applied` and `adapter`."""
    folder, dtype = tmp_path_factory.mktemp("exported"), request.param
    base = shutil.copytree(tiny_checkpoint, folder / "base")
    build_llama().to(dtype).save_pretrained(base)
    tuned = write_tuned(base, folder / "tuned")
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    make(base, tuned, folder / "change.delta", LINEAR)
    with open_delta(folder / "change.delta") as delta:
        apply_delta_to_checkpoint(base, delta, folder / "applied", base_model="b")
    return folder, dtype, export(base, folder / "change.delta", folder / "adapter")


def test_peft_merges_the_adapter_to_the_applied_checkpoint(
    exported: tuple[Path, torch.dtype, ExportedAdapter],
) -> None:
    folder, dtype, summary = exported
    merged, applied = merged_by_peft(folder / "base", folder / "adapter", dtype), stored_tensors(folder / "applied")
    different = sum(int((merged[name] != tensor).sum()) for name, tensor in applied.items())
    # The changes are as large as the weights, where sums in bf16 reach only some numbers.
    assert different == summary.inexact <= (0.02 if dtype == torch.float32 else 0.4) * summary.entries
    assert all(torch.allclose(merged[name], tensor, rtol=0.01, atol=1e-3) for name, tensor in applied.items())
    assert is_adapter(folder / "adapter")
    assert (folder / "adapter" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert summary.bytes_written == (folder / "adapter" / ADAPTER_WEIGHTS).stat().st_size


def test_the_adapter_comes_back_as_peft_merges_it(
    exported: tuple[Path, torch.dtype, ExportedAdapter], tmp_path: Path
) -> None:
    folder, dtype, summary = exported
    contents = import_adapter(
        folder / "adapter", folder / "base", tmp_path / "again.delta", base_model=NamedModel("org/base")
    )
    with open_delta(tmp_path / "again.delta") as delta:
        apply_delta_to_checkpoint(folder / "base", delta, tmp_path / "out", base_model="b")
    merged, found = merged_by_peft(folder / "base", folder / "adapter", dtype), stored_tensors(tmp_path / "out")
    assert all(torch.equal(merged[name], tensor) for name, tensor in found.items())
    kept = sum(record.kept for record in contents.tensors.values())
    assert kept <= summary.entries - summary.filled
    if not summary.inexact:
        assert raw_checkpoint(tmp_path / "out") == raw_checkpoint(folder / "applied")


def test_an_adapter_trained_by_peft_is_imported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    config = SupertuningConfig(target_modules=["q_proj", "down_proj"], sparsity=0.93, init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", tiny_checkpoint, tmp_path / "x.delta", base_model=NamedModel("b"))
    with open_delta(tmp_path / "x.delta") as delta:
        apply_delta_to_checkpoint(tiny_checkpoint, delta, tmp_path / "out", base_model="b")
    merged = merged_by_peft(tiny_checkpoint, tmp_path / "adapter", torch.float32)
    assert all(torch.equal(merged[name], tensor) for name, tensor in stored_tensors(tmp_path / "out").items())


def test_changes_of_other_tensors_cannot_be_exported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tuned = write_tuned(tiny_checkpoint, tmp_path / "tuned")
    for exclude, actual in (((), "weight of Embedding"), (("embeddings",), "weight of LlamaRMSNorm")):
        make(tiny_checkpoint, tuned, tmp_path / "change.delta", plan(0.9, exclude=exclude))
        with pytest.raises(MaskingError, match="not the weight of a linear layer") as caught:
            export(tiny_checkpoint, tmp_path / "change.delta", tmp_path / "adapter")
        assert caught.value.actual == actual
        assert "--exclude embeddings,vectors" in str(caught.value.hint)
    assert not (tmp_path / "adapter").exists()


def test_transposed_layers_cannot_be_exported(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tuned = write_tuned(tmp_path / "base", tmp_path / "tuned")
    make(tmp_path / "base", tuned, tmp_path / "change.delta", LINEAR)
    with pytest.raises(MaskingError, match="not the weight of a linear layer") as caught:
        export(tmp_path / "base", tmp_path / "change.delta", tmp_path / "adapter")
    assert caught.value.actual == "weight of Conv1D"


def test_a_changed_configuration_cannot_be_exported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tuned = write_tuned(tiny_checkpoint, tmp_path / "tuned")
    document = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**document, "rms_norm_eps": 0.5}))
    make(tiny_checkpoint, tuned, tmp_path / "change.delta", LINEAR)
    with pytest.raises(MaskingError, match="changes the model's configuration"):
        export(tiny_checkpoint, tmp_path / "change.delta", tmp_path / "adapter")


@settings(deadline=None, max_examples=100)
@given(layers=st.lists(st.tuples(st.floats(0, 0.999), st.integers(2, 10**8)), min_size=1, max_size=6))
def test_the_sparsity_leaves_room_for_every_layer(layers: list[tuple[float, int]]) -> None:
    kept = {str(number): (max(1, int(share * weights)), weights) for number, (share, weights) in enumerate(layers)}
    sparsity = settle_sparsity(kept)
    assert 0 <= sparsity < 1
    counts = [entries(weights, sparsity) for _, weights in kept.values()]
    assert all(count >= changed for count, (changed, _) in zip(counts, kept.values(), strict=True))
    assert any(count <= changed + 1 for count, (changed, _) in zip(counts, kept.values(), strict=True))


@pytest.mark.parametrize(
    ("kept", "message"), [((5, 5), "Every weight of a layer is changed"), ((5, 2**31), "too many weights")]
)
def test_layers_that_no_adapter_can_hold(kept: tuple[int, int], message: str) -> None:
    with pytest.raises(MaskingError, match=message):
        settle_sparsity({"w": kept})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_added_values_give_the_wanted_weights_or_are_counted(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3000, generator=generator).to(dtype)
    after = (before.double() * (1 + 0.3 * torch.randn(3000, generator=generator))).to(dtype)
    values, wrong = added_values(before, after)
    assert values.dtype == torch.float32
    found = before.scatter_add(0, torch.arange(3000), values.to(dtype))
    assert int((found != after).sum()) == wrong
    if dtype != torch.float64:
        assert wrong < 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "cannot become a delta file"),
        ({"r": 4}, "cannot become a delta file"),
        ({"modules_to_save": ["lm_head"]}, "cannot become a delta file"),
        ({"save_precomputed_indices": False}, "cannot become a delta file"),
    ],
)
def test_another_adapter_is_refused(
    change: dict[str, object], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    settings_of = {"peft_type": "SUPERTUNING", **change}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings_of))
    with pytest.raises(ModelError, match=message) as caught:
        import_adapter(tmp_path / "adapter", tiny_checkpoint, tmp_path / "x.delta", base_model=NamedModel("b"))
    assert caught.value.key == next(iter(change))


@pytest.mark.parametrize("how", ["layer", "part", "range", "count", "zero", "damaged", "missing"])
def test_an_adapter_that_does_not_fit_is_refused(how: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    config = SupertuningConfig(target_modules=["q_proj"], sparsity=0.9, init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config).save_pretrained(adapter)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    name = min(tensors)  # indices
    values = name.replace("indices", "values")
    match how:
        case "layer":
            tensors |= {part.replace("q_proj", "x_proj"): tensors[part].clone() for part in (name, values)}
        case "part":
            del tensors[values]
        case "range":
            tensors[name][0] = -1
        case "count":
            tensors[values] = tensors[values][1:].clone()
        case "zero":
            tensors = {one: tensor * (0 if "values" in one else 1) for one, tensor in tensors.items()}
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    if how == "damaged":
        (adapter / ADAPTER_WEIGHTS).write_bytes(b"no")
    if how == "missing":
        (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ModelError):
        import_adapter(adapter, tiny_checkpoint, tmp_path / "x.delta", base_model=NamedModel("b"))
    assert not (tmp_path / "x.delta").exists()


def test_shira_is_refused_with_the_way_round(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = ShiraConfig(target_modules=["q_proj"], r=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot become a delta file") as caught:
        import_adapter(tmp_path / "adapter", tiny_checkpoint, tmp_path / "x.delta", base_model=NamedModel("b"))
    assert "merge it into its base" in str(caught.value.hint)
