"""The paper's settings, compared with an implementation of the training step that shares no code with mftctl.

Plain torch, written from the papers: scores from N(0, 0.02), ranking of |S| by sorting, a straight-through
gradient, AdamW, clipped gradients, a linear schedule with warm-up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.layers import initial_scores
from mftctl.masking.mask import load_mask
from mftctl.masking.targets import MaskTarget, find_targets
from mftctl.progress import Silence
from mftctl.training.score_start import score_start
from mftctl.workflows.mask_train import mask_train
from tests.workflow_fixtures import make_recipe, open_run, write_additions
from tests.workflows.test_mask_train import learn

STEPS, WARMUP_RATIO, RATIO, RATE = 20, 0.1, 0.1, 2e-3
LARGEST_NORM = 0.0125  # the paper's is 1.0; this model's gradient norms are between 0.011 and 0.016
MaskRule = Callable[[torch.Tensor], torch.Tensor]


def smallest_removed(scores: torch.Tensor) -> torch.Tensor:
    """0 for the tenth with the smallest |S|, else 1, as fp32 that passes gradients to |S|."""
    order = scores.detach().abs().flatten().argsort(stable=True)
    keep = torch.ones(scores.numel())
    keep[order[: math.floor(RATIO * scores.numel() + 0.5)]] = 0.0
    return keep.view(scores.shape) + (scores.abs() - scores.abs().detach())


def below_removed(scores: torch.Tensor) -> torch.Tensor:
    """1 where S is at least -0.035, else 0, as fp32 that passes gradients to S."""
    return (scores.detach() >= -0.035).float() + (scores - scores.detach())


class Masked(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear, scores: torch.Tensor, rule: MaskRule) -> None:
        super().__init__()
        self.weight = linear.weight
        self.scores = torch.nn.Parameter(scores)
        self.rule = rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.rule(self.scores))


def batch(tokenizer: Any, data: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All records in one batch in the chat template; the answer and its end-of-turn marker are learned."""
    rows, answers = [], []
    for line in data.read_text().splitlines():
        record = json.loads(line)
        turns = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
        ids = [
            list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (
                tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True),
                tokenizer.apply_chat_template(turns, tokenize=False),
            )
        ]
        rows.append(ids[1])
        answers.append([-100] * len(ids[0]) + ids[1][len(ids[0]) :])
    width = max(map(len, rows))
    return (
        torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        torch.tensor([row + [-100] * (width - len(row)) for row in answers]),
    )


