"""Several mftctl commands in the processes of one launch, whose start takes longer than a tiny training does."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

from mftctl.cli.app import build_app
from mftctl.evaluation import head_chunks
from mftctl.processes import leave

CHUNK = "CHUNK_LOGITS="
"""Before a command: how many logits are computed at once, from then on."""


def keep_fsdp_on_a_cpu() -> None:
    """Makes accelerate shard as it would on GPUs, with gloo, where on a CPU it would take DDP for FSDP."""
    original = AcceleratorState.__init__

    def as_on_gpus(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *arguments, **options)

    AcceleratorState.__init__ = as_on_gpus  # type: ignore[method-assign]


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        keep_fsdp_on_a_cpu()
    for line in sys.argv[1:]:
        words = shlex.split(line)
        if words[0].startswith(CHUNK):
            head_chunks.CHUNK_LOGITS = int(words.pop(0).removeprefix(CHUNK))
        build_app()(words, standalone_mode=False)
        AcceleratorState._reset_state(True)  # it keeps what the first command configured
    leave()
