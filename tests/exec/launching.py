"""Starting programs natively or under `sevmm exec`, as a user does, and seeing that nothing is left of them.

Every process that a test starts carries a mark in its environment, which all its descendants inherit: `survivors` finds
them, whatever they did with sessions, parents and fds.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TREE = Path(__file__).parents[2]
MARK = "SEVMM_TEST_MARK"
LIMIT = 30.0
"""Seconds that a program may take; it fails the test then, and is killed with all it started."""


@dataclass(frozen=True)
class Under:
    """How a program is started: `exec` or `native`, with options of the verb and words before all."""

    name: str
    options: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """The words that start `argv`."""
        words = [str(word) for word in argv]
        verb = [] if self.name == "native" else [sys.executable, "-m", "vmm.cli", "exec", *self.options, "--"]
        return [*self.before, *verb, *words]

    def environment(self) -> dict[str, str]:
        """With the mark; modules are found whatever the directory is."""
        return {**os.environ, "PYTHONPATH": str(TREE), MARK: self.mark}

    def start(self, argv: Sequence[str | Path], **words: object) -> subprocess.Popen[str]:
        """A process with pipes, which the caller ends."""
        base: dict[str, object] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(argv), env=self.environment(), **{**base, **words})  # type: ignore[call-overload, no-any-return]

    def run(self, *argv: str | Path, limit: float = LIMIT, text: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end with `text` on stdin; fails when it takes too long, or leaves a process behind."""
        process = self.start(argv, stdin=subprocess.PIPE, cwd=cwd)
        try:
            out, err = process.communicate(text, timeout=limit)
        except subprocess.TimeoutExpired:
            self.kill_all()
            out, err = process.communicate()
            raise AssertionError(f"{argv} took more than {limit} s; so far: {out[-2000:]} {err[-2000:]}") from None
        self.nothing_left()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def survivors(self) -> dict[int, str]:
        """Processes with our mark and their names; those that have ended but were not waited for do not count."""
        found = {}
        wanted = f"{MARK}={self.mark}".encode()
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found[int(name)] = Path(f"/proc/{name}/comm").read_text().strip()
            except OSError:
                continue
        return found

    def nothing_left(self, limit: float = 3.0) -> None:
        """Fails when a process of ours is still there after `limit` seconds; kills it."""
        if not soon(lambda: not self.survivors(), limit):
            left = self.survivors()
            self.kill_all()
            raise AssertionError(f"left behind: {left}")

    def kill_all(self) -> None:
        """By pid, until none is left."""
        for _ in range(20):
            left = self.survivors()
            for pid in left:
                with_no_error(pid)
            if not left:
                return


def with_no_error(pid: int) -> None:
    """SIGKILL to a process that may be gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


def soon(condition: Callable[[], bool], limit: float = 10.0) -> bool:
    """Does it come true within `limit` seconds?"""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def read_line(process: subprocess.Popen[str], limit: float = 15.0) -> str:
    """The next line of its output; fails when none comes."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], limit)
    assert readable, "no output"
    return process.stdout.readline()


class Terminal:
    """The far end of a pty on which a program runs: what a person sees and types."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.fd = fd
        self.process = process
        self.seen = ""

    def type(self, text: str) -> None:
        """Keys; "\\x03" is Ctrl-C, "\\x1a" Ctrl-Z."""
        os.write(self.fd, text.encode())

    def until(self, words: str, limit: float = 15.0) -> str:
        """Everything up to and with `words`, which are taken out of what is seen."""
        end = time.monotonic() + limit
        while words not in self.seen:
            readable, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            try:
                data = os.read(self.fd, 4096) if readable else b""
            except OSError:  # EIO: nobody has the other end open
                data = b""
            assert data, f"{words!r} did not come; seen: {self.seen!r}"
            self.seen += data.decode(errors="replace")
        before, _, self.seen = self.seen.partition(words)
        return before + words

    def ended(self, limit: float = 15.0) -> int:
        """Its exit status, -N for signal N."""
        return self.process.wait(limit)


@contextmanager
def terminal(under: Under, argv: Sequence[str | Path]) -> Iterator[Terminal]:
    """Run `argv` in a session of its own on a new pty."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        under.command(argv), env=under.environment(), stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=lambda: _take_terminal(theirs),  # noqa: PLW1509  # no other thread of ours holds a lock that it needs
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        under.kill_all()
        process.wait()
        os.close(ours)


def _take_terminal(fd: int) -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
