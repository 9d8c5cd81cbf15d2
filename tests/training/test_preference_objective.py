"""The loss on preferences: equal to TRL's, to plain torch, and to a mean over the records of a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mftctl.data.batching import REFERENCE, PaddingCollator
from mftctl.data.encoding import Encoded
from mftctl.data.formats import to_example
from mftctl.data.prepared.records import with_reference
from mftctl.evaluation.head_chunks import answer_positions, logits_only_at
from mftctl.evaluation.preferences import DpoLoss, PreferenceLoss, answer_scores, mean_rewards, preference_losses
from mftctl.training.objectives import AnswerBatch, PreferenceObjective
from tests.conftest import CHAT_TEMPLATE, build_llama, build_tokenizer
from tests.preference_records import SHAPES, preference_records
from tests.workflow_fixtures import encode_records

BETA = 0.3
PAD = 0


def encoded(records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """The records with their log-probabilities under the reference model."""
    examples = [to_example(record, f"train.jsonl:{number}") for number, record in enumerate(records, 1)]
    found = encode_records(examples, tokenizer).records
    return list(with_reference(found, answer_scores(reference_model(), found, pad_token_id=PAD).log_probs.numpy()))


def reference_model() -> LlamaForCausalLM:
    return build_llama(layers=2, seed=0)


def policy_model() -> LlamaForCausalLM:
    return build_llama(layers=2, seed=1)


def step_loss(model: LlamaForCausalLM, records: list[Encoded], loss: DpoLoss, terms: int) -> torch.Tensor:
    """The loss of a micro-batch as the trainer computes it."""
    inputs = PaddingCollator(PAD)(records)
    labels = inputs.pop("labels")
    batch = AnswerBatch(labels, *answer_positions(labels), inputs.pop(REFERENCE))
    with logits_only_at(model, batch.positions, batch.tokens):
        outputs = model(**inputs, use_cache=False)
    return PreferenceObjective(loss).loss(outputs, batch, torch.tensor(terms))


def gradients(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_trls_dpo_trainer(shape: str, tmp_path: Path) -> None:
    """Tokens, losses, rewards and gradients, of plain DPO and of TRL's `sigmoid_norm`."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    tokenizer = build_tokenizer(chat_template=CHAT_TEMPLATE if "turns" in shape else None)
    records = preference_records(8, shape)
    arguments = trl.DPOConfig(
        str(tmp_path), beta=BETA, report_to="none", use_cpu=True, bf16=False, max_length=64, disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=4,
    )  # fmt: skip
    policy = policy_model()
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference_model(),
        args=arguments,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    policy.eval()
    ours = encoded(records, tokenizer)
    for start in range(0, len(records), 4):
        part = ours[start : start + 4]
        theirs = trainer.data_collator([trainer.train_dataset[index] for index in range(start, start + 4)])
        mine = PaddingCollator(PAD)(part)
        assert torch.equal(mine["input_ids"], theirs["input_ids"])
        assert torch.equal(mine["labels"] != -100, theirs["completion_mask"] == 1)
        for trainer.loss_types in (["sigmoid"], ["sigmoid_norm"]):
            loss = DpoLoss(BETA, length_normalized=trainer.loss_types == ["sigmoid_norm"])
            expected = trainer.compute_loss(policy, dict(theirs))
            expected.backward()
            wanted = gradients(policy)
            found = step_loss(policy, part, loss, len(part))
            found.backward()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert wanted
            for name, gradient in gradients(policy).items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5)
            measured = preference_losses(answer_scores(policy, part, pad_token_id=PAD), part, loss)
            assert sum(one.nll for one in measured) / len(part) == pytest.approx(float(expected), abs=1e-5)
            if not loss.length_normalized:  # TRL logs rewards that are not normalised
                rewards = mean_rewards(measured)
                for name, value in (
                    ("chosen", rewards.chosen), ("rejected", rewards.rejected), ("margins", rewards.margin),
                    ("accuracies", rewards.accuracy),
                ):  # fmt: skip
                    assert value == pytest.approx(trainer._metrics["eval"][f"rewards/{name}"][-1], abs=1e-5)


