"""A failed test in words: what was asserted, the values of the names in it, and where.

`assert` needs no pytest to be useful: the statement is found by the traceback's line in the source, and the names it uses are looked up in
the frame. Nothing is evaluated again, so explaining has no side effects. Values are cut; long byte strings never appear whole.
"""

from __future__ import annotations

import ast
import linecache
import os
import sysconfig
import traceback
from pathlib import Path
from types import FrameType, TracebackType

from kvmapi.errors import KvmApiError
from vmm.selftests.case import Skip
from vmm.selftests.checks import Failure

_HERE = Path(__file__).parent
_FOREIGN = (
    *(_HERE.parents[1] / name for name in ("vmm", "kvmapi", "guest")),
    *map(Path, {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}),
)
_LONGEST = 100
_MOST_NAMES = 8


def explain(failure: BaseException) -> str:
    """A sentence or a few lines; with the whole traceback for what is a bug of the test or of the VMM rather than a finding."""
    where = _place(failure.__traceback__)
    if isinstance(failure, Failure):
        return f"{failure} ({where})"
    if isinstance(failure, AssertionError):
        return f"{_assertion(failure)} ({where})"
    if isinstance(failure, OSError | KvmApiError | Skip):
        return f"{type(failure).__name__}: {failure} ({where})"
    return "".join(traceback.format_exception(failure)).rstrip()


def _frames(trace: TracebackType | None) -> list[TracebackType]:
    found = []
    while trace is not None:
        found.append(trace)
        trace = trace.tb_next
    return found


def _place(trace: TracebackType | None) -> str:
    """`suite.py:line`: the innermost frame that is a test's or its helper's, not this framework's, a library's or Python's."""
    own = [frame for frame in _frames(trace) if _is_a_tests(frame.tb_frame.f_code.co_filename)]
    return f"{os.path.basename(own[-1].tb_frame.f_code.co_filename)}:{own[-1].tb_lineno}" if own else "not in a test"


def _is_a_tests(file: str) -> bool:
    path = Path(file)
    if _HERE in path.parents:
        return path.parent != _HERE
    return not any(folder in path.parents for folder in _FOREIGN)


def _assertion(failure: AssertionError) -> str:
    frames = _frames(failure.__traceback__)
    said = str(failure)
    if not frames:
        return said or "assertion failed"
    last = frames[-1]
    statement = _statement(last.tb_frame.f_code.co_filename, last.tb_lineno)
    if statement is None:
        return said or "assertion failed"
    text, names = statement
    values = _values(last.tb_frame, names)
    parts = [f"{said}: {text}" if said else text, *([f"where {values}"] if values else [])]
    return ", ".join(parts)


def _statement(file: str, line: int) -> tuple[str, list[str]] | None:
    """The assert statement at a line: its condition as text and the names in it; None where there is none."""
    source = "".join(linecache.getlines(file))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    found = [
        node for node in ast.walk(tree) if isinstance(node, ast.Assert) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]  # fmt: skip
    if not found:
        return None
    test = found[-1].test
    names = dict.fromkeys(node.id for node in ast.walk(test) if isinstance(node, ast.Name))
    return f"assert {ast.unparse(test)}", list(names)


def _values(frame: FrameType, names: list[str]) -> str:
    shown = [f"{name} = {show(frame.f_locals[name])}" for name in names if name in frame.f_locals and not callable(frame.f_locals[name])]
    return ", ".join(shown[:_MOST_NAMES])


def show(value: object) -> str:
    """A value, cut to a line; numbers in hex where that says more; of bytes the first ones."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:#x}" if abs(value) > 9 else str(value)
    if isinstance(value, bytes | bytearray) and len(value) > 16:
        return f"<{len(value)} bytes, {bytes(value[:8]).hex(' ')}...>"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
