"""Many indices in several processes that may die without taking the rest along: what `fuzz snippets` and `fuzz sev` share.

Each process works through every n-th index (`Turns`). It writes the index before its turn starts into a file that it shares
with its parent, so an index that ends the process (a crash of the engine) or never ends is known by its number; the process is
started again behind it. What a process has to say, its findings among it, is one JSON object on its stdout at the end.

The parent (`main`) reads the options, watches, adds up, and prints a summary as JSON on stdout; each finding goes to stderr with
the command that repeats it.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

TREE = Path(__file__).absolute().parents[2]
ENVIRONMENT = {**os.environ, "MALLOC_ARENA_MAX": "1"}
"""Of the processes: with an arena per thread, what the allocator keeps would look like a leak."""

INTERRUPTED = 130
_START = "import sys; sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]; "
_STATE = struct.Struct("<QQQ")  # index + 1 of the turn that runs, turns done, whether it is where `Subject.where` says
_LOOK = 0.1  # seconds


@dataclass(frozen=True)
class Subject:
    """What is fuzzed. `name`: the word behind scripts/fuzz; `unit` and `units`: what an index stands for; `child`: the code of a
    process; `hang`: seconds that one turn may take; `where`: words for (outside, inside) of what a process notes, in findings;
    `most`: findings after which no process is started again.
    """

    name: str
    unit: str
    units: str
    child: str
    hang: float
    most: int
    where: tuple[str, str] = ("", "")
    about: str = ""


@dataclass
class Plan:
    """What was asked for: indices [first, first + count), spread over processes. `more`: options of the subject's own, as they are
    passed to each process and stand in the command that repeats a finding.
    """

    count: int
    seed: int
    seconds: float
    processes: int
    first: int = 0
    more: dict[str, int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The index behind the last."""
        return self.first + self.count


class Seen(NamedTuple):
    """What a process is doing: index + 1 (0: nothing yet), turns done, the note."""

    index: int
    done: int
    noted: int


class Progress:
    """One process's place in the shared file."""

    def __init__(self, path: Path, number: int) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._at = number * _STATE.size

    def begin(self, index: int, done: int) -> None:
        """A turn starts; -1: none."""
        _STATE.pack_into(self._map, self._at, index + 1, done, 0)

    def note(self, inside: bool) -> None:
        """Where the turn is."""
        self._map[self._at + 16] = inside

    def read(self) -> Seen:
        """What it is doing now."""
        return Seen(*_STATE.unpack_from(self._map, self._at))


def positive(text: str) -> int:
    """An option's value: 1 or more, underscores allowed."""
    number = int(text.replace("_", ""))
    if number <= 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def options(subject: Subject, count: int) -> argparse.ArgumentParser:
    """The options of all subjects; `count` is the default for how many."""
    parser = argparse.ArgumentParser(prog=f"fuzz {subject.name}", description=f"{subject.about} JSON on stdout.")
    add = parser.add_argument
    add("--count", type=positive, default=count, metavar="N", help=f"how many {subject.units} ({count})")
    add("--seed", type=int, default=1, metavar="N", help="what the random choices begin with (1)")
    add("--first", type=int, default=0, metavar="N", help=f"index of the first {subject.unit} (0)")
    add("--seconds", type=float, default=3600.0, metavar="S", help="stop after this time (an hour)")
    add("--processes", type=positive, default=min(os.cpu_count() or 1, 8), metavar="N", help="one per processor, at most 8")
    return parser


def main(subject: Subject, plan: Plan, take: Callable[[dict[str, Any]], None], summary: Callable[[int, float], dict[str, Any]]) -> int:
    """Run it: `take` gets what each process said, `summary(done, seconds)` gives what is printed, to which seed, processes and findings
    are added. Exit status 0 when nothing was found, 1 when something was, 130 after Ctrl-C: then what running processes had to say is
    missing.
    """
    more = "".join(f" of {value}" for value in plan.more.values())
    print(f"fuzz: seed {plan.seed}, {plan.count:,} {subject.units}{more} in {plan.processes} processes", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    parent = _Parent(subject, plan, take)
    interrupted = False
    try:
        parent.run()
    except KeyboardInterrupt:
        interrupted = True
    done, seconds = parent.done, parent.seconds
    found = {"seed": plan.seed, "processes": plan.processes, **summary(done, seconds), "findings": parent.findings}
    print(json.dumps({subject.units: done, "seconds": round(seconds, 1), "interrupted": interrupted, **found}, indent=2))
    for finding in parent.findings:
        print(f"fuzz: FOUND {finding['what']}\nfuzz: again: {finding['again']}", file=sys.stderr)
    if interrupted:
        print("fuzz: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 1 if parent.findings else 0


class _Place:
    """One place for a process; it is filled again when the process dies."""

    def __init__(self, number: int, subject: Subject, plan: Plan, folder: Path) -> None:
        self._number, self._subject, self._plan, self._folder = number, subject, plan, folder
        self._next, self._earlier = plan.first + number, 0
        self.finished = self._next >= plan.end
        self.progress = Progress(folder / "state", number)
        self.process: subprocess.Popen[bytes] | None = None
        self._out, self._errors = (folder / f"{name}{number}" for name in ("out", "err"))

    def start(self, seconds: float) -> None:
        """A process for what is left, and for so long."""
        self.progress.begin(-1, 0)
        self._seen, self._since = Seen(0, 0, 0), time.monotonic()
        plan = self._plan
        numbers = (self._number, self._next, plan.end, plan.processes, plan.seed, *plan.more.values(), max(seconds, 0.1))
        arguments = [str(TREE), str(TREE / "scripts"), str(self._folder / "state"), *map(str, numbers)]
        with self._out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START + self._subject.child, *arguments], stdout=out, stderr=errors, cwd=TREE, env=ENVIRONMENT
            )

    def done(self) -> int:
        """Turns that this place has finished."""
        return self._earlier + self.progress.read().done

    def look(self) -> tuple[dict[str, Any] | None, int, str]:
        """(what the process said at its end, and if that was none: an index and a finding)."""
        assert self.process is not None
        now = self.progress.read()
        if now[:2] != self._seen[:2]:
            self._seen, self._since = now, time.monotonic()
        hung = time.monotonic() - self._since > self._subject.hang and self.process.poll() is None
        if hung:
            self.process.kill()
        status = self.process.wait() if hung else self.process.poll()
        if status is None:
            return None, 0, ""
        if status == 0:
            self.finished = True
            return json.loads(self._out.read_text()), 0, ""
        return None, *self._died(now, status, hung)

    def _died(self, now: Seen, status: int, hung: bool) -> tuple[int, str]:
        """The index in which it did, and how; the place goes on behind that."""
        self._earlier += now.done
        unit, said = self._subject.unit, self._errors.read_text(errors="replace")[-3000:]
        if not now.index:
            self.finished = True
            return self._next, f"the process ended with status {status} before its first {unit}\n{said}"
        self._next = now.index - 1 + self._plan.processes
        self.finished = self._next >= self._plan.end
        what = f"hangs for {self._subject.hang:.0f} s" if hung else f"ends the process with status {status}"
        where = self._subject.where[bool(now.noted)]
        return now.index - 1, f"{unit} {now.index - 1} {what}{where and f' {where}'}\n{said}"


