"""`fft` with adapters that change individual weights: SHiRA and Super-Tuning, alone or on the weights of a mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftctl.errors import ChangedDataError, ConfigError, Interrupted, MaskMismatchError, ModelError
from mftctl.experiments.model_source import source_of_run
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.checkpoints.adapters import load_adapter
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.sparse_adapters import trained_positions
from mftctl.masking.mask import save_mask
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.workflows.eval import evaluate
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from tests.conftest import build_llama, build_tokenizer
from tests.masking.architectures import build
from tests.masking.mask_files import build_mask
from tests.training.test_reference_step import batch
from tests.workflow_fixtures import Interrupter, make_recipe, open_run, tuned

pytestmark = pytest.mark.slow

RATE = {"fft__learning_rate": 3e-2}
SHIRA = {"fft__method": "shira", "fft__lora_rank": 3, **RATE}
SUPER = {"fft__method": "supertuning", "fft__ratio": 0.9, **RATE}
METHODS = {"shira": SHIRA, "supertuning": SUPER}
IDS = torch.arange(4, 40)[None]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def projections(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(folder).items() if "_proj." in name}


def write_support(path: Path, keep: Mapping[str, torch.Tensor]) -> Path:
    save_mask(build_mask(**keep), path)
    return path


def uneven_support(model: Path, path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A mask of some projections that keeps 3 % of one and up to 20 % of another, and half of the embeddings."""
    generator = torch.Generator().manual_seed(4)
    keep = {}
    for number, (name, tensor) in enumerate(sorted(projections(model).items())):
        if ".layers.2." not in name:
            share = 0.03 + 0.17 * (number % 7) / 6
            keep[name] = torch.rand(tensor.shape, generator=generator) < share
    embeddings = weights(model)["model.embed_tokens.weight"]
    chosen = {**keep, "model.embed_tokens.weight": torch.rand(embeddings.shape, generator=generator) < 0.5}
    return write_support(path, chosen), keep


