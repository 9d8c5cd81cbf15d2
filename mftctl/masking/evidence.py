"""Turns the few entries of a mask that the gradients of many batches support: small, trusted steps.

The straight-through gradient of a score, dL/d(w m) * w, is to first order what the loss changes by when the mask entry
m turns. It does not say how far that holds; of millions of entries the largest values are mostly noise; and entries of
one unit all promise the same gain, which only the first of them can bring. So entries turn in rounds, in three steps:

1. **Search.** For every entry the sum of its gradients over batches, and of their squares. The entries whose promise
   is worth most after its uncertainty become the pool of the next round.
2. **Trial.** On other batches, the gradient of each entry of the pool in each batch: what turning it promises, free of
   the luck that chose it, and how entries go together. With h an entry's mean gradient per answer token and c the
   covariance of two entries' summed gradients over batches, per answer token (the empirical Fisher information times
   both weights), a set of entries S promises sum_S h - 1/2 sum_SS c. The set grows by the entry that adds most, as
   long as that is worth `significance` standard errors, until it promises the budget.
3. **Judgement.** The loss on other data decides. What did not lower it is taken back, and the budget halves; else the
   budget grows, and the search goes on from the new mask.

The budget, a change of the loss, is the learning rate of a mask, in a unit that depends on no model size.

Source: replaces the update of MFT, section 2; the straight-through gradient is the paper's. The promise is that of
Optimal Brain Surgeon (Hassibi and Stork, 1993, equation 1) with the gradient kept and no weight adjusted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mftctl.masking.layers import MaskedLinear

_POOL = 10_000
"""Entries on trial: their gradients are kept for each batch."""

_GROWTH = 1.5
_SHRINKAGE = 0.5
_DECAY = 0.5
"""Weight of the earlier search after an accepted round: it went on under another mask."""


@dataclass(frozen=True, slots=True)
class Flips:
    """What one round has turned.

    Attributes:
        removed: Entries that were kept before.
        restored: Entries that were removed before.
        promised: By how much the loss per answer token should fall.
        budget: What the round was allowed to promise.
    """

    removed: int
    restored: int
    promised: float
    budget: float


class EvidenceOptimizer(torch.optim.Optimizer):
    """Keeps evidence for every mask entry: `step` gathers it, `flip` turns what it supports, `judge` has the last word.

    The sign of a score is its mask entry. Gradients must be means over the answer tokens of a step, and not clipped.

    Args:
        layers: Masked by a threshold of 0 on signed scores, none of them 0.
        budget: Fall of the loss per answer token that the first round may promise.
        significance: Standard errors that an entry's promise must be worth.
        keeps_counts: Whether as many entries stay removed in each tensor: whatever else turns, the least costly
            entries turn the other way.

    Attributes:
        step_tokens: Answer tokens of the coming step; to be set before each.
    """

    def __init__(
        self, layers: Sequence[MaskedLinear], *, budget: float, significance: float, keeps_counts: bool = False
    ) -> None:
        # All that a resumed training needs is in the group: of the state of a parameter, torch makes its dtype. A
        # learning rate is there for the schedulers, which insist on one.
        pools = [torch.empty(0, dtype=torch.int64) for _ in layers]
        state = {"lr": 0.0, "budget": budget, "best_loss": math.inf, "tokens": 0.0, "steps": 0.0}
        trial = {"pools": pools, "trials": [torch.empty(0, 0) for _ in layers], "trial_tokens": []}
        super().__init__([layer.scores for layer in layers], {**state, **trial})
        self._significance = significance
        self._keeps_counts = keeps_counts
        self._turned: list[torch.Tensor] = []
        self.step_tokens = 0

    @property
    def best_loss(self) -> float:
        """The lowest loss judged so far, which is that of the mask as it stands; infinite before the first."""
        return float(self._group["best_loss"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Adds the gradients of one step to the evidence; no score changes."""
        self._group["tokens"] += self.step_tokens
        self._group["steps"] += 1
        self._group["trial_tokens"].append(self.step_tokens)
        pools, trials = self._group["pools"], self._group["trials"]
        for number, scores in enumerate(self._group["params"]):
            state = self.state[scores]
            if not state:
                state["sums"], state["squares"] = torch.zeros_like(scores), torch.zeros_like(scores)
            summed = scores.grad * self.step_tokens
            state["sums"].add_(summed)
            state["squares"].addcmul_(summed, summed)
            row = summed.view(-1)[pools[number].to(summed.device)].cpu()
            trials[number] = torch.cat([trials[number], row[None]])

    @torch.no_grad()
    def flip(self) -> Flips:
        """Turns the entries on trial that promise most together, within the budget; without a trial, calls for one."""
        parameters, pools = self._group["params"], self._group["pools"]
        if not any(map(len, pools)):
            self._call_to_trial()
            self._turned = [pool[:0] for pool in pools]
            return Flips(0, 0, 0.0, self._group["budget"])
        signs = [
            scores.detach().view(-1)[pool.to(scores.device)].sign().cpu()
            for scores, pool in zip(parameters, pools, strict=True)
        ]
        # In double precision and on the CPU, so that the choice depends on the gradients alone.
        trial = torch.cat(self._group["trials"], dim=1).double() * torch.cat(signs)
        chosen, promised = self._grow(trial)
        parts = torch.split(chosen, [len(pool) for pool in pools])
        self._turned = [
            pool[part].to(scores.device) for scores, pool, part in zip(parameters, pools, parts, strict=True)
        ]
        if self._keeps_counts:
            self._balance()
        removed = sum(
            int((scores.view(-1)[entries] > 0).sum()) for scores, entries in zip(parameters, self._turned, strict=True)
        )
        self._turn()
        return Flips(removed, sum(map(len, self._turned)) - removed, promised, self._group["budget"])

    def judge(self, loss: float) -> bool:
        """Whether the last flips stay: only if the loss is lower than under any mask before.

        Args:
            loss: Of the mask as it is now; the first one judged is the mask that the training starts from.
        """
        first, better = self.best_loss == math.inf, loss < self.best_loss
        if better:
            self._group["best_loss"] = loss
        else:
            self._turn()  # back; search and trial were made under this mask, and stay
        self._turned = []
        if not first:
            self._group["budget"] *= _GROWTH if better else _SHRINKAGE
            if better:
                self._fade()
                self._call_to_trial()
        return better

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self.param_groups[0]
        return group

    def _grow(self, trial: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The set of entries that promises the budget, or as much as it can, and what it promises.

        Args:
            trial: Summed gradients `(steps, pool)`, with the sign of the score.
        """
        tokens = torch.tensor(self._group["trial_tokens"], dtype=torch.float64)
        total = float(tokens.sum())
        chosen = torch.zeros(trial.shape[1], dtype=torch.bool)
        if len(trial) < 2:  # no spread, no evidence
            return chosen, 0.0
        gradients = trial.sum(0) / total
        centred = trial - tokens[:, None] * gradients
        curvatures = centred.square().sum(0) / total
        errors = (curvatures * total).sqrt() / total
        promised = 0.0
        together = torch.zeros(len(trial), dtype=torch.float64)
        while promised < self._group["budget"]:
            promises = gradients - curvatures / 2 - together @ centred / total
            worst = (promises - self._significance * errors).masked_fill_(chosen, -math.inf)
            best = int(worst.argmax())
            if worst[best] <= 0 or (chosen.any() and promised + float(promises[best]) > self._group["budget"]):
                break
            chosen[best] = True
            promised += float(promises[best])
            together += centred[:, best]
        return chosen, promised

    def _call_to_trial(self) -> None:
        """Makes the most promising entries of all tensors the pool, and begins their trial."""
        pools, gains = [], []
        for scores in self._group["params"]:
            weighed = self._weigh(scores)[1]
            pools.append(_highest(weighed, _POOL))
            gains.append(weighed[pools[-1]])
        chosen = torch.zeros(sum(map(len, pools)), dtype=torch.bool, device=gains[0].device)
        chosen[_highest(torch.cat(gains), _POOL)] = True
        parts = torch.split(chosen, [len(pool) for pool in pools])
        pools = [pool[part].cpu() for pool, part in zip(pools, parts, strict=True)]
        self._group["pools"], self._group["trial_tokens"] = pools, []
        self._group["trials"] = [torch.empty(0, len(pool)) for pool in pools]

    def _weigh(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What turning each entry of a tensor alone promises by the search, and that less its uncertainty; flat."""
        sums, squares = (self.state[scores][name].view(-1) for name in ("sums", "squares"))
        tokens, steps = self._group["tokens"], self._group["steps"]
        promises = torch.where(scores.view(-1) > 0, sums, -sums).sub_(squares, alpha=0.5).div_(tokens)
        spread = (squares - sums.square().div_(steps)).clamp_min_(0.0).sqrt_()
        return promises, promises - spread.mul_(self._significance / tokens)

    def _balance(self) -> None:
        """Turns the least costly entries the other way until each tensor has as many removed as before."""
        for number, scores in enumerate(self._group["params"]):
            promise = self._weigh(scores)[0]
            kept = scores.view(-1) > 0
            turned = torch.zeros_like(kept)
            turned[self._turned[number]] = True
            removed, restored = turned & kept, turned & ~kept
            more, fewer = (removed, ~kept) if removed.sum() >= restored.sum() else (restored, kept)
            lacking = int(more.sum() - (turned & ~more).sum())
            turned[_highest(promise, lacking, among=fewer & ~turned)] = True
            # A tensor may have too few entries to turn the other way: then the least promising do not turn at all.
            lacking = int(more.sum() - (turned & ~more).sum())
            turned[_highest(-promise, lacking, among=more)] = False
            self._turned[number] = turned.nonzero().squeeze(1)

    @torch.no_grad()
    def _turn(self) -> None:
        for scores, entries in zip(self._group["params"], self._turned, strict=False):
            scores.view(-1)[entries] *= -1

    def _fade(self) -> None:
        self._group["tokens"] *= _DECAY
        self._group["steps"] *= _DECAY
        for scores in self._group["params"]:
            self.state[scores]["sums"].mul_(_DECAY)
            self.state[scores]["squares"].mul_(_DECAY)


def _highest(values: torch.Tensor, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
    """The flat indices of the `count` highest values, lowest index first, among the entries of a bool tensor if given.

    Of equal values the lowest index is taken first, on every device.
    """
    if among is not None:
        values = values.masked_fill(~among, -math.inf)
        count = min(count, int(among.sum()))
    count = min(count, len(values))
    if count <= 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    # A selection, and a sort of the few that it leaves, instead of a sort of millions.
    entries = (values >= torch.topk(values, count).values[-1]).nonzero().squeeze(1)
    return entries[torch.sort(values[entries], descending=True, stable=True).indices[:count]].sort().values
