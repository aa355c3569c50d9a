"""The kernel's own KVM selftests, from the source that the lab's kernel is built from: build once, run inside, one table.

Each test's verdict is pass, skip (kselftest's status 4), fail, hang (over the limit) or crash (the machine ended with it). After a hang or
a crash the others go on in a fresh machine: what such a test leaves behind was seen to slow the next ones down to their limits.

Some tests cannot pass on TCG, whatever KVM does; LIMITS names them with the part of TCG that their message points at. They are shown, and
do not count as failures.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lablib import kernel, machine, packages, source
from lablib.cache import Result, Step, remove, write_json
from lablib.initrd import Job
from lablib.words import Failure, Progress, run_logged, say

RUNNER = Path(__file__).with_name("inside_selftests.py")
LIMIT = 240.0
"""Seconds per test; the slowest that passes (memslot_perf_test) takes about 160 on two cores."""

LIMITS = {
    "access_tracking_perf_test": "takes minutes under TCG",
    "hardware_disable_test": "its forks do not end under TCG",
    "mmu_stress_test": "its vCPUs do not meet in time under TCG",
    "rseq_test": "too few KVM_RUNs in time under TCG",
    "x86/dirty_log_page_splitting_test": "wants more huge pages than the lab has",
    "x86/debug_regs": "TCG's #DB and #BP under SVM",
    "x86/nested_exceptions_test": "TCG's exception error codes under SVM",
    "x86/hyperv_clock": "TCG's TSC",
    "x86/kvm_clock_test": "TCG's TSC",
    "x86/nested_tsc_adjust_test": "TCG's TSC",
    "x86/msrs_test": "TCG's SYSENTER MSRs are 64 bits wide",
    "x86/svm_nested_soft_inject_test": "TCG has no NRIPS",
}


class NoMatch(Failure):
    """A pattern that no test's name matches."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    test: str
    verdict: str
    seconds: float
    reason: str = ""

    @property
    def limited(self) -> bool:
        """Did not pass, and TCG is known to be why."""
        return self.verdict in {"fail", "hang", "crash"} and self.test in LIMITS

    @property
    def bad(self) -> bool:
        return self.verdict in {"fail", "hang", "crash"} and not self.limited

    def shown_reason(self) -> str:
        return f"[lab: {LIMITS[self.test]}] {self.reason}".strip() if self.limited else self.reason


def selftests_step(resolved: Result) -> Step:
    """The built tests of this source."""
    return Step("selftests", 1, {"package": str(resolved["package"]), "version": str(resolved["version"])})


def build(resolved: Result) -> Path:
    """The folder with the binaries, made when it is not there (about a minute, and the source's download)."""
    step = selftests_step(resolved)
    step.run(functools.partial(_build, step, resolved))
    return step.directory / "bin"


def _build(step: Step, resolved: Result, progress: Progress) -> Result:
    lacking = packages.missing("build", "selftests")
    if lacking:
        raise Failure(f"this machine lacks {', '.join(lacking)}\n{packages.how_to_get(lacking)}")
    tree = source.tree(resolved)
    output = step.directory / "build"
    output.mkdir(exist_ok=True)
    run_logged(kernel.make_command(tree, output, "headers"), step.log, progress)
    tests = output / "kvm"
    tests.mkdir(exist_ok=True)
    command = ["nice", "-n", "10", "make", "-C", str(tree / "tools/testing/selftests/kvm"), f"-j{os.cpu_count() or 1}", f"OUTPUT={tests}"]
    run_logged([*command, f"KHDR_INCLUDES=-isystem {output}/usr/include"], step.log, progress, count=r"^(gcc|cc|  CC) ", unit="files")
    partial = step.directory / "bin.partial"
    remove(partial)
    names = programs(tests)
    for name in names:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tests / name, partial / name)
    if not names:
        raise Failure(f"the build left no programs in {tests}; see {step.log}")
    run_logged(["strip", "--strip-debug", *(str(partial / name) for name in names)], step.log, progress)
    remove(step.directory / "bin")
    partial.rename(step.directory / "bin")
    remove(output)
    return {"tests": len(names)}


def programs(folder: Path) -> list[str]:
    """Relative paths of the executables in `folder`, sorted."""
    found = []
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place) / name
            if os.access(path, os.X_OK) and not name.endswith((".so", ".sh")):
                found.append(str(path.relative_to(folder)))
    return sorted(found)


