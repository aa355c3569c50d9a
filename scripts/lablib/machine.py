"""QEMU, and the channels that make a command inside the lab look like a command outside.

1. Four socket pairs become four virtio serial ports: stdin, stdout, stderr, and the control channel that streams.c describes. The kernel's
   own messages go to a file; they are shown when the machine fails, and only then.
2. Threads carry the streams; the calling thread reads the control channel, which says when the job starts and with what it ended.
3. The job's words are all out when its status arrives (the guest writes a port synchronously), so QEMU is then killed: nothing in the
   guest is worth a shutdown.

QEMU gets a session of its own, so a terminal's Ctrl-C reaches this process only: the first goes on to the job, the second ends the machine.
The kernel kills QEMU when this process dies of whatever (setpriv --pdeathsig): none is left behind.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lablib import initrd
from lablib.words import Failure, say

PORTS = ("in", "out", "err", "ctl")
BOOT_LIMIT = 90.0
"""Seconds until the job must have started; it takes less than 3 on an idle machine."""

TIMED_OUT = 124
ESCAPE = b"\x1d"
"""Ctrl-] ends the machine when the job has the terminal."""

CPU = "EPYC,+svm,+npt"


@dataclass(frozen=True)
class Machine:
    """Kernel, first process, and size."""

    kernel: Path
    init: Path
    cpus: int = 2
    memory: str = "4G"

    def command(self, archive: Path, console: Path, fds: dict[str, int]) -> list[str]:
        """QEMU's command line; `fds` are our ends' peers, by port."""
        words = [
            "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", str(self.cpus),
            "-m", self.memory, "-machine", "q35", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{console}",
            "-kernel", str(self.kernel), "-initrd", str(archive), "-append", "console=ttyS0 quiet panic=-1",
            "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-serial-pci",
        ]  # fmt: skip
        for number, name in enumerate(PORTS, start=1):
            words += ["-chardev", f"socket,id={name},fd={fds[name]}", "-device", f"virtserialport,chardev={name},nr={number},name={name}"]
        return words


@dataclass
class Streams:
    """Where the job's streams come from and go to; `stdin` None is an empty one.

    `out` and `err` take bytes as they come; when one answers False, its reader has gone, and the job is told so as by a pipe (SIGPIPE).
    """

    stdin: int | None
    out: Callable[[bytes], object]
    err: Callable[[bytes], object]


def own_streams(with_stdin: bool) -> Streams:
    """This process's own."""
    return Streams(0 if with_stdin else None, lambda data: write_all(1, data), lambda data: write_all(2, data))


