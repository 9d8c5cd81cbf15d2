from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from mftctl.evaluation.lm.output_cache import OutputCache
from mftctl.evaluation.lm.sampling import SeededSampling, sample_seeds
from tests.evaluation.lm.test_hf import answers, requests

WARM = {"do_sample": True, "temperature": 1.5}


@pytest.mark.slow
def test_samples_do_not_depend_on_the_rest_of_the_batch(llama: LlamaForCausalLM) -> None:
    prompts = ["one", "one", "a much longer prompt than the first", "mid length", "one"]
    alone = answers(llama, batch_size=1).generate_until(requests(prompts, **WARM))
    assert answers(llama, batch_size=2).generate_until(requests(prompts, **WARM)) == alone
    assert answers(llama).generate_until(requests(prompts, **WARM)) == alone
    assert answers(llama).generate_until(requests(prompts[:3], **WARM)) == alone[:3]
    assert len(set(alone)) == 5


def test_samples_of_a_resumed_evaluation_equal_those_of_an_uninterrupted_one(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    asked = requests(["one", "two", "three", "one"], **WARM)
    whole = answers(llama).generate_until(asked)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    cache = tmp_path / "outputs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answers(llama, OutputCache(cache), batch_size=1, on_progress=stop).generate_until(asked)
    assert answers(llama, OutputCache(cache)).generate_until(asked) == whole


def test_seeds_differ_between_requests() -> None:
    asked = [("p", {"a": 1}), ("p", {"a": 1}), ("p", {"a": 2}), ("q", {"a": 1})]
    assert len(set(sample_seeds(0, asked) + sample_seeds(1, asked))) == 8
    assert sample_seeds(0, asked)[2:] == sample_seeds(0, asked[2:])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_as_frequent_as_their_probability(temperature: float) -> None:
    rows = 4000
    scores = torch.tensor([2.0, -torch.inf, 1.0, 0.0, -1.0]).repeat(rows, 1)
    sampling = SeededSampling(range(rows), temperature=temperature, width_tokens=3, new_tokens=2)
    for place in (3, 4):
        left = sampling(torch.zeros(rows, place, dtype=torch.long), scores)
        assert (left.isfinite().sum(1) == 1).all()
        shares = left.argmax(1).bincount(minlength=5) / rows
        assert shares.tolist() == pytest.approx((scores[0] / temperature).softmax(0).tolist(), abs=0.03)
        assert shares[1] == 0
