"""Runs several mftctl commands in the processes of one launch, since starting one takes longer than a tiny training."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

from mftctl.cli.app import build_app
from mftctl.evaluation import head_chunks
from mftctl.masking.checkpoints.load import load_model
from mftctl.runtime.process_group import leave, shares_weights
from mftctl.runtime.processes import is_first
from mftctl.training.sharding.fsdp import FsdpModel
from mftctl.training.sharding.zero import ZeroModel
from mftctl.workflows import fft, mask_train

CHUNK = "CHUNK_LOGITS="
"""Before a command: how many logits are computed at once, from then on."""


def keep_fsdp_on_a_cpu() -> None:
    """Makes accelerate shard with gloo as on GPUs; on a CPU it would replace FSDP with DDP."""
    original = AcceleratorState.__init__

    def as_on_gpus(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *arguments, **options)

    AcceleratorState.__init__ = as_on_gpus  # type: ignore[method-assign]


def require_others_to_hold_nothing(kind: type[FsdpModel | ZeroModel]) -> None:
    """Makes every process but the first fail if it receives an optimizer's full state."""
    original = kind.state_dict

    @functools.wraps(original)
    def watched(self: Any) -> dict[str, Any]:
        state = original(self)
        if state and not is_first():
            raise AssertionError("a process that does not write holds an optimizer's state")
        return state

    kind.state_dict = watched  # type: ignore[method-assign]


def require_others_to_load_parts() -> None:
    """Makes every weight-sharing process but the first, which writes, fail if it loads a whole model."""

    def first_alone(*arguments: Any, **options: Any) -> Any:
        if shares_weights() and not is_first():
            raise AssertionError("a process loads all weights where it is to hold a part of them")
        return load_model(*arguments, **options)

    for workflow in (fft, mask_train):
        workflow.load_model = first_alone  # type: ignore[attr-defined]


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        keep_fsdp_on_a_cpu()
    for spread in (FsdpModel, ZeroModel):
        require_others_to_hold_nothing(spread)
    require_others_to_load_parts()
    for line in sys.argv[1:]:
        words = shlex.split(line)
        if words[0].startswith(CHUNK):
            head_chunks.CHUNK_LOGITS = int(words.pop(0).removeprefix(CHUNK))
        build_app()(words, standalone_mode=False)
        AcceleratorState._reset_state(True)  # it keeps the configuration of the first command
    leave()
