"""Who wants a vCPU to leave may find that it is gone: nothing happens, and the others are served."""

from __future__ import annotations

import signal
import threading

from kvmapi.model.lock import EngineLock
from kvmapi.model.signals import Inside


def released_kick() -> memoryview:
    """A kick flag of a vCPU that was torn down."""
    kick = memoryview(bytearray(1))
    kick.release()
    return kick


def test_a_signal_for_a_vcpu_that_is_gone() -> None:
    inside = Inside(released_kick())
    inside.enter()
    try:
        signal.raise_signal(signal.SIGWINCH)  # pending until we leave
        inside.look()
        inside.look()
        assert inside.interrupted, "the signal was seen, and the watcher goes on"
    finally:
        inside.leave()


def test_the_lock_of_a_vcpu_that_is_gone() -> None:
    lock = EngineLock()
    lock.acquire()
    lock._holder = released_kick()
    taken = threading.Event()

    def insist() -> None:
        lock.acquire()
        taken.set()

    waiting = threading.Thread(target=insist)
    waiting.start()
    assert not taken.wait(0.05), "the holder has not left"
    lock.release()
    assert taken.wait(5), "and whoever waited has it now"
    waiting.join()
    lock.release()
