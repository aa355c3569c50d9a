"""`sevmm selftest`: run the selftests and report, for people or for programs.

stdout carries the answer: a table and what failed, or KTAP, or one JSON object; the progress bar is on stderr, and only on a terminal.
Ctrl-C ends the run, not the answer: it has what was known by then, and says so.
Exit status: 0 all that could run passed, 1 something failed, 4 nothing could run here (as kselftest's skip), 2 usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmm.cli import missing_package, selftest_table, status
from vmm.cli.selftest_table import COLOURS
from vmm.cli.style import Style, is_terminal
from vmm.selftests import collect, ktap, report, runner
from vmm.selftests.execute import Result
from vmm.selftests.subtests import FAIL, SKIP

if TYPE_CHECKING:
    from vmm.selftests.collect import Item

FAILED = 1


class UsageError(Exception):
    """What was asked for does not exist; one sentence."""


def run(options: argparse.Namespace) -> int:
    """Run what `options` select."""
    if not __debug__:
        return _usage("python -O takes the assertions out of the tests; run without it")
    try:
        items, broken = _select(options)
        if options.junit is not None:
            _check_target(options.junit)
    except UsageError as refusal:
        return _usage(str(refusal))
    if options.list:
        _list(items, options.json)
        return status.OK
    began = time.perf_counter()
    results, interrupted = _run(items, broken, options)
    elapsed = time.perf_counter() - began
    if options.junit is not None:
        with open(options.junit, "wb") as file:
            file.write(report.to_junit(results, elapsed))
    if options.json:
        print(json.dumps(report.to_json(results, options.on, elapsed, interrupted), indent=2))
    elif not options.ktap:
        _show(results, elapsed)
    if interrupted:
        sys.stdout.flush()
        print(f"sevmm: interrupted: {len(results)} of {len(broken) + len(items)} tests had ended", file=sys.stderr)
        return status.INTERRUPTED
    return {FAIL: FAILED, SKIP: status.UNSUPPORTED}.get(ktap.overall(results), status.OK)


def _usage(text: str) -> int:
    print(f"sevmm selftest: {text}", file=sys.stderr)
    return status.USAGE


def _check_target(path: str) -> None:
    """A file that cannot be written is better known before the run than after it."""
    try:
        with open(path, "ab"):
            pass
    except OSError as failure:
        raise UsageError(f"{path} cannot be written: {(failure.strerror or str(failure)).lower()}") from failure


def _select(options: argparse.Namespace) -> tuple[list[Item], list[Result]]:
    """What to run, and a failed result for each suite that cannot be imported. Raises `UsageError` where nothing is left, and
    ModuleNotFoundError where a package is missing: that is one matter, and no suite's.
    """
    items, failures = collect.select(options.patterns, options.type, options.dialect, collect.PACKAGE)
    missing = next((failure for failure in failures.values() if missing_package(failure)), None)
    if missing is not None:
        raise missing
    everything = not options.patterns
    broken = [
        Result(suite, "import", "plain", "mainline", FAIL, f"the suite cannot be imported: {type(failure).__name__}: {failure}")
        for suite, failure in failures.items()
        if everything or any(pattern.split(".")[0] == suite for pattern in options.patterns)
    ]
    if items or broken:
        return items, broken
    if options.patterns and not collect.select(options.patterns, package=collect.PACKAGE)[0]:
        raise UsageError(
            f"no test matches {' or '.join(options.patterns)}; there are the suites {', '.join(collect.suites(collect.PACKAGE))}"
        )
    wanted = " and ".join(f"{name} {value}" for name, value in (("type", options.type), ("dialect", options.dialect)) if value)
    raise UsageError(f"no selected test runs on {wanted}")


def _list(items: Sequence[Item], as_json: bool) -> None:
    tests: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        tests.setdefault((item.suite, item.name), []).append(item)
    if as_json:
        rows = [{"suite": s, "test": t, "cases": [i.case for i in found], "text": found[0].text} for (s, t), found in tests.items()]
        print(json.dumps(rows, indent=2))
        return
    width = max(len(f"{suite}.{name}") for suite, name in tests)
    for (suite, name), found in tests.items():
        print(f"{f'{suite}.{name}':<{width}}  [{', '.join(item.case for item in found)}]  {found[0].text}".rstrip())


def _run(items: Sequence[Item], broken: Sequence[Result], options: argparse.Namespace) -> tuple[list[Result], bool]:
    """Run everything; the results in the plan's order, and whether Ctrl-C ended it. With --ktap suites are printed as they become
    complete.
    """
    plan = {item.id: at for at, item in enumerate(items)}
    found: dict[int, Result] = {}
    printer = _Ktap(items, broken) if options.ktap else None
    interrupted = False
    timeout = (options.timeout or 0.0) if hasattr(options, "timeout") else None  # None is what --timeout 0 became
    try:
        with _progress(len(items), shares_terminal=options.ktap and is_terminal(sys.stdout)) as tick:
            for result in runner.run(items, options.on, options.jobs, timeout, collect.PACKAGE):
                found[plan[f"{result.suite}.{result.test}[{_case(result)}]"]] = result
                if printer is not None:
                    printer.add(result)
                tick(result)
    except KeyboardInterrupt:
        interrupted = True
    if printer is not None and interrupted:
        print("Bail out! interrupted", flush=True)
    elif printer is not None:
        printer.finish()
    return [*broken, *(found[at] for at in sorted(found))], interrupted


def _case(result: Result) -> str:
    from vmm.selftests.case import case_id

    return case_id(result.type, result.dialect)


class _Ktap:
    """Prints suites in order, each when all its tests have finished."""

    def __init__(self, items: Sequence[Item], broken: Sequence[Result]) -> None:
        self._ids = {item.id: at for at, item in enumerate(items)}
        self._left: dict[str, int] = {}
        for item in items:
            self._left[item.suite] = self._left.get(item.suite, 0) + 1
        self._found: dict[str, list[Result]] = {suite: [] for suite in [*(result.suite for result in broken), *self._left]}
        for result in broken:
            self._left[result.suite] = self._left.get(result.suite, 0)
            self._found[result.suite].append(result)
        self._printed = 0
        self._print(ktap.head(len(self._found)))
        self._flush()

    def add(self, result: Result) -> None:
        """One more result."""
        self._found[result.suite].append(result)
        self._left[result.suite] -= 1
        self._flush()

    def finish(self) -> None:
        """The last line."""
        print(ktap.totals([result for results in self._found.values() for result in results]), flush=True)

    def _flush(self) -> None:
        """Print the suites that are complete, as far as those before them are."""
        names = list(self._found)
        while self._printed < len(names) and self._left[names[self._printed]] == 0:
            name = names[self._printed]
            order = sorted(self._found[name], key=lambda r: self._ids.get(f"{r.suite}.{r.test}[{_case(r)}]", -1))
            self._printed += 1
            self._print(ktap.suite(self._printed, name, order))

    @staticmethod
    def _print(lines: Iterator[str]) -> None:
        print("\n".join(lines), flush=True)


@contextmanager
def _progress(total: int, shares_terminal: bool) -> Iterator[Callable[[Result], None]]:
    """A bar on stderr, if that is a terminal and stdout does not write lines to the same one."""
    if not is_terminal(sys.stderr) or shares_terminal or total < 2:
        yield lambda _result: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parts = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        failed = 0

        def tick(result: Result) -> None:
            nonlocal failed
            failed += result.result == FAIL
            words = f"{failed} failed, " if failed else ""
            bar.update(task, advance=1, description=f"{words}{result.suite}.{result.test}")

        yield tick


def _show(results: Sequence[Result], elapsed: float) -> None:
    """The table, what failed, why what was skipped was skipped, and the totals."""
    style = Style(sys.stdout)
    for line in selftest_table.lines(results, selftest_table.room(sys.stdout), style.paint):
        print(line)
    for result in results:
        if result.result == FAIL:
            print(f"\n{style.paint('FAIL', 'red')} {result.suite}.{result.test}[{_case(result)}] on {result.rung or 'no rung'}")
            parts = [f"{part.name}: {part.text}" for part in result.parts if part.result == FAIL]
            for line in "\n".join([result.text, *parts]).splitlines():
                print(f"    {ktap.printable(line)}")
    _show_skips(results, style)
    noted = [(f"{result.suite}.{result.test}[{_case(result)}]", note) for result in results for note in result.notes]
    for number, (name, note) in enumerate(noted):
        print("\n" * (number == 0) + f"{style.paint('note', 'dim')} {name}: {ktap.printable(note)}")
    total = report.counts(results)
    words = ", ".join(f"{style.paint(f'{count} {kind}', COLOURS[kind]) if count else f'0 {kind}'}" for kind, count in total.items())
    subtests = sum(len(result.parts) for result in results)
    print(f"\n{words}; {subtests} subtests; {elapsed:.1f} s")


def _show_skips(results: Sequence[Result], style: Style) -> None:
    reasons: dict[str, list[str]] = {}
    for result in results:
        name = f"{result.suite}.{result.test}[{_case(result)}]"
        if result.result == SKIP:
            reasons.setdefault(result.text, []).append(name)
        for part in result.parts:
            if part.result == SKIP and result.result != SKIP:
                reasons.setdefault(part.text, []).append(f"{name} {part.name}")
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"\n{style.paint('skip', 'yellow')} {', '.join(names[:3])}{more}\n    {ktap.printable(' '.join(reason.split()))}")
