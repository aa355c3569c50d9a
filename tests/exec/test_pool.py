"""The threads that answer, without a program: what becomes of calls when there can be no more threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest

from vmm.exec.notify import Notification
from vmm.exec.pool import Pool

pytestmark = pytest.mark.model


class Calls:
    """A listener whose notifications come from a queue; None ends the thread that takes it."""

    def __init__(self) -> None:
        self.coming: queue.SimpleQueue[Notification | None] = queue.SimpleQueue()
        self.ended = False

    def receive(self, buffer: bytearray) -> Notification:
        found = self.coming.get()
        if found is None:
            self.ended = True
            raise OSError
        return found

    def deserted(self) -> bool:
        return self.ended


def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls last, and no thread can be had for the next one, at first: it is answered when there is one."""
    calls, long, done = Calls(), threading.Event(), threading.Event()
    asked = threading.Semaphore(0)
    refused = 0

    def handle(notification: Notification) -> None:
        if notification.tid < 3:
            asked.release()
            long.wait(20)
        else:
            done.set()

    pool = Pool(calls, handle, lambda: False)  # type: ignore[arg-type]
    pool.start()
    start = pool._run

    def run(main: Callable[[], None], name: str) -> None:
        nonlocal refused
        if refused < 3:
            refused += 1
            raise RuntimeError("can't start new thread")
        start(main, name)

    monkeypatch.setattr(pool, "_run", run)
    for number in (1, 2):
        calls.coming.put(Notification(number, number, *(0,) * 10))
        assert asked.acquire(timeout=5), "a second thread is there from the start"
    calls.coming.put(Notification(3, 3, *(0,) * 10))
    try:
        assert done.wait(5), "nobody answers any more"
        assert refused == 3
    finally:
        long.set()
        pool.stop()
        for _ in range(4):
            calls.coming.put(None)
