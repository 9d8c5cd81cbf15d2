"""Preferences on sums, in the shapes that TRL documents."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SHAPES = ("text", "implicit text", "turns", "implicit turns")


def preference_records(count: int, shape: str = "text", seed: int = 0) -> list[dict[str, Any]]:
    """Preferences for right sums; answers differ in length.

    Args:
        count: Number of records.
        shape: One of `SHAPES`.
        seed: Decides the sums.
    """
    generator = random.Random(seed)
    records = []
    for _ in range(count):
        a, b = generator.randint(0, 50), generator.randint(0, 50)
        prompt, chosen, rejected = f"{a}+{b}?", f" is {a + b}", f" maybe {a - b}" + " or so" * (a % 3)
        question = {"role": "user", "content": prompt}
        answers = [[{"role": "assistant", "content": answer.strip()}] for answer in (chosen, rejected)]
        records.append(
            {
                "text": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
                "implicit text": {"chosen": prompt + chosen, "rejected": prompt + rejected},
                "turns": {"prompt": [question], "chosen": answers[0], "rejected": answers[1]},
                "implicit turns": {"chosen": [question, *answers[0]], "rejected": [question, *answers[1]]},
            }[shape]
        )
    return records


def write_preferences(path: Path, count: int, shape: str = "text", seed: int = 0) -> Path:
    """Writes preferences, one per line."""
    records = preference_records(count, shape, seed)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
