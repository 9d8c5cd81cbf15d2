"""The whole workflow on a tiny model: all commands in sequence, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mftctl import apply_mask, load_mask
from mftctl.experiments.run_folder import list_runs, load_run
from tests.cli.running import CommandLine

FFT = ("--max-steps", 6, "--val-steps", 3, "--batch-size", 4, "--lr", "3e-3")


@pytest.mark.slow
def test_1_fft(here: CommandLine, workspace: Path) -> None:
    outcome = here("fft", "-m", workspace / "tiny", "-d", workspace / "train.jsonl", *FFT)
    assert outcome.code == 0, outcome.stderr
    assert "validation loss" in outcome.stdout
    assert "Next: mftctl probe" in outcome.stderr
    assert (here.folder / "runs" / "001-fft" / "model" / "model.safetensors").is_file()
    assert (here.folder / "runs" / "001-fft" / "config.yaml").is_file()


@pytest.mark.slow
def test_2_probe_finds_the_model_and_the_data_by_itself(here: CommandLine) -> None:
    outcome = here("probe", "--groups", 2, "--data-fraction", 0.5, "--json")
    assert outcome.code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert {group["layers"] for group in document["groups"]} == {"0-1", "2-3"}
    assert "from 001-fft" in outcome.stderr
    assert "Next: mftctl mask-train" in outcome.stderr


@pytest.mark.slow
def test_3_mask_train_takes_the_recommended_layers(here: CommandLine) -> None:
    outcome = here("mask-train", "--epochs", 1, "--ratio", 0.1, "--json")
    assert outcome.code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    recommended = list_runs(here.folder / "runs")[0][1].record.result["recommended_layers"]
    assert document["layers"] == recommended
    assert "recommended by 002-probe" in outcome.stderr
    assert (here.folder / "mask.bits").read_bytes() == Path(document["mask"]).read_bytes()


@pytest.mark.slow
def test_4_apply_writes_a_plain_checkpoint(here: CommandLine) -> None:
    outcome = here("apply")
    assert outcome.code == 0, outcome.stderr
    runs = here.folder / "runs"
    applied = AutoModelForCausalLM.from_pretrained(runs / "004-apply" / "model")
    base = AutoModelForCausalLM.from_pretrained(runs / "001-fft" / "model")
    apply_mask(base, load_mask(here.folder / "mask.bits"))
    ids = torch.arange(6, 30)[None]
    assert torch.equal(applied(ids).logits, base(ids).logits)


@pytest.mark.slow
def test_5_eval_measures_the_result_and_its_source_model(here: CommandLine, workspace: Path) -> None:
    outcome = here("eval", "-d", workspace / "test.jsonl", "--json")
    assert outcome.code == 0, outcome.stderr
    states = [item["state"] for item in json.loads(outcome.stdout)["evaluations"]]
    assert states == ["pre-trained", "FFT", "MFT"]
    again = here("eval", "-d", workspace / "test.jsonl")
    assert "FFT: already measured by 006-eval" in again.stderr


@pytest.mark.slow
def test_5_eval_repeats_a_measurement_on_request(here: CommandLine, workspace: Path) -> None:
    model = here.folder / "runs" / "001-fft" / "model"
    outcome = here("eval", model, "-d", workspace / "test.jsonl", "--again", "--json")
    assert "already measured" not in outcome.stderr
    document = json.loads(outcome.stdout)
    assert Path(document["run"]).name > "006-eval"
    first = load_run(here.folder / "runs" / "006-eval").record.result
    assert document["datasets"] == first["datasets"]


@pytest.mark.slow
def test_5_eval_reports_the_speed_of_a_benchmark(here: CommandLine, workspace: Path) -> None:
    task = ("--tasks", "gsm8k_0shot", "--task-data", f"gsm8k_0shot={workspace / 'test.jsonl'}")
    outcome = here("eval", workspace / "tiny", *task, "--limit", 2, "--max-new-tokens", 4, "--runs", "other")
    assert outcome.code == 0, outcome.stderr
    assert "gsm8k_0shot: 8 tokens in " in " ".join(outcome.stderr.split())


@pytest.mark.slow
def test_6_report_compares_them(here: CommandLine) -> None:
    outcome = here("report", "--json")
    assert outcome.code == 0, outcome.stderr
    loss = json.loads(outcome.stdout)["tables"][0]
    assert [row["state"] for row in loss["rows"]] == ["pre-trained", "FFT", "MFT"]
    assert loss["rows"][0]["change"]["verdict"] == "worse"
    document = json.loads((here.folder / "report" / "report.json").read_text())
    assert {name: value for name, value in document.items() if name != "files"} == json.loads(outcome.stdout)
    assert "| FFT |" in (here.folder / "report" / "report.md").read_text()
    assert "removed-by-magnitude" in [figure["name"] for figure in document["figures"]]
    assert all((here.folder / "report" / name).is_file() for name in document["files"])


@pytest.mark.slow
def test_6_report_shows_one_table_the_next_step_and_where_the_files_are(here: CommandLine) -> None:
    outcome = here("report")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.count("pre-trained") == 1
    messages = " ".join(outcome.stderr.split())
    assert "Written: report/index.html, report.md, report.json" in messages
    assert "Next: mftctl " in messages
    each = here("report", "--each-seed")
    assert each.stdout.count("pre-trained") > 1


@pytest.mark.slow
def test_7_a_result_is_replaced_only_with_yes(here: CommandLine) -> None:
    before = (here.folder / "mask.bits").read_bytes()
    refused = here("mask-train", "--method", "random")
    assert refused.code == 2
    assert "A result already exists" in refused.stderr
    assert (here.folder / "mask.bits").read_bytes() == before
    assert here("mask-train", "--method", "random", "--yes").code == 0
    assert (here.folder / "mask.bits").read_bytes() != before


@pytest.mark.slow
def test_8_mask_info_and_diff(here: CommandLine) -> None:
    runs = here.folder / "runs"
    learned = runs / "003-mask-train" / "mask.bits"
    info = json.loads(here("mask", "info", learned, "--json").stdout)
    assert info["method"] == "learned"
    assert info["ratio"] == pytest.approx(0.1, abs=0.01)
    assert "q_proj" in here("mask", "info", learned).stdout
    same = json.loads(here("mask", "diff", learned, learned, "--json").stdout)
    assert same["tensors"]["all"]["jaccard"] == 1.0
    assert "by chance" in here("mask", "diff", learned, "mask.bits").stdout


@pytest.mark.slow
def test_9_eval_with_a_mask_equals_the_applied_model(here: CommandLine, workspace: Path) -> None:
    runs = here.folder / "runs"
    arguments = ("-d", workspace / "test.jsonl", "--no-generate", "--json")
    masked = here("eval", runs / "001-fft/model", "--mask", runs / "003-mask-train/mask.bits", *arguments)
    applied = here("eval", runs / "004-apply/model", *arguments)
    first, second = (json.loads(outcome.stdout)["datasets"][0]["metrics"] for outcome in (masked, applied))
    assert json.loads(masked.stdout)["state"] == "MFT"
    assert first == second


@pytest.mark.slow
def test_continued_fft_is_named_so(here: CommandLine) -> None:
    outcome = here("fft", "--max-steps", 1, "--json")
    assert json.loads(outcome.stdout)["state"] == "continued FFT"


@pytest.mark.slow
def test_settings_are_inherited_from_run_to_run(here: CommandLine) -> None:
    runs = {run.name: run.record.config for run in list_runs(here.folder / "runs")[0]}
    assert runs["002-probe"]["fft"]["learning_rate"] == 3e-3
    assert runs["003-mask-train"]["data"] == runs["001-fft"]["data"]


@pytest.mark.slow
def test_9_data_to_retain_is_a_reason_to_measure_again(here: CommandLine, workspace: Path) -> None:
    arguments = ("eval", "-d", workspace / "test.jsonl", "--retain", workspace / "val.jsonl")
    outcome = here(*arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    assert "already measured" not in outcome.stderr
    evaluations = json.loads(outcome.stdout)["evaluations"]
    assert [item["state"] for item in evaluations] == ["pre-trained", "FFT", "continued FFT"]
    for item in evaluations:
        assert [dataset["name"] for dataset in item["datasets"]] == ["test.jsonl", "retained"]
    again = here(*arguments)
    assert again.stderr.count("already measured") == 2  # a model outside the runs folder may have changed
    assert " retained " in again.stdout
