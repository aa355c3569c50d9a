"""The command line: `sevmm VERB …`. One file per verb; this one holds what all share at the outermost edge.

Invariants:
- an error is one line on stderr that says what was wrong and, where known, what to do; a traceback appears only with SEVMM_DEBUG=1;
- stdout carries the answer and nothing else, so that `--json` can be piped;
- a verb's modules are imported when the verb runs: `sevmm run hello` does not pay for tables, and `sevmm guests` not for the VMM.

Exit status: the verb's own (for `run`: the guest's code, 4 this host cannot, 124 timeout), 2 usage, 70 the VMM failed, 130 Ctrl-C, 141 the
reader of stdout went away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vmm.cli import status

__all__ = ["main", "missing_package"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv[1:]`) and return its exit status. Never raises, never shows a traceback by itself.

    >>> main(["guests"])
    0
    """
    _stand_in_for_closed()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
    except SystemExit as stop:  # argparse: --help, --version, usage errors
        code = stop.code if isinstance(stop.code, int) else status.VMM_FAILED
        return _flushed(code)
    except KeyboardInterrupt:
        _say("interrupted")
        return status.INTERRUPTED
    except BrokenPipeError:
        return _reader_gone()
    except Exception as error:
        if os.environ.get("SEVMM_DEBUG"):
            raise
        _say(describe(error))
        return status.VMM_FAILED
    return code


def _stand_in_for_closed() -> None:
    """Started with stdout or stderr closed (`>&-`): Python has None there, and its print would turn to the other one."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # for the rest of the process


def _dispatch(argv: Sequence[str] | None) -> int:
    from vmm.cli.parser import build_parser

    parser = build_parser()
    options = parser.parse_args(argv)
    return int(options.verb(options))


def describe(error: BaseException) -> str:
    """One line for an error that nobody expected, with the way to its traceback."""
    if package := missing_package(error):
        return f"the Python package {package!r} is missing; get it: pip install {package}, or start with scripts/sevmm"
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{text or type(error).__name__} (SEVMM_DEBUG=1 shows where)"
    kind = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"internal error: {kind} (SEVMM_DEBUG=1 shows the traceback)"


def missing_package(error: BaseException) -> str:
    """The Python package that we depend on and that is not installed; "" for other errors."""
    name = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    return "" if name.split(".")[0] in ("vmm", "kvmapi", "guest") else name


def _flushed(code: int) -> int:
    """`code`, once what is buffered has reached the reader of stdout."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_gone()
    return code


def _reader_gone() -> int:
    """`sevmm guests | head -1`: end as quietly as a program killed by SIGPIPE; the interpreter must not flush into the pipe again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return status.BROKEN_PIPE


def _say(text: str) -> None:
    try:
        print(f"sevmm: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # stderr is closed: the exit status still tells
