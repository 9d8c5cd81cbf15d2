"""AlpacaEval's own package, calling a local stand-in for the API."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.alpaca_judge import (
    ALPACA_EVAL_DIGEST,
    Answer,
    entry,
    length_controlled,
    what_is_missing,
    win_shares,
)

REFERENCES = [Answer(f"Say {n}.", f"reference {n}", "gpt4") for n in range(3)]


class StandIn(ThreadingHTTPServer):
    """Prefers any answer containing `good` in 9 of 10 cases, and counts requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.status = 200


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(request)
        body = json.dumps(verdict(request) if self.server.status == 200 else {"error": {"message": "no such key"}})
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def verdict(request: dict[str, Any]) -> dict[str, Any]:
    """A chat completion that prefers whichever of the models m and M has `good` in its output."""
    prompt = request["messages"][-1]["content"]
    first = prompt.index('"model_identifier": "m"')
    second = prompt.index('"model_identifier": "M"')
    good = prompt.index("good") if "good" in prompt else -1
    likes_first = first < good < second if first < second else not second < good < first
    chances = [0.9, 0.1] if likes_first else [0.1, 0.9]
    top = [
        {"token": token, "logprob": math.log(chance), "bytes": None}
        for token, chance in zip("mM", chances, strict=True)
    ]
    return {
        "id": "0",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "m"},
                "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


@pytest.fixture(scope="module")
def running() -> Iterator[StandIn]:
    # The package reads the key on first import.
    assert "alpaca_eval" not in sys.modules
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = dict(os.environ)
    os.environ |= {"OPENAI_API_KEY": "key", "OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1"}
    yield server
    os.environ.clear()
    os.environ.update(before)
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge(running: StandIn) -> StandIn:
    running.asked.clear()
    running.status = 200
    return running


@pytest.mark.slow
def test_the_judge_prefers_the_better_answer_on_either_side(judge: StandIn, tmp_path: Path) -> None:
    answers = [Answer("Say 0.", "good", "mine"), Answer("Say 1.", "bad", "mine"), Answer("Say 2.", "good", "mine")]
    references = [*REFERENCES[:1], Answer("Say 1.", "good", "gpt4"), *REFERENCES[2:]]
    shares = win_shares(answers, references, tmp_path / "verdicts.json")
    assert shares == pytest.approx([0.9, 0.1, 0.9])
    assert len(judge.asked) == 3
    assert {request["model"] for request in judge.asked} == {"gpt-4-1106-preview"}


@pytest.mark.slow
def test_an_answer_equal_to_the_reference_is_a_draw_and_costs_nothing(judge: StandIn, tmp_path: Path) -> None:
    answers = [Answer("Say 0.", "reference 0", "mine")]
    assert win_shares(answers, REFERENCES[:1], tmp_path / "verdicts.json") == [0.5]
    assert judge.asked == []


@pytest.mark.slow
def test_no_verdict_is_paid_for_twice(judge: StandIn, tmp_path: Path) -> None:
    answers = [Answer(f"Say {n}.", "good" * (n + 1), "mine") for n in range(3)]
    first = win_shares(answers[:2], REFERENCES[:2], tmp_path / "verdicts.json")
    both = win_shares(answers, REFERENCES, tmp_path / "verdicts.json")
    assert both[:2] == first
    assert len(judge.asked) == 3


def test_an_api_that_refuses_is_an_error(judge: StandIn, tmp_path: Path) -> None:
    judge.status = 401
    with pytest.raises(EvaluationError, match="judge failed") as caught:
        win_shares([Answer("Say 0.", "good", "mine")], REFERENCES[:1], tmp_path / "verdicts.json")
    assert "no such key" in str(caught.value.actual)


def test_nothing_is_printed(judge: StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    win_shares([Answer("Say 0.", "good", "mine")], REFERENCES[:1], tmp_path / "verdicts.json")
    assert capfd.readouterr() == ("", "")


def gamed(folder: Path) -> Path:
    """A file like AlpacaEval's `df_gamed.csv`: verdicts on two models that exploit answer length, and difficulties."""
    lines = ["model,index,instruction_difficulty,preference,std_delta_len,not_gamed_baseline"]
    for model, length, share in (("concise", 1.0, 0.2), ("verbose", -1.0, 0.65)):
        lines += [f"{model},{index},{(index - 10) / 10},{share},{length},False" for index in range(20)]
    file = folder / "df_gamed.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.slow
def test_shorter_answers_gain_by_the_control_for_length(
    running: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from alpaca_eval.metrics import glm_winrate

    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(gamed(tmp_path)))
    references = [Answer(f"Say {n}.", "r" * 400, "gpt4") for n in range(20)]
    lengths = [40 + 30 * n for n in range(20)]
    answers = [Answer(f"Say {n}.", "a" * length, "mine") for n, length in enumerate(lengths)]
    shares: list[float | None] = [0.1 + 0.7 * length / 610 for length in lengths]
    shares[3] = None
    shown = length_controlled(answers, references, shares, ALPACA_EVAL_DIGEST)
    short = length_controlled(answers[:10], references[:10], [0.4] * 10, ALPACA_EVAL_DIGEST)
    assert len(shown) == 20
    assert all(0 < share < 1 for share in shown)
    assert sum(short) / 10 > 0.4  # the win rate is that high in spite of shorter answers
    assert capfd.readouterr() == ("", "")


def test_length_control_needs_the_packages_data_and_instructions(
    running: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alpaca_eval.metrics import glm_winrate

    answers = [Answer("Say 0.", "good", "mine")]
    with pytest.raises(EvaluationError, match="only for AlpacaEval's own instructions") as caught:
        length_controlled(answers, REFERENCES[:1], [0.5], "another")
    assert caught.value.key == "task_data.alpaca_eval"

    def fail(**_: Any) -> str:
        raise FileNotFoundError("offline")

    monkeypatch.setattr(glm_winrate, "hf_hub_download", fail)
    with pytest.raises(EvaluationError, match="cannot compute the length-controlled win rate") as caught:
        length_controlled(answers, REFERENCES[:1], [0.5], ALPACA_EVAL_DIGEST)
    assert caught.value.actual == "offline"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEYS", "OPENAI_CLIENT_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert what_is_missing() == ["an API key (OPENAI_API_KEY)"]
    monkeypatch.setenv("OPENAI_API_KEYS", "a,b")
    assert what_is_missing() == []
    monkeypatch.setattr("mftctl.evaluation.benchmarks.alpaca_judge.find_spec", lambda name: None)
    assert what_is_missing() == ["the package alpaca_eval (pip install 'mftctl[alpaca-eval]')"]


@pytest.mark.slow
def test_an_entry_is_alpaca_evals() -> None:
    expected = {"instruction": "Say 0.", "output": "reference 0", "generator": "gpt4", "dataset": "alpaca_eval"}
    assert entry(REFERENCES[0]) == expected
