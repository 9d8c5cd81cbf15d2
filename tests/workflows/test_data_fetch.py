"""`data fetch`: what is downloaded, what is there already, and what is said without a network."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from mftctl.errors import EvaluationError
from mftctl.progress import Progress, Silence
from mftctl.workflows.data_fetch import FetchedData, State, fetch_data, require_all

MATHS = {"problem": "1 + 1?", "solution": r"\boxed{2}"}
RECORDS: dict[str, dict[str, Any]] = {
    "openai/gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
    "EleutherAI/hendrycks_math": MATHS,
    "evalplus/humanevalplus": {"task_id": "0", "prompt": "def f():", "entry_point": "f", "test": "def check(f): f()"},
    "google/IFEval": {"prompt": "Go.", "instruction_id_list": ["a"], "kwargs": [{}]},
}


class HubCache:
    """Stands in for `datasets.load_dataset`: a cache, and a hub behind it."""

    def __init__(self) -> None:
        self.on_hub = set(RECORDS)
        self.cached: set[tuple[str, str | None]] = set()
        self.downloads: list[tuple[str, str | None]] = []
        self.attempts: list[str] = []
        self.network = True

    def load(self, name: str, part: str | None, **_: object) -> list[dict[str, Any]]:
        import datasets

        if (name, part) not in self.cached:
            if datasets.config.HF_HUB_OFFLINE:
                raise ConnectionError("offline mode is enabled")
            self.attempts.append(name)
            if not self.network:
                raise ConnectionError(f"Couldn't reach {name}")
            if name not in self.on_hub:
                raise FileNotFoundError(f"{name} doesn't exist")
            self.downloads.append((name, part))
            self.cached.add((name, part))
        return [RECORDS[name]] * 2


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> HubCache:
    import datasets
    from huggingface_hub import constants

    stand_in = HubCache()
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return stand_in


def states(found: tuple[FetchedData, ...]) -> list[tuple[str, State, int | None]]:
    return [(data.benchmark, data.state, data.records) for data in found]


class Told(Silence):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[Progress] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, state: Progress) -> None:
        self.steps.append(state)


def test_data_is_downloaded_once(hub: HubCache) -> None:
    told = Told()
    found = fetch_data(["gsm8k", "humaneval", "gsm8k_0shot", "gsm8k"], told)
    assert states(found) == [
        ("gsm8k", State.FETCHED, 2),
        ("humaneval", State.SHIPPED, 164),
        ("gsm8k_0shot", State.THERE, 2),
    ]
    assert hub.downloads == [("openai/gsm8k", "main")]
    assert told.notes == ["gsm8k: downloading openai/gsm8k/main:test"]
    assert [(step.done, step.total) for step in told.steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    require_all(found)


def test_only_the_missing_parts_are_downloaded(hub: HubCache) -> None:
    hub.cached |= {("EleutherAI/hendrycks_math", part) for part in ("algebra", "geometry")}
    [found] = fetch_data(["math"], Silence())
    assert (found.state, found.records) == (State.FETCHED, 14)
    assert len(hub.downloads) == 5


def test_a_group_stands_for_its_members(hub: HubCache) -> None:
    found = fetch_data(["group:math"], Silence())
    assert [data.benchmark for data in found] == ["gsm8k", "math"]


@pytest.mark.slow
def test_an_unknown_name_fails_before_anything_is_downloaded(hub: HubCache) -> None:
    with pytest.raises(EvaluationError, match="gsm9k") as caught:
        fetch_data(["math", "gsm9k"], Silence())
    assert caught.value.hint == "gsm8k"
    assert not hub.attempts


def test_without_a_network_one_attempt_is_made_and_the_rest_is_looked_up(hub: HubCache) -> None:
    hub.network = False
    hub.cached.add(("evalplus/humanevalplus", None))
    found = fetch_data(["gsm8k", "math", "humaneval_plus", "humaneval"], Silence())
    assert [data.state for data in found] == [State.MISSING, State.MISSING, State.THERE, State.SHIPPED]
    assert hub.attempts == ["openai/gsm8k"]
    with pytest.raises(EvaluationError, match="The data of gsm8k, math cannot be downloaded") as caught:
        require_all(found)
    assert caught.value.actual == "Couldn't reach openai/gsm8k"
    lines = str(caught.value.hint).split("\n")
    assert lines[1:] == [
        "gsm8k: https://huggingface.co/datasets/openai/gsm8k, revision main, split test of main; "
        "then --task-data gsm8k=FILE",
        "math: https://huggingface.co/datasets/EleutherAI/hendrycks_math, revision main, split test of 7 parts; "
        "then --task-data math=FOLDER",
    ]


def test_data_that_the_hub_lacks_does_not_stop_the_rest(hub: HubCache) -> None:
    hub.on_hub.remove("openai/gsm8k")
    found = fetch_data(["gsm8k", "humaneval_plus"], Silence())
    assert states(found) == [("gsm8k", State.MISSING, None), ("humaneval_plus", State.FETCHED, 2)]
    assert found[0].problem == "openai/gsm8k doesn't exist"


def test_data_that_cannot_be_used_is_its_own_error(hub: HubCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDS, "openai/gsm8k", {"question": "?"})
    with pytest.raises(EvaluationError, match="lacks a required field"):
        fetch_data(["gsm8k"], Silence())


def test_ifeval_needs_sentence_data_too(hub: HubCache, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    installed: list[str] = []

    def find(place: str) -> str:
        if "punkt_tab" not in installed:
            raise LookupError(place)
        return place

    def refuse(name: str, **_: object) -> None:
        raise ValueError("<urlopen error>")

    monkeypatch.setattr(nltk.data, "find", find)
    monkeypatch.setattr(nltk, "download", refuse)
    imported = set(sys.modules)
    found = fetch_data(["ifeval"], Silence())
    assert not [name for name in set(sys.modules) - imported if "ifeval" in name], "its modules download by themselves"
    assert states(found) == [("ifeval", State.FETCHED, 2), ("ifeval", State.MISSING, None)]
    with pytest.raises(EvaluationError, match=r"^The data of ifeval cannot") as caught:
        require_all(found)
    assert "punkt_tab.zip" in str(caught.value.hint)
    assert "openai" not in str(caught.value.hint)
    monkeypatch.setattr(nltk, "download", lambda name, **_: installed.append(name))
    assert [data.state for data in fetch_data(["ifeval"], Silence())] == [State.THERE, State.FETCHED]
    assert [data.state for data in fetch_data(["ifeval"], Silence())] == [State.THERE, State.THERE]
