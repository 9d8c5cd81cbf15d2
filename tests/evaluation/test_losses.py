from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mftctl.data.encoding import Encoded
from mftctl.errors import EvaluationError
from mftctl.evaluation.losses import SampleLoss, mean_loss, sample_losses
from tests.conftest import build_llama


def random_samples(count: int, *, seed: int = 0) -> list[Encoded]:
    """Samples of 2 to 40 tokens with prompts of any length from zero to all but one token."""
    rng = random.Random(seed)
    samples = []
    for index in range(count):
        ids = [rng.randrange(6, 102) for _ in range(rng.randint(2, 40))]
        prompt = rng.randint(0, len(ids) - 1)
        samples.append(Encoded(input_ids=ids, labels=[-100] * prompt + ids[prompt:], where=f"x.jsonl:{index + 1}"))
    return samples


def loop_losses(model: torch.nn.Module, samples: list[Encoded]) -> list[tuple[float, int]]:
    """Computes one sample and one token at a time, from all logits."""
    results = []
    for sample in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0]
        scored = [t for t in range(1, len(sample.labels)) if sample.labels[t] != -100]
        nll = sum(float(F.cross_entropy(logits[t - 1], torch.tensor(sample.labels[t]))) for t in scored)
        results.append((nll, len(scored)))
    return results


def assert_same(losses: list[SampleLoss], expected: list[tuple[float, int]]) -> None:
    assert [loss.answer_tokens for loss in losses] == [tokens for _, tokens in expected]
    assert [loss.nll for loss in losses] == pytest.approx([nll for nll, _ in expected], rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1, 90, 4096])
def test_agrees_with_a_plain_loop(batch_tokens: int) -> None:
    model, samples = build_llama(), random_samples(23)
    losses = sample_losses(model, samples, pad_token_id=0, batch_tokens=batch_tokens)
    assert_same(losses, loop_losses(model, samples))


def test_agrees_where_the_model_computes_all_logits() -> None:
    model, samples = build_llama(), random_samples(9)
    some = sample_losses(model, samples, pad_token_id=0)
    forward = model.forward
    model.forward = lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask, use_cache=use_cache)
    every = sample_losses(model, samples, pad_token_id=0)
    assert_same(some, [(loss.nll, loss.answer_tokens) for loss in every])


def test_keeps_a_models_transformation_of_its_logits() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=102, head_dim=8, num_hidden_layers=2, final_logit_softcapping=0.2, pad_token_id=0, **sizes
    )
    model, samples = Gemma2ForCausalLM(config).eval(), random_samples(7)
    assert_same(sample_losses(model, samples, pad_token_id=0), loop_losses(model, samples))


def test_dropout_is_off_and_training_mode_is_restored() -> None:
    model, samples = build_llama(attention_dropout=0.9), random_samples(5)
    expected = sample_losses(model, samples, pad_token_id=0)
    model.train()
    assert sample_losses(model, samples, pad_token_id=0) == expected
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_bf16_model_is_summed_in_higher_precision() -> None:
    model, samples = build_llama().to(torch.bfloat16), random_samples(6)
    reference = build_llama().to(torch.bfloat16).float()
    losses = sample_losses(model, samples, pad_token_id=0)
    for loss, (nll, _) in zip(losses, loop_losses(reference, samples), strict=True):
        assert loss.nll == pytest.approx(nll, rel=2e-3, abs=1e-2)


def test_a_sample_without_labels_has_no_tokens() -> None:
    samples = [*random_samples(1), Encoded(input_ids=[7, 8, 9], labels=[-100] * 3, where="x:2")]
    for batch_tokens in (1, 4096):
        losses = sample_losses(build_llama(), samples, pad_token_id=0, batch_tokens=batch_tokens)
        assert losses[1] == SampleLoss(nll=0.0, answer_tokens=0)


def test_progress_reaches_the_end() -> None:
    calls: list[tuple[int, int]] = []
    samples = random_samples(11)
    sample_losses(build_llama(), samples, pad_token_id=0, batch_tokens=80, on_progress=lambda *call: calls.append(call))
    assert calls[-1] == (11, 11)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) > 1


def test_the_mean_is_over_tokens() -> None:
    assert mean_loss([SampleLoss(6.0, 2), SampleLoss(2.0, 6)]) == 1.0


def test_no_answer_token_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no answer token"):
        mean_loss([SampleLoss(0.0, 0)])


@pytest.mark.slow
def test_the_report_compares_losses_without_torch() -> None:
    code = (
        "import sys; import numpy as np; from mftctl.evaluation import losses, statistics;"
        "assert losses.mean_loss([losses.SampleLoss(1.0, 2)]) == 0.5;"
        "assert statistics.paired_difference(np.full(3, -0.5), np.full(3, 2.0)).excludes_zero;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
