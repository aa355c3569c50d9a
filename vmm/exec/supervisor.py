"""`sevmm exec`: one program, one modelled machine, and what both need of us.

The order of a life: the filter and the program (launch.py), the threads that answer (pool.py), waiting until the program
and all it started have ended, giving everything back, and ending as the program did.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import resource
import sys
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

from kvmapi.model.caller import ProcessMemory
from kvmapi.model.files import File
from kvmapi.model.signals import WATCHER
from vmm.exec import filter as calls
from vmm.exec import launch
from vmm.exec.caller import Call, Process
from vmm.exec.dispatch import Dispatcher
from vmm.exec.files import FileTable
from vmm.exec.notify import Notification
from vmm.exec.options import CannotExec, ExecOptions
from vmm.exec.paths import Paths
from vmm.exec.pool import Pool
from vmm.exec.processes import Processes
from vmm.exec.refusals import CONTAINERS, NO_THREADS, files_refused, install_refused, memory_refused, news_refused, reach
from vmm.exec.tracing import cpuid
from vmm.exec.tracing.tracer import Tracer

if TYPE_CHECKING:
    from vmm.exec.fallthrough import Fallthrough
    from vmm.exec.log import Log, Pending

_GUARDED_PART = 4  # the last quarter of the fd table is where guarded fds stand
_LARGEST_TABLE = 4096
_MANY_FRESH = 4096
_GARBAGE = 10_000  # objects between two looks of the collector
_MANY_SAID = 256
_PR_SET_DUMPABLE = 4


class _Peek(ProcessMemory):
    """Short looks at any thread's memory, one object per thread of ours."""

    def __init__(self) -> None:
        super().__init__(0)

    def at(self, tid: int) -> _Peek:
        self._pid = tid
        return self


class _Local(threading.local):
    def __init__(self) -> None:
        self.memory = _Peek()


class Held:
    """One waiting call whose process is about to be stopped for a moment (ram.py)."""

    def __init__(self, supervisor: Supervisor, call: Call) -> None:
        self._supervisor = supervisor
        self._call = call
        self.tid = call.thread
        self.ip = call.ip

    @property
    def busy(self) -> set[int]:
        """Threads of the process that wait in other calls."""
        return self._supervisor.in_call(self._call.process.tgid) - {self.tid}

    def add_fd(self, fd: int) -> int:
        """Put a copy of our fd into the process's table; its number. Raises OSError."""
        return self._supervisor.listener.add_fd(self._call.id, fd, close_on_exec=True)

    def answer(self, result: int) -> bool:
        """End the call. False: its thread is gone."""
        return self._supervisor.listener.answer(self._call.id, result)


