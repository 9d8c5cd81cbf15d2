"""DeepSpeed, imported so that stdout stays for results."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import warnings

_COMPILED_ON_CPU = "deepspeed_shm_comm"
"""An operator for inference, for which DeepSpeed would call a compiler for a minute on a machine without a GPU."""


@functools.cache
def import_deepspeed() -> None:
    """Imports DeepSpeed if it is installed; accelerate does so whenever a model is trained.

    Its log goes to the stream that is stdout at that moment. Below errors it tells nothing that a user could act on.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return
    from mftctl.devices import best_device

    if best_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings(
        "ignore", message="`torch.distributed", category=FutureWarning
    )  # DeepSpeed asks by old names
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if best_device().type == "cpu":
        deepspeed.ops.__compatible_ops__[_COMPILED_ON_CPU] = False
