"""Trainings whose best step is decided by a score instead of the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import ConfigError, Interrupted
from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.mask_results import MeasuredMask
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import FftResult, Score
from mftctl.experiments.run_folder import Run
from mftctl.progress import Silence
from mftctl.training.candidates import Candidate, best_candidate, log_entry, logged_candidates
from mftctl.training.validation_scores import ValidationScorer
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from tests.workflow_fixtures import Interrupter, make_recipe, open_run, tuned

AVERAGES: dict[str, Any] = {"fft__average": "ema", "fft__average_horizons": [0.5]}


def score(value: float, *, higher_is_better: bool = True) -> Score:
    return Score(metric="m", value=value, standard_error=0.1, samples=9, higher_is_better=higher_is_better)


def test_the_score_decides_then_the_loss_then_the_trained_values() -> None:
    low, high = Candidate(None, 0.5, score(0.2)), Candidate(0.1, 0.7, score(0.3))
    assert best_candidate([low, high]) is high
    tied = Candidate(0.1, 0.4, score(0.2))
    assert best_candidate([low, tied]) is tied
    same = Candidate(0.1, 0.5, score(0.2))
    assert best_candidate([low, same]) is low
    worse = Candidate(0.1, 0.5, score(0.3, higher_is_better=False))
    assert best_candidate([Candidate(None, 0.5, score(0.4, higher_is_better=False)), worse]) is worse
    assert best_candidate([Candidate(None, float("nan")), Candidate(0.1, 9.0)]).horizon == 0.1


def test_candidates_are_read_back_from_the_log() -> None:
    for candidates in (
        [Candidate(None, 0.5)],
        [Candidate(None, 0.5), Candidate(0.1, 0.25), Candidate(0.02, 0.125)],
        [Candidate(None, 0.5, score(0.1)), Candidate(0.1, 0.25, score(0.2))],
    ):
        assert logged_candidates(json.loads(json.dumps(log_entry(candidates)))) == candidates


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Exact match by the name of the measurement's folder; 0 for others. A tiny model answers nothing right."""
    values: dict[str, float] = {}
    measured = ValidationScorer.score

    def replaced(self: ValidationScorer, model: Any, folder: Path) -> Score:
        found = measured(self, model, folder)
        [file] = folder.glob("*.jsonl")
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        right = round(values.get(folder.name, 0.0) * len(lines))
        for number, line in enumerate(lines):
            line["scores"]["exact_match"] = float(number < right)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return found.model_copy(update={"value": right / len(lines)})

    monkeypatch.setattr(ValidationScorer, "score", replaced)
    return values


def scored_run(workspace: Path, root: Path, **changes: Any) -> Run:
    return tuned(workspace, root, fft__best_by="exact_match", fft__max_steps=6, fft__val_steps=2, **changes)


@pytest.mark.slow
def test_the_step_with_the_best_score_is_kept(workspace: Path, tmp_path: Path, scores: dict[str, float]) -> None:
    scores |= {"step-2": 0.5, "step-4": 0.75, "step-6": 0.25}
    run = scored_run(workspace, tmp_path)
    result = run.result(FftResult)
    lines = [line for line in run.training.metrics() if line.eval_loss is not None]
    assert result.best_step == 4
    assert result.best_loss == lines[2].eval_loss > result.last_loss == lines[3].eval_loss
    assert result.best_score is not None
    assert (result.best_score.metric, result.best_score.value) == ("exact_match", 0.75)
    again = tuned(workspace, tmp_path / "again", model=result.model, fft__max_steps=1)
    assert again.result(FftResult).start_loss == result.best_loss
    changes = [line.document().get("score_change") for line in lines]
    assert changes[:2] == [None, None]  # the start is no candidate
    assert changes[2] is not None
    assert (changes[2]["value"], changes[3]["value"]) == pytest.approx((0.25, -0.5))
    assert changes[2]["low"] <= 0.25 <= changes[2]["high"]


@pytest.mark.slow
def test_an_average_with_a_better_score_is_kept(workspace: Path, tmp_path: Path, scores: dict[str, float]) -> None:
    scores |= {"step-2": 0.5, "step-4-average-0.5": 0.75}
    result = scored_run(workspace, tmp_path, **AVERAGES).result(FftResult)
    assert (result.best_step, result.kept_average) == (4, 0.5)


