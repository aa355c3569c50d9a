"""`scripts/fuzz snippets`: hostile code in guests of the model, in processes that may die without taking the rest along.

Each process works through every n-th index. It writes the index before a snippet starts into a file that it shares with its
parent, so a snippet that ends the process (a crash of the engine) or never ends (an immediate_exit that nobody saw) is
known by its number; the process is started again behind it. All findings are printed with the command that repeats
them.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzlib.hostile import Machine
from kvmapi.model.host import ModelHost

TREE = Path(__file__).absolute().parents[2]
_CHILD = "import sys; sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]; from fuzzlib.snippets import child; sys.exit(child())"
_STATE = struct.Struct("<QQQ")  # index + 1 of the snippet that runs, snippets done, whether a KVM_RUN is under way
HANG = 30.0  # seconds in one snippet
SNIPPETS_PER_VM = 5000
MOST_FINDINGS = 20


@dataclass
class Plan:
    """What was asked for: indices [first, first + count), spread over processes."""

    count: int
    seed: int
    seconds: float
    processes: int
    first: int = 0


class Progress:
    """What one process is doing, in shared memory."""

    def __init__(self, path: Path, number: int) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._at = number * _STATE.size

    def begin(self, index: int, done: int) -> None:
        """A snippet starts."""
        _STATE.pack_into(self._map, self._at, index + 1, done, 0)

    def note(self, vcpu: int, inside: bool) -> None:
        """KVM_RUN of a vCPU begins or ends."""
        if vcpu == 0:
            self._map[self._at + 16] = inside

    def read(self) -> tuple[int, int, int]:
        """(index + 1 or 0, done, inside KVM_RUN)"""
        found: tuple[int, int, int] = _STATE.unpack_from(self._map, self._at)
        return found


def main(argv: list[str]) -> int:
    """Exit status 0 when nothing was found, 1 when something was, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="fuzz snippets", description="Random bytes and mutated instructions, in every mode, in guests of the model. JSON on stdout."
    )
    parser.add_argument("--count", type=_positive, default=20_000, metavar="N", help="how many snippets (20000)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="what the random choices begin with (1)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="index of the first snippet (0)")
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="S", help="stop after this time (an hour)")
    parser.add_argument(
        "--processes", type=_positive, default=min(os.cpu_count() or 1, 8), metavar="N", help="one per processor, at most 8"
    )
    options = parser.parse_args(argv)
    plan = Plan(options.count, options.seed, options.seconds, options.processes, options.first)
    print(f"fuzz: seed {plan.seed}, {plan.count:,} snippets in {plan.processes} processes", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    summary = _Parent(plan).run()
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
    """One place for a process; it is filled again when the process dies."""

    def __init__(self, number: int, plan: Plan, state: Path, folder: Path) -> None:
        self.number, self._plan, self._state, self._folder = number, plan, state, folder
        self.next, self.finished, self._earlier = plan.first + number, False, 0
        self.progress = Progress(state, number)
        self.process: subprocess.Popen[bytes] | None = None
        self._seen, self._since = (0, 0, 0), time.monotonic()

    def start(self, seconds: float) -> None:
        self.progress.begin(-1, 0)
        self._since = time.monotonic()
        plan = self._plan
        arguments = (self._state, self.number, self.next, plan.first + plan.count, plan.processes, plan.seed, max(seconds, 0.1))
        command = [sys.executable, "-P", "-c", _CHILD, str(TREE), str(TREE / "scripts"), *map(str, arguments)]
        self._out, self._errors = (self._folder / f"{name}{self.number}" for name in ("out", "err"))
        with self._out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=TREE)

    def done(self) -> int:
        """Snippets that this place has finished."""
        return self._earlier + self.progress.read()[1]

    def look(self) -> tuple[dict[str, Any] | None, str | None]:
        """(what the process said at its end, a finding if its end was none)."""
        assert self.process is not None
        now = self.progress.read()
        if now[:2] != self._seen[:2]:
            self._seen, self._since = now, time.monotonic()
        hung = time.monotonic() - self._since > HANG and self.process.poll() is None
        if hung:
            self.process.kill()
        status = self.process.wait() if hung else self.process.poll()
        if status is None:
            return None, None
        if status == 0:
            self.finished = True
            return json.loads(self._out.read_text()), None
        index, done, inside = now
        self._earlier += done
        if not index:
            self.finished = True
            return None, f"the process ended with status {status} before its first snippet\n{self._errors.read_text()[-3000:]}"
        self.next = index - 1 + self._plan.processes
        where = "in KVM_RUN" if inside else "outside KVM_RUN"
        what = f"hangs for {HANG:.0f} s {where}" if hung else f"ends the process with status {status} {where}"
        return None, f"snippet {index - 1} {what}\n{self._errors.read_text()[-3000:]}"


