"""The fuzzing process: threads that make calls on one model, a watchdog that gets them out of guests, canaries beside them.

A finding is an exception that came out of the host, a result that no system call gives, a canary with a wrong answer, a
thread that hangs, an fd or a mapping that is left when everything is closed, or memory that is not given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import mmap
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzlib.arguments import SCRATCH, Arguments, Memory
from fuzzlib.calls import Log
from fuzzlib.canary import Canary
from kvmapi.abi import ioctls
from kvmapi.model.host import ModelHost
from kvmapi.table import any_row
from tests.conftest import device_mappings, open_fds

IN_GUEST, HANG = 0.004, 60.0  # seconds: a guest is kicked after the first; a call that takes the second hangs
MOST_FDS, CANARY_EVERY = 14, 0.5
FRESH_FDS = {
    ioctls.KVM_CREATE_VM: "vm",
    ioctls.KVM_CREATE_VCPU: "vcpu",
    ioctls.KVM_CREATE_GUEST_MEMFD: "guest_memfd",
    ioctls.KVM_GET_STATS_FD: "stats",
}
NO_FDS = (-1, 0, 999999, 1 << 33)
RSS_GROWTH, RSS_MOST = 64, 2048  # MiB


@dataclass
class Plan:
    """What was asked for."""

    calls: int
    seed: int
    threads: int
    seconds: float


@dataclass
class Outcome:
    """What happened."""

    errnos: Counter[int] = field(default_factory=Counter)
    successes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    rss_most: int = 0


class Fuzzer:
    """One run."""

    def __init__(self, plan: Plan, log: Log) -> None:
        self._plan = plan
        self._log = log
        self._host = ModelHost()
        _ = self._host.platform.firmware.identity.pdh_certificate  # vaults live as long as host and process: no leaks
        self._memory = Memory(plan.threads)
        self._fds: list[int] = []
        self._kinds: dict[int, str] = {}
        self._lock = threading.Lock()  # of `_fds`: who holds it may rely on an fd's meaning
        self._inside: list[tuple[float, Any] | None] = [None] * plan.threads
        self._since = [time.monotonic()] * plan.threads
        self._stop = False
        self.outcome = Outcome()

    def run(self) -> dict[str, Any]:
        """Fuzz; the summary."""
        plan, outcome = self._plan, self.outcome
        Canary(self._host).close()  # caches of the library are no leaks
        gc.collect()
        before, maps = set(open_fds()), device_mappings()
        rss = rss_mib()
        canary = Canary(self._host)
        start = time.monotonic()
        self._fds += [self._host.open("/dev/kvm", os.O_RDWR), self._host.open("/dev/sev", os.O_RDWR)]
        self._kinds = dict(zip(self._fds, ("system", "sev")))
        threads = [threading.Thread(target=self._worker, args=(number,), daemon=True) for number in range(plan.threads)]
        for thread in threads:
            thread.start()
        hung = self._watch(threads, canary, start + plan.seconds)
        seconds = time.monotonic() - start
        if not hung:
            self._tear_down(canary, before, maps, rss)
        return {
            "calls": sum(self._log.counts()),
            "seconds": round(seconds, 1),
            "calls_per_second": round(sum(self._log.counts()) / seconds),
            "seed": plan.seed,
            "threads": plan.threads,
            "canary_checks": canary.checks,
            "rss_mib": {"before": rss, "most": outcome.rss_most, "after": rss_mib()},
            "errnos": {os.strerror(number) if number else "success": count for number, count in outcome.errnos.most_common()},
            "succeeded": dict(outcome.successes.most_common()),
            "findings": outcome.findings[:20],
        }

    def _tear_down(self, canary: Canary, before: set[int], maps: list[str], rss: int) -> None:
        """Close everything; what stays is a leak."""
        findings = self.outcome.findings
        for fd in self._fds:
            self._host.close(fd)
        wrong = canary.check()
        if wrong:
            findings.append(wrong)
        canary.close()
        gc.collect()
        names = open_fds()
        left = {fd: names[fd] for fd in set(names) - before}
        if left:
            findings.append(f"fds left open: {dict(list(left.items())[:8])}")
        now = device_mappings()
        if now != maps:
            findings.append(f"mappings left behind: {len(now) - len(maps)}, such as {[line for line in now if line not in maps][:4]}")
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is no leak
        after = rss_mib()
        if after > rss + RSS_GROWTH or self.outcome.rss_most > RSS_MOST:
            findings.append(f"memory: {rss} MiB at the start, {self.outcome.rss_most} at most, {after} with everything closed")

    # ---- the main thread: watchdog and canaries
    def _watch(self, threads: list[threading.Thread], canary: Canary, deadline: float) -> bool:
        """Until all threads are done: kick guests, run canaries, notice a hang (True)."""
        next_check = 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.002)
            now = time.monotonic()
            self._stop |= now > deadline
            for entry in list(self._inside):
                if entry is not None and now > entry[0]:
                    with contextlib.suppress(ValueError):
                        entry[1][1] = 1  # immediate_exit
            if now > next_check:
                next_check = now + CANARY_EVERY
                wrong = canary.check()
                self.outcome.rss_most = max(self.outcome.rss_most, rss_mib())
                if wrong:
                    self.outcome.findings.append(wrong)
                    self._stop = True
            if any(thread.is_alive() and now - since > HANG for thread, since in zip(threads, self._since)):
                faulthandler.dump_traceback()
                self.outcome.findings.append(f"a call does not return within {HANG:g} s")
                return True
        return False

    # ---- the fuzzing threads
    def _worker(self, thread: int) -> None:
        rng = random.Random(self._plan.seed * 1000 + thread)
        source = Arguments(rng, self._memory, thread, lambda: self._fds[:4] + self._fds[-4:])
        share = self._plan.calls // self._plan.threads + (thread < self._plan.calls % self._plan.threads)
        errnos: Counter[int] = Counter()
        successes: Counter[str] = Counter()
        for number in range(share):
            if self._stop:
                break
            self._since[thread] = time.monotonic()
            with self._lock:
                fd = rng.choice(self._fds) if rng.random() < 0.97 else rng.choice(NO_FDS)
            request = source.request(self._kinds.get(fd, ""))
            argument = source.argument(request)
            self._log.before(thread, number, fd, request, argument, self._data(thread, argument))
            try:
                result = self._call(thread, rng, fd, request, argument)
            except BaseException:
                self._finding(thread, number, traceback.format_exc())
                continue
            if type(result) is not int or result < -4095:
                self._finding(thread, number, f"the result is {result!r}")
                continue
            self._log.after(thread, number, result)
            errnos[max(-result, 0)] += 1
            if result >= 0:
                row = any_row(request)
                successes[row.name if row is not None else hex(request)] += 1
                if result > 2 and request in FRESH_FDS:
                    self._kinds[result] = FRESH_FDS[request]
                    self._fds.append(result)
            if rng.random() < 0.05 or len(self._fds) > MOST_FDS:
                self._other_call(rng)
        with self._lock:
            self.outcome.errnos.update(errnos)
            self.outcome.successes.update(successes)

    def _finding(self, thread: int, number: int, words: str) -> None:
        if len(self.outcome.findings) < 100:
            self.outcome.findings.append("\n".join([words, *self._log.last(thread, 4)]))

    def _data(self, thread: int, argument: int) -> bytes:
        """What a pointer into the thread's scratch memory points to."""
        left = self._memory.scratch[thread] + SCRATCH - argument
        return ctypes.string_at(argument, min(left, 448)) if 0 < left <= SCRATCH else b""

    def _call(self, thread: int, rng: random.Random, fd: int, request: int, argument: int) -> int:
        if request != ioctls.KVM_RUN:
            return self._host.ioctl(fd, request, argument)
        page = self._run_page(fd)
        if page is None:
            return self._host.ioctl(fd, request, argument)
        page[1] = rng.random() < 0.5
        self._inside[thread] = (time.monotonic() + IN_GUEST, page)
        try:
            return self._host.ioctl(fd, request, argument)
        finally:
            self._inside[thread] = None

    def _run_page(self, fd: int) -> mmap.mmap | None:
        """A vCPU's kvm_run. Under the lock: were another file behind the fd meanwhile, touching its mapping could be SIGBUS."""
        with self._lock:
            try:
                self._host.runner(fd)
                return self._host.mmap(fd, 8192)
            except OSError:
                return None

    def _other_call(self, rng: random.Random) -> None:
        """fallocate, mmap, or close one of the fds."""
        kind = rng.random()
        with self._lock, contextlib.suppress(OSError):
            fd = rng.choice(self._fds)
            if len(self._fds) > MOST_FDS or kind < 0.1:
                if len(self._fds) > 2:
                    self._host.close(self._fds.pop(rng.randrange(2, len(self._fds))))
            elif kind < 0.7:
                numbers = [rng.choice((0, 1, 2, 3, 4096, 8192, 65536, 1 << 40, 1 << 62, -1, -4096)) for _ in range(2)]
                self._host.fallocate(fd, rng.choice((0, 1, 1, 2, 3, 3, 16)), *numbers)
            else:
                with contextlib.suppress(ValueError, OverflowError):
                    self._host.mmap(fd, rng.choice((1, 4096, 8192, 12288, 1 << 20)), offset=rng.choice((0, 4096, 1 << 20))).close()


def rss_mib() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4 // 1024


def child(plan: Plan, path: str) -> int:
    """The process that `main` starts: fuzz, and print the summary as JSON."""
    faulthandler.enable()
    summary = Fuzzer(plan, Log(Path(path), plan.threads)).run()
    print(json.dumps(summary), flush=True)
    sys.stdout.flush()
    os._exit(1 if summary["findings"] else 0)  # a hung thread would keep the interpreter
