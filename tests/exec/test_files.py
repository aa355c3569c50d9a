"""The table of files, without a program: two fds that are given at the same time."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import pytest

from kvmapi.model.files import File
from kvmapi.model.placeholder import StandIn, empty
from vmm.exec.files import FileTable

pytestmark = pytest.mark.model
FIRST = 200


class Guarded(File):
    """As a guest_memfd: its fd stands where the filter asks us about reads."""

    def stand_in(self) -> StandIn:
        return StandIn(empty("test"), guarded=True)


class Slow:
    """A listener whose program is this process."""

    def add_fd(self, notification: int, fd: int, *, close_on_exec: bool, at: int | None = None) -> int:
        time.sleep(0.1)
        assert at is not None
        return os.dup2(fd, at)


def test_two_threads_get_numbers_of_their_own() -> None:
    table, got = FileTable(FIRST), list[int]()
    call = SimpleNamespace(id=0, thread=os.getpid(), access=None, close_on_exec=True, process=SimpleNamespace(tgid=os.getpid()))

    def one() -> None:
        got.append(table.install(Slow(), call, Guarded()))  # type: ignore[arg-type]

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for number in got:
        os.close(number)
    assert len(set(got)) == 3 and min(got) >= FIRST
    table.take_news()
    assert len(table) == 0
    table.close()
