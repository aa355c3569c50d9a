"""KTAP (Documentation/dev-tools/ktap.rst), which kselftest, LAVA and KernelCI read: suites, in them tests, in them subtests.

    KTAP version 1
    1..1
      KTAP version 1
      # Subtest: sev_dbg
      1..2
      ok 1 decrypt[sev]
      ok 2 decrypt[sev-es] # SKIP this kernel's KVM has no VM type sev-es; ...
    ok 1 sev_dbg
    # Totals: pass:1 fail:0 xfail:0 xpass:0 skip:1 error:0

Why something failed, or ran where it ran, stands in diagnostic lines (`# ...`) before its result. A suite is printed when it is
complete, so a reader sees progress and every plan has its number. The totals count tests, not subtests. The description of a
result cannot hold a `#`, and a test that was killed by its time limit has the directive TIMEOUT.

Invariant: no text of a test can become a line of its own in the protocol: newlines start a new diagnostic line, `#` is taken out of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vmm.selftests.execute import Result
from vmm.selftests.subtests import FAIL, PASS, SKIP

_INDENT = "  "


def head(suites: int) -> Iterator[str]:
    """The first lines: version and plan."""
    yield "KTAP version 1"
    yield f"1..{suites}"


def suite(number: int, name: str, results: Sequence[Result]) -> Iterator[str]:
    """One suite with its tests, as top-level result `number`."""
    for line in _group(name, [(_name(result), result) for result in results]):
        yield _INDENT + line
    yield _line(number, name, overall(results), "every test was skipped" if results else "")


def totals(results: Sequence[Result]) -> str:
    """kselftest's last line."""
    count = {kind: sum(result.result == kind for result in results) for kind in (PASS, FAIL, SKIP)}
    return f"# Totals: pass:{count[PASS]} fail:{count[FAIL]} xfail:0 xpass:0 skip:{count[SKIP]} error:0"


def overall(results: Iterable[Result]) -> str:
    """The result of several: fail if one failed, skip if all were skipped (or there are none), else pass."""
    found = {result.result for result in results}
    return FAIL if FAIL in found else PASS if PASS in found else SKIP


def _group(name: str, tests: Sequence[tuple[str, Result]]) -> Iterator[str]:
    yield "KTAP version 1"
    yield f"# Subtest: {_plain(name)}"
    yield f"1..{len(tests)}"
    for number, (label, result) in enumerate(tests, 1):
        if result.parts:
            yield from (_INDENT + line for line in _parts(label, result))
        if result.result == FAIL:
            yield from _diagnostic(result.text)
        for note in result.notes:
            yield from _diagnostic(f"note: {note}")
        if result.rung:
            yield from _diagnostic(f"{result.rung}: {result.rung_reason}, {result.elapsed_s:.2f} s")
        line = _line(number, label, result.result, result.text)
        yield f"{line} # TIMEOUT {' '.join(result.text.split(chr(10))[0].split())}" if result.timed_out else line


def _parts(label: str, result: Result) -> Iterator[str]:
    yield "KTAP version 1"
    yield f"# Subtest: {_plain(label)}"
    yield f"1..{len(result.parts)}"
    for number, part in enumerate(result.parts, 1):
        if part.result == FAIL:
            yield from _diagnostic(part.text)
        yield _line(number, part.name, part.result, part.text)


def _line(number: int, name: str, result: str, why: str) -> str:
    word = "not ok" if result == FAIL else "ok"
    reason = f" # SKIP {' '.join(why.split())}" if result == SKIP else ""
    return f"{word} {number} {_plain(name)}{reason.rstrip()}"


def _diagnostic(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield f"# {printable(line)}".rstrip()


def _name(result: Result) -> str:
    from vmm.selftests.case import case_id

    return f"{result.test}[{case_id(result.type, result.dialect)}]"


def _plain(name: str) -> str:
    """A name that is one word to the end of the line, without the character that begins a directive."""
    return printable(" ".join(name.replace("#", "").split()))


def printable(text: str) -> str:
    """`text` with control characters and the like as \\xNN: what a guest printed cannot steer a terminal, nor a reader of KTAP."""
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in text)