def write_all(fd: int, data: bytes) -> bool:
    """Write everything; False when the reader has gone."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        return False
    return True


def run(machine: Machine, job: initrd.Job, streams: Streams, timeout: float | None = None) -> int:
    """Boot, run `job`, end the machine. Gives the job's exit status, or 124 when `timeout` seconds have passed since its start.

    Raises `Failure`, with what kernel and QEMU said last, when there is no status to give.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sevmm-lab-")))
        archive, console, complaints = folder / "initrd", folder / "console", folder / "qemu"
        archive.write_bytes(initrd.archive(machine.init, job))
        ours: dict[str, socket.socket] = {}
        theirs: dict[str, socket.socket] = {}
        for name in PORTS:
            ours[name], theirs[name] = socket.socketpair()
            stack.callback(ours[name].close)
            stack.callback(theirs[name].close)
        fds = {name: end.fileno() for name, end in theirs.items()}
        with complaints.open("wb") as file:
            try:
                qemu = subprocess.Popen(
                    machine.command(archive, console, fds), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    pass_fds=tuple(fds.values()), start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise Failure(f"QEMU cannot be run: {error}; get it: scripts/lab setup --install") from error
        stack.callback(_kill, qemu)
        for end in theirs.values():
            end.close()
        session = _Session(qemu, ours, streams, raw=job.tty is not None)
        try:
            return session.serve(timeout)
        except _Gone:
            raise Failure(f"the lab's machine ended before the job did\n{_evidence(console, complaints)}") from None
        except _NotUp as words:
            raise Failure(f"the lab's machine did not come up: {words}\n{_evidence(console, complaints)}") from None


class _Gone(Exception):
    """QEMU has ended, or closed the control channel."""


class _NotUp(Exception):
    """The guest says that it cannot, or says nothing."""


class _Session:
    """One run's streams and control channel."""

    def __init__(self, qemu: subprocess.Popen[bytes], ends: dict[str, socket.socket], streams: Streams, raw: bool) -> None:
        self.qemu, self.ends, self.streams, self.raw = qemu, ends, streams, raw
        self.interrupts = 0
        self.sending = threading.Lock()

    def tell(self, line: str) -> None:
        """A line on the control channel; a machine that has gone cannot hear it."""
        with self.sending:
            try:
                self.ends["ctl"].sendall(line.encode() + b"\n")
            except OSError:
                pass

    def serve(self, timeout: float | None) -> int:
        readers = [
            threading.Thread(target=self._pump_out, args=(self.ends["out"], self.streams.out), daemon=True),
            threading.Thread(target=self._pump_out, args=(self.ends["err"], self.streams.err), daemon=True),
        ]
        for reader in readers:
            reader.start()
        self.tell("go")
        threading.Thread(target=self._pump_in, daemon=True).start()
        with _signals(self), _terminal(self if self.raw else None):
            status = self._control(timeout)
            _kill(self.qemu)
            for reader in readers:
                reader.join()
        return status

    def _control(self, timeout: float | None) -> int:
        """Follow the control channel until the job has ended or its time is up."""
        deadline: float | None = time.monotonic() + BOOT_LIMIT
        up = False
        text = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.ends["ctl"], selectors.EVENT_READ)
            while True:
                left = None if deadline is None else deadline - time.monotonic()
                if self.interrupts > 1:
                    return 130
                if left is not None and left <= 0:
                    if not up:
                        raise _NotUp(f"nothing heard of it in {BOOT_LIMIT:.0f} s")
                    say(f"time is up after {timeout:g} s")
                    return TIMED_OUT
                if not selector.select(min(left, 0.5) if left is not None else 0.5):
                    continue
                try:
                    data = self.ends["ctl"].recv(4096)
                except ConnectionError:
                    raise _Gone from None
                if not data:
                    raise _Gone
                *lines, text = (text + data).split(b"\n")
                for line in lines:
                    word, _, rest = line.decode(errors="replace").partition(" ")
                    if word == "exit":
                        return int(rest)
                    if word == "fail":
                        raise _NotUp(rest)
                    if word == "up":
                        up = True
                        deadline = None if timeout is None else time.monotonic() + timeout

    def _pump_out(self, end: socket.socket, take: Callable[[bytes], object]) -> None:
        while True:
            try:
                data = end.recv(65536)
            except OSError:
                return
            if not data:
                return
            if take(data) is False:
                self.tell(f"signal {int(signal.SIGPIPE)}")

    def _pump_in(self) -> None:
        sent = 0
        while self.streams.stdin is not None:
            try:
                data = os.read(self.streams.stdin, 65536)
                if not data:
                    break
                if self.raw and ESCAPE in data:
                    self.interrupts = 2
                    return
                self.ends["in"].sendall(data)
            except OSError:
                break
            sent += len(data)
        self.tell(f"eof {sent}")

    def interrupt(self) -> None:
        """Ctrl-C: to the job first, then the end."""
        self.interrupts += 1
        if self.interrupts == 1:
            say("interrupting the command; again to end the machine")
            self.tell("signal 2")


@contextmanager
def _signals(session: _Session) -> Iterator[None]:
    """Ctrl-C goes to the session while it lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: session.interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _terminal(session: _Session | None) -> Iterator[None]:
    """The terminal in raw mode, its size carried on; nothing without a session or a terminal."""
    if session is None or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)

    def resized(*_: object) -> None:
        session.tell("size {1} {0}".format(*shutil.get_terminal_size()))

    changes = signal.signal(signal.SIGWINCH, resized)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, changes)


def _kill(qemu: subprocess.Popen[bytes]) -> None:
    qemu.kill()
    qemu.wait()


def _evidence(console: Path, complaints: Path) -> str:
    """The last words of the kernel and of QEMU, without QEMU's warnings about what TCG lacks."""
    lines: list[str] = []
    for path, most in ((complaints, 6), (console, 25)):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        kept = [line.rstrip() for line in text.splitlines() if line.strip() and "TCG doesn't support" not in line]
        lines += [f"  {line}" for line in kept[-most:]]
    return "\n".join(lines) or "  neither the kernel nor QEMU said anything"


def checked_environment(tree: Path, interpreter: Path) -> dict[str, str]:
    """The job's environment: ours, with the project's interpreter first in PATH and temporary files in the guest's memory."""
    hidden = ("/dev/", "/proc/", "/run/", "/sys/")
    for path in (tree, interpreter):
        if f"{path}/".startswith(hidden):
            raise Failure(f"{path} cannot be seen in the lab, which has its own {', '.join(hidden)}: use a copy elsewhere")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "DBUS_", "XDG_RUNTIME", "DISPLAY"))}
    environment["PATH"] = os.pathsep.join([str(interpreter.parent), environment.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")])
    environment |= {"TMPDIR": "/run/tmp", "SEVMM_IN_LAB": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if sys.stdout.isatty():
        environment |= {"FORCE_COLOR": "1", "COLUMNS": str(shutil.get_terminal_size().columns)}
    return environment