class _Parent:
    """Starts the processes, watches them, and collects what they found."""

    def __init__(self, subject: Subject, plan: Plan, take: Callable[[dict[str, Any]], None]) -> None:
        self._subject, self._plan, self._take = subject, plan, take
        self.findings: list[dict[str, Any]] = []
        self.done, self.seconds = 0, 1e-9

    def run(self) -> None:
        """Until all is done; `done` turns in `seconds` then, and also where it ends before."""
        plan, start = self._plan, time.monotonic()
        with tempfile.TemporaryDirectory(prefix="sevmm-fuzz-") as name:
            (Path(name) / "state").write_bytes(bytes(_STATE.size * plan.processes))
            places = [_Place(number, self._subject, plan, Path(name)) for number in range(plan.processes)]
            try:
                for place in places:
                    if not place.finished:
                        place.start(plan.seconds)
                while not all(place.finished for place in places):
                    time.sleep(_LOOK)
                    for place in places:
                        if not place.finished:
                            self._look(place, plan.seconds - (time.monotonic() - start))
                    self._show(sum(place.done() for place in places), time.monotonic() - start)
            finally:
                for place in places:
                    if place.process is not None and place.process.poll() is None:
                        place.process.kill()
                        place.process.wait()
                self.done, self.seconds = sum(place.done() for place in places), time.monotonic() - start
                if sys.stderr.isatty():
                    print(file=sys.stderr)

    def _look(self, place: _Place, left: float) -> None:
        said, index, finding = place.look()
        if said is not None:
            self._take(said)
            for number, what in said["findings"]:
                self._found(number, what)
        if finding:
            self._found(index, finding)
            place.finished |= left <= 0 or len(self.findings) >= self._subject.most
            if not place.finished:
                place.start(left)

    def _found(self, index: int, what: str) -> None:
        more = "".join(f" --{name} {value}" for name, value in self._plan.more.items())
        again = f"scripts/fuzz {self._subject.name} --seed {self._plan.seed}{more} --first {index} --count 1 --processes 1"
        self.findings.append({"index": index, "what": what, "again": again})

    def _show(self, done: int, seconds: float) -> None:
        if sys.stderr.isatty():
            bar = ("#" * (24 * done // self._plan.count)).ljust(24, ".")
            words = f"{done:,} of {self._plan.count:,} {self._subject.units}, {seconds:.0f} s"
            print(f"\rfuzz: [{bar}] {words} ", end="", file=sys.stderr, flush=True)


class Turns:
    """The process's side: iterate over it for the indices of its turns, and `end`. Arguments are those that `_Place.start` passes.

    It stops when all is done, time is over, there are enough findings, or the parent has gone. `done`: turns before this one.
    """

    def __init__(self, most: int) -> None:
        faulthandler.enable()
        path, *numbers, seconds = sys.argv[1:]
        number, self._first, self._end, self._step, self.seed, *self.more = map(int, numbers)
        self._most, self._stop, self._parent = most, time.monotonic() + float(seconds), os.getppid()
        self.progress = Progress(Path(path), number)
        self.findings: list[tuple[int, str]] = []
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        for index in range(self._first, self._end, self._step):
            if time.monotonic() > self._stop or len(self.findings) >= self._most or os.getppid() != self._parent:
                break
            self.progress.begin(index, self.done)
            yield index
            self.done += 1

    def last(self, index: int) -> bool:
        """Is it the last one of this process?"""
        return index + self._step >= self._end

    def end(self, said: Callable[[], dict[str, Any]]) -> NoReturn:
        """The turns are over: close everything in `said`, whose dict goes to the parent."""
        self.progress.begin(-1, self.done)
        print(json.dumps({**said(), "findings": self.findings}))
        sys.stdout.flush()
        os._exit(0)
