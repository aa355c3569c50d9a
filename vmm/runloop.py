"""The run loop: one thread per vCPU, and one that waits for them.

The waiting thread is the caller's, so Ctrl-C works and the time limit needs no help from the guest: at the deadline every vCPU is kicked
until its thread has ended, whether the guest spins through exits, computes, or is stuck inside KVM_RUN (`vmm.kick`).

The hot path is `_VcpuThread._spin`. A port access costs: one call into KVM, one look at `exit_reason`, one comparison of the whole
64-bit description of the access (direction, size, port, count) with the one before (a dictionary has the others), one call of what the
device bound for it (`PortBus.bind`). No exit object is made, nothing is counted by hand. Measured on a KVM whose exit takes 7.3 us in
C, 1.0 us of Python comes on top of fcntl.ioctl's 0.8: after a VM exit the caches are cold, and what counts is how little memory is
touched, not how the loop is written.

Conversions of guests with private memory are the other exits that come in numbers: their numbers go to the dispatcher as they are
(`_convert`). Everything else takes the slow path: the typed exit, the handlers of whoever wants to see exits, then the dispatcher
(`vmm.dispatch`).

Invariants
- a vCPU is run by one thread, from start to end; its kvm_run is written by that thread only, except `immediate_exit`;
- the first reason to stop is the one reported; later ones are dropped;
- when `run` returns (or raises, on Ctrl-C), every thread has ended and every view of kvm_run has been released.
"""

from __future__ import annotations

import errno as errnos
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from operator import length_hint
from typing import TYPE_CHECKING

from kvmapi.words import EHWPOISON
from vmm import kick
from vmm.devices import BOUND_CALLS, GuestStop, PortBus
from vmm.dispatch import Dispatcher, Stop

if TYPE_CHECKING:
    from kvmapi.exit_types import Exit
    from kvmapi.vcpu import Vcpu

KVM_RUN = 0xAE80
_EXIT_IO, _EXIT_HYPERCALL, _EXIT_MEMORY_FAULT = 2, 3, 39
_PRIVATE = 1 << 3  # KVM_MEMORY_EXIT_FLAG_PRIVATE
_EFAULT = -errnos.EFAULT
_U64 = (1 << 64) - 1
_KICK_AGAIN = 0.01
_CACHED_ACCESSES = 256
"""Kinds of port access remembered per vCPU: a guest chooses them, so there must be an end to it."""

Handler = Callable[["Vcpu", "Exit"], bool]
"""Sees an exit before the dispatcher; True = it has dealt with it. A run with handlers makes an exit object for every port access."""

_BASE_VIEWS = 3  # bytes, 32-bit words, 64-bit words