@pytest.mark.parametrize("length_normalized", [False, True])
def test_equals_plain_torch_one_answer_at_a_time(tokenizer: PreTrainedTokenizerFast, length_normalized: bool) -> None:
    """Without padding, batches, or a selection of logits."""
    records = encoded(preference_records(5, "turns"), tokenizer)
    policy, reference = policy_model(), reference_model()
    losses = []
    for record in records:
        rewards = []
        for side in record.sides:
            ids, labels = torch.tensor([side.input_ids]), torch.tensor(side.labels[1:])
            answer = (labels != -100).nonzero().squeeze(1)
            scores = []
            for model in (policy, reference):
                log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                scores.append(log_probs[answer, labels[answer]].sum())
            ratio = scores[0] - scores[1].detach()
            rewards.append(BETA * (ratio / len(answer) if length_normalized else ratio))
        losses.append(-torch.log(torch.sigmoid(rewards[0] - rewards[1])))
    expected = torch.stack(losses).mean()
    expected.backward()
    wanted = gradients(policy)
    # In micro-batches of three and two, as parts of one mean.
    loss = DpoLoss(BETA, length_normalized)
    parts = [step_loss(policy, part, loss, len(records)) for part in (records[:3], records[3:])]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_logits_in_chunks_give_the_same(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    records, loss = encoded(preference_records(4, "turns"), tokenizer), DpoLoss(BETA)
    policy = policy_model()
    whole = step_loss(policy, records, loss, 4)
    whole.backward()
    wanted = gradients(policy)
    monkeypatch.setattr("mftctl.evaluation.head_chunks.CHUNK_LOGITS", 102 * 20)
    chunked = step_loss(policy, records, loss, 4)
    chunked.backward()
    torch.testing.assert_close(chunked, whole)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_pair_that_fills_a_gap_between_processes_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    records, objective = encoded(preference_records(3, "turns"), tokenizer), PreferenceObjective(DpoLoss(BETA))
    policy = policy_model()
    filler = records[0].ignored()
    assert filler.answer_tokens == 0
    assert step_loss(policy, [filler], objective.dpo, 3).detach().item() == 0.0
    with_filler = step_loss(policy, [*records, filler], objective.dpo, 3)
    torch.testing.assert_close(with_filler, step_loss(policy, records, objective.dpo, 3))
    labels = PaddingCollator(PAD)([*records, filler])["labels"]
    assert int((objective.counted(labels)[:, 1:] != -100).sum()) == 3


def test_the_reference_itself_has_no_rewards(tokenizer: PreTrainedTokenizerFast) -> None:
    records = encoded(preference_records(6, "turns"), tokenizer)
    measured = preference_losses(answer_scores(reference_model(), records, pad_token_id=PAD), records, DpoLoss(BETA))
    assert {(one.chosen_reward, one.rejected_reward) for one in measured} == {(0.0, 0.0)}
    assert [one.nll for one in measured] == pytest.approx([math.log(2)] * 6, abs=1e-15)
    rewards = mean_rewards(measured)
    assert (rewards.accuracy, rewards.margin) == (0.0, 0.0)


_VALUES = st.floats(-200, 200, allow_nan=False)


@given(log_probs=st.lists(_VALUES, min_size=2, max_size=2), reference=st.lists(_VALUES, min_size=2, max_size=2))
def test_the_loss_is_the_likelihood_of_the_preference(log_probs: list[float], reference: list[float]) -> None:
    loss = DpoLoss(0.1)
    values = [torch.tensor(part, dtype=torch.float64).view(2, 1) for part in (log_probs, reference)]
    chosen, rejected = loss.rewards(*values, torch.ones(2, 1))
    assert float(chosen) == pytest.approx(0.1 * (log_probs[0] - reference[0]))
    both = float(torch.exp(-loss.losses(chosen, rejected))) + float(torch.exp(-loss.losses(rejected, chosen)))
    assert both == pytest.approx(1.0)


def test_means_of_rewards() -> None:
    losses = [PreferenceLoss(0.5, 2.0, 1.0), PreferenceLoss(0.7, -1.0, -1.0), PreferenceLoss(0.9, 0.0, 3.0)]
    found = mean_rewards(losses)
    assert found.accuracy == pytest.approx(1 / 3)  # equal rewards are no success
    assert (found.chosen, found.rejected) == (pytest.approx(1 / 3), pytest.approx(1.0))
    assert found.margin == pytest.approx(-2 / 3)