class Supervisor:
    """The state that all threads share."""

    def __init__(self, options: ExecOptions) -> None:
        self.options = options
        if number := files_refused():
            raise CannotExec(f"files in memory (memfd_create) cannot be made here: {os.strerror(number).lower()}; allow it: {CONTAINERS}")
        self._said: set[str] = set()
        self.platform = options.platform()
        self.log: Log | None = None
        if options.record is not None or options.verbose:
            from vmm.exec.log import Log

            self.log = Log(options, self.say)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        table = min(soft, _LARGEST_TABLE)
        high = table - table // _GUARDED_PART
        try:
            self.files = FileTable(high, self.platform.memlock, self.log.released if self.log is not None else None)
        except OSError as failure:
            raise news_refused(failure.errno or 0) from None
        self.files.say = self.say_once
        self.fallthrough = self._kernel() if options.fallthrough else None
        self.fresh: set[int] = set()  # threads whose new program image has not asked anything yet
        self._local = _Local()
        self._conversions = 0
        try:
            self.child = launch.Child(options.argv, calls.program(high))
        except launch.InstallError as failure:
            raise install_refused(failure.number) from failure
        except BlockingIOError:  # of fork(2)
            raise CannotExec(NO_THREADS) from None
        _close_to_others()
        self.listener = self.child.listener
        self.tracer = Tracer(partial(cpuid.seen, self.platform.host_cpuid, cpuid.native), self.child.ended, self._explain)
        self.processes = Processes(lambda tgid: Process(tgid, self.tracer))
        self._dispatch = Dispatcher(self, Paths(self.platform))
        self.pool = Pool(self.listener, self._dispatch, lambda: self.tracer.active)

    def _kernel(self) -> Fallthrough | None:
        from vmm.exec.fallthrough import Fallthrough

        try:
            return Fallthrough(self)
        except OSError as failure:
            self.say(f"--fallthrough: /dev/kvm cannot be opened ({os.strerror(failure.errno or 0).lower()}): all VMs run on the model")
            return None

    # ---- the life
    def run(self) -> int:
        """Until everybody has ended. The exit status. Raises CannotExec where the program's memory is out of reach."""
        if number := reach(self.child.pid):
            self.child.give_up()
            raise memory_refused(number)
        gc.freeze()  # the modules stay for good: the collector need not look at them again and again
        gc.set_threshold(_GARBAGE)
        try:
            self.tracer.start()
            self.processes.start()
            self.pool.start()
        except RuntimeError:
            self.child.give_up()
            raise CannotExec(NO_THREADS) from None
        failure = self.child.exec_failure()
        status = self.child.wait(self.tracer.reap, self._still_running, WATCHER.job_continued)
        self.pool.stop()
        self.files.close()
        if self.fallthrough is not None:
            self.fallthrough.close()
        for words in self.log.close() if self.log is not None else ():
            self.say(words)
        if self.options.verbose:
            self.say(f"{self.pool.answered} system calls were looked at; memory became guest RAM {self._conversions} times")
            if failure is None:
                self.say(f"{self.child.name} {launch.ending(status)}")
        if failure is not None:
            return self._not_started(failure)
        return launch.end_as(status)

    def _not_started(self, number: int) -> int:
        name = self.options.argv[0]
        found = launch.find(name)
        if found is None or (number == errno.ENOENT and not os.path.exists(found)):
            self.say(f"{name or repr(name)}: there is no such program")
            return launch.NOT_FOUND
        why = "its interpreter or loader is missing" if number == errno.ENOENT else os.strerror(number).lower()
        self.say(f"{found} cannot be executed: {why}")
        return launch.NOT_EXECUTABLE

    def _still_running(self) -> None:
        pids = launch.descendants()
        if pids:
            names = ", ".join(str(pid) for pid in pids[:8]) + (", ..." if len(pids) > 8 else "")
            self.say(f"{self.child.name} has ended; what it started still runs ({names}) and is served. Ctrl-C ends it")

    # ---- processes
    def peek(self, tid: int) -> ProcessMemory:
        """The memory of a thread that waits in a call, for a short look."""
        return self._local.memory.at(tid)

    def new_image(self, tid: int) -> None:
        """The process is about to become another program: its memory, as we know it, ends then."""
        self.fresh.add(self.processes.leaves(tid))
        if len(self.fresh) > _MANY_FRESH:
            self.fresh = {one for one in self.fresh if os.path.exists(f"/proc/{one}")}

    def image_starts(self, notification: Notification) -> None:
        """The first call of a new program image."""
        self.fresh.discard(notification.tid)
        self.processes.known(notification.tid)  # what the old image had is given back
        if not self.options.host_cpuid:
            self.tracer.follow(notification.tid, notification.ip)

    def in_call(self, tgid: int) -> set[int]:
        """Threads of a process that wait in calls now."""
        with contextlib.suppress(OSError):
            return {int(tid) for tid in os.listdir(f"/proc/{tgid}/task")} & set(self._dispatch.waiting.values())
        return set()

    def hold(self, call: Call) -> Held:
        """The call as ram.py needs it."""
        return Held(self, call)

    def ram_converted(self, failure: OSError | None) -> None:
        """Memory became guest RAM; `failure`: it cannot be shared."""
        self._conversions += 1
        if failure is not None:
            self.say_once(
                f"guest RAM cannot be shared with the program ({os.strerror(failure.errno or 0).lower()}): it is copied at every KVM_RUN,"
                " which is slower, and a running guest and the program do not see each other's writes"
            )

    # ---- who wants to hear of calls
    def begin(self, call: Call, file: File | Fallthrough, notification: Notification) -> Pending | None:
        """An ioctl begins; None when nobody wants to hear of it."""
        return None if self.log is None else self.log.begin(call, file, notification.a1, notification.a2)

    def end(self, pending: Pending, result: int | None, file: File | Fallthrough) -> None:
        """It is about to be answered; None: by the kernel."""
        if self.log is not None:
            self.log.end(pending, result, file)

    def conclude(self, call: Call, name: str, fields: dict[str, Any], result: int, file: File | None = None) -> None:
        """Tell of and answer a call that is no ioctl."""
        if self.log is not None:
            self.log.call(call, name, fields, result, file)
        self.listener.answer(call.id, result)

    # ---- what the user hears
    def say(self, text: str) -> None:
        """One line on stderr."""
        with contextlib.suppress(OSError, ValueError), launch.not_stopped_by_terminal():
            print(f"sevmm exec: {text}", file=sys.stderr, flush=True)

    def _explain(self, text: str) -> None:
        """Something that only whoever wonders has to know."""
        if self.options.verbose:
            self.say_once(text)

    def say_once(self, text: str) -> None:
        """The same, but never twice."""
        if text not in self._said and len(self._said) < _MANY_SAID:
            self._said.add(text)
            self.say(text)

    def internal_error(self) -> None:
        """A handler failed: the program gets EIO, and the user one line."""
        kind, failure, _ = sys.exc_info()
        self.say_once(f"internal error, answered EIO: {kind.__name__ if kind else ''}: {failure}")
        if os.environ.get("SEVMM_DEBUG"):
            traceback.print_exc()


def _close_to_others() -> None:
    """The program runs under our user, and what the model knows about guests is none of its business: it may not look into
    this process through /proc or ptrace. SEVMM_DEBUG leaves it open, for a debugger of our own.
    """
    from kvmapi.model.cpu.native import own_memory

    own_memory(os.getpid())  # the last chance to open that
    if not os.environ.get("SEVMM_DEBUG"):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def run(options: ExecOptions) -> int:
    """Run `options.argv` against the modelled machine; the exit status. Raises CannotExec."""
    return Supervisor(options).run()
