"""`mftctl env`."""

from __future__ import annotations

import platform

from mftctl.cli import options as opt
from mftctl.cli.cache import cache_text
from mftctl.cli.output import Output, pairs_table
from mftctl.experiments.tracking.names import trackers_text


def env(as_json: opt.AsJson = False) -> None:
    """Show versions and hardware for a bug report."""
    import os
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from mftctl.data.prepared.cache_folder import cache_use
    from mftctl.runtime.devices import device_names
    from mftctl.runtime.processes import INSTALL_DEEPSPEED

    packages = ("mftctl", "torch", "transformers", "datasets", "accelerate", "safetensors", "lm_eval", "typer")
    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError:
        deepspeed = f"not installed, needed for ZeRO: {INSTALL_DEEPSPEED}"
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_count": str(os.cpu_count()),
        "cpu_threads": str(torch.get_num_threads()),
        **{name: version(name) for name in packages},
        "deepspeed": deepspeed,
        "gpus": ", ".join(device_names()) or "none",
        "cache": cache_text(cache_use()),
        "trackers": trackers_text(),
    }
    Output(as_json=as_json).result(facts, pairs_table("Environment", list(facts.items())))
