"""A connection to a server: a client whose requests run side by side in a thread of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from threading import Thread
from typing import Any, TypeVar

import openai

from mftctl.evaluation.server.failures import api_key, failure_of

_RETRIES = 5
"""Of a request that the server cannot take now, with growing pauses; done by the client."""

_TIMEOUT = openai.Timeout(3600.0, connect=10.0)
"""In seconds: requests also wait for each other on the server."""

T = TypeVar("T")
Request = Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, T]]
"""Sends a request with the client and returns what came back."""


class Connection:
    """A client with a thread for its requests, which are cancelled when the context ends.

    Args:
        url: The server's URL.
        concurrent: Maximum number of requests at a time.
        retries: How often the client repeats a request that the server cannot take now.

    Raises:
        ConfigError: The API key cannot be sent.
    """

    def __init__(self, url: str, concurrent: int, retries: int = _RETRIES) -> None:
        self.url = url
        self._concurrent = concurrent
        # Without a key the client would raise an error; servers on one's own machine mostly take any.
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=api_key() or "none", max_retries=retries, timeout=_TIMEOUT
        )
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="mftctl-requests", daemon=True)
        self._thread.start()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, request: Request[T], *, retries: int | None = None) -> T:
        """What a single request returns.

        Args:
            request: The request.
            retries: How often to repeat it, if not as usual.

        Raises:
            ServerError: It failed.
        """
        client = self._client if retries is None else self._client.with_options(max_retries=retries)
        future = self._start(request, client)
        try:
            return future.result()
        finally:
            future.cancel()

    def ask_all(self, requests: Sequence[Request[T]]) -> Iterator[tuple[int, T]]:
        """What each request returns, with its index, as soon as it is there.

        Args:
            requests: The requests; they start in this order.

        Raises:
            ServerError: One failed; the others under way are cancelled.
        """
        waiting = iter(enumerate(requests))
        running: dict[Future[T], int] = {}
        try:
            while True:
                for index, request in islice(waiting, self._concurrent - len(running)):
                    running[self._start(request, self._client)] = index
                if not running:
                    return
                done = wait(running, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=lambda future: future.exception() is not None):  # answers are kept
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()

    def _start(self, request: Request[T], client: openai.AsyncOpenAI) -> Future[T]:
        async def send() -> T:
            try:
                return await request(client)
            except openai.OpenAIError as error:
                raise failure_of(error, self.url) from error

        return asyncio.run_coroutine_threadsafe(send(), self._loop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()
