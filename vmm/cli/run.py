"""`sevmm run GUEST`: from options to a GuestRequest, and from its RunReport to text or JSON and an exit status.

The guest's console goes to stdout as it comes, the summary follows it. With --json stdout carries one object and the console is in it.
Messages about what went wrong go to stderr, one line each.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vmm.boot import MAX_SECRET
from vmm.cli import status
from vmm.cli.style import Style, is_terminal, visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from vmm.report import RunReport


class SecretError(Exception):
    """A file cannot be a guest's secret; one sentence without any of its contents."""


PROGRESS_FROM = 32 << 20
"""Bytes of a launch from which a progress bar is worth its line; less takes a fraction of a second."""


class LaunchProgress:
    """A progress bar on stderr for a large launch: only on a terminal, and gone when the launch is done or given up."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        if total < PROGRESS_FROM or not is_terminal(sys.stderr):
            return
        if self._bar is None:
            self._start(total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        if done >= total:
            self.finish()

    def _start(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("measuring and encrypting", total=total)
        self._bar.start()

    def finish(self) -> None:
        """Take the bar away. Safe to call twice, and without a bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LiveConsole:
    """Writes the guest's bytes to stdout as they come, and knows whether the last line is still open."""

    def __init__(self) -> None:
        self.safe = Style(sys.stdout).terminal
        self.open_line = False
        self.used = False

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        sys.stdout.buffer.write(visible(data) if self.safe else data)
        sys.stdout.buffer.flush()
        self.used = True
        self.open_line = data[-1:] != b"\n"

    def finish(self) -> None:
        """End an open line, so that what follows starts at the margin."""
        if self.open_line:
            self(b"\n")


def run(options: argparse.Namespace) -> int:
    """Run the guest; the exit status of the process."""
    from vmm.run import GuestRequest, run_guest

    console = None if options.json else LiveConsole()
    progress = LaunchProgress()
    try:
        secret = None if options.secret is None else read_secret(options.secret)
    except SecretError as refusal:
        print(f"sevmm: {_one_line(str(refusal))}", file=sys.stderr)
        return status.USAGE
    sys.stdout.flush()
    request = GuestRequest(
        guest=options.guest,
        type=options.type,
        on=options.on,
        dialect=options.dialect,
        memory=options.memory,
        vcpus=options.vcpus,
        policy=options.policy,
        timeout=options.timeout,
        arguments=options.arguments,
        console=console,
        secret=secret,
        save_launch=options.save_launch,
        progress=progress,
    )
    try:
        report = run_guest(request)
    finally:
        if secret is not None:
            secret[:] = bytes(len(secret))
        progress.finish()
        if console is not None:
            console.finish()
    if console is None:
        print(report.dumps())
    elif report.rung is not None:
        from vmm.cli import summary

        summary.show(report, sys.stdout, gap=console.used)
    sys.stdout.flush()
    _messages(report)
    return report.exit_status


def read_secret(path: str) -> bytearray:
    """The bytes of a file, or of stdin for `-`. Raises `SecretError`."""
    room, size = bytearray(MAX_SECRET + 1), 0
    try:
        with open(0 if path == "-" else path, "rb", buffering=0, closefd=path != "-") as file:
            while size <= MAX_SECRET:
                got = file.readinto(memoryview(room)[size:])
                if not got:
                    break
                size += got
    except (OSError, ValueError) as failure:
        why = getattr(failure, "strerror", None) or str(failure)
        raise SecretError(f"the secret {path} cannot be read: {why.lower()}") from failure
    secret = room[:size]
    room[:] = bytes(len(room))
    if not 1 <= size <= MAX_SECRET:
        secret[:] = bytes(size)
        what = "is empty" if not size else f"has more than {MAX_SECRET} bytes"
        raise SecretError(f"the secret {path} {what}: one page holds 1 to {MAX_SECRET} bytes")
    return secret


def _messages(report: RunReport) -> None:
    """What a person should know besides the report, on stderr."""
    for note in report.notes:
        print(f"sevmm: note: {_one_line(note)}", file=sys.stderr)
    if not report.message:
        return
    text = _one_line(report.message)
    if report.remedy:
        text = f"{text.rstrip('.')}; {_one_line(report.remedy)}"
    print(f"sevmm: {report.guest}: {text}" if report.guest not in text else f"sevmm: {text}", file=sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.split())
