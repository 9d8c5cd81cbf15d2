"""Probing by a score: groups ranked by an evaluation of each mask, and nothing measured twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.errors import ConfigError, EvaluationError, Interrupted
from mftctl.evaluation.score_choice import check_score
from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.model_source import ModelSource, Recommendation, recommended_layers
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import Score
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.checkpoints.build_mask import build_mask
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.layers import MaskedLinear
from mftctl.masking.mask import save_mask
from mftctl.masking.mask_file.document import MaskMetadata
from mftctl.masking.targets import find_targets
from mftctl.progress import Silence
from mftctl.training.held_out import split_validation_records
from mftctl.training.mask_search import FoundMask
from mftctl.training.validation_scores import ValidationScorer
from mftctl.workflows.eval import evaluate
from mftctl.workflows.probe import probe
from tests.workflow_fixtures import Interrupter, make_recipe, open_run

TASK = "truthfulqa_mc2"
CHOICES = [
    {
        "question": f"{n}+{n}?",
        "mc2_targets": {"choices": [str(2 * n), str(n), str(3 * n + 1)], "labels": [1, 0, 0]},
    }
    for n in range(1, 5)
]


@pytest.fixture(scope="module")
def workspace(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same workspace with more positions in the model, for few-shot prompts."""
    folder = tmp_path_factory.mktemp("wide") / "workspace"
    shutil.copytree(workspace, folder)
    config = json.loads((folder / "tiny" / "config.json").read_text())
    (folder / "tiny" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return folder


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("choices") / "truthfulqa.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in CHOICES))
    return str(path)


def by_job(workspace: Path, choices: str, **changes: Any) -> Recipe:
    by = {"probe__by": TASK, "eval__task_data": {TASK: choices}, "mask_train__max_steps": 4}
    return make_recipe(workspace, **{**by, **changes})


@pytest.fixture(scope="module")
def probed(workspace: Path, choices: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    recipe = by_job(workspace, choices, probe__groups=[1])
    run, source = open_run(tmp_path_factory.mktemp("probed"), "probe", recipe)
    run.finish(probe(recipe, source, run, Silence()))
    return run, run.record.result


@pytest.mark.slow
def test_groups_are_ranked_by_score_and_also_show_the_loss(probed: tuple[Run, dict[str, Any]]) -> None:
    _, result = probed
    scores = [group["score"] for group in result["groups"]]
    assert len(set(scores)) == 4
    assert scores == sorted(scores, reverse=True)
    losses = [group["best_loss"] for group in result["groups"]]
    assert losses != sorted(losses)  # otherwise ranking by loss would give the same order
    unmasked = result["unmasked_score"]
    assert (result["by"], unmasked["metric"], unmasked["samples"]) == (TASK, "acc,none", 4)
    for group in result["groups"]:
        assert group["score_change"] == pytest.approx(group["score"] - unmasked["value"])
        assert group["change"] == pytest.approx(group["best_loss"] - result["unmasked_loss"])
    assert result["recommended_layers"] == result["groups"][0]["layers"]


@pytest.mark.slow
def test_the_next_mask_training_takes_the_layers_with_the_best_score(probed: tuple[Run, dict[str, Any]]) -> None:
    run, result = probed
    found = recommended_layers(run.folder.parent, ModelSource(str(run.record.inputs["model"])))
    assert found == Recommendation(result["groups"][0]["layers"], run.name)
    assert run.record.config["probe"]["by"] == TASK


@pytest.mark.slow
def test_a_score_is_what_an_evaluation_of_the_mask_measures(
    workspace: Path, choices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, FoundMask] = {}
    from mftctl.workflows import probe as probing

    find_mask = probing.find_mask

    def keeping(search: Any) -> FoundMask:
        found = find_mask(search)
        kept[str(search.targets[0].layer)] = found
        return found

    monkeypatch.setattr(probing, "find_mask", keeping)
    recipe = by_job(workspace, choices, probe__groups=[1], probe__layers="2")
    run, source = open_run(tmp_path, "probe", recipe)
    result = probe(recipe, source, run, Silence()).document()
    model = load_model(workspace / "tiny", dtype=torch.float32)
    metadata = MaskMetadata(
        kind="weight",
        base_model="tiny",
        base_revision=None,
        method="learned",
        ratio=0.1,
        threshold=None,
        layers="2",
        seed=0,
        run_id="probe",
    )
    save_mask(
        build_mask(kept["2"].mask, find_targets(model, [2]), model, workspace / "tiny", metadata), tmp_path / "m.bits"
    )
    recipe = make_recipe(workspace, test_data=[], eval={"tasks": [TASK], "task_data": {TASK: choices}})
    source = ModelSource(str(workspace / "tiny"), mask=str(tmp_path / "m.bits"))
    evaluation = create_run(tmp_path, "eval", to_document(recipe), inputs=source.as_inputs())
    [dataset] = evaluate(recipe, source, evaluation, Silence()).document()["datasets"]
    assert dataset["metrics"][0]["value"] == pytest.approx(result["groups"][0]["score"], abs=1e-9)
    unmasked = create_run(tmp_path, "eval", to_document(recipe), inputs=ModelSource(source.model).as_inputs())
    [dataset] = evaluate(recipe, ModelSource(source.model), unmasked, Silence()).document()["datasets"]
    assert dataset["metrics"][0]["value"] == pytest.approx(result["unmasked_score"]["value"], abs=1e-9)


@pytest.mark.slow
def test_the_masks_are_those_of_a_probe_by_the_loss(
    probed: tuple[Run, dict[str, Any]], workspace: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(workspace, probe__groups=[1], mask_train__max_steps=4)
    run, source = open_run(tmp_path, "probe", recipe)
    by_loss = probe(recipe, source, run, Silence()).document()
    assert by_loss["by"] == "loss"
    losses = {group["layers"]: group["best_loss"] for group in by_loss["groups"]}
    assert losses == {group["layers"]: group["best_loss"] for group in probed[1]["groups"]}
    assert all("score" not in group for group in by_loss["groups"])


@pytest.mark.slow
@pytest.mark.parametrize("scores", [1, 3])
def test_interrupted_scoring_is_resumed_to_the_same_results(
    probed: tuple[Run, dict[str, Any]],
    workspace: Path,
    choices: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: int,
) -> None:
    score, scored = ValidationScorer.score, []

    def stopping(self: ValidationScorer, model: Any, folder: Path) -> Score:
        found = score(self, model, folder)
        scored.append(folder.name)
        if len(scored) == scores:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(ValidationScorer, "score", stopping)
    recipe = by_job(workspace, choices, probe__groups=[1])
    run, source = open_run(tmp_path, "probe", recipe)
    with pytest.raises(KeyboardInterrupt):
        probe(recipe, source, run, Silence())
    result = probe(recipe, source, run, Silence(), resume=True).document()
    assert result["groups"] == probed[1]["groups"]
    assert result["unmasked_score"] == probed[1]["unmasked_score"]
    everything = ["unmasked", "0", "1", "2", "3"]
    assert scored == [*everything[:scores], *everything[scores - 1 :]]  # completed scores are not repeated


@pytest.mark.slow
def test_interrupted_training_is_resumed_to_the_same_results(
    probed: tuple[Run, dict[str, Any]], workspace: Path, choices: str, tmp_path: Path
) -> None:
    recipe = by_job(workspace, choices, probe__groups=[1])

    class InThirdGroup(Interrupter):
        def note(self, text: str) -> None:
            self.step = 2 if text.startswith("Group 3") else self.step

    run, source = open_run(tmp_path, "probe", recipe)
    with pytest.raises(Interrupted):
        probe(recipe, source, run, InThirdGroup(-1))
    result = probe(recipe, source, run, Silence(), resume=True).document()
    assert result["groups"] == probed[1]["groups"]


@pytest.mark.slow
def test_exact_match_is_of_the_deciding_validation_records(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, probe__by="exact_match", mask_train__max_steps=4, eval__generate=False)
    run, source = open_run(tmp_path, "probe", recipe)
    result = probe(recipe, source, run, Silence()).document()
    lines = (workspace / "val.jsonl").read_text().splitlines()
    deciding = [json.loads(line) for line in split_validation_records(lines, recipe.mask_train)[0]]
    assert (result["unmasked_score"]["metric"], result["unmasked_score"]["samples"]) == ("exact_match", len(deciding))
    samples = run.folder / "groups" / "0-1" / "samples.jsonl"
    references = [json.loads(line)["reference"] for line in samples.read_text().splitlines()]
    assert references == [record["answer"] for record in deciding]
    # Scores are equal for a model that has learned nothing, so the loss decides.
    assert {group["score"] for group in result["groups"]} == {0.0}
    losses = [group["best_loss"] for group in result["groups"]]
    assert losses == sorted(losses)


@pytest.mark.slow
def test_a_limit_leaves_problems_out(workspace: Path, choices: str, tmp_path: Path) -> None:
    for by, expected in ((TASK, 3), ("exact_match", 3)):
        recipe = by_job(workspace, choices, eval__limit=3, probe__layers="0-1").model_copy()
        recipe = recipe.model_copy(update={"probe": recipe.probe.model_copy(update={"by": by})})
        run, source = open_run(tmp_path, "probe", recipe)
        assert probe(recipe, source, run, Silence()).document()["unmasked_score"]["samples"] == expected


@pytest.mark.slow
def test_warns_that_test_problems_choose_the_layers(
    workspace: Path, choices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mftctl.evaluation.benchmarks import measure

    monkeypatch.setattr(measure, "fetch_problems", lambda config, task: measure.read_problems(Path(choices), task))
    recipe = by_job(workspace, choices, probe__layers="0-1", eval__task_data={})
    run, source = open_run(tmp_path, "probe", recipe)
    listener = Interrupter(-1)
    probe(recipe, source, run, listener)
    assert any(f"chosen on the problems of {TASK} itself" in note for note in listener.notes)


@pytest.mark.parametrize(
    ("by", "text"),
    [("coding", "humaneval, humaneval_plus"), ("group:math", "gsm8k, math"), ("alpaca_eval", "its own score")],
)
def test_metrics_that_cannot_rank_groups(by: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_score(by, {}, "probe.by")


def test_a_missing_file_of_problems() -> None:
    with pytest.raises(EvaluationError, match="does not exist"):
        check_score("gsm8k", {"gsm8k": "missing.jsonl"}, "probe.by")


@pytest.mark.slow
def test_a_misspelt_criterion_names_its_key_and_the_nearest_one() -> None:
    with pytest.raises(EvaluationError, match="no benchmark named") as caught:
        check_score("exactmatch", {}, "--best-by")
    assert (caught.value.key, caught.value.hint) == ("--best-by", "did you mean exact_match?")
    assert str(caught.value.expected).startswith("loss, exact_match, or ")


def test_nothing_is_scored_where_nothing_is_trained() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({"probe": {"fast": True, "by": "gsm8k"}})
    assert caught.value.problems == ("probe: probe.fast only predicts the loss, so it cannot rank groups by gsm8k",)


def test_texts_without_questions_have_no_exact_match(workspace: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} and {n}"}) + "\n" for n in range(12)))
    recipe = make_recipe(workspace, probe__by="exact_match", val_data=[str(text)])
    run, source = open_run(tmp_path, "probe", recipe)
    with pytest.raises(ConfigError, match="needs questions"):
        probe(recipe, source, run, Silence())


def test_deciding_keys_of_a_probe_by_a_score_include_those_of_the_score() -> None:
    def keys(by: str, **of_eval: Any) -> dict[str, Any]:
        return deciding_keys(Recipe(probe={"by": by}, eval=of_eval), "probe")

    assert keys("loss") == deciding_keys(Recipe(), "probe")
    assert "by" not in keys("loss")["probe"]  # so that older probes are still recognised
    assert keys("loss", limit=3) == keys("loss")
    assert keys("gsm8k") != keys("math")
    same = keys("gsm8k", tasks=["gsm8k"], task_data={"math": "m.jsonl"}, save_samples=True)
    assert same == keys("gsm8k")
    for change in ({"limit": 3}, {"task_data": {"gsm8k": "g.jsonl"}}, {"max_new_tokens": 9}, {"chat_template": True}):
        assert keys("gsm8k", **change) != keys("gsm8k")


@pytest.mark.slow
def test_the_model_is_without_its_masks_afterwards(
    workspace: Path, choices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mftctl.workflows import probe as probing

    models: list[Any] = []
    load: Callable[..., Any] = probing.load_frozen_model
    monkeypatch.setattr(probing, "load_frozen_model", lambda *given: models.append(load(*given)) or models[-1])
    recipe = by_job(workspace, choices)
    run, source = open_run(tmp_path, "probe", recipe)
    probe(recipe, source, run, Silence())
    [model] = models
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    before = load_model(workspace / "tiny", dtype=torch.float32).state_dict()
    assert all(torch.equal(value.cpu(), before[name]) for name, value in model.state_dict().items())
