"""Starting the program under the filter, and living beside it without being noticed.

The child installs the filter, hands the listener to us, and becomes the program: same terminal, same process group, same
environment, same fds. We keep out of its way: signals that the terminal sends reach it by themselves, signals sent to us
by somebody are passed on, and when it has ended we end as it did, by the same status or the same signal.

We are the subreaper of all it starts: processes that outlive their parents become our children, so `wait` ends exactly
when nobody is left who could ask us something. If we die, the program is killed: with nobody to answer, it could not even
open a file.
"""

from __future__ import annotations

import array  # noqa: F401  # socket.send_fds imports it when first used: under the filter that would wait for ourselves
import contextlib
import ctypes
import errno
import os
import resource
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence

from vmm.exec import notify

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as shells have it
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGWINCH)
_PASSED_ON = (
    *_FROM_TERMINAL, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO,
    signal.SIGURG, signal.SIGPWR, signal.SIGSTKFLT, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)  # fmt: skip
_FROM_KERNEL = 0x80  # si_code of what the terminal sends, and timers
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)
_LIMITS = {  # options of ulimit, and what leaves room for a few guests
    resource.RLIMIT_NOFILE: ("-n", 256),
    resource.RLIMIT_FSIZE: ("-f", 1 << 48),
    resource.RLIMIT_AS: ("-v", 16 << 30),
    resource.RLIMIT_DATA: ("-d", 4 << 30),
}
_FDS = 1 << 20
_PATIENCE = 2.0  # seconds until a user is told who is still running

_libc = ctypes.CDLL(None, use_errno=True)
_FAILED = struct.Struct("<BI")  # stage, errno
_INSTALL, _EXEC = 1, 2


class InstallError(Exception):
    """The filter could not be installed; `number` is the errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


def find(program: str) -> str | None:
    """Where the shell would find it."""
    return program if "/" in program else shutil.which(program)


class Child:
    """The program: `pid`, and the listener of its filter."""

    def __init__(self, argv: Sequence[str], filter_code: bytes) -> None:
        """Start `argv`. InstallError: the filter was refused. The exec itself is waited for by `wait_for_exec`, because the
        program's first system calls need answers.
        """
        self._held = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD, signal.SIGCONT})
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        ours, theirs = socket.socketpair()
        self.name = argv[0]
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            self._become(argv, filter_code, theirs)
        self._free_ourselves()
        theirs.close()
        self._channel = ours
        message, fds, _, _ = socket.recv_fds(ours, _FAILED.size, 1)
        if not fds:
            os.waitpid(self.pid, 0)
            raise InstallError(_FAILED.unpack(message)[1] if len(message) == _FAILED.size else errno.EIO)
        os.set_inheritable(fds[0], False)
        self.listener = notify.Listener(fds[0])

    @staticmethod
    def _free_ourselves() -> None:
        """What was meant for the program does not bind us: we have fds, files and address space for all that it and its children
        have, so as much as we may; and their ends are told to us.
        """
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, wait(2) would know nothing of them
        for what in _LIMITS:
            _, hard = resource.getrlimit(what)
            for limit in (max(hard, _FDS) if what == resource.RLIMIT_NOFILE else resource.RLIM_INFINITY, hard):
                with contextlib.suppress(OSError, ValueError):  # above the hard limit only root can go
                    resource.setrlimit(what, (limit, limit))
                    break

    def _become(self, argv: Sequence[str], filter_code: bytes, channel: socket.socket) -> None:
        """In the child. From the filter on nothing may be opened before somebody listens."""
        stage = _INSTALL
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for number in _PYTHON_IGNORES:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._held)
            path = find(argv[0])
            listener = notify.install(filter_code)
            socket.send_fds(channel, [b"\0"], [listener])
            os.close(listener)
            stage = _EXEC
            if path is None:
                raise FileNotFoundError(errno.ENOENT, "")
            os.execv(path, list(argv))
        except OSError as failure:
            channel.sendall(_FAILED.pack(stage, failure.errno or errno.EIO))
        except BaseException:
            channel.sendall(_FAILED.pack(stage, errno.EIO))
        finally:
            os._exit(NOT_FOUND)

    def exec_failure(self) -> int | None:
        """Once somebody answers the program's calls: None when the exec succeeded, else its errno."""
        data = self._channel.recv(_FAILED.size)
        self._channel.close()
        return _FAILED.unpack(data)[1] if len(data) == _FAILED.size else None

    def give_up(self) -> None:
        """Before anybody answers: the program is not to start."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def ended(self, pid: int, status: int) -> None:
        """Somebody below us has ended."""
        if pid == self.pid:
            self._status = status

    def wait(self, reap: Callable[[], bool], waiting: Callable[[], None], continued: Callable[[], None]) -> int:
        """Until the program and all it started have ended: the program's wait status. Signals go on to it. `reap` takes wait
        statuses, calls `ended`, and says whether anybody is left; `waiting` is called once when the program has ended but
        others have not, after two seconds; `continued` when we were stopped, as the terminal stops a whole job.
        """
        told = False
        watched = {*_PASSED_ON, signal.SIGCHLD, signal.SIGCONT}
        while True:
            left, status = reap(), self._status
            if not left:
                return status if status is not None else 0
            if status is None:
                came = signal.sigwaitinfo(watched)
            else:
                timed = signal.sigtimedwait(watched, _PATIENCE)
                if timed is None:
                    if not told:
                        waiting()
                    told = True
                    continue
                came = timed
            if came.si_signo == signal.SIGCHLD:
                continue
            if came.si_signo == signal.SIGCONT:
                continued()
                continue
            if status is not None:
                if came.si_signo != signal.SIGWINCH:
                    kill_descendants()
            elif not _reached_all(came):
                with contextlib.suppress(OSError):  # it has ended just now
                    os.kill(self.pid, came.si_signo)


@contextlib.contextmanager
def not_stopped_by_terminal() -> Iterator[None]:
    """Inside, this thread may write to the terminal although the program has put us into the background there (`stty tostop`): the
    kernel would stop us, and whoever waits for our answers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def limits() -> str:
    """The limits that bind us all the same, as options of the shell's `ulimit`; empty where there is room for guests."""
    found = []
    for what, (option, enough) in _LIMITS.items():
        soft, _ = resource.getrlimit(what)
        if 0 <= soft < enough:
            found.append(option)
    return ", ".join(found)


def _reached_all(came: signal.struct_siginfo) -> bool:
    """Has the program got this signal already? What the terminal sends goes to all of the job, but that it is gone is told to
    the leader of the session alone.
    """
    if came.si_code != _FROM_KERNEL or came.si_signo not in _FROM_TERMINAL:
        return False
    return came.si_signo != signal.SIGHUP or os.getsid(0) != os.getpid()


def descendants() -> list[int]:
    """Pids of all processes below us."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as stat:
                    parent = int(stat.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def kill_descendants() -> None:
    """Kill everything that the program started: it has ended itself, and whoever waits wants no more."""
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def ending(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        known = number in signal.Signals.__members__.values()
        return f"was killed by {signal.Signals(number).name if known else f'signal {number}'}"
    return f"ended with status {os.waitstatus_to_exitcode(status)}"


def end_as(status: int) -> int:
    """The exit status that equals a wait status; a death by signal is repeated, without a second core file."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        sys.stdout.flush()
        sys.stderr.flush()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        return 128 + number
    return os.waitstatus_to_exitcode(status)
