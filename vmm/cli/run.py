"""`sevmm run GUEST`: from options to a GuestRequest, and from its RunReport to text or JSON and an exit status.

The guest's console goes to stdout as it comes, the summary follows it. With --json stdout carries one object and the console is in it.
Messages about what went wrong go to stderr, one line each.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vmm.cli.style import Style, visible

if TYPE_CHECKING:
    from vmm.report import RunReport


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
    )
    try:
        report = run_guest(request)
    finally:
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
