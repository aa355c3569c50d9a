"""The command: which mutations, how many at a time, and what to say about them."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict

from mutatelib import hook
from mutatelib.rules import MUTATIONS, SHORT, Mutation
from mutatelib.trial import CONTROL, Trial, Verdict

NOTICED, SURVIVED, BROKEN = "noticed", "SURVIVED", "BROKEN"
_POLL = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when every mutation was noticed, 1 when one was not or could not be tried, 2 usage, 130 Ctrl-C."""
    options = _parser().parse_args(arguments)
    chosen = _choose(options)
    if not chosen:
        print(f"mutate: no mutation is called {' or '.join(options.names)}; see --list", file=sys.stderr)
        return 2
    if options.list:
        _list(chosen, options.json)
        return 0
    began = time.monotonic()
    try:
        control, verdicts = try_all(chosen, options.jobs, options.all_tests, _progress(len(chosen) + 1))
    except KeyboardInterrupt:
        print("\nmutate: interrupted", file=sys.stderr)
        return 130
    elapsed = time.monotonic() - began
    if options.json:
        print(json.dumps(report(chosen, control, verdicts, elapsed), indent=2))
    else:
        _show(chosen, control, verdicts, elapsed)
    return int(bool(_fault(control)) or any(state(one) != NOTICED for one in verdicts.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mutate",
        description="Breaks the software model, one rule at a time and in memory only: sevmm selftest must notice each.",
        epilog="Before the mutations the same tests run on the model as it is, and must pass.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations by name, or shell patterns (default: all)")
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--all-tests", action="store_true", help="run every test for each mutation, not only those meant to notice it")
    parser.add_argument("-j", "--jobs", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help="trials at a time (CPUs)")
    parser.add_argument("--list", action="store_true", help="names and rules, nothing is run")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _choose(options: argparse.Namespace) -> list[Mutation]:
    names = list(options.names) + (list(SHORT) if options.short else [])
    if not names:
        return list(MUTATIONS)
    return [one for one in MUTATIONS if any(fnmatch.fnmatchcase(one.name, name) for name in names)]


def _list(chosen: Sequence[Mutation], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"name": one.name, "rule": one.rule, "module": one.full_module, "tests": one.tests} for one in chosen], indent=2))
        return
    width = max(len(one.name) for one in chosen)
    for one in chosen:
        print(f"{one.name:<{width}}  {one.rule}")


# ---- running
def try_all(
    chosen: Sequence[Mutation], jobs: int, all_tests: bool = False, tick: Callable[[int, str], None] = lambda _done, _what: None
) -> tuple[Verdict, dict[str, Verdict]]:
    """The verdict on the model as it is, and on each mutation; `jobs` trials at a time. No process is left when it returns or raises."""
    verdicts: dict[str, Verdict] = {}
    waiting: list[tuple[str, Sequence[str]]] = []
    patterns = sorted({test for one in chosen for test in one.tests})
    waiting.append((CONTROL, [] if all_tests else patterns))
    for one in chosen:
        try:
            hook.check(one)
        except (hook.RuleGone, SyntaxError) as failure:
            verdicts[one.name] = Verdict(one.name, error=str(failure))
        else:
            waiting.append((one.name, [] if all_tests else one.tests))
    for done in _run(waiting, jobs):
        verdicts[done.name] = done
        tick(len(verdicts), done.name or "(no mutation)")
    control = verdicts.pop(CONTROL)
    for verdict in verdicts.values():  # a test that fails anyway notices nothing
        verdict.noticed_by = [test for test in verdict.noticed_by if test not in control.noticed_by]
    return control, verdicts


def _run(waiting: list[tuple[str, Sequence[str]]], jobs: int) -> Iterator[Verdict]:
    running: list[Trial] = []
    with ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < jobs:
                trial = Trial(*waiting.pop(0))
                stack.callback(trial.end)
                running.append(trial)
            time.sleep(_POLL)
            for trial in list(running):
                verdict = trial.poll()
                if verdict is not None:
                    running.remove(trial)
                    yield verdict


def _progress(total: int) -> Callable[[int, str], None]:
    """A line on stderr that says how far it is, on a terminal only."""
    if not sys.stderr.isatty():
        return lambda _done, _what: None
    began = time.monotonic()

    def tick(done: int, what: str) -> None:
        text = f"mutate: {done} of {total}, {time.monotonic() - began:.0f} s, last: {what}"
        end = "\n" if done == total else ""
        print(f"\r\x1b[K{text}"[: max(20, shutil.get_terminal_size().columns + 3)], end=end, file=sys.stderr, flush=True)

    tick(0, "none yet")
    return tick


# ---- saying it
def state(verdict: Verdict) -> str:
    """One word for a mutation's verdict."""
    return BROKEN if verdict.error else NOTICED if verdict.noticed_by else SURVIVED


def _fault(control: Verdict) -> str:
    """Why the trials mean nothing, if so: tests that fail without a mutation notice none."""
    if control.error:
        return control.error
    return f"without any mutation these fail: {', '.join(control.noticed_by)}: {control.text}" if control.noticed_by else ""


def report(chosen: Sequence[Mutation], control: Verdict, verdicts: dict[str, Verdict], elapsed: float) -> dict[str, object]:
    """The object of --json: version, elapsed_s, control, totals {noticed, survived, broken}, mutations."""
    states = [state(one) for one in verdicts.values()]
    return {
        "version": 1,
        "elapsed_s": round(elapsed, 1),
        "control": {"tests": control.tests, "fault": _fault(control)},
        "totals": {word.lower(): states.count(word) for word in (NOTICED, SURVIVED, BROKEN)},
        "mutations": [
            {"rule": one.rule, "module": one.full_module, "state": state(verdicts[one.name]).lower(), **asdict(verdicts[one.name])}
            for one in chosen
        ],
    }


def _show(chosen: Sequence[Mutation], control: Verdict, verdicts: dict[str, Verdict], elapsed: float) -> None:
    width = max(len(one.name) for one in chosen)
    for one in chosen:
        found = verdicts[one.name]
        how = found.error or (
            f"{len(found.noticed_by)} of {found.tests}: {found.noticed_by[0]}" if found.noticed_by else f"0 of {found.tests}"
        )
        print(f"{state(found):<8}  {one.name:<{width}}  {how}")
        print(f"{'':<8}  {'':<{width}}  {one.rule}")
        if found.text:
            print(f"{'':<8}  {'':<{width}}  {found.text[:200]}")
    states = [state(one) for one in verdicts.values()]
    fault = _fault(control)
    print(f"\nas it is: {fault or f'{control.tests} tests pass'}")
    print(f"{states.count(NOTICED)} noticed, {states.count(SURVIVED)} survived, {states.count(BROKEN)} broken; {elapsed:.0f} s")