@pytest.mark.slow
def test_a_resumed_training_keeps_the_same_step(workspace: Path, tmp_path: Path, scores: dict[str, float]) -> None:
    scores |= {"step-2": 0.75, "step-4": 0.5, "step-6": 0.75}
    undisturbed = scored_run(workspace, tmp_path / "a").result(FftResult)
    recipe = make_recipe(workspace, fft__best_by="exact_match", fft__max_steps=6, fft__val_steps=2)
    run, source = open_run(tmp_path / "b", "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(3))
    result = fine_tune(recipe, source, run, Silence(), resume=True)
    assert result.best_step == undisturbed.best_step == 6  # of equal scores that with the lower loss
    assert result.best_loss == undisturbed.best_loss


@pytest.mark.slow
def test_a_mask_is_kept_by_its_score(workspace: Path, tmp_path: Path, scores: dict[str, float]) -> None:
    scores |= {"unmasked": 0.5, "step-4": 1.0}
    recipe = make_recipe(workspace, mask_train__best_by="exact_match")
    run, source = open_run(tmp_path, "mask-train", recipe)
    result = mask_train(recipe, source, run, Silence())
    assert isinstance(result, MeasuredMask)
    assert (result.best_step, result.helps) == (4, True)
    assert result.unmasked_score is not None
    assert result.best_score is not None
    assert (result.unmasked_score.value, result.best_score.value) == (0.5, 1.0)


@pytest.mark.slow
def test_initial_scores_that_remove_nothing_have_the_score_of_the_unmasked_model(
    workspace: Path, tmp_path: Path, scores: dict[str, float]
) -> None:
    scores |= {"unmasked": 1 / 3, "step-4": 5 / 6}
    recipe = make_recipe(workspace, mask_train__best_by="exact_match", mask_train__preset="default")
    run, source = open_run(tmp_path, "mask-train", recipe)
    result = mask_train(recipe, source, run, Silence())
    assert isinstance(result, MeasuredMask)
    assert result.best_step == 4
    [change] = [line.document()["score_change"] for line in run.training.metrics() if line.step == 4 and line.eval_loss]
    assert change["value"] == pytest.approx(0.5)


@pytest.mark.slow
def test_of_equal_scores_that_with_the_lower_loss_is_kept(
    workspace: Path, tmp_path: Path, scores: dict[str, float]
) -> None:
    result = scored_run(workspace, tmp_path).result(FftResult)
    assert result.best_score is not None
    assert result.best_score.value == 0.0
    assert (result.best_step, result.best_loss) == (6, result.last_loss)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "default"])
def test_the_masks_of_a_probe_are_kept_by_their_scores(
    workspace: Path, tmp_path: Path, scores: dict[str, float], preset: str
) -> None:
    scores |= {"unmasked": 0.5, "step-2": 1.0}
    recipe = make_recipe(
        workspace,
        mask_train__preset=preset,
        mask_train__best_by="exact_match",
        mask_train__max_steps=4,
        mask_train__val_steps=2,
        probe__groups=[2],
    )
    run, source = open_run(tmp_path, "probe", recipe)
    groups = probe(recipe, source, run, Silence()).document()["groups"]
    assert [group["best_step"] for group in groups] == [2, 2]
    assert not any("score" in group for group in groups)  # they are still ranked by loss
    for group in ("0-1", "2-3"):
        lines = [line.document() for line in run.training_in(run.folder / "groups" / group).metrics()]
        [change] = [line["score_change"] for line in lines if line["step"] == 2 and "score_change" in line]
        assert change["value"] == pytest.approx(0.5 if preset == "default" else 1.0)


def test_a_score_adds_its_settings_to_what_decides_a_result() -> None:
    def keys(by: str, **of_eval: Any) -> dict[str, Any]:
        return deciding_keys(Recipe(fft={"best_by": by}, eval=of_eval), "fft")

    assert keys("loss") == deciding_keys(Recipe(), "fft")
    assert keys("loss", limit=3) == keys("loss")
    assert keys("exact_match") != keys("loss")
    assert keys("exact_match", limit=3) != keys("exact_match")


def test_a_mask_without_training_has_no_best_step() -> None:
    with pytest.raises(ConfigError, match="best_by applies only to learned masks"):
        parse_recipe({"mask_train": {"method": "random", "best_by": "exact_match"}})


def test_texts_without_questions_have_no_exact_match(workspace: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} and {n}"}) + "\n" for n in range(12)))
    recipe = make_recipe(workspace, fft__best_by="exact_match", val_data=[str(text)])
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(ConfigError, match="needs questions") as caught:
        fine_tune(recipe, source, run, Silence())
    assert caught.value.key == "fft.best_by"
