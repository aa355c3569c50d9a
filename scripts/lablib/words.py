"""Progress and long commands: what a person sees while a step works, and what the log keeps.

On a terminal the last line is rewritten; elsewhere (CI) a line appears every half minute, so that a slow build is not taken for a dead one.
All words go to stderr: stdout belongs to the command that runs in the lab.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

HEARTBEAT = 30.0
"""Seconds between lines of progress where stderr is not a terminal."""


HELD: list[int] = []
"""Descriptors of locks. Commands get them too: should this process be killed, a lock holds until its command has ended as well."""


class Failure(Exception):
    """A step or the machine failed; the text says which, why and what to do."""


def say(text: str) -> None:
    """One line on stderr per line of `text`."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    for line in text.splitlines():
        print(f"{clear}lab: {line}", file=sys.stderr, flush=True)


class Progress:
    """One activity: `update` as often as one likes, `done` once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.start = self._spoken = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def update(self, text: str) -> None:
        now = time.monotonic()
        if self._terminal:
            if now - self._spoken >= 0.1:
                self._spoken = now
                width = max(20, shutil.get_terminal_size().columns - 1)
                line = f"lab: {self.name} {self.elapsed():.0f} s: {text}"[:width]
                print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif now - self._spoken >= HEARTBEAT:
            self._spoken = now
            say(f"{self.name} {self.elapsed():.0f} s: {text}")

    def done(self, text: str) -> None:
        say(f"{self.name}: {text} ({self.elapsed():.0f} s)")


def run_logged(
    command: list[str],
    log: Path,
    progress: Progress,
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    count: str = "",
    unit: str = "",
) -> None:
    """Run `command` with its output in `log` (appended); raise `Failure` with the last lines when it fails.

    `count`: lines that match this pattern are counted, and progress shows "N unit" instead of the last line. Ctrl-C ends the whole group.
    """
    pattern = re.compile(count) if count else None
    counted = 0
    last: deque[str] = deque(maxlen=200)
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            cwd=cwd, env={**os.environ, "LC_ALL": "C", **(env or {})}, start_new_session=True, pass_fds=tuple(HELD),
        )  # fmt: skip
        try:
            for line in process.stdout or ():
                out.write(line)
                last.append(line.rstrip())
                if pattern is not None and pattern.search(line):
                    counted += 1
                progress.update(f"{counted} {unit}" if pattern is not None else line.strip())
            status = process.wait()
        except BaseException:
            end_group(process)
            raise
    if status != 0:
        raise Failure(f"{Path(command[0]).name} ended with status {status}\n{why(list(last))}\nthe whole output: {log}")


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill the process and all that share its group, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def why(lines: list[str], most: int = 6) -> str:
    """The lines that name an error, with the one that came first on top; else the last ones."""
    errors = [line for line in lines if re.search(r"\berror\b|^E: |\*\*\*|No space left|fatal", line, re.IGNORECASE)]
    return "\n".join(f"  {line}" for line in (errors[:most] or lines[-most:]))
