"""One mutation on trial: `sevmm selftest` in a process of its own, with the mutation installed there and in its workers.

The verdict is the selftest's own: its exit status and its JSON. A trial that does not end in time is killed with all its processes;
that is no verdict, because a selftest has time limits of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[2]
CONTROL = ""
"""The name of the trial without a mutation."""

TEST_LIMIT, TRIAL_LIMIT = 20, 900
_CHILD = "import sys; sys.path[:0] = sys.argv[1:3]; from mutatelib.trial import child; sys.exit(child(sys.argv[3:]))"
_FAILED, _PR_SET_PDEATHSIG = 1, 1


@dataclass
class Verdict:
    """How a trial went: `noticed_by` are the tests that failed, with the first one's words in `text`; `error`: it was none."""

    name: str
    tests: int = 0
    noticed_by: list[str] = field(default_factory=list)
    text: str = ""
    error: str = ""
    elapsed_s: float = 0.0


class Trial:
    """A running trial. `poll` gives the verdict once there is one; `end` kills it."""

    def __init__(self, name: str, patterns: Sequence[str], jobs: int = 1) -> None:
        self.name = name
        self._began = time.monotonic()
        self._out, self._err = _scratch(), _scratch()
        arguments = [str(TREE), str(TREE / "scripts"), name, str(jobs), *patterns]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, *arguments], cwd=TREE, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err,
            start_new_session=True,
        )  # fmt: skip

    def poll(self) -> Verdict | None:
        """The verdict, None while it runs."""
        elapsed = time.monotonic() - self._began
        if self._process.poll() is None:
            if elapsed < TRIAL_LIMIT:
                return None
            self.end()
            return Verdict(self.name, error=f"did not end within {TRIAL_LIMIT} s", elapsed_s=elapsed)
        verdict = self._read()
        verdict.elapsed_s = elapsed
        self.end()
        return verdict

    def end(self) -> None:
        """Kill what is left of it. Safe to call twice."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._out.close()
        self._err.close()

    def _read(self) -> Verdict:
        words = _read(self._err).strip()
        try:
            report = json.loads(_read(self._out))
        except ValueError:
            return Verdict(self.name, error=f"sevmm selftest gave no report (exit status {self._process.returncode}): {words[-500:]}")
        return verdict(self.name, report, self._process.returncode, words)


def verdict(name: str, report: dict[str, Any], status: int, words: str = "") -> Verdict:
    """What the report of `sevmm selftest --json` and its exit status say."""
    tests = [test for test in report["tests"] if test["result"] != "skip"]
    failed = [test for test in tests if test["result"] == "fail"]
    found = Verdict(name, len(tests), [_name(test) for test in failed])
    broken = [test for test in failed if test["test"] == "import"]
    if broken:
        found.error = f"a suite could not be imported: {broken[0]['text']}"
    elif not tests:
        found.error = "no test could run: " + (report["tests"][0]["text"] if report["tests"] else "none was selected")
    elif bool(failed) != (status == _FAILED):
        found.error = f"exit status {status} with {len(failed)} failed tests: {words[-500:]}"
    if failed:
        found.text = _words(failed[0])
    return found


def _name(test: dict[str, Any]) -> str:
    case = test["type"] if test["dialect"] == "mainline" else f"{test['type']}-{test['dialect']}"
    return f"{test['suite']}.{test['test']}[{case}]"


def _words(test: dict[str, Any]) -> str:
    """The sentence that matters: that its time was over, the first failed subtest's, or the last line of the test's."""
    if test["timed_out"]:
        return str(test["text"]).split("\n")[0]
    for part in test["subtests"]:
        if part["result"] == "fail":
            return f"{part['name']}: {_line(part['text'])}"
    return _line(test["text"])


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _scratch() -> Any:
    import tempfile

    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(file: Any) -> str:
    file.seek(0)
    text: str = file.read()
    return text


def child(arguments: list[str]) -> int:
    """In the trial's process: install the mutation, run the command, give its report and its exit status."""
    import ctypes

    from mutatelib import hook

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the selftest's workers have the same
    name, jobs, *patterns = arguments
    if name != CONTROL:
        hook.install(name)
    from vmm.cli import main
    from vmm.selftests import worker

    if name != CONTROL:
        worker.START = hook.start(name, worker.START)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(["selftest", "--on", "model", "--json", "-j", jobs, "--timeout", str(TEST_LIMIT), *patterns])
    sys.stdout.write(out.getvalue())
    return status
