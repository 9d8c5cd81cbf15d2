"""Time and memory of preparing data, beside `datasets.map` with the tokenisation of TRL, on the same records.

    python -m tests.benchmarks.data_speed MODEL GSM8K.jsonl.gz --records 100000

The records are pairs of GSM8K problems joined to about 400 tokens. Every measurement is a process of its own; the two
sides take turns. Memory is the anonymous memory of the process and its children, less what they take before reading:
pages of mapped files can be dropped at any time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

_SAMPLE_SECONDS = 0.05


def make_records(source: Path, count: int, path: Path) -> None:
    """Writes records made of two random problems each."""
    with gzip.open(source, "rt", encoding="utf-8") as stream:
        problems = [json.loads(line) for line in stream]
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            one, other = generator.sample(problems, 2)
            question = f"{one['question']} {other['question']} ({number})"
            stream.write(json.dumps({"question": question, "answer": f"{one['answer']}\n{other['answer']}"}) + "\n")


class PeakMemory(threading.Thread):
    """Samples the anonymous memory of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = _anonymous_bytes()
        self.peak = self.before
        self.done = threading.Event()

    def run(self) -> None:
        """Samples until told to stop."""
        while not self.done.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    total = 0
    process = psutil.Process()
    for one in (process, *process.children(recursive=True)):
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
    return total


def prepare(model: Path, data: Path, length: int) -> int:
    """Prepares records as every command does."""
    from mftctl.data.encoding import Encoder
    from mftctl.data.prepared.load import load_examples
    from mftctl.data.prepared.records import encode_prepared, token_lengths
    from mftctl.data.record_issues import RecordIssues
    from mftctl.data.sources import DataSource
    from mftctl.data.splits import split_validation
    from mftctl.masking.checkpoints.load import load_tokenizer
    from mftctl.progress import Silence

    encoder = Encoder(load_tokenizer(model))
    examples = load_examples([DataSource(str(data))])
    train, validation = split_validation(examples, 0.05, 0)
    parts = [encode_prepared(part, encoder, length, RecordIssues(), Silence()) for part in (train, validation)]
    return sum(sum(token_lengths(part.records)) for part in parts)


def map_like_trl(model: Path, data: Path, length: int) -> int:
    """Tokenises records as TRL's SFTTrainer does for prompts and completions, with the result kept in Arrow files."""
    import datasets
    import pyarrow.compute as pc
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenized(example: dict[str, Any]) -> dict[str, Any]:
        prompt = [{"role": "user", "content": example["question"]}]
        answer = [{"role": "assistant", "content": example["answer"]}]
        options = {"tokenize": True, "return_dict": True}
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + answer, **options)["input_ids"]
        mask = [0] * len(asked) + [1] * (len(whole) - len(asked))
        return {"input_ids": whole[:length], "completion_mask": mask[:length]}

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=cache)
        processes = len(os.sched_getaffinity(0))
        mapped = rows.map(tokenized, num_proc=processes, remove_columns=rows.column_names)
        return int(pc.sum(pc.list_value_length(mapped.data["input_ids"])).as_py())


def measured(what: str, model: Path, data: Path, length: int, environment: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds and megabytes of one run in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.data_speed", str(model), str(data), "--length", str(length)]
    output = subprocess.run(
        [*command, "--run", what], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def run(what: str, model: Path, data: Path, length: int) -> dict[str, float]:
    """Measures one run within this process."""
    import datasets  # noqa: F401 - libraries are not part of what is measured
    import pyarrow  # noqa: F401
    import transformers  # noqa: F401

    memory = PeakMemory()
    memory.start()
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    tokens = {"prepare": prepare, "map": map_like_trl}[what](model, data, length)
    memory.done.set()
    memory.join()
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": sum(os.times()[:4]) - cpu,
        "peak_mb": (memory.peak - memory.before) / 1e6,
        "tokens": tokens,
    }


def compare(arguments: argparse.Namespace) -> None:
    """Prints all measurements."""
    with tempfile.TemporaryDirectory() as folder:
        data, few = Path(folder) / "data.jsonl", Path(folder) / "few.jsonl"
        make_records(arguments.data, arguments.records, data)
        make_records(arguments.data, 100, few)
        rows: dict[str, list[dict[str, float]]] = {}

        def take(name: str, what: str, file: Path, **environment: str) -> None:
            found = measured(what, arguments.model, file, arguments.length, environment)
            rows.setdefault(name, []).append(found)
            print(f"{name:28} {json.dumps({key: round(value, 2) for key, value in found.items()})}", flush=True)

        for number in range(arguments.times):
            cache = str(Path(folder) / f"cache-{number}")
            take("first command", "prepare", data, MFTCTL_CACHE=cache)
            take("second command", "prepare", data, MFTCTL_CACHE=cache)
            take("100 records", "prepare", few, MFTCTL_CACHE=cache)
            take("100 records, second command", "prepare", few, MFTCTL_CACHE=cache)
            if not arguments.only_ours:
                take("one process", "prepare", data, MFTCTL_CACHE="off", MFTCTL_DATA_PROCESSES="1")
                take("datasets.map", "map", data)
        print(f"\n{arguments.records:,} records; minimum, median, maximum of {arguments.times}")
        for name, runs in rows.items():
            for key in ("wall_seconds", "cpu_seconds", "peak_mb"):
                values = [item[key] for item in runs]
                spread = (min(values), statistics.median(values), max(values))
                print(f"{name:28} {key:13} " + "  ".join(f"{value:10.2f}" for value in spread))


def main() -> None:
    """Compares, or measures one run for the process that compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--run", choices=["prepare", "map"])
    arguments = parser.parse_args()
    if arguments.run is None:
        compare(arguments)
    else:
        print(json.dumps(run(arguments.run, arguments.model, arguments.data, arguments.length)))


if __name__ == "__main__":
    main()
