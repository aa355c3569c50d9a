"""The traced processes that use the model, by their threads.

A notification names a thread; what the model needs is its process. Numbers are used again after their owners have ended,
so what is remembered goes when a process ends: its pidfd says when. And where a wrong answer would be one process's
memory shown to another, the pair of numbers is asked for (`sure`).

An exec is announced before it happens, and may fail: then all is as it was. So the process is only doubted from then on,
until a call comes from the new image, or from the thread whose exec has failed.

Only processes that make a call on one of our files, or open one, are remembered. They are closed outside of the lock:
that may have to wait for somebody who uses their memory.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

from vmm.exec.caller import Process

_MANY_LEAVING = 64  # threads of one process that have asked for an exec
_MANY_THREADS = 1024  # of one process, beyond which those that have ended are looked for


class Processes:
    """`make(tgid)` a Process. Any thread may ask."""

    def __init__(self, make: Callable[[int], Process]) -> None:
        self._make = make
        self._by_group: dict[int, Process] = {}
        self._by_thread: dict[int, Process] = {}
        self._threads: dict[int, set[int]] = {}  # by tgid: what `_by_thread` has of it
        self._lock = threading.Lock()
        self._ends = select.epoll()
        self._by_pidfd: dict[int, Process] = {}

    def start(self) -> None:
        """From here on, processes that have ended are forgotten."""
        threading.Thread(target=self._watch, name="sevmm-ends", daemon=True).start()

    def of(self, tid: int) -> Process:
        """Whose thread it was when we last looked. ProcessLookupError: it has ended."""
        process = self._by_thread.get(tid)
        if process is None or (process.leaving and not self._stays(process, tid)):
            return self._look(tid)
        return process

    def sure(self, tid: int) -> Process:
        """Whose thread it is. ProcessLookupError: it has ended."""
        return self.known(tid) or self._look(tid)

    def known(self, tid: int) -> Process | None:
        """The same, for a process that has used the model before; None for others."""
        process = self._by_thread.get(tid)
        if process is None:
            with contextlib.suppress(ProcessLookupError):
                process = self._by_group.get(_group_of(tid))
        elif not os.path.exists(f"/proc/{process.tgid}/task/{tid}"):
            return None
        return None if process is None or (process.leaving and not self._stays(process, tid)) else process

    def leaves(self, tid: int) -> int:
        """The thread's process becomes another program, if its exec succeeds. The thread's number is then the one returned."""
        tgid = tid
        with contextlib.suppress(ProcessLookupError):
            tgid = _group_of(tid)
            process = self._by_group.get(tgid)
            if process is not None:
                if len(process.leaving) >= _MANY_LEAVING:
                    process.leaving = {one for one in set(process.leaving) if os.path.exists(f"/proc/{process.tgid}/task/{one}")}
                process.leaving.add(tid)
        return tgid

    def _stays(self, process: Process, tid: int) -> bool:
        """Is it still the program that it was? `tid` makes a call, so no exec of its own is under way."""
        if process.same_image():
            process.leaving.discard(tid)
            return True
        with self._lock:
            known = self._by_group.get(process.tgid) is process
            if known:
                self._drop(process)
        if known:
            process.close()
        return False

    def _look(self, tid: int) -> Process:
        tgid = _group_of(tid)
        doubted = self._by_group.get(tgid)
        if doubted is not None and doubted.leaving:
            self._stays(doubted, tid)
        with self._lock:
            process = self._by_group.get(tgid)
            if process is None:
                process = self._by_group[tgid] = self._make(tgid)
                self._threads[tgid] = set()
                self._by_pidfd[process.pidfd] = process
                self._ends.register(process.pidfd, select.EPOLLIN)
            self._by_thread[tid] = process
            threads = self._threads[tgid]
            threads.add(tid)
            if len(threads) > _MANY_THREADS:
                for gone in [one for one in threads if not os.path.exists(f"/proc/{tgid}/task/{one}")]:
                    threads.discard(gone)
                    self._by_thread.pop(gone, None)
            return process

    def _drop(self, process: Process) -> None:
        """Under the lock. Whoever has it closes it afterwards."""
        del self._by_group[process.tgid], self._by_pidfd[process.pidfd]
        for tid in self._threads.pop(process.tgid):
            if self._by_thread.get(tid) is process:
                del self._by_thread[tid]
        self._ends.unregister(process.pidfd)

    def _watch(self) -> None:
        while True:
            for pidfd, _ in self._ends.poll():
                with self._lock:
                    process = self._by_pidfd.get(pidfd)
                    if process is None or not _has_ended(pidfd):
                        continue
                    self._drop(process)
                with contextlib.suppress(OSError):
                    process.close()


def _has_ended(pidfd: int) -> bool:
    """Its number may be that of a newer process by now."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _group_of(tid: int) -> int:
    """The process that a thread belongs to. ProcessLookupError: it has ended."""
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
    except OSError:
        raise ProcessLookupError from None
    raise ProcessLookupError
