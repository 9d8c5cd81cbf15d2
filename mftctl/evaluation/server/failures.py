"""Failures of a server, as errors that never contain the API key."""

from __future__ import annotations

import os

import openai

from mftctl.errors import ConfigError, ServerError

KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_SHOWN = 300
_RESUME = "the same command with --resume continues from the answers so far"


def api_key() -> str | None:
    """The API key in the environment; None without one.

    Raises:
        ConfigError: It has characters that the header of a request cannot contain.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            "The API key cannot be sent.",
            key=KEY_VARIABLE,
            expected="printable ASCII characters without spaces",
            actual="a key with other characters, not shown",
        )
    return key or None


def failure_of(error: openai.OpenAIError, url: str) -> ServerError:
    """The error to report for a failed request.

    Args:
        error: The client's error, after its retries.
        url: The server's URL.
    """
    told = without_key(_told(error))
    match error:
        case openai.APITimeoutError():
            return ServerError("The server does not answer in time.", path=url, actual=told, hint=_RESUME)
        case openai.APIConnectionError():
            hint = f"start it, or check --base-url; {_RESUME}"
            return ServerError("The server cannot be reached.", path=url, actual=told, hint=hint)
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return ServerError(
                "The server refuses the API key.",
                path=url,
                key=KEY_VARIABLE,
                expected="a key that it accepts, in this environment variable",
                actual=f"{told}, {'with a key' if api_key() else 'without a key'}",
            )
        case openai.NotFoundError():
            return ServerError(
                "The server knows no such address or model.",
                path=url,
                actual=told,
                hint="check --base-url, which often ends in /v1, and --served-model",
            )
        case openai.RateLimitError():
            hint = f"lower --concurrent-requests; {_RESUME}"
            return ServerError("The server takes no more requests.", path=url, actual=told, hint=hint)
        case openai.InternalServerError():
            return ServerError("The server failed.", path=url, actual=told, hint=f"see its log; {_RESUME}")
        case openai.APIStatusError():
            return ServerError("The server refuses a request.", path=url, actual=told, hint="see its log")
        case _:
            return ServerError("The request failed.", path=url, actual=told)


def _told(error: openai.OpenAIError) -> str:
    """What the server or the network said, on one line."""
    text = str(error.__cause__ or error) if isinstance(error, openai.APIConnectionError) else str(error)
    line = " ".join(text.split()) or type(error).__name__
    return line if len(line) <= _LONGEST_SHOWN else f"{line[:_LONGEST_SHOWN]}…"


def without_key(text: str) -> str:
    """The text without the API key, which some servers repeat in their answers.

    Args:
        text: What a server sent.
    """
    key = api_key()
    return text.replace(key, "…") if key else text
