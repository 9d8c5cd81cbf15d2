"""A stand-in on this machine for a server with OpenAI's API: completions of a tiny model, greedy, with likelihoods."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

EXTENSIONS = {"top_k", "min_p", "repetition_penalty", "repeat_penalty", "stop_token_ids", "return_tokens_as_token_ids"}


@dataclass
class Behaviour:
    """How the server differs from vLLM.

    Attributes:
        models: The models that it lists; None if it keeps no list.
        context_tokens: The context length that it tells.
        takes_tokens: Whether it takes token ids.
        takes_extensions: Whether it takes fields beyond OpenAI's.
        echo: `full`, `refused`, or `ignored`.
        key: The API key that it asks for.
        failures: Statuses of the next completions; each is sent once.
        failing_from: Number of the completion from which on all of them fail with status 500.
        interrupting_at: Number of the completion at which Ctrl-C is pressed; it and all later ones get no answer.
        silent_over_tokens: Longest answer that it gives; requests for longer ones get none until it closes.
        most_tokens: Where it cuts every answer.
        begins_texts: Whether it adds a token to prompts that are texts.
        body: Sent in place of every completion.
    """

    models: tuple[str, ...] | None = ("tiny",)
    context_tokens: int | None = None
    takes_tokens: bool = True
    takes_extensions: bool = True
    echo: str = "full"
    key: str | None = None
    failures: list[int] = field(default_factory=list)
    failing_from: int | None = None
    interrupting_at: float = math.inf
    silent_over_tokens: float = math.inf
    most_tokens: int | None = None
    begins_texts: bool = False
    body: str | None = None


class Completions(ThreadingHTTPServer):
    """The server.

    Attributes:
        url: The value for --base-url.
        asked: The bodies of all requests for a completion.
        most_at_once: The largest number of requests that were open at the same time.
    """

    daemon_threads = False  # a thread that still computes when Python ends would end it with an error

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.behaviour = model, tokenizer, behaviour
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked: list[dict[str, Any]] = []
        self.most_at_once = 0
        self.at_once = 0
        self.closing = threading.Event()
        self.counting, self.computing = threading.Lock(), threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A client that has seen enough closes its other requests."""

    @property
    def answered(self) -> list[dict[str, Any]]:
        """The requests for answers, without those that find out what the server understands."""
        return [body for body in self.asked if body["max_tokens"] > 1]


@contextmanager
def serving(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour | None = None
) -> Iterator[Completions]:
    """Serves a model while the context is open."""
    server = Completions(model, tokenizer, behaviour or Behaviour())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Completions

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        models = self.server.behaviour.models
        if not self._is_allowed():
            return
        if self.path != "/v1/models" or models is None:
            self._refuse(404, "no such page")
            return
        context = self.server.behaviour.context_tokens
        entries = [{"id": name, "object": "model", "owned_by": "vllm", "max_model_len": context} for name in models]
        self._reply(200, json.dumps({"object": "list", "data": entries}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.counting:
            server.asked.append(body)
            number = len(server.asked)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            if self._is_allowed():
                self._complete(body, number)
        finally:
            with server.counting:
                server.at_once -= 1

    def _complete(self, body: dict[str, Any], number: int) -> None:
        how = self.server.behaviour
        if number >= how.interrupting_at or body["max_tokens"] > how.silent_over_tokens:
            if number == how.interrupting_at:
                os.kill(os.getpid(), signal.SIGINT)
            self.server.closing.wait()
        elif self.path != "/v1/completions" or (how.models and body["model"] not in how.models):
            self._refuse(404, "no such model")
        elif how.failures:
            self._refuse(how.failures.pop(0), "try again")
        elif how.failing_from is not None and number > how.failing_from:
            self._refuse(500, "out of order")
        elif how.body is not None:
            self._reply(200, how.body)
        elif isinstance(body["prompt"], list) and not how.takes_tokens:
            self._refuse(422, "prompt must be a text")
        elif len(body.get("stop", ())) > 4 or (EXTENSIONS & set(body) and not how.takes_extensions):
            self._refuse(400, "too many stops, or an unknown field")
        elif body.get("echo") and how.echo == "refused":
            self._refuse(400, "Only no echo is supported")
        else:
            with self.server.computing, torch.no_grad():
                self._reply(200, json.dumps(_completion(self.server, body)))

    def _is_allowed(self) -> bool:
        key = self.server.behaviour.key
        given = self.headers.get("Authorization", "")
        if key is not None and given != f"Bearer {key}":
            self._refuse(401, f"Incorrect API key provided: {given}")
            return False
        return True

    def _refuse(self, status: int, message: str) -> None:
        self._reply(status, json.dumps({"error": {"message": message, "code": status}}))

    def _reply(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if text.startswith(("{", "[")) else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")  # as some servers send it; the client then waits no longer
        self.end_headers()
        self.wfile.write(content)


def _completion(server: Completions, body: dict[str, Any]) -> dict[str, Any]:
    how, tokenizer = server.behaviour, server.tokenizer
    prompt = body["prompt"]
    if isinstance(prompt, str):
        prompt = [*([tokenizer.pad_token_id] if how.begins_texts else []), *tokenizer(prompt)["input_ids"]]
    most = min(body["max_tokens"], how.most_tokens or body["max_tokens"])
    new, reason = _continue(server, prompt, most, body)
    text = tokenizer.decode(new, skip_special_tokens=True)
    ends = [text.find(stop) for stop in body.get("stop", ()) if stop in text]
    choice: dict[str, Any] = {"index": 0, "text": text[: min(ends, default=len(text))], "finish_reason": reason}
    if body.get("logprobs"):
        shown = [*prompt, *new] if body.get("echo") and how.echo == "full" else new
        choice["logprobs"] = _likelihoods(server, [*prompt, *new], len(shown))
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(new), "total_tokens": len(prompt) + len(new)},
    }


def _continue(server: Completions, prompt: list[int], most: int, body: dict[str, Any]) -> tuple[list[int], str]:
    ends = {server.tokenizer.eos_token_id, *body.get("stop_token_ids", ())}
    new: list[int] = []
    while len(new) < most and not server.closing.is_set():
        token = int(server.model(torch.tensor([[*prompt, *new]])).logits[0, -1].argmax())
        if token in ends:
            return new, "stop"
        new.append(token)
        if any(stop in server.tokenizer.decode(new) for stop in body.get("stop", ())):
            return new, "stop"
    return new, "length"


def _likelihoods(server: Completions, token_ids: list[int], shown: int) -> dict[str, Any]:
    """OpenAI's `logprobs` for the last tokens; the first token of a text has none."""
    values = server.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    found: list[float | None] = [None, *(float(values[at, token]) for at, token in enumerate(token_ids[1:]))]
    best: list[dict[str, float] | None] = [None]
    for at, token in enumerate(token_ids[1:]):
        top = int(values[at].argmax())
        best.append({f"token_id:{top}": float(values[at, top]), f"token_id:{token}": float(values[at, token])})
    names = [f"token_id:{token}" for token in token_ids]
    return {
        "tokens": names[-shown:],
        "token_logprobs": found[-shown:],
        "top_logprobs": best[-shown:],
        "text_offset": [0] * shown,
    }
