"""Stop requests by signal."""

from __future__ import annotations

import signal
import threading

import pytest

from mftctl.progress import Silence
from mftctl.runtime.stop_request import stop_on_signal, take_late_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sighup_and_sigterm_request_a_stop_too(number: signal.Signals) -> None:
    with stop_on_signal(Silence()) as stop:
        signal.raise_signal(number)
        assert stop.requested
        signal.raise_signal(number)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(Silence()) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_requests_a_stop_and_the_second_ends_the_process() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal(Silence()) as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_not_handled_in_another_thread() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_on_signal(Silence()) as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_a_request_that_came_too_late_is_told_once() -> None:
    take_late_stop()
    with stop_on_signal(Silence()):
        pass
    assert not take_late_stop()
    with stop_on_signal(Silence()):
        signal.raise_signal(signal.SIGINT)
    assert take_late_stop()
    assert not take_late_stop()


def test_a_request_that_stopped_the_training_is_not_told_again() -> None:
    def stopped() -> None:
        with stop_on_signal(Silence()):
            signal.raise_signal(signal.SIGINT)
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        stopped()
    assert not take_late_stop()
