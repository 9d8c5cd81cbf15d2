"""The whole workflow with methods other than the default: LoRA, GMT, and resetting part of a fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.running import CommandLine

FFT = ("--max-steps", 4, "--val-steps", 2, "--batch-size", 4, "--lr", "3e-3")


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


@pytest.mark.slow
def test_1_gmt(here: CommandLine, workspace: Path) -> None:
    data = ("-d", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl")
    outcome = here("fft", "-m", workspace / "tiny", *data, *FFT, "--method", "gmt", "--ratio", 0.4, "--json")
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["state"] == "GMT"


@pytest.mark.slow
def test_2_drop_needs_neither_data_nor_the_base_of_a_run(here: CommandLine, workspace: Path) -> None:
    drop = ("--method", "drop", "--strategy", "trivial", "--ratio", 0.3)
    outcome = here("mask-train", *drop, "--json", "-o", "drop.bits")
    assert outcome.code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert (document["state"], document["base"]) == ("trivial drop", str(workspace / "tiny"))
    assert document["ratio"] == pytest.approx(0.3, abs=0.01)
    assert "reset" in here("mask-train", *drop, "-o", "drop.bits", "--yes").stdout


@pytest.mark.slow
def test_3_apply_gives_base_and_tuned_weights(here: CommandLine, workspace: Path) -> None:
    by_itself = here("apply", "-o", "dropped")
    assert by_itself.code == 0, by_itself.stderr
    assert "reset" in by_itself.stdout
    by_name = here("apply", workspace / "tiny", "drop.bits", "-o", "again", "--tuned", "runs/001-fft/model")
    assert by_name.code == 0, by_name.stderr
    base, tuned = parameters(workspace / "tiny"), parameters(here.folder / "runs" / "001-fft" / "model")
    for name, tensor in parameters(here.folder / "dropped").items():
        assert torch.equal(tensor, parameters(here.folder / "again")[name])
        assert bool(((tensor == base[name]) | (tensor == tuned[name])).all())


@pytest.mark.slow
def test_4_eval_under_the_mask_equals_the_applied_model(here: CommandLine, workspace: Path) -> None:
    data = ("-d", workspace / "test.jsonl", "--no-generate", "--json")
    losses = []
    for model in (("runs/001-fft/model", "--mask", "drop.bits"), ("dropped",)):
        outcome = here("eval", *model, *data)
        assert outcome.code == 0, outcome.stderr
        losses.append(json.loads(outcome.stdout)["datasets"][0]["metrics"][0]["value"])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_5_tuned_is_for_drops_alone(here: CommandLine, workspace: Path) -> None:
    model = here.folder / "runs" / "001-fft" / "model"
    here("mask-train", "-m", model, "--method", "random", "-o", "random.bits")
    outcome = here("apply", model, "random.bits", "-o", "wrong", "--tuned", model)
    assert outcome.code == 2
    assert "--tuned applies only to delta masks" in outcome.stderr
    assert not (here.folder / "wrong").exists()


@pytest.mark.slow
def test_6_drop_without_its_base(here: CommandLine, workspace: Path) -> None:
    outcome = here("mask-train", "-m", workspace / "tiny", "--method", "drop", "-o", "no.bits")
    assert outcome.code == 2
    assert "drop method needs the model before fine-tuning" in outcome.stderr
    assert "--base MODEL" in outcome.stderr


@pytest.mark.slow
def test_7_drop_from_another_model(here: CommandLine, workspace: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaConfig(
        vocab_size=102, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True
    )
    LlamaForCausalLM(wide).save_pretrained(here.folder / "wide")
    model = here.folder / "runs" / "001-fft" / "model"
    outcome = here("mask-train", "-m", model, "--base", "wide", "--method", "drop", "-o", "no.bits")
    assert outcome.code == 1
    assert "do not have the same tensors" in outcome.stderr
    assert not (here.folder / "no.bits").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["1", "-0.1", "lots", "q_proj=2"])
def test_8_a_ratio_outside_its_range(here: CommandLine, ratio: str) -> None:
    outcome = here("mask-train", "--ratio", ratio, "-o", "no.bits")
    assert outcome.code == 2
    assert "ratio" in outcome.stderr
    assert not (here.folder / "no.bits").exists()


@pytest.mark.slow
def test_9_a_ratio_by_projection(here: CommandLine) -> None:
    ratio = "q_proj=0.05,down_proj=0.5"
    outcome = here(
        "mask-train", "--method", "magnitude", "--layers", "0-1", "--ratio", ratio, "-o", "two.bits", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["tensors"] == 4
    described = json.loads(here("mask", "info", "two.bits", "--json").stdout)["tensors"]
    assert {name.split(".")[-2] for name in described} == {"q_proj", "down_proj"}


@pytest.mark.slow
def test_lora_that_is_not_merged_is_evaluated_as_it_is(here: CommandLine, workspace: Path) -> None:
    data = ("-d", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl")
    runs = ("--runs", "lora")
    assert here("fft", "-m", workspace / "tiny", *data, *FFT, "--method", "lora", *runs).code == 0
    measured = here("eval", "-d", workspace / "test.jsonl", "--no-generate", *runs, "--json")
    assert measured.code == 0, measured.stderr
    assert [item["state"] for item in json.loads(measured.stdout)["evaluations"]] == ["pre-trained", "LoRA"]
    masked = here("mask-train", *runs, "-o", "no.bits")
    assert masked.code == 1
    assert "--merge" in masked.stderr


@pytest.mark.slow
def test_90_super_tuning_on_the_weights_that_a_drop_keeps(here: CommandLine, workspace: Path) -> None:
    """Uses the model and the fft run of the tests above."""
    tuned, data = "runs/001-fft/model", ("-d", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl")
    drop = ("--base", workspace / "tiny", "--method", "drop", "--ratio", 0.95)
    assert here("mask-train", "-m", tuned, *drop, "-o", "most.bits", "--runs", "sparse").code == 0
    options = (*data, *FFT, "--method", "supertuning", "--support", "most.bits", "--runs", "sparse")
    outcome = here("fft", "-m", workspace / "tiny", *options, "--json")
    assert outcome.code == 0, outcome.stderr
    assert "are not trained, since peft adapts individual weights only in linear layers" in outcome.stderr
    assert "Sparse invariant" not in outcome.stderr
    assert json.loads(outcome.stdout)["state"] == "Super-Tuning on a mask"
    measured = here("eval", "-d", workspace / "test.jsonl", "--no-generate", "--runs", "sparse", "--json")
    assert measured.code == 0, measured.stderr
    states = [item["state"] for item in json.loads(measured.stdout)["evaluations"]]
    assert states == ["pre-trained", "Super-Tuning on a mask"]
    answered = here("generate", "-p", "1+2?", "--max-new-tokens", 4, "--runs", "sparse")
    assert answered.code == 0, answered.stderr
    assert "answering Super-Tuning on a mask" in answered.stderr
    again = here("fft", *data, *FFT, "--runs", "sparse", "--json")
    assert again.code == 0, again.stderr
    assert json.loads(again.stdout)["state"] == "continued Super-Tuning on a mask"
    shira = here("fft", "-m", workspace / "tiny", *data, *FFT, "--method", "shira", "--support", "most.bits")
    assert shira.code == 1
    assert "--method supertuning" in shira.stderr
    full = here("fft", "-m", workspace / "tiny", *data, *FFT, "--support", "most.bits")
    assert full.code == 2
    assert "applies only to the methods shira and supertuning" in full.stderr


@pytest.mark.slow
def test_91_a_learned_delta_mask(here: CommandLine, workspace: Path) -> None:
    learn = ("--kind", "delta", "--max-steps", 4, "--val-steps", 2, "--batch-size", 4, "--layers", "all")
    outcome = here("mask-train", *learn, "-o", "delta.bits", "--json")
    assert outcome.code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert (document["state"], document["base"]) == ("MFT delta", str(workspace / "tiny"))
    by_itself = here("apply", "-o", "delta")
    assert by_itself.code == 0, by_itself.stderr
    by_name = here("apply", workspace / "tiny", "delta.bits", "-o", "delta-2", "--tuned", "runs/001-fft/model")
    assert by_name.code == 0, by_name.stderr
    data = ("-d", workspace / "test.jsonl", "--no-generate", "--json")
    losses = []
    for model in (("runs/001-fft/model", "--mask", "delta.bits"), ("delta",), ("delta-2",)):
        outcome = here("eval", *model, *data)
        assert outcome.code == 0, outcome.stderr
        losses.append(json.loads(outcome.stdout)["datasets"][0]["metrics"][0]["value"])
    assert losses[0] == losses[1] == losses[2]
    described = here("mask", "info", "delta.bits", "--json")
    assert described.code == 0, described.stderr
    assert "delta" in described.stdout
    compared = here("mask", "diff", "delta.bits", "drop.bits")
    assert compared.code == 0, compared.stderr


@pytest.mark.slow
def test_92_delta_masks_and_weight_masks_where_they_do_not_apply(here: CommandLine, workspace: Path) -> None:
    model = workspace / "tiny"
    for options, message in (
        (("-m", model, "--kind", "delta", "-d", workspace / "train.jsonl"), "needs the model before fine-tuning"),
        (("--method", "drop", "--kind", "weight"), "kind: weight does not apply to the method drop"),
        (("--method", "magnitude", "--kind", "delta", "--unit", "row"), "applies only to kind weight"),
    ):
        outcome = here("mask-train", *options, "-o", "no.bits")
        assert outcome.code == 2
        assert message in " ".join(outcome.stderr.split())
        assert not (here.folder / "no.bits").exists()
