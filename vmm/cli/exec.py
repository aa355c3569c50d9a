"""`sevmm exec`: hand the program to the supervisor, and its exit status to the shell.

stdin, stdout and stderr are the program's; what this side has to say goes to stderr, a line that begins with `sevmm exec:`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vmm.cli import status
from vmm.exec.options import RECORD_LIMIT, CannotExec, CannotRecord, ExecOptions


def run(options: argparse.Namespace) -> int:
    """Run the program to its end."""
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words:
        return _refuse("which program? sevmm exec -- PROGRAM [ARG...]", status.USAGE)
    if options.record_limit is not None and options.record is None:
        return _refuse("--record-limit goes with --record FILE", status.USAGE)
    if options.record == "-":
        return _refuse("--record needs a file, stdout is the program's; /dev/stderr will do", status.USAGE)
    asked = ExecOptions(
        argv=tuple(words),
        machine=options.platform,
        dialect=options.dialect,
        fallthrough=options.fallthrough,
        host_cpuid=options.cpuid == "host",
        record=None if options.record is None else Path(options.record),
        record_limit=options.record_limit or RECORD_LIMIT,
        verbose=options.verbose,
    )
    from vmm.exec.supervisor import run as supervise

    try:
        return supervise(asked)
    except CannotExec as reason:
        return _refuse(f"this host cannot: {reason}", status.UNSUPPORTED)
    except CannotRecord as reason:
        return _refuse(str(reason), status.USAGE)


def _refuse(text: str, code: int) -> int:
    print(f"sevmm exec: {text}", file=sys.stderr)
    return code