@dataclass
class Outcome:
    """How a run ended: `result` is pass, fail, timeout or error; `message` one sentence for timeout and error; `elapsed_s` in seconds."""

    result: str = "error"
    exit_code: int | None = None
    message: str = ""
    exits: dict[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0


class RunLoop:
    """Runs the vCPUs of one VM to their end. Without a dispatcher any exit but a port access ends the run."""

    def __init__(
        self, vcpus: Sequence[Vcpu], ports: PortBus, dispatcher: Dispatcher | None = None, handlers: Sequence[Handler] = ()
    ) -> None:
        self.ports = ports
        self.dispatcher = dispatcher
        self.handlers = tuple(handlers)
        self._threads = [_VcpuThread(self, vcpu) for vcpu in vcpus]
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._stop: Outcome | None = None
        self._failure: BaseException | None = None
        self._left = len(self._threads)

    def run(self, timeout: float | None = None) -> Outcome:
        """Run until the guest ends, fails, or `timeout` seconds have passed. Raises what a device's hook raised (a console sink, say)."""
        kick.kick_signal()
        began = time.perf_counter()
        try:
            # An interrupt inside start() would leave a thread that nobody joins: it waits until all have started.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for thread in self._threads:
                    thread.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            if not self._ended.wait(timeout):
                self.stop(Outcome("timeout", message=f"the guest did not end within {timeout:g} s"))
        except RuntimeError as failure:  # threading's way to say that there are too many threads
            self.stop(Outcome("error", message=f"a vCPU's thread cannot be started: {failure}"))
        finally:
            self.stop(Outcome("error", message="the run was interrupted"))
            self._join()
        if self._failure is not None:
            raise self._failure
        outcome = self._stop or Outcome()
        outcome.elapsed_s = time.perf_counter() - began
        counts: Counter[str] = Counter()
        for thread in self._threads:
            counts.update(thread.exits())
        outcome.exits = dict(counts)
        return outcome

    def stop(self, outcome: Outcome) -> None:
        """End the run with `outcome`, unless it ended before; may be called from any thread and does not wait."""
        with self._lock:
            if self._stop is None:
                self._stop = outcome
        self._ended.set()

    @property
    def stopping(self) -> bool:
        """Whether the run has ended or is about to."""
        return self._ended.is_set()

    def _fail(self, failure: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = failure
        self.stop(Outcome("error", message=str(failure)))

    def _halted(self) -> None:
        """One vCPU halted for good: without an interrupt controller nothing wakes it."""
        with self._lock:
            self._left -= 1
            none_left = self._left == 0
        if none_left:
            self.stop(Outcome("error", message="the guest halted without an exit code"))

    def _join(self) -> None:
        """Kick every thread until it has ended. A kick may come just before KVM_RUN sleeps, so it is repeated.

        A second Ctrl-C waits until this is done: nobody may take the VM apart while a vCPU is in it.
        """
        interrupted: KeyboardInterrupt | None = None
        while running := [thread for thread in self._threads if thread.alive()]:
            try:
                for thread in running:
                    thread.leave()
                running[0].join(_KICK_AGAIN)
            except KeyboardInterrupt as again:
                interrupted = again
        if interrupted is not None:
            raise interrupted


class _VcpuThread:
    """The thread of one vCPU and what it counts."""

    def __init__(self, group: RunLoop, vcpu: Vcpu) -> None:
        self.group = group
        self.vcpu = vcpu
        self.counts: Counter[str] = Counter()
        self.ios = 0
        self.direct = -1 if group.handlers else _EXIT_IO  # the exit reason that is answered without an exit object
        self.converts = None if group.handlers else group.dispatcher  # who answers those that ask for conversions
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.id}", daemon=True)

    def start(self) -> None:
        self.vcpu.kvm_run.immediate_exit = 0
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def leave(self) -> None:
        """Make KVM_RUN return now and not be entered again."""
        self.vcpu.kvm_run.immediate_exit = 1
        if self._thread.native_id is not None and self._thread.is_alive():
            kick.kick(self._thread.native_id)

    def exits(self) -> dict[str, int]:
        """Exits by name."""
        counts = dict(self.counts)
        if self.ios:
            counts["IO"] = counts.get("IO", 0) + self.ios
        return counts

    def _main(self) -> None:
        kick.accept_kicks()
        memory = memoryview(self.vcpu.run_map)
        views = [memory]
        try:
            self._loop(memory, views)
        except GuestStop as stop:
            self.group.stop(Outcome("fail" if stop.code else "pass", stop.code))
        except Stop as stop:
            self.group.stop(Outcome("error", message=stop.sentence))
        except BaseException as failure:  # the waiting thread raises it: it is not the guest's doing
            self.group._fail(failure)
        finally:
            for view in reversed(views):
                view.release()

    def _loop(self, memory: memoryview, views: list[memoryview]) -> None:
        """Run the vCPU until it halts or must stop: the hot loop, interrupted by everything it does not answer itself."""
        run = runner(self.vcpu)
        reason, words = memory.cast("I"), memory.cast("Q")
        views += [reason, words]
        accesses: dict[int, Callable[[], None]] = {}
        while True:
            budget = repeat(None, BOUND_CALLS)
            try:
                errno = self._spin(run, budget, reason, words, accesses)
            finally:
                self.ios += BOUND_CALLS - length_hint(budget)
            if errno is None:  # the budget is used up: what is bound must be bound anew
                self._forget(accesses, views)
                continue
            if errno == 0 and reason[2] == self.direct:
                self._bind(memory, words, views, accesses)()
                continue
            self.ios -= 1  # the last one was no port access
            if not self._slow(errno):
                return

    def _spin(
        self,
        run: Callable[[], int],
        budget: repeat[None],
        reason: memoryview,
        words: memoryview,
        accesses: dict[int, Callable[[], None]],
    ) -> int | None:
        """Answer known port accesses and conversions as long as nothing else comes; returns the errno of the last KVM_RUN, None when the
        budget is used up.

        Hot: see the module's story. The iterator counts the exits.
        """
        direct, last, access = self.direct, -1, _nothing
        for _ in budget:
            try:
                result = run()
            except OSError as failure:
                result = -(failure.errno or errnos.EIO)
            if result or reason[2] != direct:
                if self._convert(result, reason[2], words):
                    continue
                return -result if result < 0 else 0
            if words[4] != last:  # most accesses are like the one before
                last = words[4]
                access = accesses.get(last, _nothing)
                if access is _nothing:
                    return 0
            access()
        return None

    def _convert(self, result: int, exit_reason: int, words: memoryview) -> bool:
        """Answer an exit that asks for a conversion; False when it is another, or when somebody wants to see it first.

        struct kvm_run's hypercall: nr, args[6], ret; its memory_fault: flags, gpa, size (64-bit words from the fifth on).
        """
        dispatcher = self.converts
        if dispatcher is None:
            return False
        if exit_reason == _EXIT_HYPERCALL and result >= 0:
            self.ios -= 1  # it is counted by its name
            self.counts["HYPERCALL"] += 1
            words[11] = dispatcher.hypercall(self.vcpu.id, words[4], words[5], words[6], words[7]) & _U64
        elif exit_reason == _EXIT_MEMORY_FAULT and result == _EFAULT:
            self.ios -= 1
            self.counts["MEMORY_FAULT"] += 1
            dispatcher.memory_fault(self.vcpu.id, words[5], words[6], words[4] & _PRIVATE != 0)
        else:
            return False
        return True

    def _bind(
        self, memory: memoryview, words: memoryview, views: list[memoryview], accesses: dict[int, Callable[[], None]]
    ) -> Callable[[], None]:
        """Bind the port access now in kvm_run to its device and remember that; when too many are remembered, forget them all.

        struct kvm_exit_io: direction, size (u8), port (u16), count (u32), data_offset (u64). KVM on x86 has one data_offset for ever
        (KVM_PIO_PAGE_OFFSET), so an access with the same first word has its data in the same place.
        """
        if len(accesses) >= _CACHED_ACCESSES:
            self._forget(accesses, views)
        word, offset = words[4], words[5]
        direction, size, port, count = word & 0xFF, word >> 8 & 0xFF, word >> 16 & 0xFFFF, word >> 32
        data = memory[offset : offset + size * count]
        views.append(data)
        accesses[word] = access = self.group.ports.bind(port, size, count, data, direction == 1)
        return access

    @staticmethod
    def _forget(accesses: dict[int, Callable[[], None]], views: list[memoryview]) -> None:
        """Forget all bound accesses, and let go of their views."""
        accesses.clear()
        while len(views) > _BASE_VIEWS:
            views.pop().release()

    def _slow(self, errno: int) -> bool:
        """Everything but a plain port access; False when this vCPU is done."""
        if errno in (errnos.EINTR, errnos.EAGAIN):
            if self.group.stopping:
                return False
            self.vcpu.kvm_run.immediate_exit = 0
            return True
        if errno not in (0, errnos.EFAULT, EHWPOISON):
            raise Stop(f"KVM_RUN of vCPU {self.vcpu.id}: {errnos.errorcode.get(errno, errno)}, {os.strerror(errno).lower()}")
        exit = self.vcpu.exit(errno)
        self.counts[exit.name] += 1
        for handler in self.group.handlers:
            if handler(self.vcpu, exit):
                return True
        if self.group.dispatcher is None:
            raise Stop(f"vCPU {self.vcpu.id}: nothing here answers {exit!r}")
        goes_on = self.group.dispatcher.dispatch(self.vcpu, exit)
        if not goes_on:
            self.group._halted()
        return goes_on


def _nothing() -> None:
    """Stands for an access that is not bound; never called."""


def runner(vcpu: Vcpu) -> Callable[[], int]:
    """A call that runs `vcpu` once: returns 0 or more, returns -errno, or raises OSError. The host's own fast one where it has one."""
    fast = getattr(vcpu.host, "runner", None)
    if fast is not None:
        run: Callable[[], int] = fast(vcpu.fd)
        return run
    return partial(vcpu.host.ioctl, vcpu.fd, KVM_RUN, 0)
