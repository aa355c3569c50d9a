"""`scripts/fuzz sev`: random SEV commands of several VMs for as long as one likes, each compared with a reference of KVM and the firmware.

The rules, the reference and the comparison are those of tests/model/test_sev_properties.py; seed and index make a sequence. Processes work
through every n-th index. What ends a process, hangs it, answers otherwise than the reference, or takes memory or fds and keeps them, is a
finding: with the command that repeats it, and the shortest part of its sequence that still shows it.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzzlib.fuzzer import rss_mib
from fuzzlib.snippets import Progress
from tests.conftest import device_mappings, open_fds
from tests.model.sev_rules import sequence, take
from tests.model.sev_world import World

TREE = Path(__file__).absolute().parents[2]
_CHILD = "import sys; sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]; from fuzzlib.sev import child; sys.exit(child())"
_ENVIRONMENT = {**os.environ, "MALLOC_ARENA_MAX": "1"}
HANG = 60.0  # seconds in one sequence
WARM, GROWTH = 5, 96  # sequences before memory is compared, and MiB that it may grow then
MOST_FINDINGS = 10
SHRINK = 20.0  # seconds for making a finding's sequence shorter
_STATE_SIZE = 24

Steps = list[tuple[str, tuple[int, ...]]]


@dataclass
class Plan:
    """What was asked for: sequences [first, first + count) of so many rules, spread over processes."""

    count: int
    seed: int
    steps: int
    seconds: float
    processes: int
    first: int = 0


def main(argv: list[str]) -> int:
    """Exit status 0 when nothing was found, 1 when something was, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="fuzz sev", description="Random SEV commands of several VMs on the model, judged by a reference. JSON on stdout."
    )
    parser.add_argument("--count", type=_positive, default=200, metavar="N", help="how many sequences (200)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="what the random choices begin with (1)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="index of the first sequence (0)")
    parser.add_argument("--steps", type=_positive, default=150, metavar="N", help="rules in a sequence; each makes one to ten calls (150)")
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="S", help="stop after this time (an hour)")
    parser.add_argument(
        "--processes", type=_positive, default=min(os.cpu_count() or 1, 8), metavar="N", help="one per processor, at most 8"
    )
    options = parser.parse_args(argv)
    plan = Plan(options.count, options.seed, options.steps, options.seconds, options.processes, options.first)
    print(f"fuzz: seed {plan.seed}, {plan.count:,} sequences of {plan.steps} in {plan.processes} processes", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    summary = _run(plan)
    print(json.dumps(summary, indent=2))
    for finding in summary["findings"]:
        print(f"fuzz: FOUND {finding['what']}\nfuzz: again: {finding['again']}", file=sys.stderr)
    return 1 if summary["findings"] else 0


def _positive(text: str) -> int:
    number = int(text.replace("_", ""))
    if number <= 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


class _Worker:
    """A process, and the next one when it dies."""

    def __init__(self, number: int, plan: Plan, state: Path, folder: Path) -> None:
        self._number, self._plan, self._state, self._folder = number, plan, state, folder
        self.next, self.finished, self._earlier = plan.first + number, plan.count <= number, 0
        self.progress = Progress(state, number)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float) -> None:
        self.progress.begin(-1, 0)
        self._since, self._seen = time.monotonic(), (0, 0, 0)
        plan = self._plan
        numbers = (self._number, self.next, plan.first + plan.count, plan.processes, plan.seed, plan.steps, max(seconds, 0.1))
        command = [sys.executable, "-P", "-c", _CHILD, str(TREE), str(TREE / "scripts"), str(self._state), *map(str, numbers)]
        self._out, self._errors = (self._folder / f"{name}{self._number}" for name in ("out", "err"))
        with self._out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=TREE, env=_ENVIRONMENT)

    def done(self) -> int:
        """Sequences that this place has finished."""
        return self._earlier + self.progress.read()[1]

    def look(self) -> tuple[dict[str, Any] | None, str]:
        """(what the process said at its end, a finding if its end was none)."""
        assert self.process is not None
        now = self.progress.read()
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        hung = time.monotonic() - self._since > HANG + SHRINK and self.process.poll() is None
        if hung:
            self.process.kill()
        status = self.process.wait() if hung else self.process.poll()
        if status is None:
            return None, ""
        if status == 0:
            self.finished = True
            return json.loads(self._out.read_text()), ""
        index, done, _ = now
        self._earlier += done
        what = f"hangs for {HANG:.0f} s" if hung else f"ends the process with status {status}"
        said = self._errors.read_text(errors="replace")[-3000:]
        if not index:
            self.finished = True
            return None, f"the process ended with status {status} before its first sequence\n{said}"
        self.next = index - 1 + self._plan.processes
        self.finished = self.next >= self._plan.first + self._plan.count
        return None, f"sequence {index - 1} {what}\n{said}"


