from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy import stats

from mftctl.errors import EvaluationError
from mftctl.evaluation import statistics
from mftctl.evaluation.losses import SampleLoss, mean_loss
from mftctl.evaluation.statistics import (
    Interval,
    holm,
    paired_difference,
    paired_difference_over_seeds,
    sign_flips,
    standard_error_of_loss,
    standard_error_of_ratio,
    standard_error_of_share,
)


def plain_bootstrap(differences: np.ndarray, weights: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Draws one test set after another."""
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(differences), len(differences))
        ratios.append(differences[drawn].sum() / weights[drawn].sum())
    return float(np.percentile(ratios, 2.5)), float(np.percentile(ratios, 97.5))


def drawn_losses(rng: np.random.Generator, samples: int, shift: float = 0.0) -> list[SampleLoss]:
    tokens = rng.integers(1, 60, samples)
    return [SampleLoss(float(n * (1.0 + shift) + rng.normal(0, math.sqrt(n))), int(n)) for n in tokens]


def score_difference(a: np.ndarray, b: np.ndarray) -> Interval:
    return paired_difference(np.subtract(b, a, dtype=float), np.ones(len(a)))


def loss_difference(a: list[SampleLoss], b: list[SampleLoss]) -> Interval:
    differences = np.array([after.nll - before.nll for before, after in zip(a, b, strict=True)])
    return paired_difference(differences, np.array([float(loss.answer_tokens) for loss in a]))


def test_agrees_with_an_independent_bootstrap() -> None:
    rng = np.random.default_rng(3)
    weights = rng.integers(5, 200, 150).astype(float)
    differences = -0.02 * weights + rng.normal(0, 1.5, 150)
    interval = paired_difference(differences, weights, resamples=10_000, seed=1)
    low, high = plain_bootstrap(differences, weights, resamples=4_000, seed=2)
    width = high - low
    assert interval.estimate == pytest.approx(differences.sum() / weights.sum())
    assert interval.low == pytest.approx(low, abs=0.06 * width)
    assert interval.high == pytest.approx(high, abs=0.06 * width)


@pytest.mark.slow
def test_the_interval_covers_the_truth_at_its_level() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        weights = rng.integers(5, 100, 80).astype(float)
        differences = 0.1 * weights + rng.normal(0, 3, 80)
        interval = paired_difference(differences, weights, confidence=0.9, resamples=400, seed=trial)
        covered += interval.low <= 0.1 <= interval.high
    # 300 trials at 0.9: standard deviation 0.017; the percentile method falls slightly short with 80 samples.
    assert 0.84 <= covered / 300 <= 0.95


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = np.random.default_rng(5)
    differences, weights = rng.normal(size=50), np.ones(50)
    one = paired_difference(differences, weights, resamples=500, seed=7)
    assert paired_difference(differences, weights, resamples=500, seed=7) == one
    assert paired_difference(differences, weights, resamples=500, seed=8) != one


def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    differences, weights = rng.normal(size=50), rng.uniform(1, 9, 50)
    one = paired_difference(differences, weights, resamples=500)
    monkeypatch.setattr(statistics, "_BLOCK_NUMBERS", 7 * 50)
    assert paired_difference(differences, weights, resamples=500) == one


@settings(max_examples=25)
@example(np.array([1.75, 1.75]), 28.1015625)
@given(
    st_numpy.arrays(float, st.integers(2, 20), elements=st.floats(-50, 50)),
    st.floats(0.01, 100),
)
def test_an_interval_is_ordered_and_scales_with_the_weights(differences: np.ndarray, weight: float) -> None:
    weights = np.full(len(differences), weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval = paired_difference(differences, weights, resamples=100)
    unit = paired_difference(differences, np.ones_like(weights), resamples=100)
    assert interval.low <= interval.high
    assert interval.low * weight == pytest.approx(unit.low, rel=1e-9, abs=1e-9)
    assert differences.min() - 1e-9 <= unit.low
    assert unit.high <= differences.max() + 1e-9


def test_without_differences_the_interval_is_zero_to_zero() -> None:
    losses = [SampleLoss(2.0, 3), SampleLoss(1.0, 4), SampleLoss(5.0, 5)]
    interval = loss_difference(losses, losses)
    assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert not interval.excludes_zero
    same = score_difference(np.array([1, 0, 1]), np.array([1, 0, 1]))
    assert (same.estimate, same.low, same.high) == (0.0, 0.0, 0.0)


def test_two_samples_are_enough() -> None:
    interval = score_difference(np.zeros(2), np.array([1, 0]))
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0.0, 1.0)


def test_a_clear_gain_excludes_zero_and_noise_does_not() -> None:
    rng = np.random.default_rng(1)
    a = drawn_losses(rng, 100)
    better = [SampleLoss(loss.nll - 0.1 * loss.answer_tokens + rng.normal(0, 0.2), loss.answer_tokens) for loss in a]
    noise = [SampleLoss(loss.nll + rng.normal(0, 2), loss.answer_tokens) for loss in a]
    gain = loss_difference(a, better)
    assert gain.excludes_zero
    assert gain.estimate == pytest.approx(mean_loss(better) - mean_loss(a))
    assert gain.high < 0
    assert not loss_difference(a, noise).excludes_zero


def test_swapping_the_models_flips_the_sign() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(60), rng.random(60)
    one, two = score_difference(a, b), score_difference(b, a)
    assert one.estimate == pytest.approx(-two.estimate)
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low))
    assert one.estimate == pytest.approx(b.mean() - a.mean())


def test_seeds_are_averaged_sample_by_sample() -> None:
    rng = np.random.default_rng(4)
    tokens = np.tile(rng.integers(1, 30, 40).astype(float), (3, 1))
    before, after = rng.normal(size=(3, 40)), rng.normal(size=(3, 40))
    interval = paired_difference_over_seeds(before, after, tokens)
    singles = [paired_difference(y - x, tokens[0]) for x, y in zip(before, after, strict=True)]
    assert interval.estimate == pytest.approx(np.mean([single.estimate for single in singles]))
    assert interval.high - interval.low < max(single.high - single.low for single in singles)


def test_the_interval_is_as_wide_as_the_standard_error_says() -> None:
    losses = drawn_losses(np.random.default_rng(6), 400)
    nll = np.array([loss.nll for loss in losses])
    tokens = np.array([loss.answer_tokens for loss in losses], dtype=float)
    interval = paired_difference(nll, tokens)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * standard_error_of_loss(losses), rel=0.05)


def test_the_standard_error_of_equal_answers_is_the_usual_one() -> None:
    values = np.array([1.0, 2.5, 3.0, 7.0])
    losses = [SampleLoss(float(4 * value), 4) for value in values]
    assert standard_error_of_loss(losses) == pytest.approx(values.std(ddof=1) / 2)


@given(st.lists(st.booleans(), min_size=2, max_size=200))
def test_the_standard_error_of_a_share_is_lm_evals(correct: list[bool]) -> None:
    from lm_eval.api.metrics import mean_stderr

    assert standard_error_of_share(correct) == pytest.approx(mean_stderr([float(x) for x in correct]))


def test_excludes_zero() -> None:
    assert Interval(1, 0.5, 2, 0.95).excludes_zero
    assert Interval(-1, -2, -0.5, 0.95).excludes_zero
    assert not Interval(0, -1, 1, 0.95).excludes_zero
    assert not Interval(1, 0, 2, 0.95).excludes_zero


def test_one_sample_is_an_error() -> None:
    for call in (
        lambda: score_difference(np.ones(1), np.zeros(1)),
        lambda: standard_error_of_share([True]),
        lambda: standard_error_of_loss([SampleLoss(1.0, 2)]),
    ):
        with pytest.raises(EvaluationError, match="several samples"):
            call()


def test_no_sample_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="at least 2"):
        score_difference(np.ones(0), np.ones(0))


def test_seeds_with_different_answers_are_an_error() -> None:
    weights = np.array([[2.0, 3.0], [2.0, 4.0]])
    with pytest.raises(EvaluationError, match="same answers") as caught:
        paired_difference_over_seeds(np.zeros((2, 2)), np.ones((2, 2)), weights)
    assert (caught.value.key, caught.value.actual) == ("sample 1", "3, 4")


def test_a_sample_without_weight_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="cannot be weighted") as caught:
        paired_difference(np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    assert caught.value.key == "sample 1"


def test_differences_and_weights_of_different_length_are_an_error() -> None:
    with pytest.raises(EvaluationError, match="same samples"):
        paired_difference(np.zeros(3), np.ones(4))


@pytest.mark.slow
@given(st.lists(st.integers(-3, 3), max_size=10))
def test_sign_flips_counts_sign_assignments_at_least_as_extreme(differences: list[int]) -> None:
    signed = itertools.product(*((value, -value) for value in differences))
    as_far = sum(abs(sum(values)) >= abs(sum(differences)) for values in signed)
    assert sign_flips(differences) == pytest.approx(as_far / 2 ** len(differences))


@pytest.mark.slow
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_sign_flips_of_single_answers_is_mcnemars_exact_test(pairs: list[tuple[bool, bool]]) -> None:
    gained = sum(new and not old for old, new in pairs)
    lost = sum(old and not new for old, new in pairs)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert sign_flips([new - old for old, new in pairs]) == pytest.approx(expected)


def test_sign_flips_of_many_samples_is_the_normal_approximation() -> None:
    differences = np.random.default_rng(0).choice([-3, -1, 0, 1, 2], 3000)
    z = abs(differences.sum()) / math.sqrt(float(differences @ differences))
    assert sign_flips(differences.tolist()) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)


def test_holm_on_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.slow
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.5):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
            if (len(p_values) - rank) * p_values[index] > level:
                break
            rejected.add(index)
        assert {index for index, p in enumerate(corrected) if p <= level} == rejected


def test_the_error_of_a_ratio_with_weights_of_one_is_that_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert standard_error_of_ratio(values, [1.0] * 5) == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
