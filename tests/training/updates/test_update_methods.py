"""`fft` with methods that update only a part of the weights: GMT, random updates, HFT and LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mftctl.errors import Interrupted, ModelError
from mftctl.experiments.measured_lines import MetricsLine
from mftctl.experiments.model_source import ModelSource, source_of_run
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.training.updates.hft import hft_frozen_names
from mftctl.workflows.eval import evaluate
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from tests.conftest import build_llama, build_tokenizer
from tests.workflow_fixtures import Interrupter, make_recipe, open_run, tuned


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int((tensor != after[name]).sum()) for name, tensor in before.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gmt", "random"])
def test_one_step_changes_as_many_weights_as_the_ratio_leaves(workspace: Path, tmp_path: Path, method: str) -> None:
    run = tuned(workspace, tmp_path, fft__method=method, fft__ratio=0.7, fft__max_steps=1, fft__keep="last")
    before = weights(workspace / "tiny")
    for name, count in changed(before, weights(run.folder / "model")).items():
        selected = before[name].numel() - removed_count(before[name].numel(), 0.7)
        if "embed" in name or "lm_head" in name or method == "random":
            assert count <= selected, name  # tokens that do not occur have no gradient
        else:
            assert count == selected, name


@pytest.mark.slow
def test_gmt_global_leaves_the_ratio_of_all_weights_unchanged(workspace: Path, tmp_path: Path) -> None:
    run = tuned(
        workspace,
        tmp_path,
        fft__method="gmt",
        fft__scope="global",
        fft__ratio=0.9,
        fft__max_steps=1,
        fft__keep="last",
    )
    before = weights(workspace / "tiny")
    total = sum(tensor.numel() for tensor in before.values())
    assert sum(changed(before, weights(run.folder / "model")).values()) == total - removed_count(total, 0.9)
    assert run.record.result["state"] == "GMT global"


@pytest.mark.slow
def test_embeddings_excluded_from_selection_are_fully_updated(workspace: Path, tmp_path: Path) -> None:
    steps = {"fft__max_steps": 1, "fft__keep": "last"}
    recipe = make_recipe(workspace, fft__method="gmt", fft__ratio=0.7, fft__exclude=["embeddings"], **steps)
    run, source = open_run(tmp_path / "gmt", "fft", recipe)
    listener = Interrupter(-1)
    result = fine_tune(recipe, source, run, listener).document()
    full = tuned(workspace, tmp_path / "full", **steps)
    before = weights(workspace / "tiny")
    mine, its = (changed(before, weights(folder / "model")) for folder in (run.folder, full.folder))
    for name, tensor in before.items():
        selected = tensor.numel() - removed_count(tensor.numel(), 0.7)
        assert mine[name] == (its[name] if "embed" in name else selected), name
    assert result["state"] == "GMT excluding embeddings"
    [told] = [note for note in listener.notes if note.startswith("Fully updated at each step: ")]
    assert "model.embed_tokens.weight is both embeddings and head (tied weights)" in told


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gmt", "random"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_gives_the_identical_model(workspace: Path, tmp_path: Path, method: str, accumulate: int) -> None:
    changes = {"fft__method": method, "fft__ratio": 0.5, "fft__max_steps": 6, "fft__grad_accum_steps": accumulate}
    undisturbed = tuned(workspace, tmp_path / "a", **changes)
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(tmp_path / "b", "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(3))
    fine_tune(recipe, source, run, Silence(), resume=True)
    before, after = weights(undisturbed.folder / "model"), weights(run.folder / "model")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
def test_a_ratio_of_0_is_full_fine_tuning(workspace: Path, tmp_path: Path) -> None:
    steps = {"fft__max_steps": 4, "fft__keep": "last"}
    full = tuned(workspace, tmp_path / "a", **steps)
    gmt = tuned(workspace, tmp_path / "b", fft__method="gmt", fft__ratio=0.0, **steps)
    after = weights(gmt.folder / "model")
    for name, tensor in weights(full.folder / "model").items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "rmsprop", "adagrad"])
def test_any_optimizer_leaves_unselected_weights_unchanged(workspace: Path, tmp_path: Path, optimizer: str) -> None:
    changes = {"fft__method": "gmt", "fft__ratio": 0.7, "fft__max_steps": 1, "fft__keep": "last"}
    run = tuned(workspace, tmp_path, fft__optimizer=optimizer, **changes)
    before = weights(workspace / "tiny")
    counts = changed(before, weights(run.folder / "model"))
    assert all(
        count <= before[name].numel() - removed_count(before[name].numel(), 0.7) for name, count in counts.items()
    )
    assert sum(counts.values()) > 0


@pytest.mark.slow
def test_hft_leaves_its_half_unchanged_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    run = tuned(workspace, tmp_path, fft__method="hft", fft__max_steps=4, fft__keep="last")
    frozen = hft_frozen_names(load_model(workspace / "tiny", dtype=torch.float32), 0)
    counts = changed(weights(workspace / "tiny"), weights(run.folder / "model"))
    assert {name for name, count in counts.items() if count == 0} == set(frozen)
    assert run.record.result["state"] == "HFT"
    assert run.record.result["trained_parameters"] < sum(
        tensor.numel() for tensor in weights(workspace / "tiny").values()
    )


@pytest.fixture(scope="module")
def lora(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tuned(workspace, tmp_path_factory.mktemp("lora"), fft__method="lora", fft__learning_rate=1e-2)


@pytest.mark.slow
def test_lora_writes_an_adapter_that_names_its_base(lora: Run, workspace: Path) -> None:
    folder = lora.folder / "model"
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str((workspace / "tiny").resolve())
    assert (described["r"], described["lora_alpha"]) == (16, 32)
    assert not (folder / "model.safetensors").exists()
    assert lora.record.result["best_loss"] < lora.record.result["start_loss"]


@pytest.mark.slow
def test_a_merged_adapter_is_the_model_that_eval_measures(lora: Run, workspace: Path, tmp_path: Path) -> None:
    merged = tuned(workspace, tmp_path, fft__method="lora", fft__merge=True, fft__learning_rate=1e-2)
    adapted = load_model(lora.folder / "model", dtype=torch.float32)
    whole = load_model(merged.folder / "model", dtype=torch.float32)
    input_ids = torch.arange(4, 20)[None]
    torch.testing.assert_close(adapted(input_ids=input_ids).logits, whole(input_ids=input_ids).logits)
    recipe = with_changes(make_recipe(workspace), {"eval.generate": False})
    losses = []
    for made in (lora, merged):
        run = create_run(tmp_path / "runs", "eval", {}, inputs=source_of_run(made).as_inputs())
        result = evaluate(recipe, source_of_run(made), run, Silence()).document()
        losses.append(result["datasets"][0]["metrics"][0]["value"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_continued_lora_trains_the_same_adapter(lora: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__method="lora", fft__max_steps=2)
    source = source_of_run(lora)
    run = create_run(tmp_path, "fft", {}, inputs=source.as_inputs())
    result = fine_tune(recipe, source, run, Silence()).document()
    assert result["state"] == "continued LoRA"
    assert result["start_loss"] == pytest.approx(lora.record.result["best_loss"], abs=1e-5)
    described = json.loads((run.folder / "model" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str((workspace / "tiny").resolve())


@pytest.mark.slow
def test_lora_resumes_to_the_identical_adapter(lora: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__method="lora", fft__learning_rate=1e-2)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(5))
    fine_tune(recipe, source, run, Silence(), resume=True)
    before = load_model(lora.folder / "model", dtype=torch.float32).state_dict()
    after = load_model(run.folder / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
def test_a_mask_on_an_adapter_is_refused(lora: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace)
    run = create_run(tmp_path, "mask-train", {})
    with pytest.raises(ModelError, match="a whole model is needed") as caught:
        mask_train(recipe, source_of_run(lora), run, Silence())
    assert "--merge" in str(caught.value.hint)


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not name its base"):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.slow
def test_a_continued_adapter_can_be_merged(lora: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__method="lora", fft__max_steps=1, fft__merge=True)
    run = create_run(tmp_path, "fft", {}, inputs=source_of_run(lora).as_inputs())
    result = fine_tune(recipe, source_of_run(lora), run, Silence()).document()
    assert result["trained_parameters"] > 0
    assert load_model(run.folder / "model", dtype="auto").dtype == torch.float32
    assert not (run.folder / "model" / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "wanted", "written"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
    ],
)
def test_weights_are_written_in_the_dtype_of_the_start(
    workspace: Path, tmp_path: Path, stored: torch.dtype, wanted: str, written: torch.dtype
) -> None:
    build_llama().to(stored).save_pretrained(tmp_path / "start")
    build_tokenizer().save_pretrained(tmp_path / "start")
    run = tuned(workspace, tmp_path, model=str(tmp_path / "start"), fft__max_steps=1, fft__save_dtype=wanted)
    assert load_model(run.folder / "model", dtype="auto").dtype == written


@pytest.mark.slow
def test_cosine_schedule_ends_at_zero(workspace: Path, tmp_path: Path) -> None:
    run = tuned(workspace, tmp_path, fft__schedule="cosine", fft__max_steps=8)
    rates = [
        line["learning_rate"] for line in map(MetricsLine.document, run.training.metrics()) if "learning_rate" in line
    ]
    assert rates[0] == 0.0
    assert rates[1] == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(3e-3 * 0.0495, rel=1e-2)


@pytest.mark.slow
def test_data_fraction_uses_part_of_the_data(workspace: Path, tmp_path: Path) -> None:
    run = tuned(workspace, tmp_path, fft__data_fraction=0.25, fft__max_steps=2)
    assert run.record.inputs["train_records"] == 12
    assert ModelSource(run.record.inputs["model"]).state == "pre-trained"