def _run(plan: Plan) -> dict[str, Any]:
    """All processes until all is done; the summary."""
    start, findings = time.monotonic(), []
    totals: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    memory = 0

    def found(index: int, what: str) -> None:
        again = f"scripts/fuzz sev --seed {plan.seed} --steps {plan.steps} --first {index} --count 1 --processes 1"
        findings.append({"index": index, "what": what, "again": again})

    with tempfile.TemporaryDirectory(prefix="sevmm-fuzz-") as name:
        state = Path(name) / "state"
        state.write_bytes(bytes(_STATE_SIZE * plan.processes))
        workers = [_Worker(number, plan, state, Path(name)) for number in range(plan.processes)]
        try:
            for worker in workers:
                if not worker.finished:
                    worker.start(plan.seconds)
            while not all(worker.finished for worker in workers):
                time.sleep(0.1)
                for worker in (worker for worker in workers if not worker.finished):
                    said, what = worker.look()
                    if said is not None:
                        totals.update(said["totals"])
                        answers.update(said["answers"])
                        memory = max(memory, said["rss_mib"])
                        for index, words in said["findings"]:
                            found(index, words)
                    left = plan.seconds - (time.monotonic() - start)
                    if what:
                        found(worker.next - (0 if "before its first" in what else plan.processes), what)
                        worker.finished |= left <= 0 or len(findings) >= MOST_FINDINGS
                        if not worker.finished:
                            worker.start(left)
                _show(sum(worker.done() for worker in workers), plan.count, time.monotonic() - start)
        finally:
            for worker in workers:
                if worker.process is not None and worker.process.poll() is None:
                    worker.process.kill()
                    worker.process.wait()
        done, seconds = sum(worker.done() for worker in workers), time.monotonic() - start
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return {
        "sequences": done,
        "calls": totals["calls"],
        "succeeded": totals["succeeded"],
        "seconds": round(seconds, 1),
        "calls_per_second": round(totals["calls"] / seconds),
        "seed": plan.seed,
        "processes": plan.processes,
        "rss_mib": memory,
        "answers": dict(sorted(answers.items())),
        "findings": findings,
    }


def _show(done: int, count: int, seconds: float) -> None:
    if sys.stderr.isatty():
        bar = ("#" * (24 * done // count)).ljust(24, ".")
        print(f"\rfuzz: [{bar}] {done:,} of {count:,} sequences, {seconds:.0f} s ", end="", file=sys.stderr, flush=True)


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


def child() -> int:
    """One process: arguments are those that _Worker.start passes."""
    faulthandler.enable()
    path, *texts, seconds = sys.argv[1:]
    number, first, end, step, seed, length = (int(text) for text in texts)
    progress = Progress(Path(path), number)
    totals: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    findings: list[tuple[int, str]] = []
    stop, parent = time.monotonic() + float(seconds), os.getppid()
    before: tuple[int, set[int], list[str]] | None = None
    done = rss = 0
    for index in range(first, end, step):
        if time.monotonic() > stop or len(findings) >= MOST_FINDINGS or os.getppid() != parent:
            break
        progress.begin(index, done)
        steps = sequence(Random(f"{seed}/{index}"), length)
        world, what = follow(steps)
        totals.update(calls=world.steps, succeeded=world.good)
        answers.update(world.answers)
        del world
        if what:
            few = shorten(steps)
            findings.append((index, f"sequence {index}: {what}\nshortest: {[(name, *given) for name, given in few]}"))
        done += 1
        if not findings and (done == WARM or done % 50 == 0 or index + step >= end):  # a finding's traceback may hold a world
            now = _taken()
            before, rss = before or now, max(rss, now[0])
            if leak := _leak(before, now):
                findings.append((index, f"after sequence {index} (of {done} in this process): {leak}"))
    progress.begin(-1, done)
    print(json.dumps({"totals": totals, "answers": answers, "findings": findings, "rss_mib": max(rss, rss_mib())}))
    sys.stdout.flush()
    os._exit(0)


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


__all__ = ("Plan", "child", "follow", "main", "shorten")