class _Parent:
    """Starts the processes, watches them, and adds up."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._exits: Counter[str] = Counter()
        self._modes: Counter[str] = Counter()
        self._findings: list[dict[str, Any]] = []
        self._rss = 0

    def run(self) -> dict[str, Any]:
        """Until all is done; the summary."""
        plan, start = self._plan, time.monotonic()
        with tempfile.TemporaryDirectory(prefix="sevmm-fuzz-") as name:
            folder = Path(name)
            state = folder / "state"
            state.write_bytes(bytes(_STATE.size * plan.processes))
            workers = [_Worker(number, plan, state, folder) for number in range(plan.processes)]
            try:
                for worker in workers:
                    worker.start(plan.seconds)
                while not all(worker.finished for worker in workers):
                    time.sleep(0.1)
                    for worker in workers:
                        if not worker.finished:
                            self._look(worker, plan.seconds - (time.monotonic() - start))
                    self._show(sum(worker.done() for worker in workers), time.monotonic() - start)
            finally:
                for worker in workers:
                    if worker.process is not None and worker.process.poll() is None:
                        worker.process.kill()
                        worker.process.wait()
            done, seconds = sum(worker.done() for worker in workers), time.monotonic() - start
        if sys.stderr.isatty():
            print(file=sys.stderr)
        return {
            "snippets": done,
            "seconds": round(seconds, 1),
            "snippets_per_second": round(done / seconds),
            "seed": plan.seed,
            "processes": plan.processes,
            "rss_mib": self._rss,
            "exits": dict(self._exits.most_common()),
            "modes": dict(self._modes.most_common()),
            "findings": self._findings,
        }

    def _look(self, worker: _Worker, left: float) -> None:
        said, finding = worker.look()
        if said is not None:
            self._exits.update(said["exits"])
            self._modes.update(said["modes"])
            self._rss = max(self._rss, said["rss_mib"])
            for index, what in said["findings"]:
                self._found(index, what)
        if finding is not None:
            self._found(worker.next - self._plan.processes, finding)
            if worker.finished or left <= 0 or len(self._findings) >= MOST_FINDINGS or worker.next >= self._plan.first + self._plan.count:
                worker.finished = True
            else:
                worker.start(left)

    def _found(self, index: int, what: str) -> None:
        again = f"scripts/fuzz snippets --seed {self._plan.seed} --first {index} --count 1 --processes 1"
        self._findings.append({"index": index, "what": what, "again": again})

    def _show(self, done: int, seconds: float) -> None:
        if sys.stderr.isatty():
            width = 24
            filled = width * done // max(self._plan.count, 1)
            bar = "#" * filled + "." * (width - filled)
            print(f"\rfuzz: [{bar}] {done:,} of {self._plan.count:,} snippets, {seconds:.0f} s ", end="", file=sys.stderr, flush=True)


def child() -> int:
    """One process: arguments are those that _Worker.start passes."""
    faulthandler.enable()
    path, *numbers, seconds = sys.argv[1:]
    number, first, end, step, seed = (int(text) for text in numbers)
    progress = Progress(Path(path), number)
    exits: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    findings: list[tuple[int, str]] = []
    stop, parent = time.monotonic() + float(seconds), os.getppid()
    machine: Machine | None = None
    done = 0
    for index in range(first, end, step):
        if time.monotonic() > stop or len(findings) >= MOST_FINDINGS or os.getppid() != parent:
            break
        if machine is None:
            machine = Machine(ModelHost(), seed, progress.note)
        progress.begin(index, done)
        try:
            modes[machine.one(index)] += 1
        except Exception:
            findings.append((index, f"snippet {index}: {traceback.format_exc()}"))
        done += 1
        if done % SNIPPETS_PER_VM == 0 or findings:
            exits.update(machine.counts)
            machine.close()
            machine = None
    progress.begin(-1, done)
    if machine is not None:
        exits.update(machine.counts)
        machine.close()
    with open("/proc/self/statm", encoding="ascii") as file:
        rss = int(file.read().split()[1]) * 4 // 1024
    print(json.dumps({"exits": exits, "modes": modes, "findings": findings, "rss_mib": rss}))
    sys.stdout.flush()
    os._exit(0)