def train_by_the_book(
    model: Any, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *, mean_of: str, steps: int
) -> None:
    """Steps on all records: AdamW on the scores alone, clipped gradients, linear warm-up, then decay to 0."""
    scores = [module.scores for module in model.modules() if isinstance(module, Masked)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in scores:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(scores, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rising = math.ceil(WARMUP_RATIO * STEPS)
    input_ids, attention_mask, labels = tensors
    for step in range(steps):
        share = step / rising if step < rising else (STEPS - step) / (STEPS - rising)
        optimizer.param_groups[0]["lr"] = RATE * share
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
        tokens = (labels[:, 1:] != -100).sum(dim=1)
        loss = (losses.sum(dim=1) / tokens).mean() if mean_of == "records" else losses.sum() / tokens.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scores, LARGEST_NORM)
        optimizer.step()


def by_the_book(
    workspace: Path, start: Mapping[str, torch.Tensor], rule: MaskRule, *, mean_of: str
) -> dict[str, np.ndarray]:
    """The masks after training, as bool tensors by weight name."""
    model = AutoModelForCausalLM.from_pretrained(workspace / "tiny", dtype=torch.float32)
    model.eval()
    masked = {}
    for name, scores in start.items():
        parent, _, last = name.rpartition(".")
        masked[name] = Masked(model.get_submodule(name), scores.clone(), rule)
        setattr(model.get_submodule(parent), last, masked[name])
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tiny")
    train_by_the_book(model, batch(tokenizer, workspace / "few.jsonl"), mean_of=mean_of, steps=STEPS)
    return {
        f"{name}.weight": (module.rule(module.scores).detach().round() > 0).numpy() for name, module in masked.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize("rule", ["ratio", "threshold"])
def test_the_same_weights_are_removed_as_by_an_independent_step(
    workspace: Path, tmp_path: Path, preset: str, rule: str
) -> None:
    few = workspace / "few.jsonl"
    write_additions(few, 6, seed=4)
    training: dict[str, Any] = {"batch_size": 6, "max_steps": STEPS, "val_steps": STEPS, "learning_rate": RATE}
    decides: dict[str, Any] = {"ratio": RATIO} if rule == "ratio" else {"threshold": -0.035}
    recipe = make_recipe(
        workspace,
        data=[str(few)],
        mask_train={
            **training,
            **decides,
            "layers": "1-2",
            "preset": preset,
            "keep": "last",
            "warmup_ratio": WARMUP_RATIO,
            "max_grad_norm": LARGEST_NORM,
        },
    )
    run, source = open_run(tmp_path, "mask-train", recipe)
    found = load_mask(Path(mask_train(recipe, source, run, Silence()).document()["mask"]))

    targets = find_targets(load_model(workspace / "tiny", dtype=torch.float32), [1, 2], "both")
    start = {target.name: initial_scores(target, "normal", std=0.02, seed=recipe.seed) for target in targets}
    expected = by_the_book(
        workspace,
        start,
        smallest_removed if rule == "ratio" else below_removed,
        mean_of="records" if preset == "reference" else "tokens",
    )
    assert set(found.names()) == set(expected)
    turned = total = 0
    for name, keep in expected.items():
        assert np.array_equal(found[name].numpy(), keep), name
        begun = start[name.removesuffix(".weight")]
        first = smallest_removed(begun) if rule == "ratio" else below_removed(begun)
        turned += int((first.numpy().round().astype(bool) ^ keep).sum())
        total += keep.size
    assert turned > 0.005 * total  # training had an effect


@pytest.mark.slow
def test_the_two_means_of_the_loss_differ(workspace: Path, tmp_path: Path) -> None:
    losses = []
    for preset in ("paper", "reference"):
        run, _, _ = learn(workspace, tmp_path / preset, mask_train__preset=preset)
        losses.append([line.loss for line in run.training.metrics() if line.loss is not None])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_a_threshold_of_the_paper_removes_4_percent_at_the_start() -> None:
    """With N(0, 0.02), whatever the width; a Kaiming start at width 4096 removes nothing."""
    wide = torch.nn.Linear(4096, 512, bias=False)
    model = torch.nn.ModuleDict({"wide": wide})
    target = MaskTarget("wide", 0, "mlp", model["wide"])
    assert (initial_scores(target, "normal", std=0.02) < -0.035).float().mean() == pytest.approx(0.0401, abs=0.001)
    assert not (initial_scores(target, "kaiming") < -0.035).any()


@pytest.mark.parametrize(
    ("options", "initializer_range", "std"),
    [({}, 0.02, 0.02), ({}, 0.006, 0.006), ({"start_std": 0.1}, 0.006, 0.1)],
)
def test_the_normal_start_has_the_spread_of_the_model(
    workspace: Path, options: dict[str, Any], initializer_range: float | None, std: float
) -> None:
    model = load_model(workspace / "tiny", dtype=torch.float32)
    model.config.initializer_range = initializer_range
    start = score_start(
        MaskTrainOptions.model_validate({"preset": "paper", **options}),
        model,
        seed=0,
        fft_learning_rate=1e-5,
        steps=100,
    )
    scores = start.scores(find_targets(model, [0], "mlp")[0])
    assert float(scores.std()) == pytest.approx(std, rel=0.05)
    assert float(scores.mean()) == pytest.approx(0.0, abs=std / 10)
