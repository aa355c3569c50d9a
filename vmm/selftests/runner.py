"""Runs items in worker processes, some at a time, each with a time limit.

A worker takes one item after the other; the next one goes to whoever is free. A worker whose item exceeds its limit is killed
with everything it started, one that dies is reported with its signal and its last words; in both cases a new one takes its
place, and no other item suffers. Results come in the order they finish; whoever prints them puts them into the plan's order.

Invariant: when the generator of `run` ends, or is closed, or raises (Ctrl-C), no worker is left.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import NamedTuple

from vmm.selftests import worker
from vmm.selftests.collect import PACKAGE, Item
from vmm.selftests.execute import Result, execute

TIMEOUT = 30.0
_GRACE, _START = 0.5, 10.0  # seconds after the limit: for the worker to dump its stacks; for one that has not even begun
_LAST_WORDS = 4000


def default_jobs() -> int:
    """As many as CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    items: Sequence[Item], on: str = "auto", jobs: int | None = None, timeout: float | None = None, package: str = PACKAGE
) -> Iterator[Result]:
    """Run `items`; yields each result as it comes. `jobs` 0: in this process, without time limits (for a debugger).

    `timeout`: seconds one item may take, 0 = for ever; None = what its test says, else `TIMEOUT`.
    """
    if jobs == 0:
        for item in items:
            yield execute(item, on, package)
        return
    waiting = deque(items)
    count = min(len(waiting), default_jobs() if jobs is None else jobs)
    order = _Order(on, timeout, package)
    workers: list[_Worker] = []
    with selectors.DefaultSelector() as selector:
        try:
            for _ in range(count):
                workers.append(_Worker(selector, order))
            for one in workers:
                one.give(waiting.popleft())
            while any(one.item is not None for one in workers):
                for one in _ready(workers, selector):
                    result = one.answer()
                    if result is None:
                        continue
                    yield result
                    free = _Worker(selector, order) if one.gone and waiting else one
                    workers[workers.index(one)] = free
                    if waiting:
                        free.give(waiting.popleft())
        finally:
            for one in workers:
                one.end()


def _ready(workers: list[_Worker], selector: selectors.BaseSelector) -> list[_Worker]:
    """Wait for the next workers that have something to say, or whose time is over."""
    busy = [one for one in workers if one.item is not None]
    deadlines = [one.deadline for one in busy if one.deadline is not None]
    events = selector.select(max(0.0, min(deadlines) - time.monotonic()) if deadlines else None)
    spoken = {key.data for key, _ in events}
    return [one for one in busy if one in spoken or one.late]


class _Order(NamedTuple):
    """What all workers are told: the rung, the seconds an item may take (see `run`), the package of the suites."""

    on: str
    timeout: float | None
    package: str


_DUMP = re.compile(r"^Timeout \(\d+:\d\d:\d\d", re.MULTILINE)  # how faulthandler begins when the limit is over


class _Worker:
    """One worker process, and the item it is at."""

    def __init__(self, selector: selectors.BaseSelector, order: _Order) -> None:
        self.order = order
        self.item: Item | None = None
        self.deadline: float | None = None
        self.gone = False
        self._limit = self._began = 0.0
        self._selector = selector
        self._words = tempfile.TemporaryFile()  # what its tests print
        asked, self._ask = os.pipe()
        self._answers, answered = os.pipe()
        os.set_blocking(self._answers, False)
        self._got = bytearray()
        arguments = [json.dumps(sys.path), str(asked), str(answered), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", worker.START, *arguments], stdin=subprocess.DEVNULL, stdout=self._words, stderr=subprocess.STDOUT,
                pass_fds=(asked, answered), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(asked)
            os.close(answered)
        selector.register(self._answers, selectors.EVENT_READ, self)

    def give(self, item: Item) -> None:
        """Let it run `item`."""
        self.item, self._began = item, time.monotonic()
        self._limit = item.timeout or TIMEOUT if self.order.timeout is None else self.order.timeout
        self._set_deadline(_START)
        self._words.seek(0)
        self._words.truncate()
        question = {"item": asdict(item), "limit": self._limit, "on": self.order.on, "package": self.order.package}
        with suppress(BrokenPipeError):  # it is dead: the end of its answers will tell
            os.write(self._ask, json.dumps(question).encode() + b"\n")

    @property
    def late(self) -> bool:
        """Whether the time of its item is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def answer(self) -> Result | None:
        """What it answered, None while the line is not complete. Its death is an answer too, and so is that it is late."""
        try:
            while data := os.read(self._answers, 1 << 16):
                self._got += data
                while (end := self._got.find(b"\n")) >= 0:
                    line = bytes(self._got[:end])
                    del self._got[: end + 1]
                    if line:
                        self.item = None
                        return Result.from_json(json.loads(line))
                    self._set_deadline(_GRACE)  # it has begun: what it imported before was not the item's time
        except BlockingIOError:
            return self._verdict(f"did not end within {self._limit:g} s", timed_out=True) if self.late else None
        return self._verdict(self._death())

    def _set_deadline(self, grace: float) -> None:
        self.deadline = time.monotonic() + self._limit + grace if self._limit else None

    def end(self) -> None:
        """Kill the process and what it started, and release everything. Safe to call twice."""
        if not self.gone:
            self._kill()
            self._release()

    def _death(self) -> str:
        code = self._process.wait()
        if code < 0:
            with suppress(ValueError):
                return f"the process died by {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"

    def _verdict(self, text: str, timed_out: bool = False) -> Result | None:
        """The result of the item that this worker does not survive."""
        self._kill()
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - _LAST_WORDS))
        words = self._words.read().decode("utf-8", "replace").strip()
        if not timed_out and _DUMP.search(words):  # it was being asked for its stacks, which can kill a process that is just importing
            text, timed_out = f"did not end within {self._limit:g} s ({text})", True
        item, self.item = self.item, None
        self._release()
        if item is None:
            return None
        result = Result.of(item, text=f"{text}\n{words}" if words else text)
        result.elapsed_s, result.timed_out = time.monotonic() - self._began, timed_out
        return result

    def _kill(self) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _release(self) -> None:
        self.gone = True
        self._selector.unregister(self._answers)
        os.close(self._answers)
        os.close(self._ask)
        self._words.close()
