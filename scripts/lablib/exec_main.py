"""The command behind scripts/selftests-exec: choose, run some at a time, show a table beside the lab's verdicts.

Exit status: 0 every test did what is known of it, or better; 1 one did worse; 2 usage; 4 `sevmm exec` cannot run here;
69 the selftests cannot be built; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lablib import selftests, source
from lablib.exec_expect import FACTS, Facts, Judged, Outcome
from lablib.exec_run import HostCannot, Stopped, run_one
from lablib.words import Failure

TREE = Path(__file__).resolve().parents[2]
USAGE, UNSUPPORTED, NOT_READY, INTERRUPTED = 2, 4, 69, 130
LIMIT = 240.0
"""Seconds per test; as in the lab, where the slowest that passes takes 160."""

_EXAMPLES = """\
examples:
  scripts/selftests-exec --named                   those that must pass
  scripts/selftests-exec 'sev_*' -j 1 --limit 60   some, one at a time, a minute for each
  scripts/selftests-exec --list                    names only
  scripts/selftests-exec --json > results.json     {"totals": {...}, "tests": [{"test", "verdict", "expected", "lab", "ok", ...}]}

marks: * must pass, + better than known, ! worse than known. Each line comes when its test has ended, long tests first; with --json
they are on stderr, or a bar where that is a terminal.

Nothing on this machine is changed but the lab's cache, where the tests are built when they are not there (the newest linux-source
that apt offers: a download of 160 MB, and minutes): tests that want huge pages or module parameters skip, or fail with a known reason.

exit status: 0 every test did what is known of it, or better; 1 one did worse; 2 usage, a pattern that matches no test among them;
4 sevmm exec cannot run here; 69 the tests cannot be built; 130 interrupted"""
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from vmm.cli import main; sys.exit(main())"
_WIDTH = 42


def main(arguments: Sequence[str], prefix: Sequence[str] | None = None) -> int:
    """`prefix`: what stands before the path of a test; default: this tree's `sevmm exec`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = _parser().parse_args(arguments)
    try:
        path = options.facts or FACTS
        _refuse_unknown(options, Facts(path))
        folder, kept = _binaries(options)
        facts = Facts(path, kept)
        names = _choose(options, folder, facts)
        if options.list:
            print("\n".join(names))
            return 0
        command = list(prefix) if prefix is not None else _sevmm_exec(options)
        return _report(_run(command, folder, names, facts, options), options)
    except HostCannot as words:
        say(f"sevmm exec cannot run here: {words}")
        return UNSUPPORTED
    except selftests.NoMatch as words:
        say(str(words))
        return USAGE
    except Failure as failure:
        say(str(failure))
        return NOT_READY
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


