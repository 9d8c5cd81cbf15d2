"""`mftctl apply` beside `cp -r` of the same checkpoint, and its peak memory.

python -m tests.benchmarks.apply_speed --layers 16 --repetitions 5
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mftctl.masking.bits import Mask, MaskMetadata, TensorRecord, save_mask
from mftctl.masking.checkpoint import tensor_digest, tensor_index
from tests.benchmarks.timings import ratios, seconds_in_turn, spread

_APPLY = """
import re, sys
from pathlib import Path
from mftctl.masking.bits import load_mask
from mftctl.masking.checkpoint import apply_to_checkpoint
base, mask, output = map(Path, sys.argv[1:])
apply_to_checkpoint(base, load_mask(mask), output, mask_path=mask, base_model="base", replace=True)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def make_checkpoint(folder: Path, hidden_size: int, layers: int) -> Path:
    """A random Llama in bf16, and beside it a mask of 10 % of all its projections."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=1024, num_attention_heads=8, num_key_value_heads=4, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
    generator = torch.Generator().manual_seed(0)
    tensors, records = {}, {}
    for name, stored in tensor_index(folder).items():
        if "proj" in name:
            keep = torch.rand(stored.shape, generator=generator) >= 0.1
            tensors[name] = keep
            records[name] = TensorRecord(
                stored.shape, keep.numel() - int(keep.sum()), tensor_digest(stored), stored.dtype
            )
    metadata = MaskMetadata(
        kind="weight",
        base_model=str(folder),
        base_revision=None,
        method="random",
        ratio=0.1,
        threshold=None,
        layers="all",
        seed=0,
        run_id=None,
    )
    mask = folder.parent / "mask.bits"
    save_mask(Mask(tensors, records, metadata), mask)
    return mask


def compare(folder: Path, *, hidden_size: int, layers: int, repetitions: int) -> dict[str, str]:
    """Seconds and ratios, each as minimum, median and maximum, and the most memory that apply held."""
    base = folder / "base"
    mask = make_checkpoint(base, hidden_size, layers)
    size_bytes = sum(path.stat().st_size for path in base.iterdir())
    peaks: list[int] = []

    def apply() -> None:
        command = [sys.executable, "-c", _APPLY, str(base), str(mask), str(folder / "applied")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    def start() -> None:
        subprocess.run([sys.executable, "-c", "import mftctl.masking.checkpoint"], check=True)

    def copy() -> None:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        subprocess.run(["cp", "-r", str(base), str(folder / "copy")], check=True)

    copy()  # the checkpoint is in the page cache from now on, for both
    os.sync()
    seconds = seconds_in_turn({"cp -r": copy, "apply": apply, "Python's start": start}, repetitions)
    net = [whole - only for whole, only in zip(seconds["apply"], seconds["Python's start"], strict=True)]
    return {
        "checkpoint, bytes": f"{size_bytes:,}",
        **{f"{name}, seconds": spread(values) for name, values in seconds.items()},
        "apply / cp -r": spread(ratios(seconds["apply"], seconds["cp -r"])),
        "apply without Python's start / cp -r": spread(ratios(net, seconds["cp -r"])),
        "apply, peak bytes": f"{max(peaks):,}",
    }


def main() -> None:
    """Prints the comparison for a checkpoint of about 1.2 GB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            Path(folder), hidden_size=options.hidden_size, layers=options.layers, repetitions=options.repetitions
        )
    for name, text in found.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