def choose(names: list[str], patterns: list[str]) -> list[str]:
    """Those that match one of the patterns, with or without their folder; all without patterns. NoMatch where one matches nothing.

    >>> choose(["vm_types_test", "x86/smm_test"], ["smm*"])
    ['x86/smm_test']
    """
    if not patterns:
        return names
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.rpartition("/")[2], pattern)}
        if not matches:
            like = difflib.get_close_matches(pattern, {part for name in names for part in (name, name.rpartition("/")[2])}, n=3, cutoff=0.7)
            raise NoMatch(f"no selftest matches {pattern}; " + (f"did you mean {' or '.join(like)}?" if like else "--list has the names"))
        chosen |= matches
    return [name for name in names if name in chosen]


class Table:
    """Rows as they come, from the runner's lines: {"start": test} and {"test", "verdict", "seconds", "reason"}."""

    def __init__(self, show: Callable[[Row], object] = lambda _: None) -> None:
        self.rows: list[Row] = []
        self.running = ""
        self._show = show
        self._text = b""

    def take(self, data: bytes) -> None:
        """Bytes of the runner's output; lines that are not its own are ignored."""
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("start"), str):
                self.running = record["start"]
            elif isinstance(record, dict) and {"test", "verdict", "seconds"} <= record.keys():
                self.add(Row(str(record["test"]), str(record["verdict"]), float(record["seconds"]), str(record.get("reason", ""))))

    def add(self, row: Row) -> None:
        self.running = ""
        self.rows.append(row)
        self._show(row)

    def drop_partial_line(self) -> None:
        """A machine that ended may have left half a line."""
        self._text = b""

    def summary(self) -> str:
        """Counts in words: "5 pass, 1 fail (0 of them the lab's limits)"."""
        counts = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in ("pass", "fail", "hang", "crash", "skip")}
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "no tests"
        limited = sum(row.limited for row in self.rows)
        return words + (f"; {limited} that TCG cannot pass" if limited else "")

    def as_json(self) -> list[dict[str, object]]:
        return [{**asdict(row), "limit": LIMITS[row.test] if row.limited else None} for row in self.rows]


def keep(resolved: Result, rows: list[Row]) -> None:
    """Remember verdicts beside the binaries, for scripts/selftests-exec to show."""
    path = selftests_step(resolved).directory / "verdicts.json"
    write_json(path, {**kept(resolved), **{row.test: f"{row.verdict} {row.seconds:.1f}" for row in rows}})


def kept(resolved: Result) -> dict[str, str]:
    """What `keep` has remembered of these binaries: test -> "verdict seconds"."""
    try:
        found = json.loads((selftests_step(resolved).directory / "verdicts.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(test): str(line) for test, line in found.items()} if isinstance(found, dict) else {}


def show_row(row: Row) -> None:
    """One line on stdout."""
    print(f"{row.test:<44} {row.verdict:<5} {row.seconds:>7.1f} s  {row.shown_reason()}".rstrip(), flush=True)


def run(box: machine.Machine, folder: Path, names: list[str], limit: float, table: Table, interpreter: Path) -> None:
    """Run `names` in as few machines as their behaviour allows; the rows are in `table`."""
    left = list(names)
    environment = machine.checked_environment(folder, interpreter)
    while left:
        job = Job([str(interpreter), "-I", str(RUNNER), str(folder), str(limit), *left], "/", environment)
        streams = machine.Streams(None, table.take, lambda data: machine.write_all(2, data))
        before = len(table.rows)
        try:
            status = machine.run(box, job, streams, timeout=(limit + 60) * len(left))
        except Failure as failure:
            if not table.running:
                raise
            last = str(failure).splitlines()[-1].strip()
            table.add(Row(table.running, "crash", 0.0, f"the machine ended: {last}"))
            status = 0
        if status in {130, machine.TIMED_OUT}:
            raise KeyboardInterrupt if status == 130 else Failure("the selftests' runner did not end")
        table.drop_partial_line()
        done = {row.test for row in table.rows[before:]}
        if not done:
            raise Failure(f"the selftests' runner ended with status {status} and no result")
        left = [name for name in left if name not in done]
        if left:
            say(f"selftests: a fresh machine for the other {len(left)}")


def status_of(table: Table) -> int:
    """0 when nothing failed that could have passed."""
    sys.stdout.flush()
    return 1 if any(row.bad for row in table.rows) else 0
