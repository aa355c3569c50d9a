"""`scripts/fuzz sev`: random SEV commands of several VMs for as long as one likes, each compared with a reference of KVM and the firmware.

The rules, the reference and the comparison are those of tests/model/test_sev_properties.py; seed and index make a sequence, and processes
(processes.py) work through every n-th index. What ends a process, hangs it, answers otherwise than the reference, or takes memory or fds
and keeps them, is a finding: with the command that repeats it, and the shortest part of its sequence that still shows it.
"""

from __future__ import annotations

import ctypes
import gc
import time
import traceback
from collections import Counter
from random import Random
from typing import Any

from fuzzlib.fuzzer import rss_mib
from fuzzlib.processes import Plan, Subject, Turns, options, positive
from fuzzlib.processes import main as run
from tests.conftest import device_mappings, open_fds
from tests.model.sev_rules import sequence, take
from tests.model.sev_world import World

_CHILD = "from fuzzlib.sev import child; child()"
HANG = 60.0  # seconds in one sequence
WARM, GROWTH = 5, 96  # sequences before memory is compared, and MiB that it may grow then
MOST_FINDINGS = 10
SHRINK = 20.0  # seconds for making a finding's sequence shorter

Steps = list[tuple[str, tuple[int, ...]]]


def main(argv: list[str]) -> int:
    """Exit status 0 when nothing was found, 1 when something was, 2 usage."""
    about = "Random SEV commands of several VMs on the model, judged by a reference."
    subject = Subject("sev", "sequence", "sequences", _CHILD, HANG + SHRINK, MOST_FINDINGS, about=about)
    parser = options(subject, 200)
    parser.add_argument("--steps", type=positive, default=150, metavar="N", help="rules in a sequence; each makes one to ten calls (150)")
    asked = parser.parse_args(argv)
    totals: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    memory = [0]

    def hear(said: dict[str, Any]) -> None:
        totals.update(said["totals"])
        answers.update(said["answers"])
        memory.append(said["rss_mib"])

    def summary(done: int, seconds: float) -> dict[str, Any]:
        calls = totals["calls"]
        rate = {"calls": calls, "succeeded": totals["succeeded"], "calls_per_second": round(calls / seconds), "rss_mib": max(memory)}
        return {**rate, "answers": dict(sorted(answers.items()))}

    plan = Plan(asked.count, asked.seed, asked.seconds, asked.processes, asked.first, {"steps": asked.steps})
    return run(subject, plan, hear, summary)


def follow(steps: Steps) -> tuple[World, str]:
    """A closed world in which the steps were taken, and what went wrong ("" for nothing)."""
    world = World()
    try:
        for name, given in steps:
            take(world, name, given)
        world.close()
    except Exception as wrong:
        what = str(wrong) if isinstance(wrong, AssertionError) else traceback.format_exc()
        try:
            world.dispose()
        except Exception:
            what += f"\nand closing: {traceback.format_exc()}"
        return world, what or "an assertion without words"
    return world, ""


def shorten(steps: Steps, seconds: float = SHRINK) -> Steps:
    """The steps without those that the finding does not need, as far as there is time."""
    stop, size = time.monotonic() + seconds, max(1, len(steps) // 2)
    while time.monotonic() < stop:
        at, shorter = 0, False
        while at < len(steps) and time.monotonic() < stop:
            fewer = steps[:at] + steps[at + size :]
            if follow(fewer)[1]:
                steps, shorter = fewer, True
            else:
                at += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    return steps


def child() -> None:
    """One process."""
    turns = Turns(MOST_FINDINGS)
    (length,) = turns.more
    totals: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    before: tuple[int, set[int], list[str]] | None = None
    rss = 0
    for index in turns:
        steps = sequence(Random(f"{turns.seed}/{index}"), length)
        world, what = follow(steps)
        totals.update(calls=world.steps, succeeded=world.good)
        answers.update(world.answers)
        del world
        if what:
            few = shorten(steps)
            turns.findings.append((index, f"sequence {index}: {what}\nshortest: {[(name, *given) for name, given in few]}"))
        done = turns.done + 1
        if not turns.findings and (done == WARM or done % 50 == 0 or turns.last(index)):  # a finding's traceback may hold a world
            now = _taken()
            before, rss = before or now, max(rss, now[0])
            if leak := _leak(before, now):
                turns.findings.append((index, f"after sequence {index} (of {done} in this process): {leak}"))
    turns.end(lambda: {"totals": totals, "answers": answers, "rss_mib": max(rss, rss_mib())})


def _taken() -> tuple[int, set[int], list[str]]:
    """Memory (MiB), fds and mappings of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return rss_mib(), set(open_fds()), device_mappings()


def _leak(before: tuple[int, set[int], list[str]], now: tuple[int, set[int], list[str]]) -> str:
    """What is more than it was."""
    if now[0] > before[0] + GROWTH:
        return f"memory grew from {before[0]} to {now[0]} MiB"
    if more := now[1] - before[1]:
        return f"fds left open: {sorted(more)[:8]}"
    return f"{len(now[2]) - len(before[2])} mappings left behind" if len(now[2]) > len(before[2]) else ""