def say(text: str) -> None:
    """One line on stderr."""
    print(f"selftests-exec: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selftests-exec",
        description="The kernel's own KVM selftests, unmodified, under `sevmm exec`, beside how real kvm_amd did in the lab.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("patterns", nargs="*", metavar="PATTERN", help="names or shell patterns, with or without x86/ (default: all)")
    add("--named", action="store_true", help="only the tests that must pass")
    add("--list", action="store_true", help="names only")
    add("--json", action="store_true", help="one JSON object on stdout when all have run")
    add("-j", "--jobs", type=_jobs, default=2, metavar="N", help="tests at a time (default %(default)s)")
    add("--limit", type=_seconds, default=LIMIT, metavar="S", help="seconds per test (default %(default)g)")
    add("--platform", type=_platform, metavar="P", help="sevmm exec's --platform")
    add("--binaries", type=Path, metavar="DIR", help="where the tests are (default: the lab's cache, built when missing)")
    add("--facts", type=Path, metavar="FILE", help="what is expected (default: lablib/exec_selftests.toml)")
    return parser


def _jobs(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"{text}: 1 to 64")
    return value


def _platform(text: str) -> str:
    """Refused here, once, instead of by each test."""
    from vmm.exec.options import machine

    try:
        machine(text)
    except ValueError as refusal:
        raise argparse.ArgumentTypeError(str(refusal)) from None
    return text


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: seconds, more than 0")
    return value


def _refuse_unknown(options: argparse.Namespace, facts: Facts) -> None:
    """Patterns that match none of the tests that the facts know are mistakes, and better known before minutes of building than after
    them. Where the tests are built, their own names decide.
    """
    kept = source.resolve_step().result()
    if options.binaries is not None or (kept is not None and selftests.selftests_step(kept).result() is not None):
        return
    try:
        selftests.choose(facts.tests, options.patterns)
    except selftests.NoMatch as words:
        more = f"(nothing is built yet; --list builds the tests, and names those that {FACTS.name} does not know, too)"
        raise selftests.NoMatch(f"{words} {more}") from None


def _binaries(options: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """The folder with the tests, and what the lab's cache says of them."""
    if options.binaries is not None:
        if not options.binaries.is_dir():
            raise Failure(f"{options.binaries} is no folder")
        return options.binaries.resolve(), {}
    resolved = source.resolve()
    return selftests.build(resolved), selftests.kept(resolved)


def _choose(options: argparse.Namespace, folder: Path, facts: Facts) -> list[str]:
    names = selftests.choose(selftests.programs(folder), options.patterns)
    if not options.named:
        return names
    if lacking := [name for name in facts.named if name not in selftests.programs(folder)]:
        raise Failure(f"{folder} lacks {', '.join(lacking)}, which must pass")
    return [name for name in names if name in facts.named]


def _sevmm_exec(options: argparse.Namespace) -> list[str]:
    more = ["--platform", options.platform] if options.platform else []
    return [sys.executable, "-P", "-c", _START, str(TREE), "exec", *more, "--"]


def _run(command: Sequence[str], folder: Path, names: Sequence[str], facts: Facts, options: argparse.Namespace) -> list[Judged]:
    """All of `names`, long ones first; each is shown when it has ended. The outcomes by name."""
    order = sorted(names, key=lambda name: -facts.seconds(name))
    stop = threading.Event()
    found: dict[str, Judged] = {}
    table = _table(options.json)
    if table is not None:
        print(f"{'test':<{_WIDTH}} {'sevmm exec':<14} {'lab':<14} remarks", file=table, flush=True)
    with _progress(len(order), not options.json) as tick, ThreadPoolExecutor(options.jobs) as pool:
        began = {}

        def one(name: str) -> Outcome:
            if stop.is_set():
                raise Stopped
            began[name] = time.monotonic()
            return run_one(command, folder, name, options.limit, stop)

        waiting = {pool.submit(one, name): name for name in order}
        try:
            for done in as_completed(waiting):
                judged = facts.judge(done.result())
                found[judged.outcome.test] = judged
                if table is not None:
                    print(_line(judged), file=table, flush=True)
                running = [name for name in began if name not in found]
                tick(judged, running)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [found[name] for name in names]


def _table(as_json: bool) -> TextIO | None:
    """Where the lines of the table go: with --json to stderr, and nowhere where the bar is."""
    if not as_json:
        return sys.stdout
    return None if sys.stderr.isatty() else sys.stderr


def _line(judged: Judged) -> str:
    outcome = judged.outcome
    mark = "!" if judged.bad else "+" if judged.better else "*" if judged.named else " "
    lab = judged.lab.split()
    lab_words = f"{lab[0]:<5}{float(lab[1]):>7.1f} s" if len(lab) == 2 else ""
    note = " ".join("".join(c if c.isprintable() else "?" for c in judged.note).split())[:200]
    return f"{mark} {outcome.test:<{_WIDTH - 2}} {outcome.verdict:<5}{outcome.seconds:>6.1f} s  {lab_words:<14} {note}".rstrip()


def _report(rows: Sequence[Judged], options: argparse.Namespace) -> int:
    bad, better = [row for row in rows if row.bad], [row for row in rows if row.better]
    named = [row for row in rows if row.named]
    seconds = sum(row.outcome.seconds for row in named)
    counts = {kind: sum(row.outcome.verdict == kind for row in rows) for kind in ("pass", "skip", "fail", "hang")}
    if options.json:
        totals = {**counts, "bad": len(bad), "better": len(better), "named_seconds": round(seconds, 1)}
        print(json.dumps({"totals": totals, "tests": [row.as_json() for row in rows]}, indent=1))
    else:
        known = sum(row.outcome.verdict in ("fail", "hang") and not row.bad for row in rows)
        words = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no tests"
        print(f"\n{words}" + (f"; {known} of them known limits" if known else ""))
        if named:
            print(f"* must pass: {sum(not row.bad for row in named)} of {len(named)} do, {seconds:.1f} s together")
        if better:
            print(f"+ better than known: {', '.join(row.outcome.test for row in better)}")
        if bad:
            print(f"! worse than known: {', '.join(row.outcome.test for row in bad)}")
    sys.stdout.flush()
    return 1 if bad else 0


@contextmanager
def _progress(total: int, shares_stdout: bool) -> Iterator[Callable[[Judged, Sequence[str]], None]]:
    """A bar on stderr where that is a terminal; elsewhere the lines of the table are the progress."""
    if not sys.stderr.isatty() or total < 2:
        yield lambda _judged, _running: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parts = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    shares = shares_stdout and sys.stdout.isatty()
    with Progress(*parts, console=Console(stderr=True), transient=True, redirect_stdout=shares) as bar:
        task = bar.add_task("", total=total)
        failed = 0

        def tick(judged: Judged, running: Sequence[str]) -> None:
            nonlocal failed
            failed += judged.bad
            bar.update(task, advance=1, description=(f"{failed} worse than known, " if failed else "") + ", ".join(running))

        yield tick
