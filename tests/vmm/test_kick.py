"""The kick: a signal that nobody else uses, a handler that does nothing, no harm when it comes late."""

import os
import signal
import threading

import pytest

from vmm import kick


def test_the_signal_is_real_time_and_stays_the_same() -> None:
    number = kick.kick_signal()
    assert signal.SIGRTMIN < number <= signal.SIGRTMAX
    assert kick.kick_signal() == number


def test_a_signal_that_has_a_handler_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = kick.kick_signal()  # has our handler already, so it is like one of somebody else's
    assert kick._install() == taken + 1


def test_a_kick_interrupts_a_blocking_system_call_of_its_thread_only() -> None:
    reader, writer = os.pipe()
    interrupted = threading.Event()

    def wait() -> None:
        kick.accept_kicks()
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(1)
        if libc.read(reader, buffer, 1) < 0 and ctypes.get_errno() == 4:  # EINTR: not restarted
            interrupted.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while thread.is_alive():
        kick.kick(thread.native_id or 0)
        thread.join(0.01)
    assert interrupted.is_set()
    kick.kick(thread.native_id or 0)  # it has ended: nothing happens
    os.close(reader)
    os.close(writer)
