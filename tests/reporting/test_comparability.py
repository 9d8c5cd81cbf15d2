"""Records of an experiment with two seeds; each test changes one thing and checks the resulting flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.experiments.run_folder import SOURCE, Run
from mftctl.experiments.run_record import RunRecord
from mftctl.reporting.comparability import flags

VERSIONS = {"python": "3.11.7", "mftctl": "0.1.0", "torch": "2.13.0", SOURCE: "aaaa"}
DATA = [{"path": "train.jsonl", "count": 500}]
PARENTS = {"pre": (), "fft": ("fft",), "gmt": ("gmt",), "mft": ("fft", "mask"), "applied": ("fft", "mask", "apply")}
COMMANDS = {"fft": "fft", "gmt": "fft", "mask": "mask-train", "apply": "apply"}


class Records(dict[str, RunRecord]):
    """The records of all runs, by kind and seed: `fft-0`, `eval-of-mft-1`."""

    def change(self, name: str, key: str, value: Any) -> None:
        """Sets the value at a dotted key of a record; None deletes it. A slash stands for a dot within a key."""
        head, *parts = key.split(".")
        changed: Any = getattr(self[name], head)
        if not parts:
            self[name] = replace(self[name], **{head: value})
            return
        for part in parts[:-1]:
            changed = changed[int(part)] if isinstance(changed, list) else changed.setdefault(part, {})
        if value is None:
            del changed[parts[-1]]
        else:
            changed[parts[-1]] = value

    def of_seeds(self, name: str, key: str, value: Any) -> None:
        """Makes the same change in the records of both seeds."""
        for seed in (0, 1):
            self.change(f"{name}-{seed}", key, value)

    def flags(self, state: str, baseline: str = "fft", seeds: Sequence[int] = (0, 1)) -> tuple[str, ...]:
        runs = {name: Run(Path("runs") / folder_name(name), record) for name, record in self.items()}
        item = [runs[f"eval-of-{state}-{seed}"] for seed in seeds]
        others = [runs[f"eval-of-{baseline}-{seed}"] for seed in (0, 1) if f"eval-of-{baseline}-{seed}" in runs]
        return flags(item, others, {run.name: run for run in runs.values()})


def folder_name(name: str) -> str:
    kind, _, seed = name.rpartition("-")
    return f"{seed}{kind}-{COMMANDS.get(kind, 'eval')}"


def experiment() -> Records:
    """Two seeds of FFT, GMT and a mask of the FFT, unapplied and applied, with all evaluations."""
    records = Records()
    for seed in (0, 1):
        for kind, command in COMMANDS.items():
            digests = {"train": f"t{seed}", "validation": "v"}
            sizes = {"max_length_tokens": 128, "batch_size": 16, "grad_accum_steps": 1, "precision": "auto"}
            config = {"seed": seed, "data": DATA, "fft": dict(sizes), "mask_train": {**sizes, "method": "learned"}}
            records[f"{kind}-{seed}"] = RunRecord(
                command,
                "finished",
                "",
                {**config, "model": f"model {seed}"},
                inputs={"digests": digests, "train_records": 500, "validation_records": 40},
                versions=dict(VERSIONS),
            )
        for state, parents in PARENTS.items():
            measured = {"name": "test.jsonl", "digest": "d"}
            records[f"eval-of-{state}-{seed}"] = RunRecord(
                "eval",
                "finished",
                "",
                {"seed": seed, "data": DATA, "eval": {"limit": 100}},
                inputs={"parents": [folder_name(f"{parent}-{seed}") for parent in parents]},
                result={"datasets": [measured]},
                versions=dict(VERSIONS),
            )
    return records


STATES = [(state, baseline) for state in PARENTS for baseline in ("fft", "pre")]


@pytest.mark.parametrize(("state", "baseline"), STATES)
def test_states_of_one_experiment_have_no_flag(state: str, baseline: str) -> None:
    assert experiment().flags(state, baseline) == ()


METHOD = st.sampled_from(
    [
        ("gmt", "config.fft.method", "gmt"),
        ("gmt", "config.fft.ratio", 0.2),
        ("gmt", "config.fft.learning_rate", 1e-4),
        ("gmt", "config.fft.epochs", 3.0),
        ("mask", "config.mask_train.ratio", 0.1),
        ("mask", "config.mask_train.layers", "4-7"),
        ("mask", "config.mask_train.preset", "paper"),
        ("mask", "config.mask_train.val_steps", 3),
        ("mask", "config.name", "another"),
        ("mask", "config.fft.learning_rate", 1.0),
        ("mask", "recipe", "other.yaml"),
        ("mask", "seconds", 3.0),
        ("apply", "config.eval.limit", 3),
        ("eval-of-mft", "config.fft.batch_size", 3),
        ("eval-of-mft", "config.eval.tasks", ["gsm8k"]),
        ("eval-of-mft", "config.eval.save_samples", True),
        ("eval-of-mft", "config.eval.temperature", 0.0),
    ]
)


@pytest.mark.slow
@given(st.lists(METHOD, max_size=6), st.sampled_from(STATES))
def test_intended_differences_between_methods_are_not_flagged(
    changes: list[tuple[str, str, Any]], rows: tuple[str, str]
) -> None:
    records = experiment()
    for change in changes:
        records.of_seeds(*change)
    assert records.flags(*rows) == ()


CASES: list[tuple[str, str, Any, dict[str, str]]] = [
    (
        "eval-of-mft",
        "versions.mftctl source",
        "bbbb",
        {"mft": "Measured with mftctl source bbbb, the baseline with aaaa"},
    ),
    ("eval-of-mft", "versions.torch", "2.12.0", {"mft": "Measured with torch 2.12.0, the baseline with 2.13.0"}),
    (
        "mask",
        "versions.mftctl source",
        "bbbb",
        {
            "mft": "Made with mftctl source bbbb, the baseline with aaaa",
            "applied": "Made with mftctl source bbbb, the baseline with aaaa",
        },
    ),
    ("gmt", "versions.torch", "2.12.0", {"gmt": "Made with torch 2.12.0, the baseline with 2.13.0"}),
    ("apply", "versions.torch", "2.12.0", {"applied": "Made with torch 2.12.0, the baseline with 2.13.0"}),
    ("eval-of-gmt", "config.eval.limit", 50, {"gmt": "Measured with eval.limit 50, the baseline with 100"}),
    ("eval-of-gmt", "config.eval.engine", "vllm", {"gmt": "Measured with eval.engine vllm, the baseline with hf"}),
    (
        "eval-of-gmt",
        "config.eval.max_new_tokens",
        9,
        {"gmt": "Measured with eval.max_new_tokens 9, the baseline with none"},
    ),
    (
        "eval-of-gmt",
        "result.datasets.0.digest",
        "e",
        {"gmt": "Measured on a test.jsonl that differs from the baseline's"},
    ),
    (
        "gmt",
        "inputs.digests.train",
        "other",
        {"gmt": "Trained on records that differ from the baseline's: 500 and 500 of train.jsonl=500"},
    ),
    (
        "mask",
        "inputs.digests.train",
        "other",
        {
            state: "Mask learned from records that differ from its fine-tuning's: 500 and 500 of train.jsonl=500"
            for state in ("mft", "applied")
        },
    ),
    (
        "gmt",
        "inputs.digests.validation",
        "other",
        {"gmt": "Validated on records that differ from the baseline's: 40 and 40 of none"},
    ),
    (
        "gmt",
        "config.fft.max_length_tokens",
        64,
        {"gmt": "Trained with fft.max_length_tokens 64, the baseline with 128"},
    ),
    ("gmt", "config.fft.precision", "bf16", {"gmt": "Trained with fft.precision bf16, the baseline with auto"}),
    ("gmt", "config.fft.grad_accum_steps", 2, {"gmt": "Trained with a batch of 32, the baseline with 16"}),
    ("gmt", "processes", 3, {"gmt": "Trained with a batch of 48, the baseline with 16"}),
    (
        "mask",
        "config.mask_train.batch_size",
        8,
        {state: "Trained with a batch of 8, the baseline with 16" for state in ("mft", "applied")},
    ),
    ("gmt", "config.seed", 5, {"gmt": "Seed 5 is compared with seed 0 of the baseline"}),
]


@pytest.mark.parametrize(("name", "key", "value", "expected"), CASES, ids=lambda item: str(item)[:40])
def test_each_change_gives_one_flag_only_where_it_applies(
    name: str, key: str, value: Any, expected: dict[str, str]
) -> None:
    records = experiment()
    records.of_seeds(name, key, value)
    for state in PARENTS:
        found = records.flags(state, seeds=(0,) if key == "config.seed" else (0, 1))
        more = tuple(flag for flag in found if flag.startswith("The baseline is averaged over additional seeds"))
        wanted = [expected[state]] if state in expected else []
        assert [flag for flag in found if flag not in more] == wanted, state


def test_different_sources_are_named_with_their_record_counts() -> None:
    records = experiment()
    records.of_seeds("mask", "config.data", [{"path": "a b.jsonl"}, {"path": "c.jsonl", "count": 3}])
    assert records.flags("mft") == ()  # the same records from different files
    records.of_seeds("mask", "inputs.digests.train", "other")
    records.of_seeds("mask", "inputs.train_records", 99)
    assert records.flags("mft") == (
        "Mask learned from records that differ from its fine-tuning's: "
        "99 of a b.jsonl + c.jsonl=3 instead of 500 of train.jsonl=500",
    )


def test_without_digests_the_sources_are_compared() -> None:
    records = experiment()
    records.of_seeds("gmt", "inputs.digests", {})
    assert records.flags("gmt") == ()
    records.of_seeds("gmt", "config.data", ["train.jsonl"])
    assert records.flags("gmt") == (
        "Trained on records that differ from the baseline's: 500 of train.jsonl instead of 500 of train.jsonl=500",
    )


@pytest.mark.parametrize("method", ["random", "magnitude", "drop"])
def test_untrained_mask_has_no_flag_for_training_settings(method: str) -> None:
    records = experiment()
    for key, value in (("method", method), ("batch_size", 2), ("max_length_tokens", 3)):
        records.of_seeds("mask", f"config.mask_train.{key}", value)
    records.of_seeds("mask", "inputs.digests.train", "other")
    assert records.flags("mft") == ()


# Differences between the seeds of a row


@given(st.sampled_from(["learning_rate", "epochs", "method", "ratio"]))
def test_setting_that_differs_between_seeds_is_a_flag(key: str) -> None:
    records = experiment()
    records.of_seeds("fft", f"config.fft.{key}", "this")
    records.change("fft-1", f"config.fft.{key}", "that")
    assert records.flags("fft") == (f"Seeds differ in {key} of fft: this (seed 0), that (seed 1)",)


@pytest.mark.parametrize(
    ("name", "key", "value", "flag"),
    [
        ("mask-1", "config.mask_train.layers", "0-3", "layers of mask-train: none (seed 0), 0-3 (seed 1)"),
        ("mask-1", "config.data", ["b"], "data of mask-train: train.jsonl=500 (seed 0), b (seed 1)"),
        ("mask-1", "processes", 2, "processes of mask-train: 1 (seed 0), 2 (seed 1)"),
        ("mask-1", "versions.python", "3.12", "python of mask-train: 3.11.7 (seed 0), 3.12 (seed 1)"),
        ("eval-of-mft-1", "config.eval.limit", 9, "limit of eval: 100 (seed 0), 9 (seed 1)"),
        ("eval-of-mft-1", "versions.mftctl source", "b", "mftctl source of eval: aaaa (seed 0), b (seed 1)"),
        (
            "eval-of-mft-1",
            "versions.mftctl source",
            None,
            "mftctl source of eval: aaaa (seed 0), not recorded (seed 1)",
        ),
    ],
)
def test_difference_between_seeds_is_the_first_flag(name: str, key: str, value: Any, flag: str) -> None:
    records = experiment()
    records.change(name, key, value)
    assert records.flags("mft")[0] == f"Seeds differ in {flag}"
    assert records.flags("gmt") == ()


def test_file_that_changed_between_seeds_is_a_flag() -> None:
    records = experiment()
    records.change("fft-0", "decides.files", {"train.jsonl": "0123456789abcdef"})
    assert records.flags("fft") == ()  # nothing is known about the other file
    records.change("fft-1", "decides.files", {"train.jsonl": "f"})
    assert records.flags("fft") == ("Seeds differ in the contents of train.jsonl: 0123456789ab (seed 0), f (seed 1)",)


def test_seeds_made_in_different_ways_are_one_flag() -> None:
    records = experiment()
    records["eval-of-mft-1"] = records["eval-of-applied-1"]
    assert records.flags("mft") == (
        "Seeds were produced by different commands: fft → mask-train and fft → mask-train → apply",
    )


def test_continued_fine_tuning_is_distinguished_from_the_first() -> None:
    records = experiment()
    for seed in (0, 1):
        records[f"eval-of-gmt-{seed}"].inputs["parents"].insert(0, folder_name(f"fft-{seed}"))
    assert records.flags("gmt") == ()
    records.change("gmt-1", "config.fft.epochs", 8)
    assert records.flags("gmt") == ("Seeds differ in epochs of fft 2: 1.0 (seed 0), 8 (seed 1)",)


# Seeds of a row compared with those of the baseline


def test_baseline_of_more_seeds_is_a_flag() -> None:
    records = experiment()
    assert records.flags("mft", seeds=(1,)) == ("The baseline is averaged over additional seeds: 0",)
    assert records.flags("gmt", seeds=(0,)) == ("The baseline is averaged over additional seeds: 1",)
    assert records.flags("pre", seeds=(0,)) == ()


def test_mask_of_another_seed_than_its_model_is_a_flag() -> None:
    records = experiment()
    records.change("mask-1", "config.seed", 4)
    assert records.flags("mft") == ("Seed 4 is compared with seed 1 of the baseline",)


# Unrecorded code, and missing runs


def forget(records: Records, keep: Callable[[str], bool]) -> None:
    for name, record in records.items():
        if not keep(name):
            del record.versions[SOURCE]


def test_code_recorded_by_no_run_is_not_flagged() -> None:
    records = experiment()
    forget(records, lambda name: False)
    assert [records.flags(state, baseline) for state, baseline in STATES] == [()] * len(STATES)


def test_code_recorded_by_only_one_side_is_one_flag() -> None:
    records = experiment()
    forget(records, lambda name: name.startswith(("mask", "eval-of-mft")))
    assert records.flags("mft") == (
        "Code version not recorded: 0eval-of-fft-eval, 0fft-fft, 1eval-of-fft-eval, 1fft-fft",
    )
    assert records.flags("fft") == ()
    records = experiment()
    forget(records, lambda name: not name.startswith("mask"))
    assert records.flags("mft") == ("Code version not recorded: 0mask-mask-train, 1mask-mask-train",)


def test_missing_run_is_flagged_only_for_its_own_results() -> None:
    records = experiment()
    for seed in (0, 1):
        del records[f"mask-{seed}"]
    assert records.flags("mft") == (
        "Not checked because the run folder is missing: 0mask-mask-train, 1mask-mask-train",
    )
    for seed in (0, 1):
        del records[f"fft-{seed}"]
    assert records.flags("mft") == (
        "Not checked because the run folder is missing: 0mask-mask-train, 1mask-mask-train",
    )
    assert records.flags("gmt") == ()


def test_record_with_next_to_nothing_has_no_flag() -> None:
    run = Run(Path("1-eval"), RunRecord("eval", "finished", "", {}))
    assert flags([run], [run], {}) == flags([run], [], {}) == flags([], [run], {}) == ()
