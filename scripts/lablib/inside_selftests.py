"""Runs inside the lab: selftest binaries one after the other, a line of JSON before and after each.

    inside_selftests.py FOLDER LIMIT TEST...

Standard library only, so that it starts quickly. A test that is over its limit is reported as a hang and ends the run: the machine is then
the other side's to replace.

A test gets a session of its own, and ends by session: kselftest's harness puts its children into process groups of their own, so killing
the group of the test would leave them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

SKIP = 4
HUGE_PAGES = "64"
WORK_FOLDER = "/run/tmp"


def kill_session(leader: int) -> None:
    """SIGKILL to every process whose session is `leader`'s."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                os.kill(int(entry), signal.SIGKILL)
        except (OSError, IndexError, ValueError):
            continue  # it has ended meanwhile


def verdict_of(status: int) -> str:
    return {0: "pass", SKIP: "skip"}.get(status, "fail")


def reason_of(verdict: str, output: str) -> str:
    """The part of a test's output that says why it did not pass: the assertion, or what it requires; one line."""
    lines = [line.strip().removeprefix("1..0 # SKIP - ") for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith("Random seed:")]
    counts = tap_counts(lines)
    if verdict == "pass":
        return counts
    failed = next((number for number, line in enumerate(lines) if "Assertion Failure" in line), None)
    if failed is not None:
        # The assertion's own lines, without the process's numbers and the stack.
        noise = re.compile(r"^(\d+\s+(0x|\?\?)|\(stack|pid=)")
        chosen = [line for line in lines[failed + 1 : failed + 12] if not noise.match(line)][:3]
    else:
        speaking = [line for line in lines if re.search(r"skip|not ok|requir", line, re.IGNORECASE)]
        chosen = (speaking or lines)[-2:]
    return " | ".join([*chosen, *([counts] if counts else [])])[:300]


def tap_counts(lines: list[str]) -> str:
    """Such as "3 ok, 1 not ok" where a test speaks TAP; empty where it does not."""
    good = sum(line.startswith("ok ") for line in lines)
    bad = sum(line.startswith("not ok ") for line in lines)
    return f"{good} ok" + (f", {bad} not ok" if bad else "") if good or bad else ""


def run_one(folder: Path, name: str, limit: float) -> dict[str, object]:
    start = time.monotonic()
    path = folder / name
    process = subprocess.Popen(
        [str(path)], cwd=WORK_FOLDER, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        verdict = verdict_of(process.returncode)
    except subprocess.TimeoutExpired:
        verdict = "hang"
        kill_session(process.pid)
        try:
            output, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            output = b"does not die of SIGKILL"
    words = reason_of(verdict, output.decode(errors="replace"))
    if verdict == "fail":
        words = f"status {process.returncode}: {words}"
    return {"test": name, "verdict": verdict, "seconds": round(time.monotonic() - start, 1), "reason": words}


def say(record: dict[str, object]) -> None:
    print(json.dumps(record), flush=True)


def main() -> int:
    folder, limit, names = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    try:
        Path("/proc/sys/vm/nr_hugepages").write_text(HUGE_PAGES)
    except OSError:
        pass  # tests that want huge pages skip and say so
    for name in names:
        say({"start": name})
        try:
            record = run_one(folder, name, limit)
        except OSError as error:
            record = {"test": name, "verdict": "fail", "seconds": 0.0, "reason": f"cannot be started: {error.strerror}"}
        say(record)
        if record["verdict"] == "hang":
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
