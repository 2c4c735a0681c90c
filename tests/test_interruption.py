"""Interruption: real signals to this very process, asked and answered in the main thread."""

import os
import signal
import threading

import pytest

from search import interruption as module
from search.interruption import GRACE_S, Interrupted, Interruption

SIGNALS = signal.SIGINT, signal.SIGTERM


@pytest.fixture(autouse=True)
def harmless():
    """Signals that nobody handles fail a test instead of ending the process; what was there comes back."""

    def refuse(number, frame):
        raise AssertionError(f"signal {number} reached the handler from before")

    previous = {number: signal.signal(number, refuse) for number in SIGNALS}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when told to."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def send(number):
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 0)  # the handler of what is pending runs before this returns


@pytest.mark.parametrize("number", SIGNALS)
def test_before_defer_a_signal_raises_at_once(number):
    with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
        send(number)
    assert not interruption.requested


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_after_defer_the_first_signal_asks_and_the_second_raises(first, second):
    with Interruption() as interruption:
        interruption.defer()
        assert not interruption.requested
        send(first)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            send(second)


def test_the_first_signal_says_that_it_was_heard(capfd):
    with Interruption() as interruption:
        interruption.defer()
        send(signal.SIGINT)
    assert "interrupted: the best so far is merged now; again to stop at once" in capfd.readouterr().err


def test_what_is_under_way_is_abandoned_only_after_the_grace(clock):
    with Interruption() as interruption:
        interruption.defer()
        interruption.check()
        clock[0] += 1000
        interruption.check()  # nobody asked
        send(signal.SIGTERM)
        interruption.check()
        clock[0] += GRACE_S
        interruption.check()  # just in time
        clock[0] += 0.01
        with pytest.raises(Interrupted):
            interruption.check()
        with pytest.raises(Interrupted):
            interruption.check()  # for good


def test_a_request_outlives_the_block():
    with Interruption() as interruption:
        interruption.defer()
        send(signal.SIGINT)
    assert interruption.requested


@pytest.mark.parametrize("failure", [None, KeyError])
def test_the_handlers_from_before_come_back(failure):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyError) if failure else Interruption(), Interruption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        if failure:
            raise failure
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_one_inside_another_gives_way_to_it_again():
    with Interruption() as outer:
        outer.defer()
        with Interruption() as inner, pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert not outer.requested
        send(signal.SIGINT)
        assert outer.requested
        assert not inner.requested


def test_in_another_thread_it_leaves_signals_alone():
    handlers = []

    def enter():
        with Interruption() as interruption:
            interruption.defer()
            interruption.check()
            handlers.append([signal.getsignal(number) for number in SIGNALS])

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [before]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_request_is_no_error_that_a_broad_handler_takes_for_a_bug():
    assert not issubclass(Interrupted, KeyboardInterrupt | RuntimeError | ValueError)
