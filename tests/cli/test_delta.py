"""`mftctl delta`, `delta merge`, `delta export`, `delta import`, and the commands that take delta files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mftctl.experiments.run_folder import list_runs
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.mask import save_mask
from mftctl.reporting.reproduction import reproduction
from tests.cli.running import CommandLine
from tests.masking.built_checkpoints import learn_mask, projections, raw_tensors, write_tuned
from tests.workflow_fixtures import write_additions


def weights(folder: Path) -> dict[str, bytes]:
    return raw_tensors(folder / "model.safetensors")


@pytest.fixture
def here(mftctl: CommandLine, tiny_checkpoint: Path) -> CommandLine:
    """A folder with the checkpoints `base`, `tuned` and `other`, and with records."""
    base = shutil.copytree(tiny_checkpoint, mftctl.folder / "base")
    for seed, name in ((1, "tuned"), (2, "other")):
        write_tuned(base, mftctl.folder / name, seed=seed)
    write_additions(mftctl.folder / "test.jsonl", 6, seed=3)
    return mftctl


def test_the_file_makes_the_tuned_model_again(here: CommandLine) -> None:
    made = here("delta", "base", "tuned")
    assert made.code == 0, made.stderr
    assert "of the checkpoint" in made.stdout
    assert "Next: mftctl eval base --mask change.delta --data FILE" in made.stderr
    shutil.rmtree(here.folder / "tuned")
    applied = here("apply", "base", "change.delta", "-o", "again", "--json")
    assert applied.code == 0, applied.stderr
    document = json.loads(applied.stdout)
    assert (document["state"], document["base"], document["tensors_masked"]) == ("delta exact", "base", 38)
    assert document["changed"] > 0
    write_tuned(here.folder / "base", here.folder / "tuned", seed=1)
    assert weights(here.folder / "again") == weights(here.folder / "tuned")
    runs = [(run.record.command, run.record.status) for run in list_runs(here.folder / "runs")[0]]
    assert runs == [("delta", "finished"), ("apply", "finished")]


def test_the_result_is_one_document(here: CommandLine) -> None:
    arguments = ["--ratio", "0.9", "--select", "random", "--rescale", "--values", "int8", "--exclude", "embeddings"]
    document = json.loads(here("delta", "base", "tuned", *arguments, "-o", "x.delta", "--json").stdout)
    assert (document["state"], document["values"]) == ("delta int8 rescaled", "int8")
    assert (document["model"], document["tuned"]) == ("base", "tuned")
    assert document["output"] == str(here.folder / "x.delta")
    assert document["file_bytes"] == (here.folder / "x.delta").stat().st_size == Path(document["mask"]).stat().st_size
    assert document["checkpoint_bytes"] == sum(map(len, weights(here.folder / "base").values()))
    assert document["left_out"] == {"model.embed_tokens.weight": "excluded"}
    info = json.loads(here("mask", "info", "x.delta", "--json").stdout)
    assert (info["kind"], info["changed"], info["scale"]) == ("delta file", document["kept"], pytest.approx(10))
    assert info["share"] == document["file_bytes"] / document["checkpoint_bytes"]
    assert info["left_out"] == document["left_out"]
    shown = here("mask", "info", "x.delta").stdout
    assert all(text in shown for text in ("Delta file", "int8", "(excluded)", "random"))


@pytest.mark.slow
def test_a_model_with_the_file_is_measured_like_the_tuned_model(here: CommandLine) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (here.folder / "tuned" / "chat_template.jinja").write_text(template)
    assert here("delta", "base", "tuned").code == 0
    common = ("-d", "test.jsonl", "--set", "eval.generate=false", "--json")
    with_file = json.loads(here("eval", "base", "--mask", "change.delta", *common).stdout)
    tuned = json.loads(here("eval", "tuned", *common).stdout)
    assert with_file["state"] == "delta exact"
    assert with_file["datasets"][0]["metrics"] == tuned["datasets"][0]["metrics"]
    answered = here("generate", "base", "--mask", "change.delta", "-p", "1+1?", "--max-new-tokens", "4", "--json")
    alone = here("generate", "tuned", "-p", "1+1?", "--max-new-tokens", "4", "--json")
    answers = [json.loads(one.stdout)["answers"][0] for one in (answered, alone)]
    assert answers[0]["masked_answer"] == answers[1]["answer"]


def test_a_mask_decides_what_is_stored(here: CommandLine) -> None:
    drop = ("--method", "drop", "--ratio", "0.4", "--base", "base")
    assert here("mask-train", "-m", "tuned", *drop).code == 0
    assert here("delta", "base", "tuned", "--mask", "mask.bits").code == 0
    assert here("apply", "base", "mask.bits", "--tuned", "tuned", "-o", "masked").code == 0
    assert here("apply", "base", "change.delta", "-o", "again").code == 0
    assert weights(here.folder / "again") == weights(here.folder / "masked")


def test_an_existing_result_is_replaced_only_with_yes(here: CommandLine) -> None:
    assert here("delta", "base", "tuned").code == 0
    old = (here.folder / "change.delta").read_bytes()
    refused = here("delta", "base", "other")
    assert (refused.code, refused.stdout) == (2, "")
    assert "A result already exists" in refused.stderr
    assert (here.folder / "change.delta").read_bytes() == old
    assert here("delta", "base", "other", "--yes").code == 0
    assert (here.folder / "change.delta").read_bytes() != old
    (here.folder / "change.delta").write_text("mine")
    assert "exists and is not a delta file" in here("delta", "base", "tuned", "--yes").stderr
    assert (here.folder / "change.delta").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["delta", "base", "base"], 1, "same weights, so there is nothing to store"),
        (["delta", "base", "nowhere"], 1, "There is no such model"),
        (["delta", "base"], 2, "delta needs a model"),
        (["delta", "base", "tuned", "--ratio", "1"], 2, "less than 1"),
        (["delta", "base", "tuned", "--ratio", "0.5", "--rescale"], 2, "delta.rescale applies only to select random"),
        (["delta", "base", "tuned", "--values", "fp4"], 2, "delta.values"),
        (["delta", "base", "tuned", "--exclude", "norms"], 2, "delta.exclude"),
        (["delta", "base", "tuned", "--exclude", "head,head"], 2, "names a part twice"),
        (["delta", "base", "tuned", "--mask", "weight.bits"], 1, "does not say which changes to keep"),
        (["delta", "base", "tuned", "-o", "base"], 2, "is or contains an input model"),
        (["apply", "tuned", "x.delta", "-o", "out"], 1, "already applied"),
        (["apply", "other", "x.delta", "-o", "out"], 1, "not the base of this delta file"),
        (["apply", "base", "x.delta", "-o", "out", "--tuned", "tuned"], 2, "x.delta, a delta file"),
        (["eval", "other", "--mask", "x.delta", "-d", "test.jsonl"], 1, "not the base of this delta file"),
        (["mask", "diff", "x.delta", "x.delta"], 1, "This is a delta file"),
        (["mask", "export", "x.delta", "-o", "m.npz"], 1, "This is a delta file"),
        (["delta", "merge", "x.delta"], 2, "at least two delta files"),
        (["delta", "merge", "x.delta", "weight.bits"], 1, "This is a mask file"),
        (["delta", "merge", "x.delta", "x.delta", "--weights", "1"], 2, "cannot be used"),
        (["delta", "merge", "x.delta", "x.delta", "--base", "other"], 1, "not the base of this delta file"),
        (["delta", "export", "x.delta", "-o", "adapter"], 1, "not the weight of a linear layer"),
        (["delta", "import", "base"], 1, "configuration cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake(here: CommandLine, arguments: list[str], code: int, message: str) -> None:
    assert here("delta", "base", "tuned", "-o", "x.delta").code == 0
    save_mask(learn_mask(projections(here.folder / "base")), here.folder / "weight.bits")
    shutil.rmtree(here.folder / "runs")
    outcome = here(*arguments)
    assert outcome.code == code, outcome.stderr
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""
    assert not any((here.folder / name).exists() for name in ("out", "adapter", "change.delta", "merged.delta"))


def test_merging_and_the_commands_that_repeat_it(here: CommandLine) -> None:
    assert here("delta", "base", "tuned", "-o", "one.delta", "--ratio", "0.5").code == 0
    assert here("delta", "base", "other", "-o", "two.delta", "--ratio", "0.5").code == 0
    merged = here("delta", "merge", "one.delta", "two.delta", "--json")
    assert merged.code == 0, merged.stderr
    document = json.loads(merged.stdout)
    assert (document["state"], document["method"], document["weights"]) == ("merged deltas", "ties", [1, 1])
    assert 0 < document["conflicts"] < document["kept"]
    assert here("apply", "base", "merged.delta", "-o", "applied").code == 0
    assert here("delta", "merge", "one.delta", "two.delta", "-o", "merged").code == 0
    assert weights(here.folder / "merged") == weights(here.folder / "applied")
    runs = list_runs(here.folder / "runs")[0]
    by_command = {run.record.command: run for run in runs}
    for command in ("delta", "delta-merge"):
        words = reproduction(by_command[command]).split()
        assert words[:2] == ["mftctl", "delta"]
        assert here(*words[1:], "--yes").code == 0


@pytest.mark.slow
def test_an_adapter_there_and_back(here: CommandLine) -> None:
    only_layers = ("--ratio", "0.9", "--exclude", "embeddings,vectors")
    assert here("delta", "base", "tuned", *only_layers).code == 0
    exported = here("delta", "export", "change.delta", "-o", "adapter", "--json")
    assert exported.code == 0, exported.stderr
    document = json.loads(exported.stdout)
    assert document["layers"] == 28
    model = AutoModelForCausalLM.from_pretrained(here.folder / "base")
    merged = PeftModel.from_pretrained(model, str(here.folder / "adapter")).merge_and_unload()
    imported = here("delta", "import", "adapter", "-o", "again.delta")
    assert imported.code == 0, imported.stderr
    assert "Next: mftctl apply base again.delta -o OUT" in imported.stderr
    assert here("apply", "base", "again.delta", "-o", "out").code == 0
    found, tensors = merged.state_dict(), weights(here.folder / "out")
    assert all(found[name].numpy().tobytes() == raw for name, raw in tensors.items())
    refused = here("delta", "export", "change.delta", "-o", "adapter")
    assert refused.code == 2
    assert "A result already exists" in refused.stderr
    assert here("delta", "export", "change.delta", "-o", "adapter", "--yes").code == 0


@pytest.mark.slow
def test_without_arguments_the_latest_fine_tuning_is_stored(here: CommandLine) -> None:
    training = ("--max-steps", "2", "--batch-size", "2", "--max-length", "32", "--val-fraction", "0.4")
    assert here("fft", "-m", "base", "-d", "test.jsonl", *training).code == 0
    made = here("delta")
    assert made.code == 0, made.stderr
    assert "(FFT), before: base" in made.stderr
    with open_delta(here.folder / "change.delta") as delta:
        assert delta.contents.metadata.base.model == "base"
    applied = here("apply", "--json")  # the latest mask or delta file
    assert applied.code == 0, applied.stderr
    assert json.loads(applied.stdout)["state"] == "delta exact"