@pytest.fixture(scope="module", params=METHODS)
def adapter(request: pytest.FixtureRequest, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tuned(workspace, tmp_path_factory.mktemp(request.param), **METHODS[request.param])


def options_of(run: Run) -> dict[str, Any]:
    return METHODS[run.record.config["fft"]["method"]]


def test_the_adapter_learns_and_says_what_it_is(adapter: Run, workspace: Path) -> None:
    result, folder = adapter.record.result, adapter.folder / "model"
    method = adapter.record.config["fft"]["method"]
    assert result["state"] == {"shira": "SHiRA", "supertuning": "Super-Tuning"}[method]
    assert result["best_loss"] < result["start_loss"] - 0.05
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str((workspace / "tiny").resolve())
    assert described["peft_type"] == method.upper()
    assert not (folder / "model.safetensors").exists()
    card = (folder / "README.md").read_text()
    assert f"| Trained weights | {result['trained_parameters']:,}, " in card


def test_exactly_the_chosen_weights_are_trained(adapter: Run, workspace: Path) -> None:
    before, folder = weights(workspace / "tiny"), adapter.folder / "model"
    after = dict(load_model(folder, dtype=torch.float32).named_parameters())
    trained = trained_positions(load_adapter(folder, dtype=torch.float32, trainable=True))
    assert len(trained) == 28
    for name, tensor in before.items():
        moved = (tensor != after[name]).flatten().nonzero().squeeze(1)
        if "_proj." not in name:
            assert len(moved) == 0, name
            continue
        chosen = trained[name.removesuffix(".weight")]
        rank = 3 * sum(tensor.shape)
        assert len(chosen) == (
            rank if options_of(adapter) is SHIRA else tensor.numel() - removed_count(tensor.numel(), 0.9)
        )
        assert set(moved.tolist()) <= set(chosen.tolist()), name
        assert len(moved) > 0.9 * len(chosen), name
        if options_of(adapter) is SUPER:
            assert tensor.flatten()[chosen].abs().min() >= tensor.flatten().abs().sort().values[-len(chosen)]
    assert sum(map(len, trained.values())) == adapter.record.result["trained_parameters"]


def test_plain_peft_gives_the_same_logits(adapter: Run, workspace: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(workspace / "tiny", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(adapter.folder / "model"))
    ours = load_model(adapter.folder / "model", dtype=torch.float32)
    assert torch.equal(logits(plain), logits(ours))
    assert not torch.equal(logits(ours), logits(load_model(workspace / "tiny", dtype=torch.float32)))


def test_a_merged_adapter_is_the_model_that_eval_measures(adapter: Run, workspace: Path, tmp_path: Path) -> None:
    merged = tuned(workspace, tmp_path, **options_of(adapter), fft__merge=True)
    whole = load_model(merged.folder / "model", dtype=torch.float32)
    assert torch.equal(logits(whole), logits(load_model(adapter.folder / "model", dtype=torch.float32)))
    recipe = with_changes(make_recipe(workspace), {"eval.generate": False})
    losses = []
    for made in (adapter, merged):
        run = create_run(tmp_path / "runs", "eval", {}, inputs=source_of_run(made).as_inputs())
        result = evaluate(recipe, source_of_run(made), run, Silence()).document()
        losses.append(result["datasets"][0]["metrics"][0]["value"])
    assert losses[0] == losses[1]


def test_it_resumes_to_the_identical_adapter(adapter: Run, workspace: Path, tmp_path: Path) -> None:
    run, source = open_run(tmp_path, "fft", make_recipe(workspace, **options_of(adapter)))
    recipe = make_recipe(workspace, **options_of(adapter))
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(5))
    fine_tune(recipe, source, run, Silence(), resume=True)
    before, after = (load_file(made.folder / "model" / "adapter_model.safetensors") for made in (adapter, run))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_continued_training_changes_the_same_weights(adapter: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, **options_of(adapter), fft__max_steps=2)
    source = source_of_run(adapter)
    run = create_run(tmp_path, "fft", {}, inputs=source.as_inputs())
    result = fine_tune(recipe, source, run, Silence()).document()
    assert result["state"] == f"continued {adapter.record.result['state']}"
    assert result["start_loss"] == pytest.approx(adapter.record.result["best_loss"], abs=1e-6)
    assert result["trained_parameters"] == adapter.record.result["trained_parameters"]
    before, after = (
        trained_positions(load_adapter(made.folder / "model", dtype=torch.float32)) for made in (adapter, run)
    )
    assert all(torch.equal(positions, after[name]) for name, positions in before.items())


def test_another_method_does_not_continue_it(adapter: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__method="lora")
    run = create_run(tmp_path, "fft", {})
    with pytest.raises(ConfigError, match="adapter of another method") as caught:
        fine_tune(recipe, source_of_run(adapter), run, Silence())
    assert (caught.value.expected, caught.value.actual) == (adapter.record.config["fft"]["method"], "lora")


def test_full_fine_tuning_starts_from_the_merged_model(adapter: Run, workspace: Path, tmp_path: Path) -> None:
    run = create_run(tmp_path, "fft", {}, inputs=source_of_run(adapter).as_inputs())
    recipe = make_recipe(workspace, fft__max_steps=1, fft__learning_rate=1e-9)
    result = fine_tune(recipe, source_of_run(adapter), run, Silence()).document()
    assert result["start_loss"] == pytest.approx(adapter.record.result["best_loss"], abs=1e-6)


def test_a_mask_on_it_is_refused(adapter: Run, workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a whole model is needed"):
        mask_train(make_recipe(workspace), source_of_run(adapter), create_run(tmp_path, "mask-train", {}), Silence())


@pytest.mark.parametrize("method", METHODS)
def test_bf16_weights_that_are_not_chosen_stay_as_they_are(workspace: Path, tmp_path: Path, method: str) -> None:
    """On a CPU the base is then held in fp32, with `--precision bf16` in bf16."""
    build_llama().to(torch.bfloat16).save_pretrained(tmp_path / "start")
    build_tokenizer().save_pretrained(tmp_path / "start")
    before = weights(tmp_path / "start")
    for precision in ("fp32", "bf16"):
        changes = {**METHODS[method], "fft__max_steps": 2, "fft__precision": precision, "fft__merge": True}
        run = tuned(workspace, tmp_path / precision, model=str(tmp_path / "start"), **changes)
        after = weights(run.folder / "model")
        share = {
            name: float((tensor.view(torch.int16) != after[name].view(torch.int16)).float().mean())
            for name, tensor in before.items()
        }
        assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
        assert all(value == 0 for name, value in share.items() if "_proj." not in name)
        assert all(0 < value < 0.5 for name, value in share.items() if "_proj." in name)


def test_fp32_weights_are_not_rounded_by_bf16_training(workspace: Path, tmp_path: Path) -> None:
    run = tuned(workspace, tmp_path, **SUPER, fft__max_steps=2, fft__precision="bf16", fft__merge=True)
    before, after = weights(workspace / "tiny"), weights(run.folder / "model")
    for name, tensor in before.items():
        assert float((tensor == after[name]).float().mean()) >= (0.89 if "_proj." in name else 1.0), name


def by_hand(workspace: Path, keep: Mapping[str, torch.Tensor], steps: int, rate: float) -> dict[str, torch.Tensor]:
    """Training of the chosen weights in plain torch: AdamW on a dense change whose other gradients are removed."""
    model = AutoModelForCausalLM.from_pretrained(workspace / "tiny", dtype=torch.float32)
    tensors = batch(AutoTokenizer.from_pretrained(workspace / "tiny"), workspace / "train.jsonl")
    input_ids, attention_mask, labels = tensors
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters()}
    changes = {name: torch.zeros_like(frozen[name], requires_grad=True) for name in keep}
    optimizer = torch.optim.AdamW(changes.values(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        sums = {name: frozen[name] + change for name, change in changes.items()}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        found = functional_call(model, {**frozen, **sums}, kwargs=inputs, tie_weights=True).logits[:, :-1]
        loss = F.cross_entropy(found.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        for name, change in changes.items():
            assert change.grad is not None
            change.grad[~keep[name]] = 0.0
        torch.nn.utils.clip_grad_norm_(changes.values(), 0.05)
        optimizer.step()
    return {name: (frozen[name] + change).detach() for name, change in changes.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_plain_training(workspace: Path, tmp_path: Path, method: str) -> None:
    steps = {"fft__max_steps": 4, "fft__batch_size": 48, "fft__schedule": "constant", "fft__warmup_ratio": 0.0}
    changes = {**METHODS[method], **steps, "fft__max_grad_norm": 0.05, "fft__keep": "last", "fft__merge": True}
    if method == "supertuning":
        file, keep = uneven_support(workspace / "tiny", tmp_path / "mask.bits")
        changes.pop("fft__ratio")
        run = tuned(workspace, tmp_path, **changes, fft__support=str(file))
    else:
        run = tuned(workspace, tmp_path, **changes)
        changed = projections(run.folder / "model")
        keep = {name: tensor != changed[name] for name, tensor in projections(workspace / "tiny").items()}
    after = weights(run.folder / "model")
    for name, expected in by_hand(workspace, keep, steps=4, rate=3e-2).items():
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=2e-5)
        assert torch.equal(after[name][~keep[name]], weights(workspace / "tiny")[name][~keep[name]])


@pytest.fixture(scope="module")
def supported(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, dict[str, torch.Tensor]]:
    """A Super-Tuning adapter of the weights that a mask keeps, in parts that no single ratio describes."""
    folder = tmp_path_factory.mktemp("supported")
    file, keep = uneven_support(workspace / "tiny", folder / "mask.bits")
    recipe = make_recipe(workspace, fft__method="supertuning", fft__support=str(file), **RATE)
    run, source = open_run(folder / "runs", "fft", recipe)
    listener = Interrupter(-1)
    run.finish(fine_tune(recipe, source, run, listener))
    assert any("1 are not trained" in note and "model.embed_tokens.weight" in note for note in listener.notes)
    return run, file, keep


def test_a_mask_decides_what_is_trained(supported: tuple[Run, Path, dict[str, torch.Tensor]], workspace: Path) -> None:
    run, _, keep = supported
    assert run.record.result["state"] == "Super-Tuning on a mask"
    assert run.record.result["trained_parameters"] == sum(int(tensor.sum()) for tensor in keep.values())
    adapted = load_adapter(run.folder / "model", dtype=torch.float32, trainable=True)
    trained = trained_positions(adapted)
    assert trained.keys() == {name.removesuffix(".weight") for name in keep}
    for name, tensor in keep.items():
        assert torch.equal(trained[name.removesuffix(".weight")], tensor.flatten().nonzero().squeeze(1))
    after = dict(load_model(run.folder / "model", dtype=torch.float32).named_parameters())
    for name, tensor in weights(workspace / "tiny").items():
        left = ~keep[name] if name in keep else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[left], after[name][left]), name
    base = AutoModelForCausalLM.from_pretrained(workspace / "tiny", dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(run.folder / "model"))), logits(adapted))


def test_a_supported_adapter_continues_with_its_mask_alone(
    supported: tuple[Run, Path, dict[str, torch.Tensor]], workspace: Path, tmp_path: Path
) -> None:
    made, file, keep = supported
    other = write_support(tmp_path / "other.bits", {**keep, next(iter(keep)): ~next(iter(keep.values()))})
    for mask in (file, other):
        recipe = make_recipe(workspace, fft__method="supertuning", fft__support=str(mask), fft__max_steps=1)
        run = create_run(tmp_path, "fft", {}, inputs=source_of_run(made).as_inputs())
        if mask == other:
            with pytest.raises(MaskMismatchError, match="changes other weights than the mask keeps"):
                fine_tune(recipe, source_of_run(made), run, Silence())
            continue
        result = fine_tune(recipe, source_of_run(made), run, Silence()).document()
        assert result["state"] == "continued Super-Tuning on a mask"
        assert result["trained_parameters"] == made.record.result["trained_parameters"]


def test_a_drop_mask_is_a_support(workspace: Path, tmp_path: Path) -> None:
    """The typical use: the weights that full fine-tuning changed most."""
    full = tuned(workspace, tmp_path / "full", fft__max_steps=4)
    recipe = make_recipe(workspace, mask_train__method="drop", mask_train__ratio=0.95)
    run = create_run(tmp_path, "mask-train", {}, inputs=source_of_run(full).as_inputs())
    mask = mask_train(recipe, source_of_run(full), run, Silence()).document()["mask"]
    made = tuned(workspace, tmp_path, fft__method="supertuning", fft__support=mask, fft__max_steps=2, **RATE)
    kept = {
        name: tensor.numel() - removed_count(tensor.numel(), 0.95)
        for name, tensor in projections(workspace / "tiny").items()
    }
    assert made.record.result["trained_parameters"] == sum(kept.values())


def test_shira_trains_a_mask_of_its_counts(workspace: Path, tmp_path: Path) -> None:
    keep = {}
    for name, tensor in projections(workspace / "tiny").items():
        flat = torch.zeros(tensor.numel(), dtype=torch.bool)
        flat[: 2 * sum(tensor.shape)] = True
        keep[name] = flat.view(tensor.shape)
    file = write_support(tmp_path / "mask.bits", keep)
    run = tuned(workspace, tmp_path, fft__method="shira", fft__support=str(file), fft__max_steps=2, **RATE)
    assert run.record.result["state"] == "SHiRA on a mask"
    assert json.loads((run.folder / "model" / "adapter_config.json").read_text())["r"] == 2
    trained = trained_positions(load_adapter(run.folder / "model", dtype=torch.float32))
    assert all(torch.equal(found, torch.arange(len(found))) for found in trained.values())


def refused(workspace: Path, root: Path, **changes: Any) -> Any:
    with pytest.raises((MaskMismatchError, ConfigError)) as caught:
        tuned(workspace, root, **changes)
    return caught.value


def test_shira_does_not_train_a_mask_of_other_counts(workspace: Path, tmp_path: Path) -> None:
    file, _ = uneven_support(workspace / "tiny", tmp_path / "mask.bits")
    error = refused(workspace, tmp_path, fft__method="shira", fft__support=str(file))
    assert "rank * (inputs + outputs)" in error.message
    assert "--method supertuning" in error.hint


def test_a_mask_of_another_model(workspace: Path, tmp_path: Path) -> None:
    options = {"fft__method": "supertuning", "fft__support": str(tmp_path / "mask.bits")}
    write_support(tmp_path / "mask.bits", {"model.layers.9.mlp.up_proj.weight": torch.ones(64, 32, dtype=torch.bool)})
    assert "lacks a masked tensor" in refused(workspace, tmp_path, **options).message
    write_support(tmp_path / "mask.bits", {"model.layers.0.mlp.up_proj.weight": torch.ones(32, 64, dtype=torch.bool)})
    assert "another shape" in refused(workspace, tmp_path, **options).message


def test_a_mask_that_keeps_nothing_of_a_tensor(workspace: Path, tmp_path: Path) -> None:
    keep = {name: tensor > 0 for name, tensor in projections(workspace / "tiny").items()}
    name = "model.layers.1.mlp.up_proj.weight"
    file = write_support(tmp_path / "mask.bits", {**keep, name: torch.zeros(64, 32, dtype=torch.bool)})
    error = refused(workspace, tmp_path, fft__method="supertuning", fft__support=str(file))
    assert (error.key, error.actual) == (name, "0")


def test_a_mask_without_projections(workspace: Path, tmp_path: Path) -> None:
    norm = torch.tensor([True] * 30 + [False] * 2)
    file = write_support(tmp_path / "mask.bits", {"model.norm.weight": norm})
    error = refused(workspace, tmp_path, fft__method="supertuning", fft__support=str(file))
    assert "no linear projection" in error.message


def test_a_mask_that_changed_since_the_run_began(workspace: Path, tmp_path: Path) -> None:
    file, keep = uneven_support(workspace / "tiny", tmp_path / "mask.bits")
    recipe = make_recipe(workspace, fft__method="supertuning", fft__support=str(file))
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(5))
    write_support(file, dict(list(keep.items())[1:]))
    with pytest.raises(ChangedDataError, match="mask has changed"):
        fine_tune(recipe, source, run, Silence(), resume=True)


def test_a_rank_beyond_the_smallest_projection(workspace: Path, tmp_path: Path) -> None:
    error = refused(workspace, tmp_path, fft__method="shira")  # rank 16 of projections of 32 x 16
    assert (error.key, error.actual, error.hint) == ("fft.lora_rank", 16, "--lora-rank 10")


def test_a_ratio_that_leaves_nothing(workspace: Path, tmp_path: Path) -> None:
    error = refused(workspace, tmp_path, fft__method="supertuning", fft__ratio=0.9999)
    assert error.key == "fft.ratio"


@pytest.mark.parametrize("method", METHODS)
def test_projections_that_are_no_linear_layers(workspace: Path, tmp_path: Path, method: str) -> None:
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save_pretrained(tmp_path / "gpt2")
    error = refused(workspace, tmp_path, model=str(tmp_path / "gpt2"), **METHODS[method])
    assert "Conv1D" in error.actual
    assert error.hint == "--method lora"
